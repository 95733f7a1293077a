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

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from trl_udm import UDMGRPOTrainer

from .test_udm_grpo_trainer import LORA, PROMPTS, build_args, build_trainer, count_a
from .toy_text_family import ToyTextPipeline, build_toy_text_pipeline


TRAINER_FILES = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "rollout_state_0.pth", "trainer_state.json"}


class KeepWeights(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})


def load_checkpoint(folder, peft_config):
    """State dict of the model that a checkpoint loads as, outside of the trainer."""
    if peft_config is None:
        return ToyTextPipeline.from_pretrained(folder).transformer.state_dict()
    return PeftModel.from_pretrained(build_toy_text_pipeline().transformer, folder).state_dict()


@pytest.mark.parametrize("peft_config", [None, LORA])
def test_no_more_checkpoints_are_kept_than_asked_for_and_they_load(tmp_path, peft_config):
    trainer = build_trainer(
        tmp_path, peft_config=peft_config, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2
    )
    callback = KeepWeights()
    trainer.add_callback(callback)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    for step in (3, 4):
        loaded = load_checkpoint(tmp_path / f"checkpoint-{step}", peft_config)
        for name, tensor in callback.weights[step - 1].items():
            torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)
    assert any(not torch.equal(tensor, callback.weights[2][name]) for name, tensor in callback.weights[3].items())


@pytest.mark.parametrize("peft_config", [None, LORA])
def test_the_best_checkpoint_outlives_the_limit_and_is_the_model_at_the_end(tmp_path, peft_config):
    eval_rewards = iter([0.1, 0.9, 0.2, 0.3])

    def peaks_at_two(completions, **kwargs):
        return [next(eval_rewards)] * len(completions)

    trainer = UDMGRPOTrainer(
        build_toy_text_pipeline(),
        count_a,
        build_args(
            tmp_path,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=1,
            save_only_model=True,
            load_best_model_at_end=True,
            metric_for_best_model="eval_rewards/peaks_at_two/mean",
            per_device_eval_batch_size=8,
        ),
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS,
        peft_config=peft_config,
        eval_reward_funcs=peaks_at_two,
    )
    callback = KeepWeights()
    trainer.add_callback(callback)
    trainer.train()
    assert (tmp_path / "checkpoint-2").is_dir() and not (tmp_path / "checkpoint-1").exists()
    loaded = load_checkpoint(tmp_path / "checkpoint-2", peft_config)
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, callback.weights[1][name], rtol=0, atol=0)
        torch.testing.assert_close(tensor, loaded[name], rtol=0, atol=0)
    assert any(not torch.equal(tensor, callback.weights[3][name]) for name, tensor in callback.weights[1].items())


@pytest.mark.parametrize("peft_config", [None, LORA])
def test_a_checkpoint_of_the_model_only_has_no_optimizer(tmp_path, peft_config):
    names = {}
    for save_only_model in (False, True):
        output_dir = tmp_path / str(save_only_model)
        trainer = build_trainer(
            output_dir, peft_config=peft_config, save_strategy="steps", save_steps=1, save_only_model=save_only_model
        )
        trainer.train()
        names[save_only_model] = {path.name for path in (output_dir / "checkpoint-1").iterdir()}
        loaded = load_checkpoint(output_dir / "checkpoint-1", peft_config)
        for name, tensor in trainer.model.state_dict().items():
            torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)
    assert names[False] - names[True] == TRAINER_FILES - {"trainer_state.json"}
    assert names[True] < names[False]
