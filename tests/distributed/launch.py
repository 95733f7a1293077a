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

"""Starts the worker in several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "accelerate_configs"


def launch(
    output_dir: Path, config: str, backend: str, cases: dict[str, dict[str, Any]], flags: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    """
    Runs `cases`, keyword arguments of `worker.run_case`, under `accelerate launch` with a shipped configuration.

    `flags` are further ones of `accelerate launch`. The tests run in float32, whatever the configuration says.
    """
    settings_path = output_dir / "settings.json"
    settings_path.write_text(json.dumps({"output_dir": str(output_dir), "backend": backend, "cases": cases}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    command += ["--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no", *flags]
    command += ["-m", "tests.distributed.worker", str(settings_path)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def load(output_dir: Path, name: str) -> list[dict[str, Any]]:
    """What a case measured, in the first and in the second process."""
    return [torch.load(output_dir / f"{name}-{process}.pt", weights_only=True) for process in range(2)]
