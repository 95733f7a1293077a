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

"""
Compute the memory that training needs on a GPU, stage by stage, from a model's configurations.

No weight is read, and no GPU is needed. The defaults are those of UDMGRPOConfig.
"""

import math
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from .arguments import ModelArguments
from .parser import check_range


@dataclass(kw_only=True)
class Arguments(ModelArguments):
    """
    Arguments of `trl-udm memory`.

    Args:
        > Parameters that control the model

        model (`str`):
            As in [`ModelArguments`]. No weight is read or downloaded. Published models need no network.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype of the weights.
        lora_r (`int`, *optional*, defaults to `0`):
            Rank of a new LoRA on all linear layers, or 0 for none.
        adapter (`str`, *optional*):
            Folder or Hub repository of an adapter to train further. Without it and a LoRA, all weights are trained.
        height (`int`, *optional*):
            Height of the images in pixels.
        width (`int`, *optional*):
            Width of the images in pixels.
        num_frames (`int`, *optional*):
            Number of frames, for videos.

        > Parameters that control training, as in [`UDMGRPOConfig`]

        gradient_accumulation_steps (`int`, *optional*):
            By default the fewest with which a step contains whole groups.
        every_n_layers (`int`, *optional*, defaults to `1`):
            One layer of every so many is recomputed, > 0.
        per_device_train_batch_size, rollout_batch_size, decode_batch_size, num_generations, num_train_timesteps,
        guidance_scale, beta, kl_estimator, ema_decay, bf16, activation_checkpointing (*optional*):
            With their defaults.

        > Parameters that control the comparison

        gpu_memory (`float`, *optional*):
            Memory of the GPU in GiB.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Dtype of the weights."}
    )
    lora_r: int = field(default=0, metadata={"help": "Rank of a new LoRA on all linear layers. 0 is none."})
    adapter: str | None = field(
        default=None, metadata={"help": "Folder or Hub repository of an adapter to train further."}
    )
    height: int | None = field(default=None, metadata={"help": "Pixels. By default the model's own height."})
    width: int | None = field(default=None, metadata={"help": "Pixels. By default the model's own width."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames of a video. By default images are drawn."})

    gradient_accumulation_steps: int | None = field(
        default=None, metadata={"help": "By default the fewest with which a step contains whole groups."}
    )
    every_n_layers: int = field(default=1, metadata={"help": "One layer of every so many is recomputed."})
    per_device_train_batch_size: int = field(
        default=24, metadata={"help": "Rows, which are (sample, timestep) pairs, per device and forward pass."}
    )
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Samples denoised together. By default all of a process."}
    )
    decode_batch_size: int | None = field(
        default=None, metadata={"help": "Samples decoded together. By default all that were denoised together."}
    )
    num_generations: int = field(default=8, metadata={"help": "Samples per prompt (G)."})
    num_train_timesteps: int = field(
        default=3, metadata={"help": "Consecutive steps (K) of the rollout's grid that a sample is trained on."}
    )
    guidance_scale: float = field(
        default=1.0, metadata={"help": "Weight of classifier-free guidance in rollouts. 1 is no guidance (CFG-Free)."}
    )
    beta: float = field(default=0.05, metadata={"help": "Weight of the KL divergence to the reference policy."})
    kl_estimator: Literal["k3", "full"] = field(
        default="k3", metadata={"help": "Of log-probabilities, or of distributions over the whole vocabulary."}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Decay per step of an average of the weights, in [0, 1). By default none."}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "Compute in bfloat16, the default.", "nargs": "?", "const": True}
    )
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute the layers, the default.", "nargs": "?", "const": True}
    )

    gpu_memory: float | None = field(default=None, metadata={"help": "Memory of the GPU in GiB, to compare with."})


def build_pipeline(model: str | Path, dtype: Any) -> Any:
    """
    Builds a pipeline without its weights. A folder goes before a published model of that name.

    Args:
        model (`str` or `Path`):
            Folder or Hub repository of a pipeline.
        dtype (`torch.dtype`):
            Dtype of its weights.

    Returns:
        [`URSAPipeline`] or [`FUDOKIPipeline`]: The pipeline.

    Raises:
        FileNotFoundError: If there is no such model.
    """
    from ..pipelines.image_families import PUBLISHED_NAMES, build_published_pipeline, find_image_pipeline_class

    if model in PUBLISHED_NAMES and not Path(model).is_dir():
        return build_published_pipeline(str(model), dtype)
    try:
        return find_image_pipeline_class(model).from_configs(model, dtype=dtype)
    except FileNotFoundError as error:
        if Path(model).is_dir():
            raise
        raise FileNotFoundError(f"{error} These need no network: {', '.join(PUBLISHED_NAMES)}.") from error


def run(arguments: Arguments) -> None:
    """
    Prints the memory that training needs on a GPU, computed by [`~trl_udm.estimate_memory`].

    Args:
        arguments ([`Arguments`]):
            The model and the run.

    Raises:
        ValueError: If a value is out of its range, or the batch does not contain whole groups.
    """
    import torch
    from peft import LoraConfig

    from ..memory import estimate_memory
    from ..trainer.udm_grpo_config import UDMGRPOConfig

    check_range(arguments, lora_r=(0, 2**31), every_n_layers=(1, math.inf), gpu_memory=(0, math.inf))
    check_range(arguments, per_device_train_batch_size=(1, math.inf), gradient_accumulation_steps=(1, math.inf))
    check_range(arguments, num_generations=(2, math.inf), num_train_timesteps=(1, math.inf))
    check_range(arguments, beta=(0, math.inf), guidance_scale=(-sys.float_info.max, sys.float_info.max))
    config_names = {config_field.name for config_field in fields(UDMGRPOConfig)}
    settings = {name: value for name, value in vars(arguments).items() if name in config_names}
    if arguments.gradient_accumulation_steps is None:
        group_rows = arguments.num_generations * arguments.num_train_timesteps
        num_rows = arguments.per_device_train_batch_size
        settings["gradient_accumulation_steps"] = group_rows // math.gcd(group_rows, num_rows)
    size = {name: getattr(arguments, name) for name in ("height", "width", "num_frames")}
    args = UDMGRPOConfig(
        "outputs",
        pipeline_kwargs={name: value for name, value in size.items() if value is not None},
        activation_checkpointing_kwargs={"every_n_layers": arguments.every_n_layers},
        use_cpu=True,  # this process needs no GPU
        report_to="none",
        **settings,
    )
    pipeline = build_pipeline(arguments.checkpoint_path, getattr(torch, arguments.dtype))
    peft_config = LoraConfig(r=arguments.lora_r, target_modules="all-linear") if arguments.lora_r else None
    estimate = estimate_memory(pipeline, args, peft_config)
    print("| computed, not measured | GiB |\n|---|---|")
    names = ("trained_weights", "frozen_weights", "reference_weights", "ema_weights", "optimizer_states", "gradients")
    for name in names:
        print(f"| {name.replace('_', ' ')} | {getattr(estimate, name) / 2**30:.2f} |")
    for stage, peak in estimate.stages.items():
        print(f"| peak of the {stage} | {peak / 2**30:.2f} |")
    print("Beside it: about 0.5 GiB of CUDA's context, fragmentation, and reward models.")
    if arguments.gpu_memory is not None:
        left = arguments.gpu_memory - 0.5 - estimate.peak / 2**30
        verdict = f"fits, {left:.1f} GiB are left" if left >= 0 else f"{-left:.1f} GiB too much"
        print(f"{arguments.gpu_memory:g} GiB: {verdict}.")
