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
from pathlib import Path

import pytest

from trl_udm import DFlowDPOConfig, DFlowGRPOConfig, UDMGRPOConfig


CONFIGS = {"udm_grpo": UDMGRPOConfig, "dflow_grpo": DFlowGRPOConfig, "dflow_dpo": DFlowDPOConfig}
EFFICIENCY = Path(__file__).parents[2] / "benchmarks" / "efficiency.py"


@pytest.fixture(scope="module")
def module():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(EFFICIENCY.parent)
        return runpy.run_path(str(EFFICIENCY))


def test_every_setting_of_every_world_is_a_valid_configuration(tmp_path, module):
    for world in module["WORLDS"]:
        for name, overrides in module["SETTINGS"].items():
            options = module["build_options"](world, overrides, seed=1, num_samples=2560)
            assert options.pop("reward_mode", "official") == "official"
            config_class = CONFIGS[options.pop("algorithm", "udm_grpo")]
            args = config_class(**{**options, "output_dir": str(tmp_path)})
            rollouts = args.max_steps / (args.num_iterations * args.steps_per_generation)
            assert rollouts * args.generation_batch_size / args.num_train_timesteps == 2560, name
            assert args.max_steps == 2 * args.save_steps


def test_passes_are_counted_by_hand(module):
    def count(name):
        return module["count_passes"](module["build_options"]("shapes", module["SETTINGS"][name], 1, 1280))

    assert count("paper") == 9 + 3 + 3 * 3
    assert count("grid, beta 0.5, 4 updates") == 9 + 3 + 3 + 4 * 3 * 3
    assert count("fast") == 9 + 8 + 8 + 3 * 8
    assert count("fast, full KL") == 9 + 8 + 4 * 8
    assert count("dFlowGRPO") == 10 + 3 * 8
    assert count("DPO on the pairs of a group") == 10 + 3 * 8
    assert count("diffu-GRPO") == 10 + 3


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([0.6, 0.91, 0.92], 1),
        ([0.6, 0.91, 0.89, 0.9, 0.95], 3),  # the first was chance
        ([0.6, 0.8, 0.9], 2),  # nothing follows
        ([0.6, 0.89], None),
    ],
)
def test_the_target_is_reached_where_the_next_evaluation_confirms_it(module, accuracies, expected):
    rows = [{"accuracy": accuracy, "samples": 1280 * i} for i, accuracy in enumerate(accuracies)]
    reached = module["first_reached"](rows, 0.9)
    assert reached is (None if expected is None else rows[expected])


def test_a_run_that_was_stopped_continues_as_an_unbroken_one(tmp_path, module, monkeypatch):
    def load_trainer(*args):
        trainer, *others = module["load_trainer"](*args)
        trainer.eval_dataset = trainer.eval_dataset.select(range(8))
        return trainer, *others

    monkeypatch.setitem(module["work"].__globals__, "load_trainer", load_trainer)
    options = module["build_options"]("sums", module["SETTINGS"]["fast"], seed=1, num_samples=1280)
    options |= {"per_device_train_batch_size": 32, "num_inference_steps_eval": 10, "save_steps": 4, "warmup_steps": 0}
    options["drop_zero_variance"] = True  # samples are then counted as they are drawn
    evaluations = {}
    for name, stops in {"unbroken": (8,), "stopped": (4, 8)}.items():
        folder = tmp_path / name
        folder.mkdir()
        for max_steps in stops:
            run = {
                "world": "sums",
                "setting": "fast",
                "pipeline": None,
                "options": {**options, "max_steps": max_steps},
            }
            (folder / "run.json").write_text(json.dumps(run))
            module["work"](folder)
        rows = json.loads((folder / "evaluations.json").read_text())
        evaluations[name] = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    assert [row["samples"] for row in evaluations["unbroken"]] == [0, 16, 32]
    assert evaluations["stopped"] == evaluations["unbroken"]
    assert evaluations["unbroken"][0]["kl"] == 0 and evaluations["unbroken"][1]["kl"] > 0
    table = module["format_table"](module["read_runs"](tmp_path)).splitlines()
    assert len(table) == 4 and table[2].startswith("| sums | fast | 0.0004 | 1 |")
    assert all(
        float(cell) for row in table[2:] for cell in row.strip("| ").split(" | ")[-2:]
    )  # energy distances, with noise
    module["save_curves"](tmp_path / "curves.png", module["read_runs"](tmp_path))
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("setting", ["paper", "diffu-GRPO"])  # the second has an option that JSON turns into a list
def test_a_run_is_made_once_and_never_with_other_options(tmp_path, module, monkeypatch, setting):
    def run_process(command, **kwargs):
        (tmp_path / "done").touch()
        calls.append(command)
        return subprocess.CompletedProcess(command, returncode=0)

    calls = []
    monkeypatch.setattr("subprocess.run", run_process)
    options = module["build_options"]("sums", module["SETTINGS"][setting], seed=1, num_samples=1280)
    run = {"world": "sums", "setting": setting, "pipeline": None, "options": options}
    for _ in range(2):
        module["train"](tmp_path, run)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="`--output_dir` holds a run with other options: .*run.json"):
        module["train"](tmp_path, {**run, "options": {**options, "seed": 2}})


def test_the_summary_compares_at_equal_samples_and_at_equal_passes(module):
    def make_run(setting, seed, accuracies):
        options = module["build_options"]("shapes", module["SETTINGS"][setting], seed, num_samples=2560)
        rows = [{"samples": 1280 * i, "accuracy": value, "kl": 0.1, "diversity": 0.4} for i, value in accuracies]
        return {"world": "shapes", "setting": setting, "options": options, "rows": rows}

    runs = [make_run("paper", seed, enumerate((0.6, 0.7, last))) for seed, last in ((1, 0.8), (2, 0.9))]
    runs.append(make_run("diffu-GRPO", 1, enumerate((0.6, 0.62, 0.65))))
    lines = module["format_summary"](runs).splitlines()
    # 2,560 samples of 13 passes are 33 k, with which the paper's 21 passes draw 1,585 samples
    expected = 0.7 + (1584.76 - 1280) / 1280 * 0.15
    assert [line.split(" | ", 3)[-1] for line in lines[2:]] == [
        f"2 | 21 | 0.600 | 0.850 (0.800 to 0.900) | {expected:.3f} (33 k) | 0.100 | 0.400 |",
        "1 | 13 | 0.600 | 0.650 (0.650 to 0.650) | 0.650 (33 k) | 0.100 | 0.400 |",
    ]


def test_the_best_learning_rate_of_the_tuning_seed_is_taken(module, monkeypatch, tmp_path):
    made = []

    def train(folder, run):
        made.append((run["options"]["seed"], run["options"]["learning_rate"]))
        rows = [{"samples": 0, "accuracy": 0.6}, {"samples": 1280, "accuracy": 1 - made[-1][1]}]
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(run))
        (folder / "evaluations.json").write_text(
            json.dumps([{**row, "kl": 0.1, "diversity": 0.4, "seconds": 1} for row in rows])
        )

    monkeypatch.setitem(module["main"].__globals__, "train", train)
    command = ["efficiency.py", "--output_dir", str(tmp_path), "--settings", "paper", "--num_samples", "1280"]
    command += ["--learning_rates", "0.2", "0.1", "0.3", "--tuning_seed", "5", "--seeds", "1", "2"]
    monkeypatch.setattr("sys.argv", [*command, "--num_workers", "1"])
    module["main"]()
    assert made == [(5, 0.2), (5, 0.1), (5, 0.3), (1, 0.1), (2, 0.1)]
    (line,) = (tmp_path / "summary.md").read_text().splitlines()[2:]
    assert line.startswith("| shapes | paper | 0.1 | 2 | 21 | 0.600 | 0.900 ")


def test_a_run_that_fails_is_told(module, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.executable", "false")  # a program that ends with 1
    module["train"](tmp_path / "run", {"world": "shapes"})
    assert f"A run failed with exit code 1: {tmp_path / 'run' / 'log.txt'}" in capsys.readouterr().err
    assert not (tmp_path / "run" / "done").exists()
