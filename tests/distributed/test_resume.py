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

"""Checkpoints of one number of processes, resumed with another. The generation batch is 48 rows in both."""

import pytest
import torch

from .launch import launch


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_processes_is_warned_of_and_draws_new_rollouts_together(tmp_path, before, after):
    """The checkpoint is between two updates of a rollout, so processes that went on with theirs would wait forever."""
    kwargs = {"is_fed": False, "num_iterations": 2, "save_strategy": "steps", "save_steps": 1}
    rows = {1: 48, 2: 24}
    cases = {
        name: {**kwargs, "use_lora": use_lora, "max_steps": 1, "per_device_train_batch_size": rows[before]}
        for name, use_lora in (("full", False), ("lora", True))
    }
    flags = {number: ("--num_processes", str(number)) for number in (1, 2)}
    process = launch(tmp_path, "two_cpu_processes", "ddp", cases, flags[before])
    assert process.returncode == 0, process.stderr[-5000:]
    resumed = {
        f"{name}_resumed": {
            **case,
            "max_steps": 4,
            "per_device_train_batch_size": rows[after],
            "resume_from": str(tmp_path / name / "checkpoint-1"),
        }
        for name, case in cases.items()
    }
    process = launch(tmp_path, "two_cpu_processes", "ddp", resumed, flags[after])
    assert process.returncode == 0, process.stderr[-5000:]
    assert process.stderr.count("Its unfinished rollouts are dropped") == 2  # once a case
    assert f"'num_processes': {before}" in process.stderr and f"'num_processes': {after}" in process.stderr
    for name in resumed:
        results = [torch.load(tmp_path / f"{name}-{i}.pt", weights_only=True) for i in range(after)]
        # One rollout of 16 samples for what is left of the first one, and one for the two updates that follow
        assert [len(result["rewarded"]) for result in results] == [2 * 16 // after] * after
        assert [log["step"] for log in results[0]["log"]] == [1, 2, 3, 4]
        clipped = [log["clip_ratio/region_mean"] for log in results[0]["log"]]
        assert clipped[0] == clipped[1] == clipped[2] == 0 < clipped[3]  # the ratio is 1 in a rollout's first update
