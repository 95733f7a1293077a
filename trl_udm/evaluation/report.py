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

"""Reports: tables, grids of images, and curves."""

import json
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..drawing import open_figure
from ..image_grid import Picture, load_picture, make_image_grid, save_animation


TAG_TITLES = {"two_object": "two objects", "color_attr": "color attribution"}
"""Titles of GenEval's tags that are not words."""

MIN_PROMPTS = 3
"""Fewer prompts of a tag have no interval: drawing them anew says nothing about others."""


def write_report(
    output_dir: str | Path,
    summaries: dict[str, dict[str, dict[str, float]]],
    results: dict[str, list[dict[str, Any]]],
    reward_settings: dict[str, Any] | None = None,
) -> str:
    """
    Writes `results.json`, `results.md` and `samples.png` into the folder of the images.

    The tables have no interval (`n/a`) for a tag of fewer than three prompts, or whose scores are all equal. The
    overall score has none if a tag has fewer than three prompts.

    Args:
        output_dir (`str` or `Path`):
            The folder.
        summaries (`dict[str, dict]`):
            For each reward, what [`~trl_udm.evaluation.summarize`] returned.
        results (`dict[str, list[dict]]`):
            For each reward, what [`~trl_udm.evaluation.score_images`] returned.
        reward_settings (`dict[str, Any]`, *optional*):
            What else the scores depend on.

    Returns:
        `str`: The tables of `results.md`.
    """
    output_dir = Path(output_dir)
    settings_path = output_dir / "settings.json"
    settings = json.loads(settings_path.read_text()) if settings_path.exists() else {}
    report = {
        "settings": settings,
        "reward_settings": reward_settings or {},
        "summaries": summaries,
        "results": results,
    }
    write_json(output_dir / "results.json", report, indent=2)
    lines = []
    for name, summary in summaries.items():
        lines += [f"| {name} | mean | 95 % interval | prompts | images |", "|---|---|---|---|---|"]
        fewest = min(row["num_prompts"] for row in summary.values())
        for tag, row in summary.items():
            num_prompts = fewest if tag == "overall" else row["num_prompts"]
            # Equal scores have an interval of no width, which says nothing about others either
            is_known = num_prompts >= MIN_PROMPTS and row["low"] < row["high"]
            interval = f"{row['low']:.3f} to {row['high']:.3f}" if is_known else "n/a"
            tag = tag.replace("|", r"\|")  # which would begin a column
            lines.append(f"| {tag} | {row['mean']:.3f} | {interval} | {row['num_prompts']} | {row['num_images']} |")
        if num_abstained := summary["overall"].get("num_abstained", 0):
            num_images = num_abstained + summary["overall"]["num_images"]
            lines += ["", f"{num_abstained} of {num_images} images have no score: {name} abstained."]
        lines.append("")
    tables = "\n".join(lines)
    (output_dir / "results.md").write_text(tables)

    images = _list_images(output_dir, results)
    rows, titles = _pick_images(images, num_lines=4)
    _save_page_grid(output_dir / "samples.png", rows, images, titles)
    return tables


def save_comparison(path: str | Path, before_dir: str | Path, after_dir: str | Path) -> None:
    """
    Shows the same prompts in two evaluations, the images before training above those after it.

    If all scores of a reward are 0 or 1, it says which images are right, and they have frames. Else the scores stand
    under the images.

    Args:
        path (`str` or `Path`):
            The image to write.
        before_dir (`str` or `Path`):
            Folder of the first evaluation, as [`write_report`] leaves it.
        after_dir (`str` or `Path`):
            Folder of the second one, with the same prompts and as many images.
    """
    before, after = (
        _list_images(Path(folder), json.loads(Path(folder, "results.json").read_text())["results"])
        for folder in (before_dir, after_dir)
    )
    lines, titles = _pick_images(after, num_lines=2)
    counterparts = {image.path: replace(other, prompt="") for image, other in zip(after, before, strict=True)}
    rows = [row for line in lines for row in ([counterparts[image.path] for image in line], line)]
    _save_page_grid(path, rows, before + after, titles, ["before", "after"] * len(lines))


@dataclass
class _ScoredImage:
    path: Path
    prompt: str
    tag: str | None
    scores: tuple[float, ...]  # one of each reward, NaN where it abstained


def _list_images(folder: Path, results: dict[str, list[dict[str, Any]]]) -> list[_ScoredImage]:
    return [
        _ScoredImage(folder / row["filename"], row["prompt"], row["tag"], tuple(map(_read_score, rows)))
        for rows in zip(*results.values(), strict=True)
        for row in rows[:1]
    ]


def _read_score(row: dict[str, Any]) -> float:
    return math.nan if row["score"] is None else row["score"]


def _pick_images(images: list[_ScoredImage], num_lines: int) -> tuple[list[list[_ScoredImage]], list[str] | None]:
    """
    Picks the first image of some prompts, in lines of equal length. Of several tags, each is a column with a title.
    Else the prompts come from the whole benchmark, in up to six columns.
    """
    folders = [image.path.parents[1] for image in images]
    first = [image for i, image in enumerate(images) if i == 0 or folders[i] != folders[i - 1]]
    tags = list(dict.fromkeys(image.tag for image in first))
    if len(tags) > 1:
        columns = [[image for image in first if image.tag == tag][:num_lines] for tag in tags]
        titles = [TAG_TITLES.get(str(tag), str(tag).replace("_", " ")) for tag in tags]
        return [list(line) for line in zip(*columns, strict=False)], titles
    num_columns = min(len(first), 6)
    num_lines = min(num_lines, len(first) // num_columns)
    picked = first[:: len(first) // (num_columns * num_lines)]
    return [picked[i * num_columns :][:num_columns] for i in range(num_lines)], None


def _save_page_grid(
    path: str | Path,
    lines: list[list[_ScoredImage]],
    all_images: list[_ScoredImage],
    titles: list[str] | None,
    row_titles: list[str] | None = None,
) -> None:
    """Saves a grid that is legible where a page shows six columns in 830 pixels. If there are videos, also as GIF."""
    shown, num_rewards = [image for line in lines for image in line], len(all_images[0].scores)
    judges = [i for i in range(num_rewards) if all(image.scores[i] in (0, 1) for image in all_images)]

    def make_grid(pictures: list[Picture]) -> Image.Image:
        return make_image_grid(
            pictures,
            [image.prompt for image in shown],
            None if judges and num_rewards == 1 else [image.scores for image in shown],
            num_columns=len(lines[0]),
            tile_size=232,
            font_size=24,
            verdicts=[image.scores[judges[0]] == 1 for image in shown] if judges else None,
            column_titles=titles,
            row_titles=row_titles,
        )

    pictures = [load_picture(image.path) for image in shown]
    make_grid(pictures).save(path)
    save_animation(Path(path).with_suffix(".gif"), pictures, make_grid)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """
    Writes a file that is never half written: after an interruption it is whole, or not there.

    Args:
        path (`Path`):
            The file.
        value (`Any`):
            What JSON can hold.
        indent (`int`, *optional*):
            As in `json.dumps`.
    """
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(value, indent=indent))
    partial_path.replace(path)


def save_curves(path: str | Path, log_history: list[dict[str, Any]], curves: dict[str, str]) -> None:
    """
    Plots logged values, and their running mean over a fifteenth of the run.

    Args:
        path (`str` or `Path`):
            The image to write.
        log_history (`list[dict[str, Any]]`):
            `trainer.state.log_history`. Values that are `None` are skipped.
        curves (`dict[str, str]`):
            From the label of a curve to the name of what it shows. A name that was not logged itself is a prefix: the
            curve shows the mean of all logged values whose names begin with it.
    """
    with open_figure(path, height=4.5) as figure:
        axis = figure.subplots()
        for index, (label, prefix) in enumerate(curves.items()):
            steps, values = [], []
            for log in log_history:
                names = [prefix] if prefix in log else [name for name in log if name.startswith(prefix)]
                logged = [log[name] for name in names if log[name] is not None]
                if "reward" in log and logged:
                    steps.append(log["step"])
                    values.append(statistics.fmean(logged))
            window = max(1, len(values) // 15)
            means = [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]
            axis.plot(steps, values, color=f"C{index}", alpha=0.25)
            axis.plot(steps, means, color=f"C{index}", label=label)
        axis.set(xlabel="training step", ylabel="mean over the samples of a step")
        figure.legend(loc="outside upper left", ncols=3)


def format_table(before: dict[str, float], after: dict[str, float]) -> str:
    """
    Formats two evaluations as one table.

    Args:
        before (`dict[str, float]`):
            Mean score of each tag.
        after (`dict[str, float]`):
            The same, for the same tags.

    Returns:
        `str`: A title line, and one line for each tag.
    """
    width = max(map(len, before))
    lines = [f"{'':<{width}} {'before':>7} {'after':>7}"]
    lines += [f"{name:<{width}} {before[name]:>7.3f} {after[name]:>7.3f}" for name in before]
    return "\n".join(lines)
