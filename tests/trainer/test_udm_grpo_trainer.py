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

import io
import math
import os
import random
import re
import struct
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from PIL import Image
from tensorboardX.proto import event_pb2
from torch import nn
from transformers import TrainerCallback

from trl_udm import KineticOptimalScheduler, UDMGRPOConfig, UDMGRPOTrainer, UniformDDIMScheduler, URSAPipeline
from trl_udm.trainer.udm_grpo_config import RESERVED_COLUMNS

from .toy_text_family import NUM_TOKENS, build_toy_text_pipeline


PROMPTS = Dataset.from_dict(
    {"prompt": ["ab", "abc", "b", "dcba", "c", "da", "bb", "acd"], "target": ["a", "b", "a", "b", "a", "b", "a", "b"]}
)
LORA = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", exclude_modules=["lm_head"])


def count_a(prompts, completions, **kwargs):
    return [completion.count("a") / len(completion) for completion in completions]


def brightness(completions, **kwargs):
    assert all(isinstance(completion, Image.Image) and completion.size == (32, 32) for completion in completions)
    return [sum(completion.getpixel((3, 3))) / 765 for completion in completions]


def build_args(output_dir, **kwargs):
    defaults = {
        "num_generations": 4,
        "per_device_train_batch_size": 24,
        "num_inference_steps": 5,
        "num_inference_steps_eval": 7,
        "learning_rate": 1e-2,
        "max_steps": 1,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return UDMGRPOConfig(str(output_dir), **{**defaults, **kwargs})


def build_trainer(output_dir, reward_funcs=count_a, peft_config=None, **kwargs):
    return UDMGRPOTrainer(
        build_toy_text_pipeline(),
        reward_funcs,
        build_args(output_dir, **kwargs),
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS,
        peft_config=peft_config,
    )


def generate_batch(trainer):
    """One generation batch, as the training loop would ask for it."""
    trainer.model.train()
    rows = next(iter(trainer.get_train_dataloader()))
    return rows, trainer._generate_and_score_completions(rows)


# --- What is trained ---


@pytest.mark.parametrize("peft_config", [None, LORA])
def test_a_second_family_learns_through_the_same_trainer(tmp_path, peft_config):
    trainer = build_trainer(
        tmp_path, peft_config=peft_config, max_steps=15, per_device_train_batch_size=96, num_generations=8, beta=0.0
    )
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert len(rewards) == 15
    # Chance is 1 in 10
    assert rewards[0] < 0.25
    assert sum(rewards[-3:]) / 3 > 0.75


def test_the_trainer_names_no_family():
    for name in (
        "udm_grpo_trainer",
        "udm_grpo_config",
        "completions",
        "checkpoint",
        "adapters",
        "ema",
        "hub",
        "reward_runner",
    ):
        module = sys.modules[UDMGRPOTrainer.__module__.rpartition(".")[0] + "." + name]
        with open(module.__file__) as file:
            code = [line for line in file.read().splitlines() if not line.lstrip().startswith((">>>", "..."))]
        text = "\n".join(code).lower()
        assert not re.findall(r"\b(?:ursa|bov|codebook|vae|qwen|text_vocab)\w*", text), name


def test_full_training_changes_the_weights_and_the_reference_stays(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=3)
    initial = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    for name, tensor in trainer.ref_model.state_dict().items():
        torch.testing.assert_close(tensor, initial[name], rtol=0, atol=0)
    assert any(not torch.equal(tensor, initial[name]) for name, tensor in trainer.model.state_dict().items())
    kl = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-6


def test_lora_training_changes_the_adapter_only_and_the_reference_is_the_model_without_it(tmp_path):
    trainer = build_trainer(tmp_path, peft_config=LORA, max_steps=3)
    assert trainer.ref_model is None
    initial = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    changed = [name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, initial[name])]
    assert changed and all("lora_" in name for name in changed)
    kl = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-8


# --- Rows ---


def test_a_row_is_a_sample_at_a_timestep(tmp_path):
    trainer = build_trainer(tmp_path)
    inputs, batch = generate_batch(trainer)
    assert len(inputs) == 24
    num_prompt_tokens = batch["prompt_ids"].size(1) - NUM_TOKENS
    # Rows of one sample lie side by side and share prompt, action and advantage
    for name in ("completion_ids", "advantages"):
        values = batch[name].view(8, 3, -1)
        assert (values == values[:, :1]).all(), name
    text = batch["prompt_ids"][:, :num_prompt_tokens].view(8, 3, -1)
    assert (text == text[:, :1]).all()
    # Groups of four share their prompt, and their advantages sum to zero
    assert (text.view(2, 12, -1) == text.view(2, 12, -1)[:, :1]).all()
    torch.testing.assert_close(batch["advantages"].view(2, 12).sum(dim=1), torch.zeros(2), rtol=0, atol=1e-5)
    assert batch["num_items_in_batch"] == 24 * NUM_TOKENS
    assert trainer.max_completion_length == NUM_TOKENS


@pytest.mark.parametrize("window", [[0, 0], [2, 2], [0, 2]])
def test_timesteps_are_consecutive_from_a_start_in_the_window(tmp_path, window):
    trainer = build_trainer(tmp_path, timestep_window=window, trajectory="backward", action="intermediate")
    trainer.model.train()
    output = trainer._rollout(["ab"] * 80, "train").output
    # Let the recorded states tell their own step
    steps = torch.arange(5).view(5, 1, 1).expand(5, 80, NUM_TOKENS)
    output.trajectory.noised_samples = steps
    output.trajectory.pred_original_samples = 100 * torch.arange(80).view(1, 80, 1) + steps
    noised_samples, actions, _ = trainer._build_rows(output)
    timesteps = noised_samples[:, 0].view(80, 3)
    assert (timesteps == timesteps[:, :1] + torch.arange(3)).all()
    assert set(timesteps[:, 0].tolist()) == set(range(window[0], window[1] + 1))
    assert (actions[:, 0].view(80, 3) == 100 * torch.arange(80).view(80, 1) + timesteps).all()


@pytest.mark.parametrize("trajectory", ["forward", "backward"])
@pytest.mark.parametrize("action", ["clean", "intermediate"])
def test_the_four_corners_take_their_states_and_actions_from_the_right_place(tmp_path, action, trajectory):
    trainer = build_trainer(tmp_path, action=action, trajectory=trajectory, timestep_window=[1, 1])
    trainer.model.train()
    output = trainer._rollout(["ab"] * 8, "train").output
    noised_samples, actions, _ = trainer._build_rows(output)
    rows = torch.arange(8).repeat_interleave(3)
    timesteps = torch.arange(1, 4).repeat(8)
    if action == "clean":
        assert (actions == output.clean_samples[rows]).all()
    else:
        assert (actions == output.trajectory.pred_original_samples[timesteps, rows]).all()
    if trajectory == "backward":
        assert (noised_samples == output.trajectory.noised_samples[timesteps, rows]).all()
    elif action == "clean":
        assert output.trajectory is None
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_forward_states_keep_tokens_as_often_as_the_path_says(tmp_path):
    trainer = build_trainer(tmp_path, timestep_window=[2, 2], num_train_timesteps=1, per_device_train_batch_size=8)
    trainer.model.train()
    output = trainer._rollout(["ab"] * 2000, "train").output
    noised_samples, actions, _ = trainer._build_rows(output)
    # Mixture path at t = 2 / 5 with 10 tokens: kept with probability 0.4 + 0.6 / 10
    kept = (noised_samples == actions).float().mean().item()
    assert kept == pytest.approx(0.46, abs=4 * math.sqrt(0.46 * 0.54 / (2000 * NUM_TOKENS)))


@pytest.mark.parametrize("window", [[0, 2], [1, 2], [2, 2]])
def test_stratified_timesteps_come_one_from_each_part_and_each_step_is_as_likely(tmp_path, window):
    trainer = build_trainer(tmp_path, timestep_window=window, timestep_sampling="stratified")
    trainer.model.train()
    num_samples = 4000
    output = trainer._rollout(["ab"] * num_samples, "train").output
    _, _, t = trainer._build_rows(output)
    timesteps = (t * 5).round().long().view(num_samples, 3)
    steps = range(window[0], window[1] + 3)
    counts = timesteps.flatten().bincount(minlength=5)[window[0] : window[1] + 3]
    assert counts.sum() == 3 * num_samples
    expected = 3 * num_samples / len(steps)
    assert ((counts - expected).abs() < 5 * math.sqrt(expected)).all()
    for part, column in enumerate(timesteps.T):
        first, last = window[0] + part * len(steps) / 3, window[0] + (part + 1) * len(steps) / 3
        assert column.min() == math.floor(first)
        assert column.max() == math.ceil(last) - 1


def test_shared_noise_is_the_same_for_all_samples_of_a_group_and_for_no_others(tmp_path):
    trainer = build_trainer(tmp_path, timestep_window=[0, 2], shared_noise=True)
    trainer.model.train()
    output = trainer._rollout(["ab"] * 400, "train").output
    output.clean_samples[:] = output.clean_samples[:1].clone()
    noised_samples, _, t = trainer._build_rows(output, group_size=4)
    noised_samples, t = noised_samples.view(100, 4, 3, NUM_TOKENS), t.view(100, 4, 3)
    assert (noised_samples == noised_samples[:, :1]).all()
    assert (t == t[:, :1]).all()
    assert len(noised_samples[:, 0, 2].unique(dim=0)) > 60
    assert len(t[:, 0, 0].unique()) == 3
    # As often as the path says, mixture with 10 tokens
    clean_samples = output.clean_samples[0]
    for step in range(5):
        at_step = noised_samples[:, 0][(t[:, 0] * 5).round() == step]
        if len(at_step) > 0:
            kept, expected = (at_step == clean_samples).float().mean().item(), step / 5 + (1 - step / 5) / 10
            error = math.sqrt(expected * (1 - expected) / at_step.numel())
            assert kept == pytest.approx(expected, abs=4 * error + 1e-6)
    # In a batch of the trainer too
    _, batch = generate_batch(trainer)
    times = batch["prompt_mask"][:, -1].view(2, 4, 3)
    assert (times == times[:, :1]).all()


def test_elbo_weights_enter_the_log_probabilities(tmp_path):
    trainer = build_trainer(tmp_path, timestep_weighting="elbo", timestep_window=[2, 2])
    trainer.pipeline.scheduler = KineticOptimalScheduler(alpha=None, codebook_size=10)
    _, batch = generate_batch(trainer)
    trainer.importance_sampling_level = "token"
    rows = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    weighted, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, rows, mask, NUM_TOKENS)
    trainer.args.timestep_weighting = "none"
    plain, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, rows, mask, NUM_TOKENS)
    moved = batch["prompt_ids"][:, -NUM_TOKENS:] != batch["completion_ids"]
    t = batch["prompt_mask"][:, -1:]  # 2 / 5, 3 / 5, 4 / 5: the last is the last step of the grid
    weights = torch.where(t > 0.7, 5.0, moved / (1 - t))
    torch.testing.assert_close(weighted, weights * plain)


def test_elbo_weights_need_a_scheduler_that_has_them(tmp_path):
    pipeline = build_toy_text_pipeline()
    pipeline.scheduler = UniformDDIMScheduler(codebook_size=10)
    args = build_args(tmp_path, timestep_weighting="elbo")
    with pytest.raises(ValueError, match="`timestep_weighting` must be 'none' with a UniformDDIM.*, got 'elbo'"):
        UDMGRPOTrainer(pipeline, count_a, args, train_dataset=PROMPTS)


# --- Divergence from the reference ---


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4, target_modules="all-linear")])
def test_the_full_divergence_is_that_of_the_whole_vocabulary_at_the_trained_states(tmp_path, peft_config):
    trainer = build_trainer(
        tmp_path, peft_config=peft_config, kl_estimator="full", beta=0.7, gradient_accumulation_steps=1
    )
    _, batch = generate_batch(trainer)
    assert "ref_per_token_logps" not in batch
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    num_rows = len(batch["prompt_ids"])
    prompt_ids, noised_samples = batch["prompt_ids"][:, :-NUM_TOKENS], batch["prompt_ids"][:, -NUM_TOKENS:]
    inputs = (prompt_ids, batch["prompt_mask"][:, :-NUM_TOKENS].long(), noised_samples, trainer.latent_shape)
    log_probs = trainer.pipeline.denoise(*inputs, t=batch["prompt_mask"][:, -1]).log_softmax(dim=-1)
    with torch.no_grad(), trainer._reference_weights() as reference:
        shift = trainer.pipeline.prepare_denoiser_inputs(*inputs, labels=batch["completion_ids"])
        is_label = shift.pop("shift_labels") != -100
        ref_log_probs = reference(**shift).logits[is_label].view(num_rows, NUM_TOKENS, -1).log_softmax(dim=-1)
    kl = (log_probs.exp() * (log_probs - ref_log_probs)).sum(dim=-1).mean()
    batch["advantages"] = torch.zeros_like(batch["advantages"])  # so that the divergence is all of the loss
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, batch)
    assert kl > 0.01
    torch.testing.assert_close(loss, 0.7 * kl, atol=1e-6, rtol=1e-5)
    assert trainer._metrics["train"]["kl"][-1] == pytest.approx(kl.item(), rel=1e-5)
    assert trainer.beta == 0.7
    weights = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    for grad, expected in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(0.7 * kl, weights), strict=True):
        torch.testing.assert_close(grad, expected, atol=1e-6, rtol=1e-4)


def test_the_full_divergence_is_zero_at_the_first_step(tmp_path):
    trainer = build_trainer(
        tmp_path, kl_estimator="full", beta=0.5, max_steps=3, learning_rate=1e-2, per_device_eval_batch_size=3
    )
    trainer.train()
    assert trainer.evaluate()["eval_kl"] > 1e-4  # of 8 prompts, in batches of 3, 3 and 2
    kl = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert abs(kl[0]) < 1e-6
    assert kl[-1] > 1e-4


# --- Ratio ---


def test_the_ratio_is_exactly_one_on_policy(tmp_path):
    trainer = build_trainer(tmp_path, importance_sampling_level="token")
    batch = generate_batch(trainer)[1]
    assert "old_per_token_logps" not in batch
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, batch)
    assert trainer._metrics["train"]["clip_ratio/region_mean"] == [0.0]


@pytest.mark.parametrize("kwargs", [{"num_iterations": 2}, {"steps_per_generation": 2}])
def test_old_log_probabilities_are_the_rollout_policys_when_several_updates_follow(tmp_path, kwargs):
    trainer = build_trainer(tmp_path, max_steps=2, **kwargs)
    batch = generate_batch(trainer)[1]
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logps = trainer._get_per_token_logps_and_entropies(trainer.model, input_ids, mask, NUM_TOKENS)[0]
    torch.testing.assert_close(batch["old_per_token_logps"], logps)
    assert logps.shape == (len(input_ids), 1)
    trainer.train()
    clipped = [log["clip_ratio/region_mean"] for log in trainer.state.log_history if "loss" in log]
    # The first update is on policy; the second sees a ratio that has left 1 ± 1e-4
    assert clipped[0] == 0.0 and clipped[1] > 0.0


def test_log_probabilities_equal_a_direct_forward(tmp_path):
    trainer = build_trainer(tmp_path, importance_sampling_level="token")
    batch = generate_batch(trainer)[1]
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logps, entropies, aux_loss = trainer._get_per_token_logps_and_entropies(
            trainer.model, input_ids, mask, NUM_TOKENS, batch_size=7, compute_entropy=True
        )
        logits = trainer.pipeline.denoise(
            batch["prompt_ids"][:, :-NUM_TOKENS],
            batch["prompt_mask"][:, :-NUM_TOKENS],
            batch["prompt_ids"][:, -NUM_TOKENS:],
            trainer.latent_shape,
        ).log_softmax(dim=-1)
    torch.testing.assert_close(
        logps, logits.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(entropies, -(logits.exp() * logits).sum(dim=-1), rtol=1e-5, atol=1e-5)
    assert aux_loss is None


def test_batch_and_accumulation_splits_give_the_same_update(tmp_path):
    weights = []
    for batch_size, accumulation in ((48, 1), (24, 2), (12, 4)):
        trainer = build_trainer(
            tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=2
        )
        trainer.train()
        weights.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_seeded_run_repeats_itself(tmp_path):
    losses = []
    for _ in range(2):
        trainer = build_trainer(tmp_path, max_steps=2)
        trainer.train()
        losses.append([(log["loss"], log["reward"]) for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1]


# --- Rollouts and evaluation ---


def test_evaluation_has_its_own_steps_and_generations(tmp_path):
    trainer = build_trainer(tmp_path, num_generations_eval=2, per_device_eval_batch_size=8)
    metrics = trainer.evaluate()
    assert trainer.pipeline.scheduler.num_inference_steps == 7
    assert 0 <= metrics["eval_reward"] <= 1 and "eval_kl" in metrics and "eval_entropy" in metrics


def test_guided_rollouts_use_the_empty_prompt(tmp_path):
    trainer = build_trainer(tmp_path, guidance_scale=2.0)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_rollouts_come_in_micro_batches(tmp_path):
    trainer = build_trainer(tmp_path, rollout_batch_size=3, action="intermediate")
    trainer.model.train()
    rollout = trainer._rollout(["ab", "b"] * 4, "train")
    prompt_ids, prompt_mask, output = rollout.prompt_ids, rollout.prompt_mask, rollout.output
    completions = rollout.completions
    assert prompt_ids.size(0) == prompt_mask.size(0) == output.clean_samples.size(0) == len(completions) == 8
    assert output.trajectory.noised_samples.shape == (5, 8, NUM_TOKENS)
    assert completions == trainer.pipeline.decode(output.clean_samples, trainer.latent_shape)


def test_decoding_has_micro_batches_of_its_own(tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path, rollout_batch_size=5, decode_batch_size=2)
    decode, sizes = trainer.pipeline.decode, []
    monkeypatch.setattr(
        trainer.pipeline, "decode", lambda samples, shape: (sizes.append(len(samples)), decode(samples, shape))[1]
    )
    rollout = trainer._rollout(["ab", "b"] * 4, "train")
    output, completions = rollout.output, rollout.completions
    assert sizes == [2, 2, 1, 2, 1]
    assert completions == decode(output.clean_samples, trainer.latent_shape)


# --- Rewards ---


def test_reward_functions_get_the_columns_of_each_sample(tmp_path):
    seen = {}

    def reward(prompts, completions, target, completion_ids, **kwargs):
        seen.update(prompts=prompts, target=target, completion_ids=completion_ids)
        assert "log_metric" in kwargs and "trainer_state" in kwargs
        kwargs["log_metric"]("letters", 3.0)
        return [1.0] * len(completions)

    trainer = build_trainer(tmp_path, reward)
    trainer.train()
    by_prompt = dict(zip(PROMPTS["prompt"], PROMPTS["target"], strict=True))
    assert len(seen["prompts"]) == 8 and seen["target"] == [by_prompt[prompt] for prompt in seen["prompts"]]
    assert len(seen["completion_ids"][0]) == NUM_TOKENS
    assert trainer.state.log_history[0]["letters"] == 3.0
    assert trainer.state.log_history[0]["frac_reward_zero_std"] == 1.0


def test_several_weighted_rewards_and_an_async_one(tmp_path):
    async def half(completions, **kwargs):
        return [0.5] * len(completions)

    def abstain(completions, **kwargs):
        return [None] * len(completions)

    trainer = build_trainer(tmp_path, [count_a, half, abstain], reward_weights=[2.0, 4.0, 1.0])
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rewards/half/mean"] == 0.5 and log["rewards/abstain/mean"] is None
    assert log["reward"] == pytest.approx(2 * log["rewards/count_a/mean"] + 2)


@pytest.mark.parametrize("reward_weights", [None, [2.0]])
def test_eval_rewards_are_called_in_evaluation_only_and_count_for_nothing(tmp_path, reward_weights):
    calls = []

    def count_b(prompts, completions, **kwargs):
        calls.append("count_b")
        return [completion.count("b") / len(completion) for completion in completions]

    async def fixed(prompts, completions, **kwargs):
        calls.append("fixed")
        return [0.25] * len(completions)

    weights = []
    for eval_reward_funcs in (None, [count_b, fixed]):
        trainer = UDMGRPOTrainer(
            build_toy_text_pipeline(),
            count_a,
            build_args(tmp_path, reward_weights=reward_weights, log_completions=True),
            train_dataset=PROMPTS,
            eval_dataset=PROMPTS,
            eval_reward_funcs=eval_reward_funcs,
        )
        trainer.train()
        assert not calls
        weights.append(trainer.model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=0)
    assert not any("count_b" in name or "fixed" in name for name in trainer.state.log_history[0])

    metrics = trainer.evaluate()
    assert sorted(set(calls)) == ["count_b", "fixed"]
    assert metrics["eval_rewards/fixed/mean"] == 0.25 and 0 <= metrics["eval_rewards/count_b/mean"] <= 1
    weight = 1.0 if reward_weights is None else 2.0
    assert metrics["eval_reward"] == pytest.approx(weight * metrics["eval_rewards/count_a/mean"])


def test_a_model_is_refused_as_an_eval_reward(tmp_path):
    with pytest.raises(TypeError, match="`eval_reward_funcs` must be functions, got a `Linear`"):
        UDMGRPOTrainer(
            build_toy_text_pipeline(),
            count_a,
            build_args(tmp_path),
            train_dataset=PROMPTS,
            eval_reward_funcs=torch.nn.Linear(1, 1),
        )


def test_a_sample_that_only_a_reward_of_weight_zero_scored_leaves_its_group_alone(tmp_path):
    trainer = build_trainer(tmp_path, [count_a, brightness], reward_weights=[1.0, 0.0])
    rewards = torch.tensor([[1.0, 5.0], [float("nan"), 7.0], [0.0, float("nan")], [0.5, 3.0]])
    advantages = trainer._compute_advantages(rewards, 4)[0]
    std = torch.tensor([1.0, 0.0, 0.5]).std(unbiased=False)
    torch.testing.assert_close(advantages, torch.tensor([0.5, 0.0, -0.5, 0.0]) / (std + 1e-4), rtol=1e-5, atol=1e-6)


def test_a_sample_without_reward_gets_no_advantage_and_leaves_the_others_alone(tmp_path):
    trainer = build_trainer(tmp_path)
    rewards = torch.tensor([[1.0], [float("nan")], [0.0], [0.5], [1.0], [1.0], [1.0], [1.0]])
    advantages = trainer._compute_advantages(rewards, 4)[0]
    std = torch.tensor([1.0, 0.0, 0.5]).std(unbiased=False)
    expected = torch.tensor([0.5, 0.0, -0.5, 0.0, 0, 0, 0, 0]) / (std + 1e-4)
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_advantages_of_several_rewards_by_hand(tmp_path, aggregation):
    trainer = build_trainer(
        tmp_path, [count_a, brightness], reward_weights=[1.0, 3.0], multi_objective_aggregation=aggregation
    )
    first, second = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 4.0, 4.0])
    advantages = trainer._compute_advantages(torch.stack([first, second], dim=1), 4)[0]
    if aggregation == "sum_then_normalize":
        total = first + 3 * second
    else:
        total = (first - 0.5) / (0.5 + 1e-4) + 3 * (second - 2) / (2 + 1e-4)
    expected = (total - total.mean()) / (total.std(unbiased=False) + 1e-4)
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-6)


def test_negative_advantages_are_scaled(tmp_path):
    plain, scaled = (
        build_trainer(tmp_path, negative_advantage_scale=scale)._compute_advantages(
            torch.tensor([[1.0], [2.0], [3.0], [6.0]]), 4
        )[0]
        for scale in (1.0, 0.25)
    )
    torch.testing.assert_close(scaled, torch.where(plain < 0, 0.25 * plain, plain))
    assert (plain[:2] < 0).all()


def test_advantages_are_clipped(tmp_path):
    trainer = build_trainer(tmp_path, num_generations=8, per_device_train_batch_size=24, advantage_clip=2.0)
    advantages = trainer._compute_advantages(torch.tensor([[1.0]] + [[0.0]] * 7), 8)[0]
    assert advantages.max() == 2.0
    trainer.args.advantage_clip = None
    assert trainer._compute_advantages(torch.tensor([[1.0]] + [[0.0]] * 7), 8)[0].max() > 2.6


def failing(prompts, **kwargs):
    raise KeyError("no such column")


def too_few(prompts, completions, **kwargs):
    return [1.0]


def infinite(prompts, completions, **kwargs):
    return [float("inf")] * len(completions)


def silent(prompts, completions, **kwargs):
    return [float("nan")] * len(completions)


def absent(prompts, completions, **kwargs):
    return [None] * len(completions)


def verbose(prompts, completions, **kwargs):
    return ["0.5"] * len(completions)


async def failing_later(prompts, **kwargs):
    raise KeyError("no such column")


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (failing, RuntimeError, "'failing' failed on 8 prompts, the first of which is '[abcd]+'"),
        (failing_later, RuntimeError, "'failing_later' failed on 8 prompts, the first of which is '[abcd]+'"),
        (
            too_few,
            ValueError,
            "'too_few' must return one reward a completion, but returned 1 on 8 prompts, .*'[abcd]+'",
        ),
        (infinite, ValueError, "'infinite' returned inf for the prompt '[abcd]+'"),
        (silent, ValueError, "'silent' returned NaN and no number on 8 prompts, the first of which is '[abcd]+'"),
        (verbose, TypeError, "'verbose' must return numbers or None, but returned '0.5' for the prompt '[abcd]+'"),
    ],
)
def test_a_bad_reward_function_is_named_with_its_prompt_and_moves_no_weight(tmp_path, reward, error, message):
    trainer = build_trainer(tmp_path, reward)
    initial = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(error, match=message):
        trainer.train()
    assert all(torch.equal(tensor, initial[name]) for name, tensor in trainer.model.state_dict().items())


def test_one_reward_that_is_nan_throughout_is_named_among_others(tmp_path):
    with pytest.raises(ValueError, match="'silent' returned NaN and no number on 8 prompts"):
        build_trainer(tmp_path, [count_a, silent]).train()


@pytest.mark.parametrize("reward_error", ["raise", "none"])
def test_rewards_that_all_abstain_are_no_failure_and_one_of_weight_zero_does_not_stand_in(tmp_path, reward_error):
    trainer = build_trainer(
        tmp_path,
        [absent, count_a],
        reward_weights=[1.0, 0.0],
        reward_error=reward_error,
        max_failed_steps=0,
        beta=0.0,
        weight_decay=0.0,
    )
    initial = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    assert all(torch.equal(tensor, initial[name]) for name, tensor in trainer.model.state_dict().items())
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] is None and metrics["eval_rewards/count_a/mean"] >= 0
    assert trainer.state.log_history[0]["reward"] is None


# --- Logging and saving ---


def test_image_completions_are_logged_as_a_grid_and_a_table(tmp_path, oracle_dir, capsys):
    trainer = UDMGRPOTrainer(
        URSAPipeline.from_pretrained(oracle_dir / "tiny-ursa", max_prompt_length=16),
        brightness,
        build_args(tmp_path, log_completions=True, pipeline_kwargs={"height": 32, "width": 32}),
        train_dataset=PROMPTS,
    )
    trainer.train()
    with Image.open(tmp_path / "completions" / "completions_00001.png") as grid:
        assert grid.width > 3 * 160 and grid.height > 3 * 160
    assert (tmp_path / "completions" / "completions_00001.parquet").exists()
    assert len(trainer._logs["images"]) == 8
    printed = capsys.readouterr().out
    assert printed.count("<image>") == 2 * 3  # with the summary
    files = f"{tmp_path}/completions/completions_00001"
    assert f"All 8 completions are in {files}.parquet, with images in {files}.png\n" in printed
    logs = trainer.state.log_history[0]
    assert {"reward", "kl", "entropy", "clip_ratio/region_mean", "step_time", "rewards/brightness/mean"} <= set(logs)
    assert 0 <= logs["images/dark_fraction"] <= 1 and 0 < logs["images/saturation"] < 1


@pytest.mark.parametrize(("num_printed", "count"), [(3, 3), (0, 0), (None, 8)])
def test_a_few_completions_are_printed_and_all_are_kept(tmp_path, capsys, num_printed, count):
    options = {} if num_printed == 3 else {"num_completions_to_print": num_printed}
    trainer = build_trainer(tmp_path, count_a, log_completions=True, **options)
    generate_batch(trainer)
    state = random.getstate()
    trainer.log({"loss": 0.0})
    assert random.getstate() == state  # which reward functions may use
    printed = capsys.readouterr().out
    assert len(re.findall(r"^│ │ ", printed, flags=re.MULTILINE)) == count
    path = tmp_path / "completions" / "completions_00000.parquet"
    assert f"All 8 completions are in {path}\n" in printed
    assert len(pd.read_parquet(path)) == 8


def test_tensorboard_gets_the_grid_of_images(tmp_path, oracle_dir, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    trainer = UDMGRPOTrainer(
        URSAPipeline.from_pretrained(oracle_dir / "tiny-ursa", max_prompt_length=16),
        brightness,
        build_args(
            tmp_path, log_completions=True, report_to="tensorboard", pipeline_kwargs={"height": 32, "width": 32}
        ),
        train_dataset=PROMPTS,
    )
    trainer.train()
    (path,) = (tmp_path / "tensorboard").rglob("events.out.tfevents.*")
    logged = {}
    with path.open("rb") as file:
        # A record: the length of the event in 8 bytes, 4 bytes of checksum, the event, 4 bytes of checksum
        while header := file.read(12):
            event = event_pb2.Event.FromString(file.read(struct.unpack("<Q", header[:8])[0]))
            file.read(4)
            logged |= {value.tag: (event.step, value) for value in event.summary.value}
    step, value = logged["completions"]
    assert step == 1
    with Image.open(tmp_path / "completions" / "completions_00001.png") as grid:
        sent = Image.open(io.BytesIO(value.image.encoded_image_string))
        np.testing.assert_array_equal(np.asarray(sent), np.asarray(grid))
    assert logged["train/reward"][1].simple_value == pytest.approx(trainer.state.log_history[0]["reward"])


def test_a_full_run_saves_a_pipeline_and_resumes_from_it(tmp_path, oracle_dir):
    class StopAtTwo(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    def build(callbacks=None):
        return UDMGRPOTrainer(
            URSAPipeline.from_pretrained(oracle_dir / "tiny-ursa", max_prompt_length=16),
            brightness,
            build_args(
                tmp_path,
                max_steps=3,
                save_strategy="steps",
                save_steps=2,
                learning_rate=1e-3,
                pipeline_kwargs={"height": 32, "width": 32},
            ),
            train_dataset=PROMPTS,
            callbacks=callbacks,
        )

    whole = build()
    whole.train()
    loaded = URSAPipeline.from_pretrained(tmp_path / "checkpoint-2")
    first = build([StopAtTwo()])
    first.train()
    for name, tensor in first.model.state_dict().items():
        torch.testing.assert_close(loaded.transformer.state_dict()[name], tensor, rtol=0, atol=0)
    second = build()
    initial = {name: tensor.clone() for name, tensor in second.model.state_dict().items()}
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    # The reference is the initial policy still
    for name, tensor in second.ref_model.state_dict().items():
        torch.testing.assert_close(tensor, initial[name], rtol=0, atol=0)


def test_a_lora_run_saves_an_adapter_that_loads_two_ways(tmp_path, oracle_dir):
    trainer = UDMGRPOTrainer(
        URSAPipeline.from_pretrained(oracle_dir / "tiny-ursa", max_prompt_length=16),
        brightness,
        build_args(tmp_path, pipeline_kwargs={"height": 32, "width": 32}),
        train_dataset=PROMPTS,
        peft_config=LORA,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    pipe = URSAPipeline.from_pretrained(oracle_dir / "tiny-ursa", max_prompt_length=16)
    prompt_ids, prompt_mask = pipe.encode_prompt(["ab"])
    inputs = (prompt_ids, prompt_mask, torch.arange(64).unsqueeze(0), (1, 8, 8))
    with torch.no_grad():
        base, expected = pipe.denoise(*inputs), trainer.pipeline.denoise(*inputs)
        assert not torch.allclose(base, expected, atol=1e-4)
        pipe.load_lora_weights(tmp_path / "adapter")
        torch.testing.assert_close(pipe.denoise(*inputs), expected, rtol=1e-5, atol=1e-5)
        other = URSAPipeline.from_pretrained(oracle_dir / "tiny-ursa", max_prompt_length=16)
        PeftModel.from_pretrained(other.transformer, str(tmp_path / "adapter"))
        torch.testing.assert_close(other.denoise(*inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("peft_config", [None, LORA])
def test_the_best_model_is_loaded_at_the_end(tmp_path, peft_config):
    eval_rewards = iter([0.1, 0.9, 0.2])

    def falls_at_the_end(completions, **kwargs):
        return [next(eval_rewards)] * len(completions)

    class KeepWeights(TrainerCallback):
        weights = []

        def on_step_end(self, args, state, control, model, **kwargs):
            self.weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    callback = KeepWeights()
    trainer = UDMGRPOTrainer(
        build_toy_text_pipeline(),
        count_a,
        build_args(
            tmp_path,
            max_steps=3,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_rewards/falls_at_the_end/mean",
            per_device_eval_batch_size=8,
        ),
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS,
        callbacks=[callback],
        peft_config=peft_config,
        eval_reward_funcs=falls_at_the_end,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    changed = False
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, callback.weights[1][name], rtol=0, atol=0)
        changed = changed or not torch.equal(tensor, callback.weights[2][name])
    assert changed


# --- Bad input ---


def test_a_pipeline_is_needed(tmp_path):
    with pytest.raises(TypeError, match="`pipeline` must be a `UDMPipeline`, got str"):
        UDMGRPOTrainer("gpt2", count_a, build_args(tmp_path), train_dataset=PROMPTS)


def test_a_reward_function_is_needed(tmp_path):
    with pytest.raises(ValueError, match="`reward_funcs` must have at least one function, got none"):
        UDMGRPOTrainer(build_toy_text_pipeline(), [], build_args(tmp_path), train_dataset=PROMPTS)


def test_a_loaded_adapter_is_not_overwritten(tmp_path):
    pipeline = build_toy_text_pipeline()
    pipeline.transformer.add_adapter(LORA)
    with pytest.raises(
        ValueError, match=r"has adapters already \(\['default'\]\).* Merge them into the weights first"
    ):
        UDMGRPOTrainer(pipeline, count_a, build_args(tmp_path), train_dataset=PROMPTS, peft_config=LORA)


def test_weights_in_half_precision_are_warned_of(tmp_path, caplog):
    for peft_config, is_warned in ((None, True), (LORA, False)):
        caplog.clear()
        pipeline = build_toy_text_pipeline()
        pipeline.transformer.bfloat16()
        UDMGRPOTrainer(pipeline, count_a, build_args(tmp_path), train_dataset=PROMPTS, peft_config=peft_config)
        assert ("All weights are trained, in torch.bfloat16" in caplog.text) is is_warned


def test_dropout_of_an_adapter_is_off(tmp_path):
    dropped = LoraConfig(r=8, target_modules="all-linear", exclude_modules=["lm_head"], lora_dropout=0.5)
    trainer = build_trainer(tmp_path, peft_config=dropped)
    dropouts = [module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts and set(dropouts) == {0}


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (
            Dataset.from_dict({"text": ["a"]}),
            ValueError,
            r"`train_dataset` must have a column 'prompt', got \['text'\]",
        ),
        (Dataset.from_dict({"prompt": []}), ValueError, "`train_dataset` must have at least one row"),
        *(
            (Dataset.from_dict({"prompt": ["a"], name: [1]}), ValueError, rf"must not have the columns \['{name}'\]")
            for name in sorted(RESERVED_COLUMNS)
        ),
        (
            Dataset.from_dict({"prompt": ["a"]}),
            ValueError,
            r"`train_dataset` must have at least the 2 prompts of a generation batch .* got 1\. Repeat its rows",
        ),
        (None, TypeError, "`train_dataset` must be a `Dataset`, got `NoneType`"),
        (
            IterableDataset.from_generator(lambda: iter([{"prompt": "a"}])),
            TypeError,
            "`train_dataset` must be a `Dataset`, got an `IterableDataset`. Prompts are small",
        ),
    ],
)
def test_a_bad_dataset_is_refused(tmp_path, dataset, error, message):
    with pytest.raises(error, match=message):
        UDMGRPOTrainer(build_toy_text_pipeline(), count_a, build_args(tmp_path), train_dataset=dataset)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_generations": 1}, "`num_generations` must be >= 2, got 1"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be > 0, got 0"),
        ({"num_train_timesteps": 0}, "`num_train_timesteps` must be > 0, got 0"),
        ({"action": "noisy"}, "`action` must be 'clean' or 'intermediate', got 'noisy'"),
        ({"trajectory": "sideways"}, "`trajectory` must be 'forward' or 'backward', got 'sideways'"),
        (
            {"timestep_window": [0, 3]},
            r"`timestep_window` must end at 2 at the latest, for 3 training .* got \[0, 3\]",
        ),
        (
            {"num_inference_steps": 2},
            "`num_train_timesteps` must be at most 2, the .* grid, got 3. Lower it, or raise `num_inference_steps`.",
        ),
        ({"timestep_window": [2, 1]}, r"`timestep_window` must be \[first, last\].* got \[2, 1\]"),
        ({"timestep_window": [-1, 1]}, r"`timestep_window` must be \[first, last\].* got \[-1, 1\]"),
        ({"guidance_trunc": 1.5}, r"`guidance_trunc` must be in \[0, 1\], got 1.5"),
        ({"timestep_sampling": "random"}, r"`timestep_sampling` must be one of \('consecutive', .*, got 'random'"),
        ({"timestep_weighting": "snr"}, "`timestep_weighting` must be 'none' or 'elbo', got 'snr'"),
        (
            {"timestep_weighting": "elbo", "trajectory": "backward"},
            "`timestep_weighting` must be 'none' with `action='clean'` and `trajectory='backward'`, got 'elbo'",
        ),
        ({"negative_advantage_scale": -0.1}, "`negative_advantage_scale` must be >= 0, got -0.1"),
        ({"kl_estimator": "k1"}, "`kl_estimator` must be 'k3' or 'full', got 'k1'"),
        (
            {"lr_scheduler_type": "polynomial", "max_steps": 10, "warmup_steps": 10},
            "`warmup_steps` must differ from `max_steps` with `lr_scheduler_type='polynomial'`, got 10 and 10: .*=9`",
        ),
        (
            {"lr_scheduler_type": "polynomial", "max_steps": 1, "warmup_steps": 0.5},
            "`warmup_steps` must differ from `max_steps` .*, got 0.5 and 1: .* Set `warmup_steps=0`",
        ),
        ({"advantage_clip": 0.0}, "`advantage_clip` must be > 0 or None, got 0.0"),
        ({"rollout_batch_size": 0}, "`rollout_batch_size` must be > 0 or None, got 0"),
        ({"decode_batch_size": -1}, "`decode_batch_size` must be > 0 or None, got -1"),
        (
            {"num_inference_steps": 9, "num_inference_steps_eval": 4},
            r"`timestep_window` must end at 1 at the latest, .* or raise `num_inference_steps_eval`",
        ),
        ({"scale_rewards": "groups"}, r"`scale_rewards` must be one of \('group', 'batch', 'none'\), got 'groups'"),
        ({"multi_objective_aggregation": "sum"}, "`multi_objective_aggregation` must be one of .*, got 'sum'"),
        (
            {"num_generations_eval": 3, "per_device_eval_batch_size": 8},
            r"An evaluation batch of 8 samples .* must hold whole groups of `num_generations_eval` 3",
        ),
        ({"top_entropy_quantile": 0.5}, "`top_entropy_quantile` must be 1.0 with .*'sequence'.*, got 0.5"),
        ({"loss_type": "cispo"}, "`epsilon_high` must be >= 1 with `loss_type='cispo'`, got 0.0001"),
        ({"temperature": 0.5}, "`temperature` must be 1.0, got 0.5"),
        ({"use_vllm": True}, "`use_vllm` must be False, got True"),
        (
            {"per_device_train_batch_size": 20},
            r"20 rows .* whole groups of 12 rows .* Nearest valid `per_device_train_batch_size`: 12 or 24; nearest "
            r"valid `num_generations`: none",
        ),
        (
            {"per_device_train_batch_size": 30, "num_generations": 4},
            "Nearest valid `per_device_train_batch_size`: 24 or 36; nearest valid `num_generations`: 2 or 5",
        ),
    ],
)
def test_a_bad_configuration_is_refused_by_name(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_args(tmp_path, **kwargs)


def test_each_process_needs_whole_samples():
    code = "from trl_udm import UDMGRPOConfig; UDMGRPOConfig('x', per_device_train_batch_size=28, num_generations=7)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "WORLD_SIZE": "3"}
    )
    assert "28 * 1 steps * 3 processes) must hold whole groups of 21 rows" in result.stderr
    assert "Nearest valid `per_device_train_batch_size`: 21 or 42" in result.stderr


def test_each_process_needs_whole_groups_with_shared_noise():
    code = "from trl_udm import UDMGRPOConfig; UDMGRPOConfig('x', per_device_train_batch_size=12, shared_noise=True)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "WORLD_SIZE": "2"}
    )
    assert "each process whole groups, for `shared_noise`" in result.stderr
    assert "Nearest valid `per_device_train_batch_size`: 24" in result.stderr


@pytest.mark.parametrize("name", ["batch_size", "steps"])
def test_the_default_geometry_is_valid(tmp_path, name):
    kwargs = {"gradient_accumulation_steps": 16} if name == "steps" else {}
    assert UDMGRPOConfig(str(tmp_path), bf16=False, **kwargs).generation_batch_size % 24 == 0
