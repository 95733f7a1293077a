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


import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from scipy.stats import bootstrap

from trl_udm.cli import main
from trl_udm.evaluation import summarize, write_report
from trl_udm.evaluation.paired import compare_evaluations, load_evaluation


def make_evaluation(folder, scores, color="red"):
    """An evaluation with one image of a prompt for each of its scores. `scores` has them by tag and prompt."""
    results = []
    for index, (tag, prompt, values) in enumerate(scores):
        for number, value in enumerate(values):
            path = folder / f"{index:05}" / "samples" / f"{number:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), color).save(path)
            name = path.relative_to(folder).as_posix()
            results.append({"filename": name, "prompt": prompt, "tag": tag, "score": value})
    write_report(folder, {"closeness": summarize(results)}, {"closeness": results})
    return folder


def make_scores(seed, shift):
    """20 prompts of a tag and 10 of another, with 2 images each."""
    scores = np.random.default_rng(seed).normal(size=(30, 2)) + shift
    return [("a" if i < 20 else "b", f"prompt <{i}>", values) for i, values in enumerate(scores.tolist())]


def test_the_interval_is_that_of_the_paired_bootstrap(tmp_path):
    rows = [make_scores(0, 0.0), make_scores(1, 0.5)]
    folders = [make_evaluation(tmp_path / str(i), scores) for i, scores in enumerate(rows)]
    tags = compare_evaluations(*map(load_evaluation, folders))["closeness"]["tags"]
    first, second = (np.array([values for _, _, values in scores]).mean(axis=1) for scores in rows)
    expected = bootstrap(
        (first[:20], second[:20]),
        lambda one, other, axis: (other - one).mean(axis=axis),
        paired=True,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert tags["a"]["difference"] == pytest.approx((second - first)[:20].mean())
    assert (tags["a"]["low"], tags["a"]["high"]) == pytest.approx((expected.low, expected.high), abs=0.03)
    assert tags["a"]["win_rate"] == (second > first)[:20].mean()
    # The overall difference is the mean of the tags', each of which is drawn anew
    assert tags["overall"]["difference"] == pytest.approx((tags["a"]["difference"] + tags["b"]["difference"]) / 2)
    widths = [(tags[tag]["high"] - tags[tag]["low"]) / 2 for tag in ("a", "b", "overall")]
    assert widths[2] == pytest.approx(np.hypot(*widths[:2]) / 2, rel=0.1)
    assert tags["overall"]["num_prompts"] == 30 and tags["overall"]["win_rate"] == (second > first).mean()


def test_means_are_those_of_the_evaluations(tmp_path):
    # "a" is in two rows of the benchmark, as some prompts of the shapes are
    rows = [("x", "a", [1.0, 0.0]), ("x", "b", [0.0, 0.5]), ("x", "a", [1.0, 1.0]), ("y", "c", [0.25])]
    reports = [load_evaluation(make_evaluation(tmp_path / str(i), rows[i:] + rows[:i])) for i in range(2)]
    tags = compare_evaluations(*reports)["closeness"]["tags"]
    for tag, row in reports[0]["summaries"]["closeness"].items():
        assert tags[tag]["first"] == tags[tag]["second"] == row["mean"] and tags[tag]["win_rate"] == 0.5


def test_prompts_without_a_score_are_left_out_and_few_have_no_interval(tmp_path):
    before = make_evaluation(tmp_path / "a", [("x", "one", [0.2, None]), ("x", "two", [0.5]), ("x", "three", [None])])
    after = make_evaluation(tmp_path / "b", [("x", "one", [0.4]), ("x", "two", [0.5]), ("x", "three", [1.0])])
    comparison = compare_evaluations(load_evaluation(before), load_evaluation(after))["closeness"]
    row = comparison["tags"]["x"]
    assert (row["first"], row["second"]) == (pytest.approx(0.35), pytest.approx(0.45))
    assert [row["prompt"] for row in comparison["prompts"]] == ["one", "two"]
    assert (row["low"], row["win_rate"], row["num_prompts"], row["num_left_out"]) == (None, 0.75, 2, 1)


def test_what_cannot_be_compared_is_refused(tmp_path):
    first, second = (
        load_evaluation(make_evaluation(tmp_path / name, [("x", f"{name} prompt", [0.5])])) for name in ("a", "b")
    )
    with pytest.raises(ValueError, match="must have the same prompts, but 2 are in one of them only, such as '. prom"):
        compare_evaluations(first, second)
    with pytest.raises(ValueError, match=r"must have a reward in common, got \['closeness'\] and \['other'\]"):
        compare_evaluations(first, {**second, "results": {"other": []}})
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="There is no evaluation in "):
        load_evaluation(tmp_path)


def test_the_page_opens_in_a_browser_without_a_network(tmp_path, capsys):
    make_evaluation(tmp_path / "before", make_scores(0, 0.0), "blue")
    make_evaluation(tmp_path / "run" / "after", make_scores(1, 0.5), "lime")
    page = tmp_path / "page.html"
    folders = [str(tmp_path / "before"), str(tmp_path / "run")]
    main(["compare", *folders, "--titles", "A & B", "new", "--output", str(page), "--num_shown", "3"])
    printed = capsys.readouterr().out
    assert "| closeness | A & B | new | difference | 95 % interval | win rate | prompts |" in printed
    assert re.search(r"\| overall \| .+ to \+0\.\d+ \| \d\d% \| 30 \|", printed)
    text = page.read_text()
    assert text.count("<section") == 6 and text.count("<img") == 6 * 4
    assert "A &amp; B" in text and "prompt &lt;" in text and "prompt <" not in text
    assert not re.search("https?:|<script|<link|@import", text)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium")
    shot = tmp_path / "shot.png"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,2400"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}"]
    subprocess.run([browser, *flags, page.as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    shown = [(pixels == color).all(axis=1).sum() for color in ((0, 0, 255), (0, 255, 0))]
    # Images are drawn, and as many of either side
    assert shown[0] > 10_000 and shown[0] == pytest.approx(shown[1], rel=0.05)
