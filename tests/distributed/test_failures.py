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

import time

import pytest

from .launch import launch


@pytest.mark.parametrize(
    ("failure", "message", "async_rewards"),
    [
        ("raise", "[rank1]: RuntimeError: the detector of process 1 is out of order", False),
        ("raise", "[rank1]: RuntimeError: the detector of process 1 is out of order", True),
        ("kill", "Signal 9 (SIGKILL) received", False),
    ],
)
def test_a_process_that_fails_ends_the_run_and_says_why(tmp_path, failure, message, async_rewards):
    cases = {"broken": {"per_device_train_batch_size": 6, "failure": failure, "async_rewards": async_rewards}}
    process = launch(tmp_path, "two_cpu_processes", "ddp", cases)
    seconds = time.time() - (tmp_path / "failed").stat().st_mtime
    assert process.returncode != 0
    assert message in process.stderr
    if failure == "raise":
        # The traceback is that of the reward function, not of what the other process was waiting for
        assert "in mean_letter" in process.stderr
    assert seconds < 60, seconds
    print(f"The run ended {seconds:.1f} s after the failure.")  # noqa: T201
