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
Evaluation of a model on a benchmark: draws images of every prompt, scores them, and reports the scores.

All files lie in one folder, in GenEval's layout. So an interrupted run can continue, and images made elsewhere can be
scored:

    00000/metadata.jsonl            the prompt and what the reward needs to know, one JSON object
    00000/samples/00000.png         the images of this prompt; videos are animated
    00000/scores_<reward>.json      their scores, the images' checksums, and what else the scores depend on
    settings.json                   how the images were drawn; missing where they were made elsewhere
    results.json, results.md, samples.png, and for videos samples.gif

[`evaluate`] takes all steps. The steps come first in this file, in their order.
"""

import asyncio
import inspect
import json
import math
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from tqdm.auto import tqdm

from ..cut_prompts import expect_prompts
from ..image_grid import Picture, load_picture, save_picture
from ..pipelines.original_checkpoint import load_json
from ..reward_values import get_reward_flag, get_reward_name, read_rewards
from .report import write_json, write_report


def generate_images(
    pipeline: DiffusionPipeline,
    rows: list[dict[str, Any]],
    output_dir: str | Path,
    num_images_per_prompt: int = 4,
    batch_size: int = 16,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    **pipeline_kwargs: Any,
) -> None:
    """
    Draws images or videos of prompts into a folder. The processes of `accelerate launch` share the work.

    Images that exist are not drawn again. Each batch has its own seed and always holds the same images. So the images
    do not depend on interruptions or on the number of processes.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The model.
        rows (`list[dict]`):
            The prompts: each row has a `prompt` and what the reward needs to know.
        output_dir (`str` or `Path`):
            The folder.
        num_images_per_prompt (`int`, *optional*, defaults to `4`):
            Images per prompt, > 0.
        batch_size (`int`, *optional*, defaults to `16`):
            Images that are drawn at a time, > 0. Another batch size gives other images.
        seed (`int`, *optional*, defaults to `0`):
            Seed, >= 0. The seeds of the batches are derived from it.
        settings (`dict[str, Any]`, *optional*):
            What else the images depend on, such as the name of the model. Kept in `settings.json`.
        pipeline_kwargs (`dict[str, Any]`):
            Arguments of the pipeline, such as `num_inference_steps`, `guidance_scale`, `height`, `width` and
            `num_frames`.

    Raises:
        ValueError: If a number is out of its range, or the folder holds images that belong to other settings or
        prompts,
            or that were made elsewhere.
    """
    output_dir, state = Path(output_dir), PartialState()
    for name, value in (("num_images_per_prompt", num_images_per_prompt), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` must be > 0, got {value}.")
    if not rows:
        raise ValueError("`rows` must have at least one row, got none.")
    settings = {
        **(settings or {}),
        "num_prompts": len(rows),
        "num_images_per_prompt": num_images_per_prompt,
        "batch_size": batch_size,
        "seed": seed,
        **pipeline_kwargs,
    }
    with state.main_process_first():
        folders = _prompt_folders(output_dir)
        if folders and not (output_dir / "settings.json").exists():
            raise ValueError(
                f"`output_dir` holds images that were made elsewhere: {folders[0]} has no settings.json beside it. "
                "Give another folder. To score these images, give no pipeline."
            )
        _check_or_write(output_dir / "settings.json", settings)
        for index, row in enumerate(rows):
            _check_or_write(output_dir / f"{index:05}" / "metadata.jsonl", row)

    samples = [(index, number) for index in range(len(rows)) for number in range(num_images_per_prompt)]
    batches = list(enumerate(range(0, len(samples), batch_size)))
    expect_prompts([row["prompt"] for row in rows], [pipeline])
    pipeline.set_progress_bar_config(disable=True)
    for batch_number, start in tqdm(
        batches[state.process_index :: state.num_processes],
        desc="Drawing",
        unit="batch",
        disable=not state.is_local_main_process,
    ):
        batch = samples[start : start + batch_size]
        paths = [output_dir / f"{index:05}" / "samples" / f"{number:05}.png" for index, number in batch]
        if all(path.exists() for path in paths):
            continue
        generator = torch.Generator().manual_seed(1_000_003 * seed + batch_number)
        prompts = [rows[index]["prompt"] for index, _ in batch]
        images = pipeline(prompts, generator=generator, **pipeline_kwargs).images
        for path, image in zip(paths, images, strict=True):
            path.parent.mkdir(exist_ok=True)
            partial_path = path.with_suffix(".partial")
            save_picture(partial_path, image)
            partial_path.replace(path)
    state.wait_for_everyone()


def score_images(
    images_dir: str | Path,
    reward_func: Callable,
    batch_size: int = 16,
    settings: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """
    Scores a folder of images. The processes of `accelerate launch` share the work.

    A prompt that has scores is scored again only if its images or the `settings` have changed, or if an image has no
    score: a judge that did not answer may do so now.

    Args:
        images_dir (`str` or `Path`):
            A folder in GenEval's layout, from [`generate_images`] or made elsewhere.
        reward_func (`Callable`):
            A reward function `f(prompts, completions, **columns)`, synchronous or not. The columns are the fields of
            `metadata.jsonl`. Animated images are videos, lists of frames. It computes in its own precision: autocast
            is off.
        batch_size (`int`, *optional*, defaults to `16`):
            Images that are scored at a time. The images of one prompt are always scored together, and by themselves
            if the reward is `groupwise`.
        settings (`dict[str, Any]`, *optional*):
            What else the scores depend on, such as the reward's options.

    Returns:
        `list[dict]`: For each image, in every process: `filename`, `prompt`, `tag` (`None` without one) and `score`
        (`None` where the reward abstained).

    Raises:
        ValueError: If the folder has no prompts, a prompt has no images, a score is not finite, or no image has one.
    """
    images_dir, state, name = Path(images_dir), PartialState(), get_reward_name(reward_func)
    folders = _prompt_folders(images_dir)
    if not folders:
        raise ValueError(f"`images_dir` must have folders like 00000 with a metadata.jsonl, got {images_dir}.")
    batch_size = 1 if get_reward_flag(reward_func, "groupwise") else batch_size
    groups: list[list] = [[]]
    for folder in folders:
        row = load_json(folder / "metadata.jsonl")
        if not isinstance(row.get("prompt"), str):
            raise ValueError(f"{folder / 'metadata.jsonl'} must have a `prompt`, got {row}.")
        paths = sorted(path for path in (folder / "samples").glob("*.png") if path.stem.isdigit())
        if not paths:
            raise ValueError(f"`images_dir` must have images of every prompt, got none in {folder / 'samples'}.")
        if groups[-1] and sum(len(paths) for _, _, paths in groups[-1]) + len(paths) > batch_size:
            groups.append([])
        groups[-1].append((folder, row, paths))
    expect_prompts([row["prompt"] for group in groups for _, row, _ in group], [reward_func])

    for group in tqdm(
        groups[state.process_index :: state.num_processes],
        desc=f"Scoring {name}",
        unit="batch",
        disable=not state.is_local_main_process,
    ):
        unscored = []
        for folder, row, paths in group:
            known = {
                "settings": json.loads(json.dumps(settings or {})),
                "checksums": {path.name: zlib.crc32(path.read_bytes()) for path in paths},
            }
            scores_path = folder / f"scores_{name}.json"
            found = load_json(scores_path) if scores_path.exists() else {}
            if {**found, **known} != found or None in found["scores"].values():
                unscored.append((scores_path, known, row, paths))
        if not unscored:
            continue
        rows = [row for _, _, row, paths in unscored for _ in paths]
        images = [load_picture(path) for _, _, _, paths in unscored for path in paths]
        scores = iter(_score(reward_func, rows, images))
        for scores_path, known, _, paths in unscored:
            write_json(scores_path, {**known, "scores": {path.name: next(scores) for path in paths}})
    state.wait_for_everyone()

    results = []
    for folder, row, paths in (entry for group in groups for entry in group):
        folder_scores = load_json(folder / f"scores_{name}.json")["scores"]
        for path in paths:
            results.append(
                {
                    "filename": path.relative_to(images_dir).as_posix(),
                    "prompt": row["prompt"],
                    "tag": row.get("tag"),
                    "score": folder_scores[path.name],
                }
            )
    if all(result["score"] is None for result in results):
        raise ValueError(f"'{name}' must give a number for at least one image, got None for all {len(results)}.")
    return results


def _score(reward_func: Callable, rows: list[dict[str, Any]], images: list[Picture]) -> list[float | None]:
    columns = {key: [row.get(key) for row in rows] for key in sorted({key for row in rows for key in row})}
    prompts = columns.pop("prompt")
    with torch.autocast(PartialState().device.type, enabled=False):
        scores = reward_func(prompts=prompts, completions=images, **columns)
        if inspect.iscoroutine(scores):
            scores = asyncio.run(scores)
    name = get_reward_name(reward_func)
    scores = read_rewards(name, scores, prompts)
    for prompt, score in zip(prompts, scores, strict=True):
        if score is not None and not math.isfinite(score):
            raise ValueError(f"'{name}' must give a number or None, got {score} for {prompt!r}.")
    return scores


def summarize(results: list[dict[str, Any]], num_resamples: int = 2000) -> dict[str, dict[str, float]]:
    """
    Mean score of each tag, with a 95 % confidence interval from the bootstrap over prompts.

    Images of one prompt are alike. So the bootstrap draws prompts, not images, with replacement within each tag. Rows
    with the same prompt count as one prompt. Images without a score are counted, and left out of all else. So is a tag
    that has no scores.

    Args:
        results (`list[dict]`):
            From [`score_images`].
        num_resamples (`int`, *optional*, defaults to `2000`):
            Number of resamples.

    Returns:
        `dict[str, dict]`: For each tag and for `"overall"`: `mean`, `low`, `high`, `num_prompts`, `num_images` and,
        where there are any, `num_abstained`: the number of further images that have no score. The overall mean is the
        mean of the tags' means, as in GenEval's score.
    """
    by_tag: dict[str, dict[str, list[float]]] = {}
    num_abstained = Counter(result["tag"] or "all" for result in results if result["score"] is None)
    for result in results:
        if result["score"] is not None:
            by_tag.setdefault(result["tag"] or "all", {}).setdefault(result["prompt"], []).append(result["score"])
    random = np.random.default_rng(0)
    summary, resampled_means = {}, []
    for tag, prompts in by_tag.items():
        totals = np.array([sum(scores) for scores in prompts.values()])
        counts = np.array([len(scores) for scores in prompts.values()])
        drawn = random.integers(len(prompts), size=(num_resamples, len(prompts)))
        resampled = totals[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
        resampled_means.append(resampled)
        sizes = (len(prompts), int(counts.sum()), num_abstained[tag])
        summary[tag] = _statistics(totals.sum() / counts.sum(), resampled, *sizes)
    num_prompts = sum(map(len, by_tag.values()))
    mean = float(np.mean([statistics["mean"] for statistics in summary.values()]))
    sizes = (num_prompts, len(results) - num_abstained.total(), num_abstained.total())
    summary["overall"] = _statistics(mean, np.mean(resampled_means, axis=0), *sizes)
    return summary


def _statistics(
    mean: float, resampled: np.ndarray, num_prompts: int, num_images: int, num_abstained: int
) -> dict[str, float]:
    low, high = np.quantile(resampled, (0.025, 0.975))
    statistics = {"mean": float(mean), "low": float(low), "high": float(high)}
    statistics |= {"num_prompts": num_prompts, "num_images": num_images}
    return statistics | ({"num_abstained": num_abstained} if num_abstained > 0 else {})


def evaluate(
    reward_funcs: Sequence[Callable],
    output_dir: str | Path,
    pipeline: DiffusionPipeline | None = None,
    rows: list[dict[str, Any]] | None = None,
    num_images_per_prompt: int = 4,
    batch_size: int = 16,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    reward_settings: dict[str, Any] | None = None,
    overwrite: bool = False,
    **pipeline_kwargs: Any,
) -> dict[str, dict[str, dict[str, float]]]:
    """
    Draws images of prompts, scores them, and writes a report. A second call continues after an interruption.

    First, one image is drawn in one step and scored. So a reward that cannot work fails at once.

    Args:
        reward_funcs (`list[Callable]`):
            Reward functions `f(prompts, completions, **columns)`, synchronous or not. Their names must differ.
        output_dir (`str` or `Path`):
            The folder for images and report.
        pipeline ([`~diffusers.DiffusionPipeline`], *optional*):
            The model. Without a model, the images in the folder are scored.
        rows (`list[dict]`, *optional*):
            The prompts, as in [`generate_images`]. Required with a pipeline.
        num_images_per_prompt (`int`, *optional*, defaults to `4`):
            Images per prompt, > 0.
        batch_size (`int`, *optional*, defaults to `16`):
            Images that are drawn or scored at a time.
        seed (`int`, *optional*, defaults to `0`):
            As in [`generate_images`].
        settings (`dict[str, Any]`, *optional*):
            As in [`generate_images`].
        reward_settings (`dict[str, Any]`, *optional*):
            The `settings` of [`score_images`], or a dictionary with those of each reward under its name.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to first delete the prompts, images and scores in the folder. Needed when the weights have changed.
        pipeline_kwargs (`dict[str, Any]`):
            As in [`generate_images`].

    Returns:
        `dict[str, dict]`: For each reward, what [`summarize`] returns.

    Raises:
        ValueError: If two rewards have the same name, and as in [`generate_images`] and [`score_images`].

    Example:

    ```python
    >>> from trl_udm import GenEvalReward, URSAPipeline
    >>> from trl_udm.evaluation import evaluate
    >>> from trl_udm.worlds.shapes import CHECKPOINT_PATH
    >>> from trl_udm.worlds.shapes.detector import ShapesColorClassifier, ShapesDetector
    >>> from trl_udm.worlds.shapes.prompts import split_metadata

    >>> summaries = evaluate(
    ...     [GenEvalReward(ShapesDetector(), ShapesColorClassifier())],
    ...     "evaluation",
    ...     pipeline=URSAPipeline.from_pretrained(CHECKPOINT_PATH),
    ...     rows=split_metadata()[1][:4],
    ...     num_images_per_prompt=1,
    ...     num_inference_steps=10,
    ...     guidance_scale=1.0,
    ... )
    ```
    """
    names = [get_reward_name(reward_func) for reward_func in reward_funcs]
    if len(set(names)) != len(names):
        raise ValueError(f"`reward_funcs` must have names that differ, got {names}. Set `__name__` of one.")
    if pipeline is not None:
        if not rows:
            raise ValueError("`rows` must have at least one row, got none.")
        expect_prompts([row["prompt"] for row in rows], [pipeline, *reward_funcs])
        num_steps = min(1, pipeline_kwargs.get("num_inference_steps", 1))  # fewer are refused by the pipeline
        generator = torch.Generator().manual_seed(seed)
        trial_kwargs = {**pipeline_kwargs, "num_inference_steps": num_steps, "generator": generator}
        images = pipeline([rows[0]["prompt"]], **trial_kwargs).images
        for reward_func in reward_funcs:
            _score(reward_func, rows[:1], images)
        with PartialState().main_process_first():
            if overwrite and PartialState().is_main_process:
                for folder in _prompt_folders(Path(output_dir)):
                    shutil.rmtree(folder)
                (Path(output_dir) / "settings.json").unlink(missing_ok=True)
        generate_images(
            pipeline, rows, output_dir, num_images_per_prompt, batch_size, seed, settings, **pipeline_kwargs
        )
    settings_of = reward_settings or {}
    results = {
        name: score_images(output_dir, reward_func, batch_size, settings_of.get(name, settings_of))
        for name, reward_func in zip(names, reward_funcs, strict=True)
    }
    summaries = {name: summarize(rewards) for name, rewards in results.items()}
    if PartialState().is_main_process:
        write_report(output_dir, summaries, results, reward_settings)
    return summaries


def _prompt_folders(images_dir: Path) -> list[Path]:
    return sorted(path.parent for path in images_dir.glob("*/metadata.jsonl") if path.parent.name.isdigit())


def _check_or_write(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object. If the file exists, it must hold the same object."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, value)
        return
    found, value = load_json(path), json.loads(json.dumps(value))
    for name in sorted({*found, *value}):
        if found.get(name) != value.get(name):
            raise ValueError(
                f"`output_dir` holds another run: {path} has {name}={found.get(name)!r}, got {value.get(name)!r}. "
                "Give another folder. To continue that run, give its arguments."
            )
