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
Draw images of a benchmark's prompts, score them, and write a report.

The same command continues a run that was interrupted. Without a model, the images that are in the folder are scored;
they must lie as GenEval's own do. For several GPUs: accelerate launch -m trl_udm.cli evaluate ...
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.benchmarks import BENCHMARKS, make_reward
from ..rewards.loading import REWARD_NAMES
from .arguments import MODEL_HELP, SamplingArguments, load_pipeline
from .parser import check_output_dir


@dataclass(kw_only=True)
class Arguments(SamplingArguments):
    """
    Arguments of `trl-udm evaluate`.

    Args:
        > Parameters that control the benchmark

        benchmark (`str`):
            A key of `BENCHMARKS`.
        output_dir (`Path`):
            Folder of the images and the report.
        prompts (`str`, *optional*):
            File or Hub dataset of prompts, as [`~trl_udm.data.loading.load_prompts`] reads it. Embedded worlds have
            their own.
        rewards (`list[str]`, *optional*):
            Rewards that are measured in place of the benchmark's own: names of benchmarks that have one, of
            `REWARD_NAMES`, or any `"module:attribute"`.
        options (`dict[str, Any]`, *optional*, defaults to `{}`):
            Arguments of the reward's constructor. With `rewards`, a dictionary of them for each name.
        frames (`str`, *optional*):
            Frames of videos that the reward scores, as in [`FrameReward`]: `"first"`, `"middle"`, `"last"`, `"all"` or
            a number. By default it takes the videos.
        num_images_per_prompt (`int`, *optional*, defaults to `4`):
            Images a prompt.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to delete earlier images first, as is needed for new weights under an old name.

        > Parameters that control the model

        model (`str`, *optional*):
            As in [`SamplingArguments`]. Without one, the images in `output_dir` are scored.

        The others as in [`SamplingArguments`].
    """

    model: str | None = field(default=None, metadata={"help": MODEL_HELP})
    benchmark: str = field(metadata={"help": "What is measured.", "choices": sorted(BENCHMARKS)})
    output_dir: Path = field(metadata={"help": "Folder of the images and the report."})
    prompts: str | None = field(
        default=None, metadata={"help": "File or Hub dataset of prompts, such as evaluation_metadata.jsonl."}
    )
    rewards: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards that are measured in place of the benchmark's own: "
            f"{', '.join(sorted({*REWARD_NAMES, *(name for name in BENCHMARKS if BENCHMARKS[name].has_reward)}))}, "
            "or module:attribute."
        },
    )
    options: dict = field(
        default_factory=dict,
        metadata={
            "help": "Arguments of the reward's constructor, as a JSON object. With --rewards, an object with such an "
            "object for each name."
        },
    )
    frames: str | None = field(
        default=None, metadata={"help": "Frames of videos that are scored: first, middle, last, all or a number."}
    )
    num_images_per_prompt: int = field(default=4, metadata={"help": "Images a prompt."})
    overwrite: bool = field(default=False, metadata={"help": "Delete earlier images first, as for new weights."})


def run(arguments: Arguments) -> None:
    """
    Evaluates a model, or images, with [`~trl_udm.evaluation.evaluate`].

    Args:
        arguments ([`Arguments`]):
            What is measured, and on what.

    Raises:
        ValueError: If the benchmark is unknown, the prompts or rewards are missing, or a flag needs a model.
    """
    from accelerate import PartialState

    from ..evaluation import evaluate
    from ..reward_values import get_reward_name
    from ..rewards.frames import FrameReward

    if arguments.benchmark not in BENCHMARKS:  # a `--config` file is not checked against the choices
        raise ValueError(f"`--benchmark` must be one of {sorted(BENCHMARKS)}, got {arguments.benchmark!r}.")
    arguments.check()
    check_output_dir(arguments.output_dir)
    benchmark = BENCHMARKS[arguments.benchmark]
    pipeline = rows = settings = None
    if arguments.model is None:
        for name in ("prompts", "adapter", "overwrite"):
            if getattr(arguments, name):
                raise ValueError(f"`--{name}` needs `--model`: without one, the images in `--output_dir` are scored.")
    else:
        if benchmark.world is not None and benchmark.world.modality == "video" and (arguments.num_frames or 1) == 1:
            raise ValueError(f"`--benchmark {benchmark.name}` needs `--num_frames`: its reward looks at videos.")
        rows = benchmark.load_rows(arguments.prompts)
    names = arguments.rewards or [benchmark.name]
    if not benchmark.has_reward and arguments.rewards is None:
        raise ValueError(f"`--rewards` is needed for {benchmark.name}, which has none of its own.")
    if len(set(names)) != len(names):
        raise ValueError(f"`--rewards` must have names that differ, got {names}.")
    options = arguments.options if arguments.rewards else {benchmark.name: arguments.options}
    for name, value in options.items():
        if name not in names or not isinstance(value, dict):
            raise ValueError(
                f"`--options` must have an object for names of `--rewards`, {names}, got {value!r} for {name!r}."
            )
    rewards, reward_settings = [], {}
    for name in names:
        defaults = BENCHMARKS[name].reward_options if name in BENCHMARKS else {}
        settings_of_reward: dict[str, Any] = {"benchmark": name, "options": {**defaults, **options.get(name, {})}}
        reward = make_reward(name, settings_of_reward["options"])
        if arguments.frames is not None:
            frames: Any = int(arguments.frames) if arguments.frames.isdecimal() else arguments.frames
            reward = FrameReward(reward, frames)
            settings_of_reward["frames"] = frames
        rewards.append(reward)
        reward_settings[get_reward_name(reward)] = settings_of_reward
    if rows is not None:
        pipeline = load_pipeline(arguments, arguments.adapter)
        settings = {"model": arguments.model, "adapter": arguments.adapter, "dtype": str(pipeline.dtype)}
    evaluate(
        rewards,
        arguments.output_dir,
        pipeline,
        rows,
        num_images_per_prompt=arguments.num_images_per_prompt,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        settings=settings,
        reward_settings=reward_settings if arguments.rewards else settings_of_reward,
        overwrite=arguments.overwrite,
        **arguments.pipeline_kwargs,
    )
    if PartialState().is_main_process:
        print((arguments.output_dir / "results.md").read_text())
