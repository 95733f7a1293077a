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

"""The arguments that verbs share, and the pipeline that they describe."""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..worlds import VISUAL_WORLDS
from .parser import check_range


MODEL_HELP = f"Folder or Hub repository of a pipeline, or an embedded world: {', '.join(VISUAL_WORLDS)}."


@dataclass(kw_only=True)
class ModelArguments:
    """
    The model.

    Args:
        model (`str`):
            Folder or Hub repository of a pipeline, or the name of an embedded world of images or videos.
        dtype (`str`, *optional*):
            Dtype of the weights: `"float32"`, `"bfloat16"` or `"float16"`. By default bfloat16 on a GPU and float32 on
            a CPU.
    """

    model: str = field(metadata={"help": MODEL_HELP})
    dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "Dtype of the weights. By default bfloat16 on a GPU and float32 on a CPU."}
    )

    @property
    def checkpoint_path(self) -> str | Path:
        """`str` or `Path`: Where the pipeline is."""
        return VISUAL_WORLDS[self.model].checkpoint_path if self.model in VISUAL_WORLDS else self.model


@dataclass(kw_only=True)
class SamplingArguments(ModelArguments):
    """
    The model, and how images or videos are drawn. What is `None` is the model's own.

    Args:
        adapter (`str`, *optional*):
            Folder or Hub repository of a PEFT adapter.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the images.
        height (`int`, *optional*):
            Height of the images in pixels.
        width (`int`, *optional*):
            Width of the images in pixels.
        num_frames (`int`, *optional*):
            Number of frames, for videos.
        num_inference_steps (`int`, *optional*, defaults to `25`):
            Denoising steps, as `num_inference_steps_eval` of [`UDMGRPOConfig`].
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            Weight of classifier-free guidance, as `guidance_scale_eval` of [`UDMGRPOConfig`].
        num_images_per_prompt (`int`, *optional*, defaults to `1`):
            Images a prompt.
        batch_size (`int`, *optional*, defaults to `16`):
            How many are drawn at a time: images of an evaluation, prompts otherwise.
    """

    adapter: str | None = field(default=None, metadata={"help": "Folder or Hub repository of a PEFT adapter."})
    seed: int = field(default=0, metadata={"help": "Seed of the images."})
    height: int | None = field(default=None, metadata={"help": "Pixels. By default the model's own height."})
    width: int | None = field(default=None, metadata={"help": "Pixels. By default the model's own width."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames of a video. By default images are drawn."})
    num_inference_steps: int = field(default=25, metadata={"help": "Denoising steps."})
    guidance_scale: float = field(
        default=1.0, metadata={"help": "Weight of classifier-free guidance. 1 is no guidance."}
    )
    num_images_per_prompt: int = field(default=1, metadata={"help": "Images a prompt."})
    batch_size: int = field(
        default=16, metadata={"help": "How many are drawn at a time: images of an evaluation, prompts otherwise."}
    )

    def check(self) -> None:
        """Raises a `ValueError` if a number is out of its range."""
        names = ("height", "width", "num_frames", "num_inference_steps", "num_images_per_prompt", "batch_size")
        check_range(self, seed=(0, 2**63 - 1), **dict.fromkeys(names, (1, math.inf)))
        check_range(self, guidance_scale=(-sys.float_info.max, sys.float_info.max))

    @property
    def pipeline_kwargs(self) -> dict[str, Any]:
        """`dict[str, Any]`: Arguments of a call of the pipeline."""
        names = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def load_pipeline(arguments: ModelArguments, adapter: str | None = None, pipeline_class: Any = None) -> Any:
    """
    Loads a pipeline onto the device of the process.

    Args:
        arguments ([`ModelArguments`]):
            The model.
        adapter (`str`, *optional*):
            Folder or Hub repository of a PEFT adapter.
        pipeline_class (`type[UDMPipeline]`, *optional*):
            Class of the pipeline. By default that of the model, [`URSAPipeline`] or [`FUDOKIPipeline`].

    Returns:
        [`UDMPipeline`]: The pipeline.
    """
    import torch
    from accelerate import PartialState

    from ..pipelines.image_families import find_image_pipeline_class

    path = arguments.checkpoint_path
    pipeline_class = pipeline_class or find_image_pipeline_class(path)
    weights = None
    if adapter is not None:
        weights = pipeline_class.read_adapter(adapter)  # a mistake is told before a large model is loaded
    size = {name: getattr(arguments, name, None) for name in ("height", "width", "num_frames")}
    size = {name: value for name, value in size.items() if value is not None}
    if size:
        pipeline_class.from_configs(path).latent_shape(**size)
    device = PartialState().device
    dtype = arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    pipeline = pipeline_class.from_pretrained(path, dtype=getattr(torch, dtype))
    if weights is not None:
        pipeline.load_lora_weights(weights)
    return pipeline.to(device)
