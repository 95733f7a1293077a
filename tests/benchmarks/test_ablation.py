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

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


ABLATION = Path(__file__).parents[2] / "benchmarks" / "ablation.py"


@pytest.fixture
def ablation(monkeypatch):
    """
    Runs the command without training: the results of a run depend on its flags. Returns the flags of all runs that
    would have been trained.
    """
    trainings = []

    def train(command, **kwargs):
        flags = command[2:]
        trainings.append(flags)
        names = ("--output_dir", "--action", "--seed", "--beta")
        output_dir, action, seed, beta = (flags[flags.index(name) + 1] for name in names)
        output_dir = Path(output_dir)
        after = (0.9 if action == "clean" else 0.7) + 0.01 * int(seed)
        results = {"before": {"overall": 0.6}, "after": {"overall": after}, "seconds": 9.0}
        logs = [{"step": step, "loss": 0.0, "reward": 0.5, "kl": 0.1 * step} for step in (1, 2, 3)]
        if beta == "0.0":
            logs = [{name: value for name, value in log.items() if name != "kl"} for log in logs]
        (output_dir / "results.json").write_text(json.dumps(results))
        (output_dir / "trainer_state.json").write_text(json.dumps({"log_history": logs}))

    def run(*argv):
        trainings.clear()
        monkeypatch.setattr(sys, "argv", ["ablation.py", *map(str, argv)])
        runpy.run_path(str(ABLATION), run_name="__main__")
        return list(trainings)

    monkeypatch.setattr(subprocess, "run", train)
    return run


def test_every_setting_is_trained_once_with_each_seed(tmp_path, ablation, capsys):
    argv = ["--output_dir", tmp_path, "--seeds", 1, 2, "--max_steps", 3]
    trainings = ablation(*argv)
    assert len(trainings) == 28 * 2 and len({tuple(flags) for flags in trainings}) == len(trainings)
    assert ablation(*argv) == []

    table = (tmp_path / "table.md").read_text().splitlines()
    assert len(table) == 2 + 28
    assert table[2].startswith(
        "| corners: clean action, forward trajectory | 0.600 | 0.915 (0.910 to 0.920) | 0.200 (0.200"
    )
    assert "intermediate action, backward trajectory | 0.600 | 0.715" in table[5]
    assert any(line.startswith("| KL: beta = 0 | 0.600 | 0.915 (0.910 to 0.920) |  | 19.0 |") for line in table)
    assert table[-1] in capsys.readouterr().out
    for name in ("curves.png", "accuracies.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width == 2 * 830  # as wide as a page, at twice its pixels


def test_a_folder_with_runs_of_other_flags_is_refused(tmp_path, ablation):
    ablation("--output_dir", tmp_path, "--seeds", 1, "--groups", "KL", "--max_steps", 3)
    with pytest.raises(ValueError, match="`--output_dir` holds a run with other flags: .*flags.json"):
        ablation("--output_dir", tmp_path, "--seeds", 1, "--groups", "KL", "--max_steps", 4)


def test_passes_count_rollout_scoring_and_update():
    module = runpy.run_path(str(ABLATION))
    passes, method = module["count_passes"], module["METHOD"]
    assert passes(method) == 10 + 3 + 3 * 3
    assert passes({**method, "guidance_scale": 3.0}) == 20 + 3 + 9
    assert passes({**method, "num_iterations": 4}) == (10 + 3 + 3) / 4 + 9
    assert passes({**method, "beta": 0.0, "num_pairs": 2}) == 10 + 9 / 2


def test_settings_may_have_equal_numbers_of_passes(tmp_path, ablation):
    flags = ("--seeds", 1, "--groups", "algorithms", "--max_passes", 440, "--num_workers", 1)
    trainings = ablation("--output_dir", tmp_path, *flags)
    steps = [int(flags[flags.index("--max_steps") + 1]) for flags in trainings]
    assert steps == [20, 23, 13, 12, 12, 13, 34, 23]
