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

"""Numbers of the authors' code of dFlowGRPO on a tiny FUDOKI: factors, ratios, advantages and losses.

The network is not needed here: what it predicts at the recorded states is recorded, too.
"""

import json

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from trl_udm import DFlowGRPOConfig, DFlowGRPOTrainer, KineticOptimalScheduler, UDMGRPOConfig, UDMGRPOTrainer
from trl_udm.dflow_grpo.dflow_grpo_trainer import log_mean_exp

from ..trainer.toy_text_family import ToyTextPipeline, build_toy_text_pipeline


NUM_STEPS, NUM_SAMPLES, NUM_TOKENS, NUM_DRAWS = 4, 4, 16, 3


class RecordedPipeline(ToyTextPipeline):
    """Scores with the posteriors (S, B, N, V) of a recorded policy. A row's prompt is the number of its sample."""

    posteriors: torch.Tensor

    def score(self, model, prompt_ids, prompt_mask, noised_samples, latent_shape, labels, t=None):
        steps = (t * NUM_STEPS).round().long()
        log_probs = self.posteriors[steps, prompt_ids.squeeze(1)].log()  # (B, N, V)
        scores = log_probs.gather(-1, labels.view(*labels.shape[:2], -1)).view_as(labels)
        return scores, torch.zeros(labels.shape[:2])


@pytest.fixture(scope="module")
def rollout(oracle_dir):
    tensors = load_file(oracle_dir / "fudoki_grpo" / "rollout.safetensors")
    for policy in ("old", "medium"):
        tensors[policy] = torch.stack([tensors[f"posterior_{policy}.step{k}"] for k in range(NUM_STEPS)])
    tensors["small"] = torch.stack([tensors[f"posterior_small.step{k}"] for k in range(NUM_STEPS)])
    return tensors


@pytest.fixture(scope="module")
def results(oracle_dir):
    return json.loads((oracle_dir / "fudoki_grpo" / "results.json").read_text())


@pytest.fixture(scope="module")
def scheduler(rollout):
    scheduler = KineticOptimalScheduler(metric_power=4.0)
    scheduler.set_codebook(rollout["image_embedding"])
    scheduler.set_timesteps(NUM_STEPS)
    return scheduler


def build_trainer(output_dir, scheduler, trainer_class=DFlowGRPOTrainer, config_class=DFlowGRPOConfig, **kwargs):
    toy = build_toy_text_pipeline()
    defaults = {"bf16": False, "report_to": "none", "per_device_train_batch_size": 12, "num_generations": 2}
    defaults |= {"num_inference_steps": NUM_STEPS, "num_train_timesteps": 3, "timestep_window": [0, 0]}
    args = config_class(str(output_dir), **{**defaults, **kwargs})
    pipeline = RecordedPipeline(toy.transformer, toy.scheduler, toy.tokenizer)
    trainer = trainer_class(pipeline, lambda completions, **_: [0.0] * len(completions), args, train_dataset=PROMPTS)
    pipeline.register_modules(scheduler=scheduler)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


PROMPTS = Dataset.from_dict({"prompt": ["ab", "c"] * 3})


def score(rollout, policy, k, draws):
    """log p(x₁ | x_t) of draws (B, N, n) in step k."""
    return rollout[policy][k].log().gather(-1, draws)


def build_rows(rollout, scheduler, steps):
    """The rows of all samples and some steps, as the trainer would build them from this rollout."""
    parts = []
    for k in steps:
        states = rollout["trajectory"][k : k + 2]  # (2, B, N)
        draws = rollout[f"step{k}.x1_samples"].permute(1, 2, 0)  # (B, N, n)
        parts.append(
            {
                "prompt_ids": torch.cat([torch.arange(NUM_SAMPLES).unsqueeze(1), states[0]], dim=1),
                "prompt_mask": torch.ones(NUM_SAMPLES, 1),
                "completion_ids": states[1],
                "completion_mask": torch.ones_like(states[1]),
                "timesteps": torch.full((NUM_SAMPLES,), k),
                "t": torch.full((NUM_SAMPLES,), k / NUM_STEPS),
                "draws": draws,
                "transition_logps": scheduler.transition_probabilities(*states, draws, k).log(),
                "old_per_token_logps": score(rollout, "old", k, draws),
                "ref_per_token_logps": rollout["posterior_ref"][k].log().gather(-1, draws),
                "advantages": rollout["advantages"],
            }
        )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("k", range(NUM_STEPS))
def test_factors_denominators_and_ratios(rollout, scheduler, k):
    rows = build_rows(rollout, scheduler, [k])
    factors = (rows["transition_logps"] - rows["old_per_token_logps"]).exp()
    torch.testing.assert_close(factors, rollout[f"step{k}.factors"].permute(1, 2, 0), atol=0, rtol=1e-5)
    denominators = log_mean_exp(rows["transition_logps"])
    torch.testing.assert_close(denominators.exp(), rollout[f"step{k}.denominator"], atol=0, rtol=1e-5)
    moved = rows["completion_ids"] != rows["prompt_ids"][:, 1:]
    assert torch.equal(moved, rollout[f"step{k}.changed"].bool()) or k == NUM_STEPS - 1  # where they count all tokens
    for policy in ("small", "medium"):
        difference = score(rollout, policy, k, rows["draws"]) - rows["old_per_token_logps"]
        log_ratios = log_mean_exp(rows["transition_logps"] + difference) - denominators
        torch.testing.assert_close(log_ratios.exp(), rollout[f"token_ratio.{policy}"][k], atol=2e-6, rtol=2e-6)
        ratios = log_ratios.mean(dim=1).exp()
        torch.testing.assert_close(ratios, rollout[f"sample_ratio.{policy}"][k], atol=1e-6, rtol=1e-6)


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
def test_losses(tmp_path, rollout, results, scheduler, case):
    trainer = build_trainer(tmp_path, scheduler, **CASES[case])
    if case == "grpo.batch1.accum2":
        trainer.current_gradient_accumulation_steps = 2
    rows = build_rows(rollout, scheduler, [0] if case == "grpo.step0_only" else range(3))
    for policy in ("old", "small", "medium"):
        trainer.pipeline.posteriors = rollout[policy]
        loss = trainer._compute_loss(trainer.model, rows)
        assert loss.item() == pytest.approx(results["cases"][f"{case}|{policy}"]["loss"], abs=1e-6)
    if trainer.beta > 0:
        kl = results["cases"][f"{case}|medium"]["kl_loss"] / trainer.beta
        assert trainer._metrics["train"]["kl"][-1] == pytest.approx(kl, abs=1e-6)


def test_advantages(tmp_path, rollout, scheduler):
    trainer = build_trainer(tmp_path, scheduler)
    advantages, _, _ = trainer._compute_advantages(rollout["rewards"].unsqueeze(1), num_generations=2)
    torch.testing.assert_close(advantages.float(), rollout["advantages"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("level", ["token", "sample"])
def test_diffu_grpo_is_a_configuration_of_udm_grpo(tmp_path, rollout, results, scheduler, level):
    """One forward pass at the initial noise, and the final tokens as the action."""
    trainer = build_trainer(
        tmp_path,
        scheduler,
        UDMGRPOTrainer,
        UDMGRPOConfig,
        trajectory="backward",
        num_train_timesteps=1,
        importance_sampling_level="token" if level == "token" else "sequence",
        epsilon=1e-3,
        epsilon_high=1.5e-3,
        beta=0.0,
    )
    noise, clean = rollout["trajectory"][0], rollout["diffu.x_1_img"]
    old = rollout["diffu.log_p_old_x1_given_x0"]
    rows = {
        "prompt_ids": torch.cat([torch.arange(NUM_SAMPLES).unsqueeze(1), noise], dim=1),
        "prompt_mask": torch.cat([torch.ones(NUM_SAMPLES, 1), torch.zeros(noise.shape)], dim=1),
        "completion_ids": clean,
        "completion_mask": torch.ones_like(clean),
        "old_per_token_logps": old if level == "token" else old.mean(dim=1, keepdim=True),
        "advantages": rollout["advantages"],
    }
    for policy in ("old", "small", "medium"):
        trainer.pipeline.posteriors = rollout[policy]
        loss = trainer._compute_loss(trainer.model, rows)
        assert loss.item() == pytest.approx(results["cases"][f"diffu.{level}_level|{policy}"]["loss"], abs=1e-6)
