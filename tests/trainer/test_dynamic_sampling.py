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
from datasets import Dataset

from trl_udm import DFlowDPOConfig, DFlowGRPOConfig, DFlowGRPOTrainer, UDMGRPOConfig, UDMGRPOTrainer

from .test_resume import assert_equal
from .toy_text_family import build_toy_text_pipeline


PROMPTS = Dataset.from_dict({"prompt": ["ab", "b", "abc", "bb", "c", "d", "dc", "ba"], "is_solved": [False, True] * 4})
BOTH = {"drop_zero_variance": True, "resample_zero_variance": 2}


def score(completions, is_solved, **kwargs):
    """Rewards that differ, but for solved prompts, whose samples all have 1."""
    rewards = [ord(completion[0]) + i / 7 for i, completion in enumerate(completions)]
    return [1.0 if solved else reward for solved, reward in zip(is_solved, rewards, strict=True)]


# 4 groups of 4 samples, of which the second and the fourth group are solved, and plain gradient descent
DEFAULTS = {
    "num_generations": 4,
    "per_device_train_batch_size": 48,
    "shuffle_dataset": False,
    "num_inference_steps": 5,
    "num_inference_steps_eval": 5,
    "beta": 0.0,
    "optim": "sgd",
    "learning_rate": 1.0,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "max_steps": 1,
    "save_steps": 1,
    "logging_steps": 1,
    "bf16": False,
    "activation_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
}


def build(output_dir, trainer_class=UDMGRPOTrainer, dataset=PROMPTS, **kwargs):
    args = trainer_class._config_class(str(output_dir), **{**DEFAULTS, **kwargs})
    return trainer_class(build_toy_text_pipeline(), score, args, train_dataset=dataset, eval_dataset=dataset)


def generate(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def change(trainer):
    """What training does to the weights, as one vector."""
    before = torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()
    trainer.train()
    return torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach() - before


@pytest.mark.parametrize("options", [{"action": "intermediate"}, {"async_rewards": True, "beta": 0.1}])
def test_where_all_groups_have_spread_nothing_changes(tmp_path, options):
    options |= {"per_device_train_batch_size": 24, "steps_per_generation": 2, "gradient_accumulation_steps": 2}
    dataset = PROMPTS.select(range(0, 8, 2))
    changes = [change(build(tmp_path, dataset=dataset, **options, **dynamic)) for dynamic in ({}, BOTH)]
    assert changes[0].abs().max() > 0
    assert torch.equal(*changes)


# Half of the 4 * 4 * 3 rows cannot be shared out among 16 parts, so that groups without spread fill them up
@pytest.mark.parametrize(("num_parts", "num_groups"), [(1, 2), (16, 4)])
def test_rows_without_spread_are_dropped_and_the_loss_is_the_mean_of_the_others(tmp_path, num_parts, num_groups):
    options = {"steps_per_generation": num_parts, "gradient_accumulation_steps": num_parts}
    # Of states that do not depend on the other samples
    options |= {"per_device_train_batch_size": 48 // num_parts, "trajectory": "backward", "timestep_window": [0, 0]}
    assert len(generate(build(tmp_path, drop_zero_variance=True, **options))["advantages"]) == num_groups * 4 * 3
    changes = [change(build(tmp_path, drop_zero_variance=drop, **options)) for drop in (False, True)]
    torch.testing.assert_close(changes[1], 2 * changes[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_draws", [1, 20])
def test_groups_without_spread_are_replaced_up_to_a_bound(tmp_path, num_draws):
    trainer = build(tmp_path, resample_zero_variance=num_draws)
    batch, metrics = generate(trainer), trainer._metrics["train"]
    advantages = batch["advantages"][::3].view(4, 4)
    has_spread = advantages.abs().amax(dim=1) > 0
    (samples_drawn,), (frac_resampled,) = metrics["samples_drawn"], metrics["frac_resampled"]
    if num_draws == 1:
        assert samples_drawn == 16 + 2 * 4
    else:
        assert has_spread.all() and samples_drawn >= 24
    assert frac_resampled == (has_spread.sum() - 2) / 4
    assert metrics["frac_reward_zero_std"] == [0.5]  # metrics are those of the first draw
    assert len(trainer._logs["prompt"]) == 0 and not trainer._pending_metrics


def test_a_batch_without_any_spread_is_drawn_again_and_drops_to_one_group(tmp_path):
    trainer = build(tmp_path, dataset=PROMPTS.select(range(1, 8, 2)), **BOTH)
    batch = generate(trainer)
    assert trainer._metrics["train"]["samples_drawn"] == [3 * 16.0]
    assert len(batch["advantages"]) == 4 * 3 and not batch["advantages"].any()


def test_nothing_is_drawn_again_where_no_sample_has_a_reward(tmp_path):
    trainer = build(tmp_path, reward_error="none", **BOTH)
    trainer.reward_funcs[0].abstains = lambda: True
    batch = generate(trainer)
    assert trainer._metrics["train"]["samples_drawn"] == [16.0] and not batch["advantages"].any()


def test_a_run_with_dynamic_sampling_goes_on_as_if_nothing_had_happened(tmp_path):
    outcomes = []
    for folder, max_steps, resume in (("unbroken", 6, False), ("broken", 3, False), ("broken", 6, True)):
        options = {"num_iterations": 2, "learning_rate": 1e-3, "optim": "adamw_torch", **BOTH}
        trainer = build(tmp_path / folder, max_steps=max_steps, shuffle_dataset=True, **options)
        trainer.train(resume_from_checkpoint=resume)
        outcomes.append((trainer.model.state_dict(), trainer.optimizer.state_dict(), torch.rand(1)))
    assert_equal(outcomes[0], outcomes[2])
    logs = [log for log in trainer.state.log_history if "samples_drawn" in log]
    assert max(log["samples_drawn"] for log in logs) > 16 and max(log["frac_resampled"] for log in logs) > 0


def test_evaluation_is_as_without_dynamic_sampling(tmp_path):
    metrics = [build(tmp_path, **dynamic).evaluate() for dynamic in ({}, BOTH)]
    assert "eval_samples_drawn" not in metrics[1]
    assert metrics[0]["eval_reward"] == metrics[1]["eval_reward"]
    assert metrics[0]["eval_loss"] == metrics[1]["eval_loss"]


def test_steps_of_the_sampler_are_resampled_too(tmp_path):
    options = {"num_train_timesteps": 3, "timestep_window": [0, 0], "num_iterations": 2}
    trainer = build(tmp_path, DFlowGRPOTrainer, resample_zero_variance=20, **options)
    batch = generate(trainer)
    assert batch["advantages"].view(4, -1).any(dim=1).all() and len(batch["draws"]) == 48
    # The rows of a group are those that its prompt drew: the old policy is the current one
    logps, _ = trainer._score_draws(trainer.model, batch, "train")
    torch.testing.assert_close(batch["old_per_token_logps"], logps)


def test_options_are_checked(tmp_path):
    with pytest.raises(ValueError, match="`resample_zero_variance` must be >= 0, got -1"):
        UDMGRPOConfig(str(tmp_path), bf16=False, resample_zero_variance=-1)
    assert DFlowGRPOConfig(str(tmp_path), bf16=False, **BOTH).drop_zero_variance
    with pytest.raises(ValueError, match="`drop_zero_variance` must be False: pairs of equal reward"):
        DFlowDPOConfig(str(tmp_path), bf16=False, drop_zero_variance=True)
