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

"""
Numbers of the authors' code of dFlowGRPO (WanZhengyan/dFlowGRPO, commit aa81e50) on a tiny FUDOKI: factors, ratios,
advantages, losses and gradients of a recorded rollout, and four updates of their training script.
"""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file

from trl_udm import (
    DFlowDPOConfig,
    DFlowDPOTrainer,
    DFlowGRPOConfig,
    DFlowGRPOTrainer,
    FUDOKIPipeline,
    UDMGRPOConfig,
    UDMGRPOTrainer,
)
from trl_udm.dflow_grpo.dflow_grpo_trainer import log_mean_exp
from trl_udm.pipelines.pipeline_output import UDMSamplerOutput, UDMTrajectory
from trl_udm.trainer.udm_grpo_trainer import Rollout


NUM_STEPS, NUM_SAMPLES, NUM_TOKENS = 4, 4, 16
POLICIES = ("old", "small", "medium")


@pytest.fixture(scope="module")
def folder(oracle_dir):
    return oracle_dir / "fudoki_grpo"


@pytest.fixture(scope="module")
def rollout(folder):
    return load_file(folder / "rollout.safetensors")


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture
def pipe(oracle_dir):
    pipe = FUDOKIPipeline.from_pretrained(oracle_dir / "fudoki" / "tiny-fudoki", uncond_token_id=342)
    pipe.scheduler.set_timesteps(NUM_STEPS)
    return pipe


def build_args(output_dir, config_class=DFlowGRPOConfig, **kwargs):
    defaults = {"bf16": False, "use_cpu": True, "report_to": "none", "logging_steps": 1, "save_strategy": "no"}
    defaults |= {"per_device_train_batch_size": 12, "num_generations": 2, "disable_tqdm": True}
    defaults |= {"num_inference_steps": NUM_STEPS, "num_train_timesteps": 3, "timestep_window": [0, 0]}
    return config_class(str(output_dir), **{**defaults, **kwargs})


def no_reward(completions, **kwargs):
    return [0.0] * len(completions)


def build_trainer(output_dir, pipe, folder, config_class=DFlowGRPOConfig, trainer_class=DFlowGRPOTrainer, **kwargs):
    """A trainer of the recorded adapter, about to compute a loss."""
    trainer = trainer_class(
        pipe,
        no_reward,
        build_args(output_dir, config_class, adapter=str(folder / "adapter-old"), **kwargs),
        train_dataset=Dataset.from_dict({"prompt": ["ab"] * 6}),
    )
    pipe.scheduler.set_timesteps(NUM_STEPS)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def trained_weights(trainer):
    """Weights by the names that they have in the authors' code."""
    return {
        "language_model.base_model.model.model.layers." + name.partition("layers.")[2]: weight
        for name, weight in trainer.model.named_parameters()
        if weight.requires_grad
    }


def use_policy(trainer, folder, policy):
    recorded = load_file(folder / f"adapter-{policy}" / "adapter_model.safetensors")
    trainer.model.zero_grad()
    with torch.no_grad():
        for name, weight in trained_weights(trainer).items():
            name = name.removeprefix("language_model.").replace(".default", "")
            weight.copy_(recorded[name])


def build_rows(pipe, rollout, prompts, steps):
    """The rows of all samples and some steps, as the trainer would build them from this rollout."""
    prompt_ids, prompt_mask = (x.repeat_interleave(2, dim=0) for x in pipe.encode_prompt(prompts))
    parts = []
    for k in steps:
        states = rollout["trajectory"][k : k + 2]  # (2, B, N)
        draws = rollout[f"step{k}.x1_samples"].permute(1, 2, 0)  # (B, N, n)
        parts.append(
            {
                "prompt_ids": torch.cat([prompt_ids, states[0]], dim=1),
                "prompt_mask": prompt_mask,
                "completion_ids": states[1],
                "completion_mask": torch.ones_like(states[1]),
                "timesteps": torch.full((NUM_SAMPLES,), k),
                "t": torch.full((NUM_SAMPLES,), k / NUM_STEPS),
                "draws": draws,
                "transition_logps": pipe.scheduler.transition_probabilities(*states, draws, k).log(),
                "old_per_token_logps": rollout[f"posterior_old.step{k}"].log().gather(-1, draws),
                "ref_per_token_logps": rollout["posterior_ref"][k].log().gather(-1, draws),
                "advantages": rollout["advantages"],
            }
        )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def check_case(trainer, folder, results, case, rows, atol=1e-6):
    """Losses, norms of gradients and, where they are recorded, whole gradients of the three policies."""
    gradients = load_file(folder / "gradients.safetensors")
    for policy in POLICIES:
        use_policy(trainer, folder, policy)
        loss = trainer._compute_loss(trainer.model, rows)
        loss.backward()
        expected = results["cases"][f"{case}|{policy}"]
        assert loss.item() == pytest.approx(expected["loss"], abs=atol)
        grads = {name: weight.grad for name, weight in trained_weights(trainer).items()}
        norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
        assert norm.item() == pytest.approx(expected["grad_norm"], rel=1e-4)
        for name, grad in grads.items():
            recorded = gradients.get(f"{case}|{policy}|{name}")
            if recorded is not None:
                assert (grad - recorded).norm() < 1e-4 * recorded.norm()


@pytest.mark.parametrize("k", range(NUM_STEPS))
def test_factors_denominators_and_ratios(tmp_path, pipe, folder, rollout, results, k):
    trainer = build_trainer(tmp_path, pipe, folder)
    rows = build_rows(pipe, rollout, results["prompts"], [k])
    factors = (rows["transition_logps"] - rows["old_per_token_logps"]).exp()
    torch.testing.assert_close(factors, rollout[f"step{k}.factors"].permute(1, 2, 0), atol=0, rtol=1e-5)
    denominators = log_mean_exp(rows["transition_logps"]).exp()
    torch.testing.assert_close(denominators, rollout[f"step{k}.denominator"], atol=0, rtol=1e-5)
    moved = rows["completion_ids"] != rows["prompt_ids"][:, -NUM_TOKENS:]
    assert torch.equal(moved, rollout[f"step{k}.changed"].bool()) or k == NUM_STEPS - 1  # where they count all tokens
    trainer.beta = 1.0  # for the ratios to the reference
    for policy in ("small", "medium"):
        use_policy(trainer, folder, policy)
        with torch.no_grad():
            log_ratio, log_ratio_to_reference = trainer._compute_log_ratios(trainer.model, rows, "train")
        torch.testing.assert_close(log_ratio.exp(), rollout[f"token_ratio.{policy}"][k], atol=0, rtol=1e-5)
        expected = rollout[f"token_ratio_ref.{policy}"][k]
        torch.testing.assert_close(log_ratio_to_reference.exp(), expected, atol=0, rtol=1e-5)
        ratio = log_ratio.mean(dim=1).exp()
        torch.testing.assert_close(ratio, rollout[f"sample_ratio.{policy}"][k], atol=1e-6, rtol=0)


CASES = {
    "grpo.default": {},
    "grpo.wide_clip": {"epsilon": 0.2, "epsilon_high": 0.2},
    "grpo.token_level": {"importance_sampling_level": "token"},
    "grpo.changed_only": {"changed_only": True},
    "grpo.kl0.01": {"beta": 0.01},
    "grpo.kl0.5": {"beta": 0.5},
    "grpo.kl0.5.old_policy": {"beta": 0.5, "kl_reference": "old"},
    "grpo.step0_only": {},
    "grpo.gamma0.5": {"step_discount": 0.5},
    "grpo.batch1.accum2": {},
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(tmp_path, pipe, folder, rollout, results, case):
    trainer = build_trainer(tmp_path, pipe, folder, **CASES[case])
    if case == "grpo.batch1.accum2":
        trainer.current_gradient_accumulation_steps = 2
    rows = build_rows(pipe, rollout, results["prompts"], [0] if case == "grpo.step0_only" else range(3))
    check_case(trainer, folder, results, case, rows)
    if trainer.beta > 0:
        kl = results["cases"][f"{case}|medium"]["kl_loss"] / trainer.beta
        assert trainer._metrics["train"]["kl"][-1] == pytest.approx(kl, abs=1e-6)


@pytest.mark.parametrize("scale_rewards", ["batch", "group"])
def test_advantages(tmp_path, pipe, folder, results, scale_rewards):
    options = {"num_generations": 4, "per_device_train_batch_size": 24, "scale_rewards": scale_rewards}
    trainer = build_trainer(tmp_path, pipe, folder, **options)
    for case in results["advantages"][scale_rewards]:
        rewards = torch.tensor(case["rewards"], dtype=torch.float64).unsqueeze(1)
        advantages, _, _ = trainer._compute_advantages(rewards, num_generations=4)
        # Theirs are computed in float32, of rewards of up to 22
        assert advantages.tolist() == pytest.approx(case["advantages"], abs=1e-5)


@pytest.mark.parametrize("level", ["token", "sample"])
def test_diffu_grpo_is_a_configuration_of_udm_grpo(tmp_path, pipe, folder, rollout, results, level):
    """One forward pass at the initial noise, and the final tokens as the action."""
    options = {
        "trajectory": "backward",
        "num_train_timesteps": 1,
        "beta": 0.0,
        "epsilon": 1e-3,
        "epsilon_high": 1.5e-3,
    }
    options["importance_sampling_level"] = "token" if level == "token" else "sequence"
    trainer = build_trainer(tmp_path, pipe, folder, UDMGRPOConfig, UDMGRPOTrainer, **options)
    noise, clean, old = rollout["trajectory"][0], rollout["diffu.x_1_img"], rollout["diffu.log_p_old_x1_given_x0"]
    prompt_ids, prompt_mask = (x.repeat_interleave(2, dim=0) for x in pipe.encode_prompt(results["prompts"]))
    rows = {
        "prompt_ids": torch.cat([prompt_ids, noise], dim=1),
        "prompt_mask": torch.cat([prompt_mask, torch.zeros(noise.shape)], dim=1),
        "completion_ids": clean,
        "completion_mask": torch.ones_like(clean),
        "old_per_token_logps": old if level == "token" else old.mean(dim=1, keepdim=True),
        "advantages": rollout["advantages"],
    }
    check_case(trainer, folder, results, f"diffu.{level}_level", rows)


@pytest.mark.parametrize("beta", [1, 100])
def test_preferences(tmp_path, pipe, folder, rollout, results, beta):
    options = {"dpo_beta": float(beta), "per_device_train_batch_size": 12}
    trainer = build_trainer(tmp_path, pipe, folder, DFlowDPOConfig, DFlowDPOTrainer, **options)
    rows = build_rows(pipe, rollout, results["prompts"], range(3))
    pair = results["dpo_pairs"]["one_pair"]
    assert pair["rewards"] == pytest.approx(rollout["rewards"].tolist())
    rows = {name: tensor.unflatten(0, (3, NUM_SAMPLES)).transpose(0, 1).flatten(0, 1) for name, tensor in rows.items()}
    batch = trainer._pair_rows(rows)
    check_case(trainer, folder, results, f"dpo.beta{beta}", batch, atol=5e-6)


@pytest.mark.parametrize("case", ["one_pair", "half", "ties"])
def test_pairs(tmp_path, pipe, folder, results, case):
    expected = results["dpo_pairs"][case]
    num_generations, num_samples = expected["group"], len(expected["rewards"])
    trainer = build_trainer(
        tmp_path,
        pipe,
        folder,
        DFlowDPOConfig,
        DFlowDPOTrainer,
        num_generations=num_generations,
        num_pairs=expected["num_pairs"] or num_generations // 2,
        per_device_train_batch_size=num_samples * 3,
    )
    rewards = torch.tensor(expected["rewards"], dtype=torch.float64).unsqueeze(1)
    advantages, _, _ = trainer._compute_advantages(rewards, num_generations)
    samples = torch.arange(num_samples).repeat_interleave(3)
    batch = trainer._pair_rows({"prompt_ids": samples, "advantages": advantages.float().repeat_interleave(3)})
    weights = batch["pair_weights"]
    assert weights.mean().item() == pytest.approx(1)
    assert batch["prompt_ids"][weights > 0][::3].tolist() == expected["winners"]
    assert batch["rejected_prompt_ids"][weights > 0][::3].tolist() == expected["losers"]


class ReplayTrainer(DFlowGRPOTrainer):
    """Takes the rollouts from a recording, and keeps the clipped gradients and the weights of each update."""

    def _rollout(self, prompts, mode, *args, **kwargs):
        number = len(self.updates)
        recorded = {
            name.partition(".")[2]: tensor for name, tensor in self.recording.items() if f"rollout{number}." in name
        }
        assert prompts == self.record["rollouts"][number]["prompts"]
        draws = [recorded[f"step{k}.x1_samples"].permute(1, 2, 0).expand(-1, -1, 3) for k in range(NUM_STEPS)]
        trajectory = UDMTrajectory(torch.arange(NUM_STEPS), recorded["trajectory"][:-1], torch.stack(draws))
        self.pipeline.scheduler.set_timesteps(NUM_STEPS)
        output = UDMSamplerOutput(recorded["trajectory"][-1], trajectory)
        return Rollout(*self.pipeline.encode_prompt(prompts), output, [str(number)] * len(prompts))

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        optimizer.register_step_pre_hook(lambda *_: self.grads.append(self.copy(grad=True)))
        optimizer.register_step_post_hook(lambda *_: self.updates.append(self.copy()))
        return optimizer

    def copy(self, grad=False):
        weights = trained_weights(self)
        return {name: (weight.grad if grad else weight.detach()).clone() for name, weight in weights.items()}


def test_four_updates_are_those_of_the_authors_script(tmp_path, pipe, folder, oracle_dir):
    recording, record = load_file(folder / "training.safetensors"), json.loads((folder / "training.json").read_text())
    prompts = [prompt for rollout in record["rollouts"] for prompt in rollout["prompts"][::2]]

    def scripted(prompts, completions, **kwargs):
        return record["rollouts"][int(completions[0])]["scores"]

    adapter = PeftConfig.from_pretrained(str(folder / "adapter-old"))
    trainer = ReplayTrainer(
        pipe,
        scripted,
        build_args(
            tmp_path,
            max_steps=4,
            learning_rate=1e-3,
            old_policy_steps=2,
            ema_decay=0.9,
            shuffle_dataset=False,
            log_completions=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        peft_config=LoraConfig(r=adapter.r, lora_alpha=adapter.lora_alpha, target_modules=adapter.target_modules),
    )
    trainer.recording, trainer.record, trainer.grads, trainer.updates = recording, record, [], []
    with torch.no_grad():
        for name, weight in trained_weights(trainer).items():
            weight.copy_(recording[f"lora_before_update0|{name}"])
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses == pytest.approx([update["loss"] for update in record["updates"]], abs=1e-6)
    norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    assert norms == pytest.approx(record["grad_norms"], rel=1e-4, abs=1e-6)
    for number, (grads, weights) in enumerate(zip(trainer.grads, trainer.updates, strict=True)):
        for name, grad in grads.items():
            torch.testing.assert_close(grad, recording[f"clipped_grad_update{number}|{name}"], atol=1e-6, rtol=1e-4)
            expected = recording[f"lora_after_update{number}|{name}"]
            torch.testing.assert_close(weights[name], expected, atol=1e-6, rtol=1e-6)
    # Diffusers' average begins with the weights after the first update, and theirs with those before it
    averaged = torch.load(oracle_dir / "fudoki" / "release_layout" / "ema_state.pt", weights_only=True)
    for average, expected in zip(trainer.ema.shadow_params, averaged["ema_parameters"], strict=True):
        torch.testing.assert_close(average, expected, atol=2e-6, rtol=1e-6)
