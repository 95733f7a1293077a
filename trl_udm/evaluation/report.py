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
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from ..image_grid import make_image_grid


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
        lines.append("")
    tables = "\n".join(lines)
    (output_dir / "results.md").write_text(tables)

    # The first image of each prompt. Of several tags, each is a column; else the images come from the whole benchmark
    by_image = list(zip(*results.values(), strict=True))
    first = [rows for i, rows in enumerate(by_image) if i == 0 or _folder(rows[0]) != _folder(by_image[i - 1][0])]
    tags = list(dict.fromkeys(rows[0]["tag"] for rows in first))
    if len(tags) > 1:
        columns = [[rows for rows in first if rows[0]["tag"] == tag][:4] for tag in tags]
        picked, num_columns = [rows for line in zip(*columns, strict=False) for rows in line], len(tags)
    else:
        picked, num_columns = first[:: math.ceil(len(first) / 24)], None
    make_image_grid(
        [Image.open(output_dir / rows[0]["filename"]) for rows in picked],
        [rows[0]["prompt"] for rows in picked],
        [tuple(row["score"] for row in rows) for rows in picked],
        num_columns=num_columns,
    ).save(output_dir / "samples.png")
    return tables


def _folder(result: dict[str, Any]) -> str:
    return result["filename"].partition("/")[0]


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
    figure = Figure(figsize=(7, 4))
    FigureCanvasAgg(figure)
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
    axis.set(xlabel="step", ylabel="mean over the rollout's samples", title="UDM-GRPO")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


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
