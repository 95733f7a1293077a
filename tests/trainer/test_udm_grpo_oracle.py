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
One recorded GRPO step. The numbers in tests/oracle were computed with the public reference code of UDM-GRPO
(Yovecent/UDM-GRPO, commit d1bec49; torch 2.13, CPU, float32, tiny random weights).
"""

import itertools
import json

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from trl_udm import UDMGRPOConfig, UDMGRPOTrainer, URSAPipeline


NUM_TIMESTEPS = 3


def zero_reward(completions, **kwargs):
    return [0.0] * len(completions)


@pytest.fixture(scope="module")
def recorded(oracle_dir):
    return load_file(oracle_dir / "grpo.safetensors")


@pytest.fixture(scope="module")
def results(oracle_dir):
    return json.loads((oracle_dir / "grpo_results.json").read_text())


@pytest.fixture(scope="module")
def trainer(oracle_dir, tmp_path_factory):
    args = UDMGRPOConfig(
        str(tmp_path_factory.mktemp("run")),
        num_generations=4,
        per_device_train_batch_size=12,
        pipeline_kwargs={"height": 32, "width": 32},
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    pipeline = URSAPipeline.from_pretrained(oracle_dir / "tiny-ursa", max_prompt_length=16)
    trainer = UDMGRPOTrainer(pipeline, zero_reward, args, train_dataset=Dataset.from_dict({"prompt": ["a car"]}))
    trainer.ref_model.load_state_dict(load_file(oracle_dir / "grpo_reference_policy.safetensors"))
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def build_batch(trainer, recorded, corner, timesteps, oracle_dir=None):
    """Rows of the recorded step, as `_generate_and_score_completions` lays them out."""
    num_steps = len(timesteps)
    states = torch.cat([recorded[f"{corner}.step{k}.state"] for k in timesteps])
    actions = torch.cat([recorded[f"{corner}.step{k}.response"] for k in timesteps])
    text = recorded["txt_ids"].repeat(num_steps, 1)
    prompt_ids = torch.cat([text, states], dim=1)
    batch = {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": actions,
        "completion_mask": torch.ones_like(actions),
        "advantages": recorded["advantages"].repeat(num_steps),
        "num_items_in_batch": torch.tensor(actions.numel()),
    }
    input_ids = torch.cat([prompt_ids, actions], dim=1)
    mask = torch.ones_like(input_ids)
    with torch.no_grad():
        batch["ref_per_token_logps"] = trainer._get_per_token_logps_and_entropies(
            trainer.ref_model, input_ids, mask, actions.size(1), batch_size=5
        )[0]
        if oracle_dir is not None:
            current = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
            trainer.model.load_state_dict(load_file(oracle_dir / "grpo_old_policy.safetensors"))
            batch["old_per_token_logps"] = trainer._get_per_token_logps_and_entropies(
                trainer.model, input_ids, mask, actions.size(1)
            )[0]
            trainer.model.load_state_dict(current)
    return batch


CORNERS = [f"clean={clean}.forward={forward}" for clean in (0, 1) for forward in (0, 1)]


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("step", range(NUM_TIMESTEPS))
def test_token_log_probabilities_equal_the_reference(trainer, recorded, corner, step):
    text, state = recorded["txt_ids"], recorded[f"{corner}.step{step}.state"]
    action = recorded[f"{corner}.step{step}.response"]
    input_ids = torch.cat([text, state, action], dim=1)
    trainer.importance_sampling_level = "token"
    policies = ((trainer.model, "logps"), (trainer.ref_model, "ref_logps"))
    # "full" scores without TRL's fused head
    for (model, name), trainer.args.kl_estimator in itertools.product(policies, ("full", "k3")):
        with torch.no_grad():
            logps, entropies, aux_loss = trainer._get_per_token_logps_and_entropies(
                model, input_ids, torch.ones_like(input_ids), action.size(1), batch_size=3
            )
        torch.testing.assert_close(logps, recorded[f"{corner}.step{step}.{name}"], rtol=1e-4, atol=1e-4)
        assert entropies is None and aux_loss is None
    trainer.importance_sampling_level = "sequence"


@pytest.mark.parametrize("old", ["none", "old_policy"])
@pytest.mark.parametrize("corner", CORNERS)
def test_loss_ratio_kl_and_gradient_norms_equal_the_reference(trainer, recorded, results, oracle_dir, corner, old):
    expected = results[f"{corner}.old={old}.clip=0.0001"]
    for k, step in enumerate(expected["steps"]):
        batch = build_batch(trainer, recorded, corner, [k], None if old == "none" else oracle_dir)
        trainer._metrics["train"].clear()
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, batch)
        # The reference's entropy is a mean over text and image positions; ours, like TRL's, is over the action's
        # tokens
        metrics = trainer._metrics["train"]
        assert loss.item() == pytest.approx(step["loss"], rel=1e-4)
        assert metrics["kl"][0] == pytest.approx(step["kl_loss"], rel=1e-4)
        input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        logps = trainer._get_per_token_logps_and_entropies(
            trainer.model, input_ids, torch.ones_like(input_ids), batch["completion_ids"].size(1)
        )[0].squeeze(1)
        torch.testing.assert_close(logps, torch.tensor(step["mean_logps"]), rtol=1e-4, atol=0)
        torch.testing.assert_close(
            batch["ref_per_token_logps"].squeeze(1), torch.tensor(step["ref_mean_logps"]), rtol=1e-4, atol=0
        )
        delta = batch["ref_per_token_logps"].squeeze(1) - logps
        torch.testing.assert_close(delta.exp() - delta - 1, torch.tensor(step["k3"]), rtol=1e-3, atol=1e-6)
        old_logps = batch.get("old_per_token_logps", logps.detach().unsqueeze(1)).squeeze(1)
        ratio = torch.exp(logps - old_logps)
        torch.testing.assert_close(ratio, torch.tensor(step["ratio"]), rtol=1e-4, atol=0)

    trainer.model.zero_grad()
    batch = build_batch(trainer, recorded, corner, range(NUM_TIMESTEPS), None if old == "none" else oracle_dir)
    trainer._compute_loss(trainer.model, batch).backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in trainer.model.named_parameters()}
    norms["__total__"] = sum(norm**2 for norm in norms.values()) ** 0.5
    assert norms.keys() == expected["grad_norm"].keys()
    for name, norm in expected["grad_norm"].items():
        assert norms[name] == pytest.approx(norm, rel=1e-4), name


def test_gradients_equal_the_reference(trainer, recorded, oracle_dir):
    expected = load_file(oracle_dir / "grpo_gradients.safetensors")
    trainer.model.zero_grad()
    batch = build_batch(trainer, recorded, "clean=1.forward=1", range(NUM_TIMESTEPS))
    trainer._compute_loss(trainer.model, batch).backward()
    for name, parameter in trainer.model.named_parameters():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4 * scale, msg=name)


def test_advantages_equal_the_reference(trainer, oracle_dir):
    cases = json.loads((oracle_dir / "advantages.json").read_text())
    assert {case["global_std"] for case in cases} == {False, True}
    for case in cases:
        scores = torch.tensor(case["scores"], dtype=torch.float64)  # (images, prompts)
        expected = torch.tensor(case["advantages_unclipped"], dtype=torch.float64)
        trainer.scale_rewards = "batch" if case["global_std"] else "group"
        advantages, rewards, std_rewards = trainer._compute_advantages(scores.T.reshape(-1, 1), scores.size(0))
        torch.testing.assert_close(
            advantages.view_as(scores.T).T, expected.clamp(-5, 5), rtol=1e-9, atol=1e-9, msg=case["name"]
        )
        torch.testing.assert_close(rewards, scores.T.reshape(-1))
        assert std_rewards.shape == rewards.shape
    trainer.scale_rewards = "group"
