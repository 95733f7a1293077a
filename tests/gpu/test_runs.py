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

"""Runs of the trainer on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("settings", [{"async_rewards": True}, {"reward_timeout": 60.0}], ids=["async", "timeout"])
def test_rewards_in_threads_are_on_the_device_of_the_run(tmp_path, device, settings):
    import threading

    import torch

    from .models import build_trainer

    threads, devices = [], []

    def reward(prompts, completions, **kwargs):
        threads.append(threading.current_thread())
        devices.append(torch.cuda.current_device() if device.type == "cuda" else None)
        return torch.arange(len(prompts), device=device.type, dtype=torch.float32).tolist()

    build_trainer(tmp_path, device, reward, max_steps=1, rollout_batch_size=2, **settings).train()
    assert threads and threading.main_thread() not in threads
    assert set(devices) == {torch.cuda.current_device() if device.type == "cuda" else None}


@pytest.mark.parametrize("async_rewards", [False, True])
def test_a_reward_that_hangs_ends_the_run(tmp_path, device, async_rewards):
    import threading

    from .models import build_trainer

    def hang(prompts, completions, **kwargs):
        threading.Event().wait(60)

    trainer = build_trainer(tmp_path, device, hang, reward_timeout=0.3, async_rewards=async_rewards)
    with pytest.raises(TimeoutError, match="'hang' took longer than the 0.3 s of `reward_timeout`"):
        trainer.train()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_resumed_run_is_the_unbroken_one_bit_by_bit(tmp_path, device, deterministic, lora):
    import torch

    from .models import train

    settings = {"lora": lora, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    unbroken = train(tmp_path / "unbroken", device, **settings)
    checkpoint = str(tmp_path / "unbroken" / "checkpoint-2")
    resumed = train(tmp_path / "resumed", device, resume=checkpoint, **settings)
    assert len(unbroken["logs"]) == 3 and torch.equal(resumed["logs"], unbroken["logs"])
    assert all(torch.equal(weight, unbroken["weights"][name]) for name, weight in resumed["weights"].items())


def test_compiled_layers_train_as_others_do(tmp_path, device):
    import torch

    from .models import assert_same_training, train

    backend = "inductor" if device.type == "cuda" else "aot_eager"  # a CPU may have no compiler
    compiled = {"torch_compile": True, "torch_compile_backend": backend}
    settings = {"lora": True, "merge_adapter": False, "optim": "sgd", "learning_rate": 0.1}
    expected = train(tmp_path, device, **settings)
    torch.compiler.reset()
    assert_same_training(train(tmp_path, device, **settings, **compiled), expected)


def test_bfloat16_and_activation_checkpointing_train(tmp_path, device):
    from .models import train

    run = train(tmp_path, device, bf16=True, activation_checkpointing=True)
    assert len(run["logs"]) == 2 and run["logs"].isfinite().all() and run["updates"].isfinite().all()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_fsdp2_on_one_device_makes_the_update_of_a_plain_run(tmp_path, device, lora):
    import torch

    from .models import assert_same_training, train

    settings = {"lora": lora, "optim": "sgd", "learning_rate": 0.1}
    config = ROOT / "examples" / "accelerate_configs" / "fsdp2.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", "1", "--main_process_port", "0", "--mixed_precision", "no"]
    command += ["-m", "tests.gpu.fsdp_worker", str(tmp_path), device.type, json.dumps(settings)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-5000:]
    sharded = torch.load(tmp_path / "fsdp2.pt", weights_only=True)
    # A sharded adapter is not merged for rollouts, which rounds
    assert_same_training(sharded, train(tmp_path / "plain", device, **settings, merge_adapter=False if lora else None))


def test_an_adapter_on_a_quantized_base_trains(tmp_path, device):
    pytest.importorskip("bitsandbytes")
    import torch
    from transformers import BitsAndBytesConfig

    from trl_udm import URSAForImageGeneration
    from trl_udm.worlds.shapes import CHECKPOINT_PATH

    from .models import build_trainer, load_shapes

    pipeline = load_shapes(device)
    pipeline.transformer = URSAForImageGeneration.from_pretrained(
        Path(CHECKPOINT_PATH) / "transformer", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    trainer = build_trainer(tmp_path, device, lora=True, pipeline=pipeline)
    trainer.train()
    trained = [weight for name, weight in trainer.model.named_parameters() if "lora_B" in name]
    assert not trainer.merge_adapter
    assert trained and all(torch.isfinite(weight).all() and weight.any() for weight in trained)
