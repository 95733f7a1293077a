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

"""Models and runs of the comparisons. Imported by the tests when they run, since it imports everything."""

from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from trl_udm import (
    KineticOptimalScheduler,
    UDMGRPOConfig,
    UDMGRPOTrainer,
    URSAConfig,
    URSAForImageGeneration,
    URSAPipeline,
)
from trl_udm.worlds.shapes import CHECKPOINT_PATH


PROMPTS = [f"a photo of a {color} {shape}" for color in ("red", "blue") for shape in ("circle", "ring")]


def load_shapes(device, dtype=torch.float32):
    """The trained world of shapes."""
    pipeline = URSAPipeline.from_pretrained(CHECKPOINT_PATH, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_network(device, codebook_size=40_000):
    """A network of random weights, by default with more codes than a tile of TRL's fused head holds."""
    torch.manual_seed(0)
    config = URSAConfig(
        text_vocab_size=20,
        codebook_size=codebook_size,
        bov_token_id=19,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    network = URSAForImageGeneration(config)
    torch.nn.init.normal_(network.lm_head.weight, std=0.3)  # far from uniform
    return network.to(device)


def build_scheduler(device, path, codebook_size=128):
    """Of the metric path, computed at once or in tiles, or of the mixture path."""
    scheduler = KineticOptimalScheduler(None if path == "mixture" else 0.9, codebook_size=codebook_size, shift=2.0)
    if path == "tiled metric":
        scheduler.max_untiled_codes = 0
    if path != "mixture":
        scheduler.set_codebook(torch.randn(codebook_size, 8, generator=torch.Generator().manual_seed(0)))
    scheduler.set_timesteps(5, device=device)
    return scheduler


def add_adapter(network):
    """A LoRA that does not start at zero."""
    torch.manual_seed(1)
    model = get_peft_model(network, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model.to(network.device)


def build_trainer(output_dir: Path, device, reward=None, lora=False, pipeline=None, **kwargs):
    """A trainer of shapes for 2 prompts x 2 samples x 2 timesteps, with the red of the image as the default reward."""

    def redness(prompts, completions, **kwargs):
        return [image.resize((1, 1)).getpixel((0, 0))[0] / 255 for image in completions]

    settings = {
        "num_generations": 2,
        "num_train_timesteps": 2,
        "per_device_train_batch_size": 8,
        "num_inference_steps": 4,
        "num_inference_steps_eval": 4,
        "timestep_window": [0, 1],
        "learning_rate": 1e-3,
        "max_steps": 2,
        "bf16": False,
        "use_cpu": device.type == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return UDMGRPOTrainer(
        load_shapes(device) if pipeline is None else pipeline,
        reward or redness,
        UDMGRPOConfig(str(output_dir), **{**settings, **kwargs}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )


def train(output_dir: Path, device, resume=None, **kwargs):
    """Trains. Returns the trained `weights` and their `updates`, on the CPU, and the `logs` of loss and reward."""
    trainer = build_trainer(output_dir, device, **kwargs)
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    initial = {name: weight.detach().cpu().clone() for name, weight in trained.items()}
    trainer.train(resume_from_checkpoint=resume)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    weights = {name: state[name].detach().cpu() for name in initial}
    logs = [(log["loss"], log["reward"]) for log in trainer.state.log_history if "reward" in log]
    return {
        "weights": weights,
        "updates": torch.cat([(weights[name] - initial[name]).flatten() for name in initial]),
        "logs": torch.tensor(logs),
    }


def assert_same_training(actual, expected):
    """Up to rounding. Of plain gradient descent, since Adam would turn the rounding of a gradient of 0 into a step."""
    torch.testing.assert_close(actual["logs"], expected["logs"], atol=1e-2, rtol=1e-2)
    assert (actual["updates"] - expected["updates"]).norm() < 0.02 * expected["updates"].norm()
