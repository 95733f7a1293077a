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
Trains a small model of videos with UDM-GRPO: the embedded world that moves, on a CPU, in minutes.

    accelerate launch examples/train_video.py

The output folder then has `samples_before.gif` and `samples_after.gif`, with the same prompts and seeds,
`samples_before.png` and `samples_after.png`, the same videos frame by frame, `reward_curve.png`, `results.json` and
the trained model. `--help` lists all arguments.
"""

import json
import random
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import finish, load_pipeline, parse_arguments, show_progress


# isort: split
# After trl_udm, which imports them without looking for garbage
import torch
from datasets import Dataset
from diffusers.utils import make_image_grid as join_images
from PIL import Image
from trl import get_peft_config

from trl_udm import UDMGRPOTrainer, URSAPipeline
from trl_udm.cli.mistakes import mistakes_in_one_line
from trl_udm.evaluation.report import format_table, save_curves
from trl_udm.image_grid import make_image_grid
from trl_udm.worlds.moving import CHECKPOINT_PATH
from trl_udm.worlds.moving.benchmark import load_eval_rows
from trl_udm.worlds.moving.prompts import TAGS, TRAIN_NUM_PROMPTS, sample_scene, split_metadata
from trl_udm.worlds.moving.reward import MovingReward
from trl_udm.worlds.moving.world import NUM_FRAMES, render
from trl_udm.worlds.shapes.prompts import balance_metadata


@dataclass
class ScriptArguments:
    """Arguments of this script."""

    num_eval_videos: int = field(
        default=4, metadata={"help": "Videos per prompt in the evaluations before and after training."}
    )
    reward_mode: str = field(
        default="dense",
        metadata={"help": "Reward of the training: with partial credit or not.", "choices": ["dense", "strict"]},
    )


def draw_videos(trainer: UDMGRPOTrainer, rows: list[dict[str, Any]], **conditions: Any) -> list[list[Image.Image]]:
    """Draws a video for each row, with the same random numbers before and after training."""
    trainer.model.eval()
    return trainer.pipeline(
        [row["prompt"] for row in rows],
        num_inference_steps=trainer.args.num_inference_steps_eval,
        guidance_scale=trainer.args.guidance_scale_eval,
        generator=torch.Generator().manual_seed(trainer.args.seed),
        **trainer.args.pipeline_kwargs,
        **conditions,
    ).frames


def score_videos(rows: list[dict[str, Any]], videos: list[list[Image.Image]]) -> list[float]:
    """Says which videos are right, 1.0 or 0.0."""
    columns = {name: [row[name] for row in rows] for name in ("tag", "include")}
    return MovingReward(mode="strict")([row["prompt"] for row in rows], videos, **columns)


def evaluate_videos(trainer: UDMGRPOTrainer, num_videos: int, name: str) -> dict[str, float]:
    """
    Measures the share of right videos of the evaluation prompts by tag, and saves some of the videos. Those of
    `image_to_video` begin with the first frame of a scene that their prompt describes.
    """
    rows = [row for row in trainer.eval_dataset for _ in range(num_videos)]
    videos = draw_videos(trainer, rows)
    scores = score_videos(rows, videos)
    accuracy = {tag: [score for score, row in zip(scores, rows, strict=True) if row["tag"] == tag] for tag in TAGS}
    save_samples(Path(trainer.args.output_dir, f"samples_{name}"), rows[::num_videos], videos[::num_videos])

    rng = random.Random(0)
    rows = [row for row in trainer.eval_dataset if row["tag"] in ("direction", "speed", "two_object")]
    videos = draw_videos(trainer, rows, image=[render(sample_scene(row, rng))[0] for row in rows])
    accuracy |= {"overall": scores, "image_to_video": score_videos(rows, videos)}
    return {tag: statistics.fmean(scores) for tag, scores in accuracy.items()}


def save_samples(path: Path, rows: list[dict[str, Any]], videos: list[list[Image.Image]]) -> None:
    """Saves the first two videos of each tag: all beside each other in motion, and each with its frames in a row."""
    picked = [[i for i, row in enumerate(rows) if row["tag"] == tag][number] for number in (0, 1) for tag in TAGS]
    rows, videos = [rows[i] for i in picked], [videos[i] for i in picked]
    prompts, verdicts = [row["prompt"] for row in rows], [score == 1 for score in score_videos(rows, videos)]
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = (
        make_image_grid(list(frames), prompts, verdicts=verdicts, column_titles=list(TAGS), num_columns=len(TAGS))
        for frames in zip(*videos, strict=True)
    )
    first.save(path.with_suffix(".gif"), save_all=True, append_images=others, duration=250, loop=0)
    strips = [join_images(frames, rows=1, cols=len(frames)) for frames in videos]
    make_image_grid(strips, prompts, verdicts=verdicts, num_columns=2, tile_size=500).save(path.with_suffix(".png"))


def main(argv: list[str]) -> dict[str, Any]:
    with mistakes_in_one_line("train_video.py"):
        script_args, training_args, model_args = parse_arguments(ScriptArguments, argv, "moving.yaml")
        if training_args.pipeline_kwargs != (expected := {"num_frames": NUM_FRAMES}):
            raise ValueError(
                f"`pipeline_kwargs` must be {expected}, as in examples/configs/moving.yaml, got "
                f"{training_args.pipeline_kwargs}: the world's videos have {NUM_FRAMES} frames."
            )
        train_rows, _ = split_metadata()
        trainer = UDMGRPOTrainer(
            load_pipeline(URSAPipeline, model_args.model_name_or_path or CHECKPOINT_PATH, model_args),
            reward_funcs=MovingReward(mode=script_args.reward_mode),
            args=training_args,
            train_dataset=Dataset.from_list(balance_metadata(train_rows, TRAIN_NUM_PROMPTS)),
            eval_dataset=Dataset.from_list(load_eval_rows()),
            peft_config=get_peft_config(model_args),
        )
    show_progress(trainer)
    trainer.pipeline.set_progress_bar_config(disable=True)
    before = evaluate_videos(trainer, script_args.num_eval_videos, "before")
    output = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    after = evaluate_videos(trainer, script_args.num_eval_videos, "after")
    results = {
        "metric": "moving_accuracy",
        "before": before,
        "after": after,
        "seconds": output.metrics["train_runtime"],
    }
    output_dir = Path(training_args.output_dir)
    (output_dir / "results.json").write_text(json.dumps(results, indent=2))
    curves = {"reward": "reward", "strict accuracy": "moving/"}
    save_curves(output_dir / "reward_curve.png", trainer.state.log_history, curves)
    trainer.create_model_card()
    finish(trainer, f"Share of right videos; samples are in {output_dir}\n{format_table(before, after)}")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
