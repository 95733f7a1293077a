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

"""A training run with the same evaluation before and after it."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..trainer.udm_grpo_trainer import UDMGRPOTrainer
from .images import evaluate, get_reward_name
from .report import save_comparison, save_curves


def train_and_compare(
    trainer: UDMGRPOTrainer,
    reward_func: Callable,
    eval_rows: list[dict[str, Any]],
    num_images_per_prompt: int = 4,
    batch_size: int = 16,
    curves: dict[str, str] | None = None,
) -> dict[str, Any]:
    """
    Trains a model of images or videos. Evaluates it before and after, with the same prompts and seeds.

    The output folder then has:

    - the weights, and what was logged (`trainer_state.json`),
    - `samples_before.png` and `samples_after.png`, and `samples.png`, which shows the same prompts before and after,
      in `samples.gif` with videos that play,
    - `reward_curve.png`, `results.json`, and the model card, which shows them,
    - `before` and `after`, the folders of the two evaluations, as [`~trl_udm.evaluation.evaluate`] writes them.

    Args:
        trainer ([`UDMGRPOTrainer`]):
            Trainer of a model of images.
        reward_func (`Callable`):
            Reward function of the evaluation.
        eval_rows (`list[dict]`):
            Prompts, with what `reward_func` needs to know.
        num_images_per_prompt (`int`, *optional*, defaults to `4`):
            Images per prompt.
        batch_size (`int`, *optional*, defaults to `16`):
            Images that are drawn or scored at a time.
        curves (`dict[str, str]`, *optional*):
            Curves beside that of the reward, as in [`~trl_udm.evaluation.report.save_curves`].

    Returns:
        `dict`: The content of `results.json`: `metric`, the name of `reward_func`; `before` and `after`, its means by
        tag; and the `seconds` of training.

    Raises:
        ValueError: If FSDP shards the weights, and `batch_size` gives some processes more batches than others.
    """
    num_images, num_processes = len(eval_rows) * num_images_per_prompt, trainer.accelerator.num_processes
    valid_sizes = [size for size in range(1, num_images + 1) if -(-num_images // size) % num_processes == 0]
    if trainer.is_fsdp_enabled and batch_size not in valid_sizes:
        raise ValueError(
            f"`batch_size` must share {num_images} images out among {num_processes} processes in the same number of "
            f"batches each, because with FSDP all processes draw together, got {batch_size}. Nearest valid values: "
            f"{sorted(valid_sizes, key=lambda size: abs(size - batch_size))[:3]}."
        )
    args, output_dir = trainer.args, Path(trainer.args.output_dir)

    def evaluate_images(name: str) -> dict[str, float]:
        with _evaluation_mode(trainer), trainer._sampling():
            (summary,) = evaluate(
                [reward_func],
                output_dir / name,
                pipeline=trainer.pipeline,
                rows=eval_rows,
                batch_size=batch_size,
                overwrite=True,
                num_images_per_prompt=num_images_per_prompt,
                num_inference_steps=args.num_inference_steps_eval,
                guidance_scale=args.guidance_scale_eval,
                guidance_trunc=args.guidance_trunc,
                **(args.pipeline_kwargs or {}),
            ).values()
        return {tag: statistics["mean"] for tag, statistics in summary.items()}

    before, seconds, after = _train_between(trainer, evaluate_images)
    if trainer.accelerator.is_main_process:
        for name in ("before", "after"):
            shutil.copyfile(output_dir / name / "samples.png", output_dir / f"samples_{name}.png")
        save_comparison(output_dir / "samples.png", output_dir / "before", output_dir / "after")
    results = {"metric": get_reward_name(reward_func), "before": before, "after": after, "seconds": seconds}
    _save_results(trainer, results, curves)
    return results


def train_and_compare_texts(trainer: UDMGRPOTrainer, num_shown: int = 0) -> dict[str, Any]:
    """
    Trains a model of texts. Measures its mean reward on `trainer.eval_dataset` before and after, with the same seed.

    The output folder then has the weights, what was logged (`trainer_state.json`), `reward_curve.png`, `results.json`
    and the model card.

    Args:
        trainer ([`UDMGRPOTrainer`]):
            Trainer of a model of texts, with one evaluation dataset.
        num_shown (`int`, *optional*, defaults to `0`):
            Number of evaluation prompts whose completions are kept.

    Returns:
        `dict`: The content of `results.json`: the mean reward `before` and `after`. If completions are kept, also the
        `seconds` of training, and `completions`, a list of dictionaries with `prompt`, `before` and `after`.
    """
    args, prompts = trainer.args, trainer.eval_dataset[:num_shown]["prompt"]

    def evaluate_texts(_: str) -> tuple[float, list[str]]:
        with _evaluation_mode(trainer):
            reward = trainer.evaluate()["eval_reward"]
            if num_shown == 0:
                return reward, []
            with trainer._sampling(), torch.random.fork_rng():  # as `evaluate`, with random numbers of its own
                torch.manual_seed(args.seed)
                options = {"num_inference_steps": args.num_inference_steps_eval, **(args.pipeline_kwargs or {})}
                return reward, trainer.pipeline(prompts, **options).texts

    (before, texts_before), seconds, (after, texts_after) = _train_between(trainer, evaluate_texts)
    results: dict[str, Any] = {"before": before, "after": after}
    if num_shown > 0:
        results["seconds"] = seconds
        results["completions"] = [
            {"prompt": prompt, "before": text_before, "after": text_after}
            for prompt, text_before, text_after in zip(prompts, texts_before, texts_after, strict=True)
        ]
    _save_results(trainer, results)
    return results


@contextlib.contextmanager
def _evaluation_mode(trainer: UDMGRPOTrainer) -> Iterator[None]:
    was_training = trainer.model.training
    trainer.model.eval()
    try:
        yield
    finally:
        trainer.model.train(was_training)


def _train_between(trainer: UDMGRPOTrainer, evaluate_model: Callable[[str], Any]) -> tuple[Any, float, Any]:
    """Trains and saves between two evaluations. Returns the first, the seconds of training, and the second."""
    if trainer.accelerator.is_main_process:
        # Else the model card would show those of an earlier run
        for name in ("results.json", "samples.png", "samples.gif", "reward_curve.png"):
            Path(trainer.args.output_dir, name).unlink(missing_ok=True)
    before = evaluate_model("before")
    output = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    return before, output.metrics["train_runtime"], evaluate_model("after")


def _save_results(trainer: UDMGRPOTrainer, results: dict[str, Any], curves: dict[str, str] | None = None) -> None:
    if trainer.accelerator.is_main_process:
        output_dir = Path(trainer.args.output_dir)
        (output_dir / "results.json").write_text(json.dumps(results, indent=2))
        save_curves(output_dir / "reward_curve.png", trainer.state.log_history, {"reward": "reward", **(curves or {})})
        trainer.create_model_card()  # the one of `save_model` does not have the results yet
