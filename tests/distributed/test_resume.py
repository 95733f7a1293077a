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
Checkpoints of one number of processes, resumed with another. A generation batch has 48 rows in both, and its samples
follow from the prompts. So runs of one and of two processes have the same updates.
"""

import json

import pytest
import torch

from . import worker
from .launch import launch, load


KINDS = {"full": {"use_lora": False}, "lora": {"use_lora": True}}
KWARGS = {"num_iterations": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}


def cases_of(folder, num_processes):
    """A run, and two that resume the run of the other number of processes: between rollouts, and within one."""
    cases = {}
    for kind, options in KINDS.items():
        options = {**KWARGS, **options, "per_device_train_batch_size": 48 // num_processes}
        cases[f"{kind}-of-{num_processes}"] = options
        for step in (1, 2):
            checkpoint = folder / f"{kind}-of-{3 - num_processes}" / f"checkpoint-{step}"
            cases[f"{kind}-to-{num_processes}-after-{step}"] = {**options, "resume_from": str(checkpoint)}
    return cases


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of the first process by the name of the run, and what two processes wrote."""
    folder = tmp_path_factory.mktemp("resume")

    def run_alone(cases):
        settings = {"output_dir": str(folder), "backend": "ddp", "cases": cases}
        (folder / "alone.json").write_text(json.dumps(settings))
        worker.main(folder / "alone.json")

    alone, together = cases_of(folder, 1), cases_of(folder, 2)
    run_alone({name: case for name, case in alone.items() if "resume_from" not in case})
    process = launch(folder, "two_cpu_processes", "ddp", together)
    assert process.returncode == 0, process.stderr[-5000:]
    run_alone({name: case for name, case in alone.items() if "resume_from" in case})
    results = {name: torch.load(folder / f"{name}-0.pt", weights_only=True) for name in [*alone, *together]}
    return results, process.stderr, load(folder, "full-to-2-after-1")


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_processes_trains_as_the_first_would_have(runs, kind, num_processes):
    results, _, _ = runs
    unbroken, resumed = (results[f"{kind}-{name}"] for name in ("of-1", f"to-{num_processes}-after-2"))
    for expected, weights in zip(unbroken["weights"][2:], resumed["weights"], strict=True):
        for name in expected:
            torch.testing.assert_close(weights[name], expected[name], rtol=1e-4, atol=1e-5)
    changes = [(unbroken["weights"][4][name] - value).abs().max() for name, value in unbroken["weights"][2].items()]
    assert max(changes) > 1e-2


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_within_a_rollout_all_processes_draw_a_new_one_together(runs, kind, num_processes):
    """Processes that went on with the rest of theirs would wait for the others forever."""
    results, _, _ = runs
    log = results[f"{kind}-to-{num_processes}-after-1"]["log"]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    clipped = [entry["clip_ratio/region_mean"] for entry in log]
    assert clipped[0] == clipped[1] == clipped[2] == 0 < clipped[3]  # the ratio is 1 in a rollout's first update


def test_one_process_warns_and_each_draws_its_part(runs):
    _, stderr, both = runs
    assert stderr.count("was saved with {'num_processes': 1, 'per_device_train_batch_size': 48}") == 4  # once a run
    # One rollout of 16 samples for what is left of the first one, and one for the two updates that follow
    assert [len(result["rewarded"]) for result in both] == [16, 16]
