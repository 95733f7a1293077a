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

"""Comparison of two evaluations of the same prompts: paired statistics, and a page with the images side by side."""

import base64
import html
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ..pipelines.original_checkpoint import load_json
from .report import MIN_PROMPTS, TAG_TITLES


def load_evaluation(folder: str | Path) -> dict[str, Any]:
    """
    Reads an evaluation.

    Args:
        folder (`str` or `Path`):
            A folder of [`~trl_udm.evaluation.evaluate`], or of a run that [`train_and_compare`] made, of which the
            evaluation after the training is read.

    Returns:
        `dict`: The content of `results.json`, and `folder`.

    Raises:
        ValueError: If there is no evaluation in it.
    """
    for path in (Path(folder), Path(folder, "after")):
        if (path / "results.json").exists():
            report = load_json(path / "results.json")
            if "results" in report:
                return {**report, "folder": path}
    raise ValueError(f"There is no evaluation in {folder}: a folder of `trl-udm evaluate` has a results.json.")


def compare_evaluations(first: dict[str, Any], second: dict[str, Any], num_resamples: int = 9999) -> dict[str, Any]:
    """
    Compares the scores of two evaluations, prompt by prompt.

    Means are over images that have a score, as those of [`~trl_udm.evaluation.summarize`]. The interval is that of the
    paired bootstrap: prompts are drawn with replacement within each tag, each with its scores in both evaluations.

    Args:
        first (`dict`):
            From [`load_evaluation`].
        second (`dict`):
            Another one, of the same prompts.
        num_resamples (`int`, *optional*, defaults to `9999`):
            Number of resamples.

    Returns:
        `dict`: For each reward of both evaluations, a dictionary with `tags` and `prompts`. `tags` has, for each tag
        and for `"overall"` (the mean over the tags), the means `first` and `second`, their `difference`, its 95 %
        interval `low` and `high` (`None` for fewer than three prompts of a tag), `win_rate` (the share of prompts
        where the second has the better mean, where a tie counts half), `num_prompts`, and `num_left_out`, the number
        of prompts that have no score in one of the two. `prompts` has the two means of each other prompt.

    Raises:
        ImportError: If SciPy is not installed.
        ValueError: If the prompts differ, or there is no reward that both have.
    """
    if find_spec("scipy") is None:
        raise ImportError("`compare_evaluations` needs SciPy: `pip install trl-udm[geneval]`.")
    names = [name for name in second["results"] if name in first["results"]]
    if not names:
        raise ValueError(
            f"The evaluations must have a reward in common, got {[*first['results']]} and {[*second['results']]}."
        )
    comparison = {}
    for name in names:
        before, after = (
            {key: _list_scores(rows) for key, rows in _group_by_prompt(report["results"][name]).items()}
            for report in (first, second)
        )
        if before.keys() != after.keys():
            (_, prompt), *_ = before.keys() ^ after.keys()
            raise ValueError(
                f"The evaluations must have the same prompts, but {len(before.keys() ^ after.keys())} are in one of "
                f"them only, such as {prompt!r}."
            )
        prompts = [
            {"tag": key[0], "prompt": key[1], "first": fmean(before[key]), "second": fmean(after[key])}
            for key in before
            if before[key] and after[key]
        ]
        comparison[name] = {"tags": _compare_tags([before, after], num_resamples), "prompts": prompts}
    return comparison


def _group_by_prompt(results: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["tag"] or "all", result["prompt"]), []).append(result)
    return groups


def _list_scores(results: list[dict[str, Any]]) -> list[float]:
    return [result["score"] for result in results if result["score"] is not None]


def _compare_tags(groups: list[dict[tuple[str, str], list[float]]], num_resamples: int) -> dict[str, dict[str, Any]]:
    by_tag: dict[str, list[list[float]]] = {}
    num_left_out: Counter[str] = Counter()
    for tag, prompt in groups[0]:
        first, second = (scores[tag, prompt] for scores in groups)
        if first and second:
            by_tag.setdefault(tag, []).append([sum(first), len(first), sum(second), len(second)])
        else:
            num_left_out[tag] += 1
    tables = {tag: np.array(rows) for tag, rows in by_tag.items()}  # (P, 4) each
    tags = {tag: _compare_tables([table], num_resamples, num_left_out[tag]) for tag, table in tables.items()}
    if tables:
        tags["overall"] = _compare_tables([*tables.values()], num_resamples, num_left_out.total())
    return tags


def _compare_tables(tables: list[np.ndarray], num_resamples: int, num_left_out: int) -> dict[str, Any]:
    """
    Statistics of several tags, which weigh the same. A table (P, 4) has, for each prompt, the sum and the number of
    its scores in the first evaluation, and in the second.
    """
    from scipy.stats import bootstrap

    def compute_means(*rows: np.ndarray, axis: int = -1) -> np.ndarray:
        """Both means (2, ...) of prompts whose rows in the tables are `rows`, each (..., P)."""
        sums = [np.moveaxis(table[one], axis - 1, 0).sum(axis=0) for table, one in zip(tables, rows, strict=True)]
        return np.mean([[part[..., i] / part[..., i + 1] for i in (0, 2)] for part in sums], axis=0)

    def compute_difference(*rows: np.ndarray, axis: int) -> np.ndarray:
        first, second = compute_means(*rows, axis=axis)
        return second - first

    # Each tag is a sample of its own, so that all resamples have as many prompts of it
    samples = [np.arange(len(table)) for table in tables]
    first, second = compute_means(*samples).tolist()
    low = high = None
    if min(map(len, tables)) >= MIN_PROMPTS:
        found = bootstrap(
            samples,
            compute_difference,
            n_resamples=num_resamples,
            method="percentile",
            vectorized=True,
            random_state=np.random.default_rng(0),
            batch=500,
        ).confidence_interval
        low, high = float(found.low), float(found.high)
    gains = [table[:, 2] / table[:, 3] - table[:, 0] / table[:, 1] for table in tables]
    wins = np.sign(np.concatenate(gains)) / 2 + 0.5
    return {
        "first": first,
        "second": second,
        "difference": second - first,
        "low": low,
        "high": high,
        "win_rate": float(wins.mean()),
        "num_prompts": len(wins),
        "num_left_out": num_left_out,
    }


def format_comparison(comparison: dict[str, Any], titles: tuple[str, str]) -> str:
    """
    Formats a comparison as tables in Markdown.

    Args:
        comparison (`dict`):
            From [`compare_evaluations`].
        titles (`tuple[str, str]`):
            Names of the two evaluations.

    Returns:
        `str`: A table for each reward.
    """
    lines = []
    for header, rows in _make_tables(comparison, titles):
        lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def _make_tables(comparison: dict[str, Any], titles: tuple[str, str]) -> list[tuple[list[str], list[list[str]]]]:
    tables = []
    for name, part in comparison.items():
        rows = []
        for tag, row in part["tags"].items():
            interval = "n/a" if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}"
            numbers = [f"{row['first']:.3f}", f"{row['second']:.3f}", f"{row['difference']:+.3f}", interval]
            left_out = f" (without {row['num_left_out']})" if row["num_left_out"] else ""
            tag = TAG_TITLES.get(tag, tag.replace("_", " "))
            rows.append([tag, *numbers, f"{row['win_rate']:.0%}", f"{row['num_prompts']}{left_out}"])
        tables.append(([name, *titles, "difference", "95 % interval", "win rate", "prompts"], rows))
    return tables


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0 2rem; width: 100%; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
tr:last-child td { font-weight: 600; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .25rem 1.5rem; padding: 1rem 0;
  border-bottom: 1px solid #8884; }
.pair h3 { grid-column: 1 / -1; margin: 0; font-size: 1rem; font-weight: 600; }
.side div { display: flex; flex-wrap: wrap; gap: .4rem; }
.side p { margin: .2rem 0; font-size: .85rem; opacity: .8; }
img { width: 120px; height: auto; border-radius: 3px; }
"""


def write_comparison(
    path: str | Path,
    first: dict[str, Any],
    second: dict[str, Any],
    comparison: dict[str, Any],
    titles: tuple[str, str],
    num_shown: int = 12,
    num_images: int = 4,
) -> None:
    """
    Writes a comparison as one HTML page that needs no network and no other file.

    It shows the tables, the prompts that have gained most by the first reward, and those that have lost most.

    Args:
        path (`str` or `Path`):
            The file.
        first, second (`dict`):
            The evaluations, from [`load_evaluation`].
        comparison (`dict`):
            From [`compare_evaluations`].
        titles (`tuple[str, str]`):
            Names of the two evaluations.
        num_shown (`int`, *optional*, defaults to `12`):
            Number of prompts that are shown of the gains, and of the losses.
        num_images (`int`, *optional*, defaults to `4`):
            Number of images that are shown of a prompt.
    """
    escape, (a, b) = html.escape, titles
    parts = [f"<h1>{escape(a)} and {escape(b)}</h1>"]
    for header, rows in _make_tables(comparison, titles):
        parts.append(f"<table><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in header)}</tr>")
        parts += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
        parts.append("</table>")
    parts.append(
        f"<p>The interval is of the difference, by the paired bootstrap "
        f"over prompts. The win rate is the share of prompts where {escape(b)} is better, and a tie counts half.</p>"
    )
    name, *_ = comparison
    groups = [_group_by_prompt(report["results"][name]) for report in (first, second)]
    scored = sorted(comparison[name]["prompts"], key=lambda row: row["first"] - row["second"])
    gained = [row for row in scored if row["second"] > row["first"]][:num_shown]
    lost = [row for row in reversed(scored) if row["second"] < row["first"]][:num_shown]
    for title, prompts in (("The largest gains", gained), ("The largest losses", lost)):
        parts.append(f"<h2>{title} of {escape(name)}</h2>" if prompts else "")
        for row in prompts:
            parts.append(f'<section class="pair"><h3>{escape(row["prompt"])}</h3>')
            for label, key, report, group in zip(titles, ("first", "second"), (first, second), groups, strict=True):
                parts.append(f'<div class="side"><p>{escape(label)}: {row[key]:.3f}</p><div>')
                for image in group[row["tag"], row["prompt"]][:num_images]:
                    data = base64.b64encode((report["folder"] / image["filename"]).read_bytes()).decode()
                    score = "no score" if image["score"] is None else f"{image['score']:.3f}"
                    parts.append(f'<img src="data:image/png;base64,{data}" alt="{score}" title="{score}">')
                parts.append("</div></div>")
            parts.append("</section>")
    head = f'<meta charset="utf-8"><title>{escape(a)} and {escape(b)}</title><style>{_STYLE}</style>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"
    Path(path).write_text(page, encoding="utf-8")
