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

"""Every loss inherited from TRL, on the shapes model: its step makes good samples more likely, bad ones less."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from trl_udm import UDMGRPOConfig, UDMGRPOTrainer, URSAPipeline
from trl_udm.worlds.shapes import CHECKPOINT_PATH


# The losses, rewards and prompts of the table in docs/udm_grpo.md
with pytest.MonkeyPatch.context() as patch:
    benchmarks_dir = Path(__file__).parents[2] / "benchmarks"
    patch.syspath_prepend(benchmarks_dir)  # where a script finds what it imports
    BENCHMARK = runpy.run_path(str(benchmarks_dir / "losses.py"))
    PROMPTS = runpy.run_path(str(benchmarks_dir / "shapes_runs.py"))["PROMPTS"]
LOSS_TYPES = BENCHMARK["LOSS_TYPES"]
redness, darkness = BENCHMARK["redness"], BENCHMARK["darkness"]


def build_trainer(output_dir, reward_funcs=redness, **kwargs):
    if kwargs.get("loss_type") == "cispo":
        kwargs["epsilon_high"] = 5.0
    args = UDMGRPOConfig(
        str(output_dir),
        num_generations=4,
        per_device_train_batch_size=8,
        num_train_timesteps=1,
        num_inference_steps=4,
        num_inference_steps_eval=4,
        max_steps=1,
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        **{"beta": 0.0, **kwargs},
    )
    pipeline = URSAPipeline.from_pretrained(CHECKPOINT_PATH)
    return UDMGRPOTrainer(pipeline, reward_funcs, args, train_dataset=PROMPTS)


def flat_gradient(trainer, objective):
    trainer.model.zero_grad()
    objective.backward()
    return torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])


def roll_out(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def score(trainer, batch):
    """log π of each row, with a gradient."""
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    num_tokens = batch["completion_ids"].size(1)
    return trainer._get_per_token_logps_and_entropies(trainer.model, input_ids, mask, num_tokens)[0].mean(dim=1)


def ascent(trainer):
    """Cosine of the loss's step with the gradient of Σ Â log π, on one rollout."""
    batch = roll_out(trainer)
    step = -flat_gradient(trainer, trainer._compute_loss(trainer.model, batch))
    reinforce = flat_gradient(trainer, (batch["advantages"] * score(trainer, batch)).sum())
    return torch.nn.functional.cosine_similarity(step, reinforce, dim=0).item()


@pytest.mark.parametrize("importance_sampling_level", ["sequence", "token"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_loss_steps_towards_good_samples(tmp_path, loss_type, importance_sampling_level):
    trainer = build_trainer(tmp_path, loss_type=loss_type, importance_sampling_level=importance_sampling_level)
    # At ratio 1 all but two are Â log π up to scale; these two weigh good samples otherwise than bad ones
    assert ascent(trainer) > (0.9 if loss_type in ("sapo", "vespo") else 0.9999)


@pytest.mark.parametrize(
    "options",
    [
        {"scale_rewards": "batch"},
        {"scale_rewards": "none"},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"delta": 1.5, "epsilon_high": 2e-4},
        {"entropy_coef": 0.0001},
        {"top_entropy_quantile": 0.5, "importance_sampling_level": "token"},
    ],
)
def test_an_option_of_the_loss_steps_towards_good_samples(tmp_path, options):
    trainer = build_trainer(tmp_path, [redness, darkness], reward_weights=[1.0, 0.5], **options)
    assert ascent(trainer) > 0.5


@pytest.mark.parametrize("delta", [-3.0, -0.1, 1.0])
@pytest.mark.parametrize("use_bias_correction_kl", [False, True])
def test_the_kl_term_pulls_as_documented(tmp_path, use_bias_correction_kl, delta):
    trainer = build_trainer(tmp_path, beta=0.5, use_bias_correction_kl=use_bias_correction_kl)
    batch = roll_out(trainer)
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    batch["ref_per_token_logps"] = (score(trainer, batch) + delta).detach().unsqueeze(1)
    gradient = flat_gradient(trainer, trainer._compute_loss(trainer.model, batch))
    # delta is log π_ref − log π: far below 0, the weight of the one stays below 1 and that of the other grows
    weight = -delta if use_bias_correction_kl else 1 - np.exp(delta)
    expected = flat_gradient(trainer, 0.5 * weight * score(trainer, batch).mean())
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_clipping_binds_at_epsilon(tmp_path):
    trainer = build_trainer(tmp_path, num_iterations=2, epsilon=1e-4, epsilon_high=3e-4)
    batch = roll_out(trainer)
    batch["advantages"] = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 1.0, -1.0])
    # By how much the ratio differs from 1. Only the third and the fourth are beyond their bound in the advantage's
    # direction
    offsets = torch.tensor([-1e-3, 2.8e-4, 3.2e-4, -1.2e-4, -0.8e-4, 1e-3, 0.0, 0.0])
    is_clipped = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0])
    batch["old_per_token_logps"] = (score(trainer, batch) - offsets.log1p()).detach().unsqueeze(1)
    gradient = flat_gradient(trainer, trainer._compute_loss(trainer.model, batch))
    weights = (1 - is_clipped) * (1 + offsets) * batch["advantages"]
    expected = flat_gradient(trainer, -(weights * score(trainer, batch)).mean())
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
    assert trainer._metrics["train"]["clip_ratio/region_mean"][-1] == pytest.approx(2 / 8)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_loss_trains_with_clipping_and_kl(tmp_path, loss_type):
    trainer = build_trainer(tmp_path, loss_type=loss_type, beta=0.05, num_iterations=2, learning_rate=1e-3)
    trainer.args.max_steps = 3
    initial = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 3 and logs[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(np.isfinite(log["grad_norm"]) and log["grad_norm"] > 0 for log in logs)
    assert any(not torch.equal(tensor, initial[name]) for name, tensor in trainer.model.state_dict().items())
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())
