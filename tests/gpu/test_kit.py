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

"""The kit that runs the stages of docs/gpu.md, without running them."""

import importlib
import json
import re
import time
from importlib.metadata import version
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.fixture
def kit(monkeypatch):
    """Imports a module of the kit."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "gpu_kit")
    return importlib.import_module


def read_labels(text):
    """The first cells of the rows of all tables, as far as the settings go."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [
        tuple(cells[: 4 if cells[0] in ("step", "rollout", "scoring", "update", "decode") else 1]) for cells in lines
    ]


def test_a_report_without_results_has_a_row_for_every_part_and_empty_cells(kit, tmp_path, capsys):
    kit("report").main(tmp_path)
    text = capsys.readouterr().out
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == text
    labels = read_labels(text)
    for stage in ("speed", "tests", "rewards"):
        names = [name for name in kit("parts").list_parts(stage) if not name.startswith("kernels-")]
        assert all(name.split("-")[0] in {label[0].strip("`") for label in labels} for name in names)
    assert "The kernels of `kernels-lora-16`" in text
    assert re.search(r"^\| step \| lora \| 16 \| no \|  \|  \|  \|  \|$", text, re.MULTILINE)
    assert "no machine yet" in text
    assert set(labels) <= set(read_labels((ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")))


def test_results_are_in_the_report(kit, tmp_path, capsys):
    about = {"machine": "a GPU", "torch": "2.13.0", "part_seconds": 30.0}
    results = {
        "test_runs": {"tests": 9, "failures": 1, "errors": 0, "skipped": 2, "failed": ["test_x"]},
        "step-lora-16": {"seconds_a_sample": 0.5, "peak_mib": 900.0, "parts": {"scoring": 0.25}},
        "kernels-lora-16": {"kernels": [{"name": "gemm", "calls": 3, "share": 1}]},
        "update-full-64": {"seconds": 64.0, "mfu": 0.5, "extra_mib": 70.0},
        "learn": {"rewards": [0.5] * 60, "before": {"overall": 0.4}, "after": {"overall": 0.6}, "seconds": 60.0},
        "hpsv2": {"float32": 100.0, "bfloat16": 200.0},
    }
    for name, result in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**result, **about}))
    stages = dict.fromkeys(("rollout", "decode", "scoring", "update"), 160.0)
    estimate = {"peak_mib": 1000.0, "resident_mib": 100.0, "stages_mib": stages}
    (tmp_path / "estimate-lora-16.json").write_text(json.dumps(estimate))
    (tmp_path / "estimate-full-64.json").write_text(json.dumps(estimate))
    kit("report").main(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "a GPU, PyTorch 2.13.0",
        "| `test_runs` | 6 | 1 test_x | 2 | 30 |",
        "| step | lora | 16 | no | 0.500 |  | 900 | 1000 |",
        "| update | full | 64 | no | 1.000 | 50% | 70 | 60 |",
        "| `step-lora-16` | scoring | 0.25 |",
        "| `gemm` | 3 | 100.0% |",
        "| this machine | 0.500 | 0.500 | 0.400 | 0.600 | 1.00 |",
        "| hpsv2 | 100 | 200 |",
    ):
        assert line in lines


def test_parts_that_have_a_result_are_skipped_and_the_others_end_in_time(kit, tmp_path, capsys):
    parts = kit("parts")
    names = list(parts.list_parts("rewards"))
    (tmp_path / f"{names[0]}.json").write_text("{}")
    assert parts.run_stage("rewards", tmp_path, deadline=time.monotonic() + 10) == len(names) - 1
    assert [line.split(": ")[1:] for line in capsys.readouterr().out.splitlines()] == [
        [name, "not started (0 s)"] for name in names[1:]
    ]
    path = tmp_path / "unknown.json"
    assert parts.start_part("rewards", "unknown", path, 60).startswith("failed, see ")
    assert "KeyError: 'unknown'" in path.with_suffix(".log").read_text() and not path.exists()
    assert parts.start_part("rewards", names[1], path, 0.01).startswith("stopped, see ")


def test_wheels_are_those_of_this_environment_without_those_of_pytorch(kit):
    wheels = kit("wheels")
    packages = wheels.find_packages([*wheels.NEEDED], "3.12")
    assert packages["trl"] == version("trl") and {"transformers", "tokenizers", "pyarrow", "scipy"} <= packages.keys()
    present = wheels.find_packages(["torch", "numpy", "pandas"], "3.12").keys()
    assert {"torch", "sympy", "numpy", "pandas"} <= present and not {"trl", "transformers"} & present
