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

"""The code of docs/checkpoints.md, run as a reader would, with a small model under the name of the large one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from trl_udm import UDMGRPOConfig, UDMGRPOTrainer, URSAPipeline

from .pages import run_page
from .trainer.hub_server import TOKEN, HubServer


BASE = "BAAI/URSA-1.7B-IBQ512"
NAME = "me/ursa-udm-grpo"


def make_config(*args, **kwargs):
    """A configuration that needs no GPU, beside which another one's trainer goes on."""
    config = UDMGRPOConfig(*args, use_cpu=True, **kwargs)
    Accelerator(cpu=True)  # the state that `TrainingArguments` resets
    return config


def run() -> None:
    """Runs the page in the working folder."""
    pipeline = URSAPipeline.from_pretrained(BASE, max_prompt_length=16)
    model = get_peft_model(URSAPipeline.from_pretrained(BASE).transformer, LoraConfig(target_modules="all-linear"))
    model.save_pretrained("outputs/ursa-lora")
    args = make_config(
        "full",
        num_generations=2,
        per_device_train_batch_size=6,
        num_inference_steps=4,
        timestep_window=[0, 1],
        max_steps=1,
        save_steps=1,
        pipeline_kwargs={"height": 32, "width": 32},
        bf16=False,
        report_to="none",
        push_to_hub=True,
        hub_model_id=NAME,
        hub_strategy="checkpoint",
    )
    trainer = UDMGRPOTrainer(
        pipeline,
        lambda prompts, **kwargs: [0.0, 1.0] * (len(prompts) // 2),
        args,
        train_dataset=Dataset.from_dict({"prompt": ["a ring", "a cross"]}),
    )
    variables = run_page("checkpoints.md", Path.cwd(), 11, "python|bash", trainer=trainer, UDMGRPOConfig=make_config)
    assert variables["trainer"].state.global_step == 1


def test_the_page_runs(tmp_path, oracle_dir):
    shutil.copytree(oracle_dir / "tiny-ursa", tmp_path / BASE)
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    with HubServer() as server:
        environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment |= {"PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-c", f"from {__name__} import run; run()"]
        process = subprocess.run(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.returncode == 0, process.stdout
    assert "model_index.json" in server.repositories[NAME].files
