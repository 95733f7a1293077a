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

import os
import subprocess
import sys

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from .launch import CONFIGS, ROOT


EXPECTED = {
    "single_gpu": (DistributedType.NO, 1, 1),
    "multi_gpu": (DistributedType.MULTI_GPU, 8, 1),
    "multi_node": (DistributedType.MULTI_GPU, 16, 2),
    "deepspeed_zero1": (DistributedType.DEEPSPEED, 8, 1),
    "deepspeed_zero2": (DistributedType.DEEPSPEED, 8, 1),
    "deepspeed_zero3": (DistributedType.DEEPSPEED, 8, 1),
    "fsdp2": (DistributedType.FSDP, 8, 1),
    "two_cpu_processes": (DistributedType.MULTI_GPU, 2, 1),
}


def test_every_configuration_is_known():
    assert {path.stem for path in CONFIGS.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_takes_a_configuration(name):
    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert (config.distributed_type, config.num_processes, config.num_machines) == EXPECTED[name]
    assert config.mixed_precision == ("no" if config.use_cpu else "bf16")
    # Keys within a group are not checked by Accelerate: they must be options of `accelerate launch`
    options = {action.dest for action in launch_command_parser()._actions}
    settings = yaml.safe_load(path.read_text())
    for group in ("deepspeed_config", "fsdp_config"):
        assert set(settings.get(group, {})) <= options
    if name.startswith("deepspeed"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2


def test_the_example_runs_in_two_processes(tmp_path):
    small = {
        "max_steps": 1,
        "num_generations": 4,
        "num_train_timesteps": 1,
        "per_device_train_batch_size": 2,
        "num_inference_steps": 3,
        "num_inference_steps_eval": 3,
        "num_eval_images": 1,
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", "examples/accelerate_configs/two_cpu_processes.yaml", "examples/train_geneval.py"]
    command += ["--output_dir", str(tmp_path), "--disable_tqdm", "True"]
    command += [part for name, value in small.items() for part in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-5000:]
    # Told by one process alone
    assert process.stdout.count("GenEval accuracy; samples and curves are in") == 1
    assert (tmp_path / "results.json").exists() and (tmp_path / "model_index.json").exists()
