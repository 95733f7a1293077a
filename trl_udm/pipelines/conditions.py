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

"""Conditions of videos: the frames that a sample begins with, from what users hand in to tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..models.frames import check_num_frames


class ConditionMixin:
    """
    Conditions of a pipeline of videos.

    Needs `vae`, `scheduler`, `_execution_device`, `_check_vae`, and the settings `vae_scale_factor` and
    `vae_temporal_scale_factor`.
    """

    scheduler: Any
    config: Any
    _execution_device: Any
    _check_vae: Any

    def prepare_condition(
        self,
        image: Any,
        video: Any,
        cond_latents: torch.Tensor | None,
        cond_indices: Sequence[int] | None,
        latent_shape: tuple[int, ...],
        num_prompts: int,
        is_kept: bool = True,
    ) -> Callable[[], torch.Tensor] | None:
        """
        Makes the `condition` of [`UDMPipeline.sample_tokens`]. Everything is checked, and nothing is encoded yet.

        Args:
            image, video, cond_latents, cond_indices:
                As in [`URSAPipeline.__call__`].
            latent_shape (`tuple[int, int, int]`):
                From `latent_shape`.
            num_prompts (`int`):
                Number of prompts.
            is_kept (`bool`, *optional*, defaults to `True`):
                Whether the condition stays in every step, so that it must leave a frame to draw.

        Returns:
            `Callable[[], torch.Tensor]`, *optional*: Encodes the condition, to a `torch.LongTensor` of shape `(1, N)`
            or `(num_prompts, N)` with the known tokens, and -1 for the others. `None` without a condition.

        Raises:
            TypeError: If a frame is of no known type.
            ValueError: If the condition does not fit the output.
        """
        conditions: dict[str, Any] = {"image": image, "video": video, "cond_latents": cond_latents}
        conditions = {name: value for name, value in conditions.items() if value is not None}
        if not conditions:
            if cond_indices is not None:
                raise ValueError(f"`cond_indices` must be None without a condition, got {cond_indices!r}.")
            return None
        if len(conditions) > 1:
            raise ValueError(
                f"`image`, `video` and `cond_latents` are one condition: give one of them, got {list(conditions)}."
            )
        ((name, value),) = conditions.items()
        stride = self.config.vae_temporal_scale_factor
        if stride is None:
            raise ValueError(f"`{name}` must be None, got one: the pipeline draws images. Load a model of videos.")
        if name == "cond_latents":
            self._check_latents(value, latent_shape)
            pixels, num_conditions, num_latents = None, value.shape[0], value.shape[1]
        else:
            vae = self._check_vae()
            height, width = (self.config.vae_scale_factor * size for size in latent_shape[1:])
            pixels = read_frames(name, _split_batch(name, value), height, width)  # (C, 3, T, H, W)
            num_conditions, num_frames = pixels.shape[0], pixels.shape[2]
            limit = 1 + (latent_shape[0] - 1) * stride
            check_num_frames(f"The number of frames of `{name}`", num_frames, stride, limit)
            num_latents = 1 + (num_frames - 1) // stride
        if num_conditions not in (1, num_prompts):
            raise ValueError(
                f"`{name}` must be one condition, or one for each of the {num_prompts} prompts, got {num_conditions}."
            )
        indices = list(range(num_latents)) if cond_indices is None else cond_indices
        is_list = isinstance(indices, (list, tuple)) and len(indices) > 0
        if not is_list or not all(type(index) is int and 0 <= index < num_latents for index in indices):
            raise ValueError(
                f"`cond_indices` must be a list of latent frames of the condition, in [0, {num_latents}), got "
                f"{indices}. Leave it out to take all of them."
            )
        if is_kept and len(set(indices)) == latent_shape[0]:
            num_frames = 1 + (latent_shape[0] - 1) * stride
            raise ValueError(
                f"`num_frames` must be above {num_frames} with this condition, which has all frames, so that none is "
                f"left to draw. Try {num_frames + stride}, or `condition='redraw'`."
            )

        def encode() -> torch.Tensor:
            tokens = value if pixels is None else vae.encode_to_ids(pixels.to(self._execution_device, vae.dtype))
            known = tokens.new_full((num_conditions, *latent_shape), -1)
            known[:, list(indices)] = tokens[:, list(indices)]
            return known.flatten(1)

        return encode

    @torch.no_grad()
    def encode_condition(self, rows: list[dict[str, Any]], latent_shape: tuple[int, ...]) -> torch.Tensor | None:
        """
        First frames of samples, from the columns `image` and `video` of a dataset.

        Args:
            rows (`list[dict]`):
                B rows. Those whose `image` and `video` are missing or `None` give nothing.
            latent_shape (`tuple[int, int, int]`):
                From `latent_shape`.

        Returns:
            `torch.LongTensor` of shape `(B, N)`, *optional*: The tokens of these frames, and -1 for the others. `None`
            if no row gives a frame, and for models of images, which have no use for the columns.

        Raises:
            TypeError: If a frame is of no known type.
            ValueError: If the frames do not fit the output.
        """
        if self.config.vae_temporal_scale_factor is None:
            return None
        conditions = [
            self.prepare_condition(row.get("image"), row.get("video"), None, None, latent_shape, num_prompts=1)
            for row in rows
        ]
        known = [None if encode is None else encode() for encode in conditions]
        given = next((tokens for tokens in known if tokens is not None), None)
        if given is None:
            return None
        return torch.cat([torch.full_like(given, -1) if tokens is None else tokens for tokens in known])

    def _check_latents(self, latents: Any, latent_shape: tuple[int, ...]) -> None:
        num_frames, *grid = latent_shape
        is_tensor = isinstance(latents, torch.Tensor) and latents.dtype == torch.long and latents.ndim == 4
        if not is_tensor or [*latents.shape[2:]] != grid or not 1 <= latents.shape[1] <= num_frames:
            what = f"{latents.dtype} of shape {tuple(latents.shape)}" if isinstance(latents, torch.Tensor) else latents
            raise ValueError(
                "`cond_latents` must be a `torch.long` tensor of shape (batch_size, num_latent_frames, "
                f"{grid[0]}, {grid[1]}), with at most {num_frames} latent frames, as the output, got {what}."
            )
        codebook_size = self.scheduler.config.codebook_size
        if latents.min() < 0 or latents.max() >= codebook_size:
            raise ValueError(
                f"`cond_latents` must have ids in [0, {codebook_size}), got ids from {latents.min().item()} to "
                f"{latents.max().item()}."
            )


def _split_batch(name: str, value: Any) -> list[Any]:
    """The frames of each sample, of one image or video or of a batch of them."""
    if name == "image":
        is_batch = isinstance(value, (list, tuple)) or _num_axes(value) == 4
        return [[image] for image in value] if is_batch else [[value]]
    if not isinstance(value, (list, tuple, np.ndarray, torch.Tensor)) or len(value) == 0 or _num_axes(value) == 3:
        raise ValueError(f"`video` must be frames, in a list or along the first axis, got {type(value).__name__}.")
    is_batch = isinstance(value[0], (list, tuple)) or _num_axes(value[0]) == 4
    return list(value) if is_batch else [value]


def _num_axes(value: Any) -> int | None:
    return getattr(value, "ndim", None)


def read_frames(name: str, videos: Sequence[Sequence[Any]], height: int, width: int) -> torch.Tensor:
    """
    Makes one tensor of videos.

    Args:
        name (`str`):
            Name of the argument, for the error message.
        videos (`list` of lists):
            Frames of each video: RGB images of PIL, arrays or tensors of shape `(height, width, 3)` or `(3, height,
            width)`, of `uint8` or of floats in `[0, 1]`.
        height (`int`):
            Height that they must have.
        width (`int`):
            Width that they must have.

    Returns:
        `torch.FloatTensor` of shape `(num_videos, 3, num_frames, height, width)`: Frames in `[-1, 1]`.

    Raises:
        TypeError: If a frame is none of these.
        ValueError: If a frame has another size, another mode or values out of range, or the videos differ in length.
    """
    lengths = sorted({len(frames) for frames in videos})
    if len(lengths) != 1 or lengths[0] == 0:
        raise ValueError(
            f"`{name}` must have one number of frames for all samples, got {lengths}. Cut the videos to the shortest "
            "one, or call the pipeline once for each number."
        )
    return torch.stack(
        [torch.stack([_read_frame(name, frame, height, width) for frame in frames], dim=1) for frames in videos]
    )


def _read_frame(name: str, frame: Any, height: int, width: int) -> torch.Tensor:
    if isinstance(frame, Image.Image):
        if frame.mode != "RGB":
            raise ValueError(f"`{name}` must be RGB, got mode {frame.mode!r}. Pass `image.convert('RGB')`.")
    if isinstance(frame, (Image.Image, np.ndarray)):
        frame = torch.from_numpy(np.array(frame))  # a copy, also of a flipped view
    if not isinstance(frame, torch.Tensor):
        raise TypeError(f"`{name}` must be made of PIL images, arrays or tensors, got {type(frame).__name__}.")
    if frame.shape == (height, width, 3):
        frame = frame.permute(2, 0, 1)
    if frame.shape != (3, height, width):
        raise ValueError(
            f"`{name}` must have the size of the output, {height} pixels high and {width} wide, and 3 channels, got "
            f"shape {tuple(frame.shape)}. Resize it, or pass its `height` and `width`."
        )
    if frame.dtype == torch.uint8:
        return (frame.float() - 127.5) / 127.5
    if not frame.is_floating_point() or not ((frame >= 0) & (frame <= 1)).all():
        raise ValueError(f"`{name}` must be `uint8`, or floats in [0, 1], got {frame.dtype} in another range.")
    return frame.float() * 2 - 1
