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

"""A training run with an evaluation before and after it, for people to look at."""

import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import get_callable_name

from ..models.layers import without_checkpointing
from ..trainer.udm_grpo_trainer import UDMGRPOTrainer
from .images import evaluate


def train_and_compare(
    trainer: UDMGRPOTrainer,
    reward_func: Callable[..., list[float | None]],
    eval_rows: list[dict[str, Any]],
    num_images_per_prompt: int = 4,
    batch_size: int = 16,
    curves: dict[str, str] | None = None,
) -> dict[str, Any]:
    """
    Trains, and evaluates before and after with the same prompts and seeds.

    The output folder then has the weights, what was logged (`trainer_state.json`), `samples_before.png` and `samples_after.png`, `samples.png` with both, `reward_curve.png`,
    `results.json`, the model card with them, and in `before` and `after` everything that [`~trl_udm.evaluation.evaluate`] leaves.

    Args:
        trainer ([`UDMGRPOTrainer`]):
            The trainer, of images.
        reward_func (`Callable`):
            What is evaluated.
        eval_rows (`list[dict]`):
            Prompts with what `reward_func` needs to know.
        num_images_per_prompt (`int`, *optional*, defaults to `4`):
            Images a prompt.
        batch_size (`int`, *optional*, defaults to `16`):
            Images drawn or scored at a time.
        curves (`dict[str, str]`, *optional*):
            Further curves beside the reward's: from a label to the beginning of logged names, whose mean is shown.

    Returns:
        `dict`: What `results.json` holds: the `metric`'s name, its means by tag `before` and `after`, and `seconds` of training.

    Raises:
        `ValueError`: If FSDP shards the weights over processes, which must then draw equally often, and the batches cannot be
            shared out evenly.
    """
    num_images, num_processes = len(eval_rows) * num_images_per_prompt, trainer.accelerator.num_processes
    valid_sizes = [size for size in range(1, num_images + 1) if -(-num_images // size) % num_processes == 0]
    if trainer.is_fsdp_enabled and batch_size not in valid_sizes:
        raise ValueError(
            f"`batch_size` must share {num_images} images out among {num_processes} processes in equally many batches, "
            f"since with FSDP each of them holds a part of the weights, got {batch_size}. Nearest valid values: "
            f"{sorted(valid_sizes, key=lambda size: abs(size - batch_size))[:3]}."
        )
    output_dir = Path(trainer.args.output_dir)
    if trainer.accelerator.is_main_process:
        for name in ("results.json", "samples.png", "reward_curve.png"):  # else a card would show another run's
            (output_dir / name).unlink(missing_ok=True)

    def run(name: str) -> dict[str, float]:
        trainer.model.eval()
        with (
            without_checkpointing(trainer.model),
            unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator),
            trainer.accelerator.autocast(),
        ):
            (summary,) = evaluate(
                [reward_func],
                output_dir / name,
                pipeline=trainer.pipeline,
                rows=eval_rows,
                batch_size=batch_size,
                overwrite=True,
                num_images_per_prompt=num_images_per_prompt,
                num_inference_steps=trainer.args.num_inference_steps_eval,
                guidance_scale=trainer.args.guidance_scale_eval,
                guidance_trunc=trainer.args.guidance_trunc,
                **(trainer.args.pipeline_kwargs or {}),
            ).values()
        return {tag: statistics["mean"] for tag, statistics in summary.items()}

    before = run("before")
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    after = run("after")
    metric = get_callable_name(reward_func)
    results = {
        "metric": metric,
        "before": before,
        "after": after,
        "seconds": trainer.state.log_history[-1].get("train_runtime"),
    }
    if trainer.accelerator.is_main_process:
        for name in ("before", "after"):
            shutil.copyfile(output_dir / name / "samples.png", output_dir / f"samples_{name}.png")
        save_side_by_side(
            output_dir / "samples.png", output_dir / "samples_before.png", output_dir / "samples_after.png"
        )
        save_curves(output_dir / "reward_curve.png", trainer.state.log_history, {"reward": "reward", **(curves or {})})
        (output_dir / "results.json").write_text(json.dumps(results, indent=2))
        trainer.create_model_card()  # again, for it shows the results
    return results


def save_side_by_side(path: str | Path, before_path: str | Path, after_path: str | Path) -> None:
    """
    Puts two images of the same size side by side, under the words "before" and "after".

    Args:
        path (`str` or `Path`):
            The image to write.
        before_path (`str` or `Path`):
            The image on the left.
        after_path (`str` or `Path`):
            The image on the right.
    """
    header_height, gap = 20, 24
    with Image.open(before_path) as before, Image.open(after_path) as after:
        both = Image.new("RGB", (2 * before.width + gap, header_height + before.height), "white")
        draw = ImageDraw.Draw(both)
        for left, title, image in ((0, "before", before), (before.width + gap, "after", after)):
            draw.text((left + 2, 2), title, fill="black", font_size=14)
            both.paste(image, (left, header_height))
    both.save(path)


def save_curves(path: str | Path, log_history: list[dict[str, float]], curves: dict[str, str]) -> None:
    """
    Plots what was logged, and its running mean over a fifteenth of the run.

    Args:
        path (`str` or `Path`):
            The image to write.
        log_history (`list[dict[str, float]]`):
            `trainer.state.log_history`.
        curves (`dict[str, str]`):
            From a label to the beginning of logged names, whose mean is shown; the name itself where it is logged.
    """
    figure = Figure(figsize=(7, 4))
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for (label, prefix), color in zip(
        curves.items(), ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=False
    ):
        steps, values = [], []
        for log in log_history:
            logged = [log[prefix]] if prefix in log else [log[name] for name in log if name.startswith(prefix)]
            if "reward" in log and logged:
                steps.append(log["step"])
                values.append(statistics.fmean(logged))
        window = max(1, len(values) // 15)
        means = [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]
        axis.plot(steps, values, color=color, alpha=0.25)
        axis.plot(steps, means, color=color, label=label)
    axis.set(xlabel="step", ylabel="mean over the rollout's samples", title="UDM-GRPO")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def format_table(before: dict[str, float], after: dict[str, float]) -> str:
    """
    Lays two evaluations side by side.

    Args:
        before (`dict[str, float]`):
            From tag to mean.
        after (`dict[str, float]`):
            The same tags.

    Returns:
        `str`: A line a tag.
    """
    width = max(map(len, before))
    lines = [f"{'':<{width}} {'before':>7} {'after':>7}"]
    lines += [f"{name:<{width}} {before[name]:>7.3f} {after[name]:>7.3f}" for name in before]
    return "\n".join(lines)
