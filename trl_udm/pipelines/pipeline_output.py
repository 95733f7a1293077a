# Copyright 2026 The trl-udm authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import PIL.Image
import torch
from diffusers.utils.outputs import BaseOutput


Images = TypeVar("Images", list[PIL.Image.Image], np.ndarray, torch.Tensor)
Texts = TypeVar("Texts", list[str], torch.Tensor)


@dataclass
class UDMTrajectory(BaseOutput):
    """
    The states of a sampler in S steps.

    Args:
        timesteps (`torch.LongTensor` of shape `(S,)`):
            Step indices, as `scheduler.timesteps` has them.
        noised_samples (`torch.LongTensor` of shape `(S, batch_size, num_tokens)`):
            The state x_t before each step. The first is uniform noise.
        pred_original_samples (`torch.LongTensor` of shape `(S, batch_size, num_tokens)`):
            The clean tokens x₁ drawn in each step. The last are the sample. With several draws a step, the first of
            which it uses, they have a last dimension.
    """

    timesteps: torch.Tensor
    noised_samples: torch.Tensor
    pred_original_samples: torch.Tensor


@dataclass
class UDMSamplerOutput(BaseOutput):
    """
    Output of [`UDMPipeline.sample_tokens`].

    Args:
        clean_samples (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
            The final tokens x̂₁, in `[0, codebook_size)`.
        trajectory ([`UDMTrajectory`], *optional*):
            The states of the sampler, with `return_trajectory=True`.
        condition (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
            The tokens that were given and kept, and -1 for those that were drawn.
    """

    clean_samples: torch.Tensor
    trajectory: UDMTrajectory | None = None
    condition: torch.Tensor | None = None

    @property
    def drawn_samples(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(batch_size, num_tokens)`: The drawn tokens, and -1 for the given ones."""
        return self.clean_samples if self.condition is None else self.clean_samples.where(self.condition < 0, -1)

    @classmethod
    def cat(cls, outputs: "list[UDMSamplerOutput]", dim: int = 0) -> "UDMSamplerOutput":
        """Joins outputs of the same sampler along the batch, or with `dim=1` along the tokens."""
        trajectory = None
        if outputs[0].trajectory is not None:
            trajectories = [output.trajectory for output in outputs if output.trajectory is not None]
            trajectory = UDMTrajectory(
                timesteps=trajectories[0].timesteps,
                noised_samples=torch.cat([each.noised_samples for each in trajectories], dim=dim + 1),
                pred_original_samples=torch.cat([each.pred_original_samples for each in trajectories], dim=dim + 1),
            )
        conditions = [output.condition for output in outputs if output.condition is not None]
        return cls(
            clean_samples=torch.cat([output.clean_samples for output in outputs], dim),
            trajectory=trajectory,
            condition=torch.cat(conditions, dim) if conditions else None,
        )


@dataclass
class URSAPipelineOutput(BaseOutput, Generic[Images]):
    """
    Output of [`URSAPipeline`] and [`FUDOKIPipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            What `output_type` asks for: PIL images (`"pil"`), floats in `[0, 1]` of shape `(batch_size, height, width,
            3)` (`"np"`) or `(batch_size, 3, height, width)` (`"pt"`), or token ids of shape `(batch_size,
            *latent_shape)` (`"latent"`). With more than one frame, `"pil"` is a list of frames for each sample, and
            arrays and tensors have the frames as their second axis.
        trajectory ([`UDMTrajectory`], *optional*):
            The states of the sampler, with `return_trajectory=True`.
    """

    images: Images
    trajectory: UDMTrajectory | None = None

    @property
    def frames(self) -> Any:
        """The same as `images`, by the name that diffusers' pipelines of videos have: `frames[0]` is a video."""
        return self.images


@dataclass
class TextUDMPipelineOutput(BaseOutput, Generic[Texts]):
    """
    Output of [`TextUDMPipeline`].

    Args:
        texts (`list[str]` or `torch.LongTensor`):
            What `output_type` asks for: the completions (`"text"`), or token ids of shape `(batch_size, num_tokens)`
            (`"latent"`).
        trajectory ([`UDMTrajectory`], *optional*):
            The states of the sampler, with `return_trajectory=True`.
    """

    texts: Texts
    trajectory: UDMTrajectory | None = None
