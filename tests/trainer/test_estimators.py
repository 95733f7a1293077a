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

"""Estimators of log π against their equations, by enumeration of the 81 samples of four tokens with three codes."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from trl_udm import (
    DFlowGRPOConfig,
    KineticOptimalScheduler,
    UDMGRPOTrainer,
    UDMSFTConfig,
    UDMSFTTrainer,
    UniformDDIMScheduler,
)
from trl_udm.dflow_grpo.dflow_grpo_config import check_scheduler

from .test_udm_grpo_trainer import PROMPTS, build_args, build_trainer, count_a, generate_batch
from .toy_text_family import NUM_TOKENS, build_toy_text_pipeline


@pytest.fixture(scope="module")
def enumeration():
    """The benchmark's functions, and its pipeline after a short training."""
    functions = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "estimators.py"))
    return SimpleNamespace(**functions, pipeline=functions["build_pipeline"](num_steps=60))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"timestep_sampling": "stratified", "antithetic_noise": True},
        {"shared_noise": True, "antithetic_noise": True},
        {"leave_one_out": True},
        {"timestep_weighting": "elbo", "timestep_sampling": "stratified"},
        {"negative_bound_power": 2.0},
    ],
)
def test_the_expectation_of_an_estimator_is_what_its_equation_says(tmp_path, enumeration, options):
    result = enumeration.measure(enumeration.pipeline, options, 40, str(tmp_path))
    standard_error = (result["draws"].var(dim=0) / 40).sum().sqrt() / 81
    assert (result["draws"].mean(dim=0) - result["equation"]).mean().abs() < 3 * standard_error
    assert standard_error < 0.1


def test_the_chain_of_the_sampler_has_the_enumerated_probabilities(enumeration):
    pipeline = enumeration.pipeline
    probabilities = enumeration.enumerate_chain(pipeline, num_steps=3).exp()
    assert probabilities.sum().item() == pytest.approx(1)
    samples = pipeline(["c"] * 8000, num_inference_steps=3, output_type="latent").texts
    counts = (samples * 3 ** torch.arange(3, -1, -1)).sum(dim=1).bincount(minlength=81)
    assert ((counts - 8000 * probabilities).square() / (8000 * probabilities)).sum() < 81 + 4 * 12.7  # chi-square


def test_which_scores_bound_the_probability_of_a_step_from_noise(enumeration):
    for seed in range(3):
        pipeline = enumeration.build_pipeline(seed, num_steps=20 * seed)
        truth = enumeration.enumerate_chain(pipeline, num_steps=1)
        values = enumeration.expect_one_step(pipeline)
        assert (values["mean-field at t = 0"] < truth).all()
        assert (values["power 0.5, K → ∞"] < truth).all()
        torch.testing.assert_close(values["power 1, K → ∞"], truth)
        assert (values["power 2, K → ∞"] > truth).all()


# --- Leave-one-out ---


@pytest.mark.parametrize("t", [0.0, 0.25, 1 - 2**-10])
def test_a_leave_one_out_score_is_bayes_rule_in_float64(t):
    num_codes = 50
    logits = 4 * torch.randn(8, 6, num_codes, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    labels, state = torch.randint(num_codes, (2, 8, 6), generator=torch.Generator().manual_seed(1))
    labels[:4] = state[:4]
    logits[0].scatter_(-1, state[0].unsqueeze(-1), 30.0)  # certain to keep the token
    logps = logits.log_softmax(dim=-1)
    likelihoods = t * torch.nn.functional.one_hot(state, num_codes) + (1 - t) / num_codes
    expected = (logps - likelihoods.log()).log_softmax(dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    pairs = logps.gather(-1, torch.stack([labels, state], dim=-1)).float()
    for scheduler in (UniformDDIMScheduler(num_codes), KineticOptimalScheduler(alpha=None, codebook_size=num_codes)):
        for times in (torch.full((8,), t), torch.full((8, 6), t)):
            scores = scheduler.leave_one_out(pairs, labels, state, times)
            torch.testing.assert_close(scores, expected.float())


def test_the_two_predictions_of_a_uniform_path_are_those_of_an_enumerated_distribution(enumeration):
    """Of all 81 samples and states, from a random distribution of samples and Bayes' rule alone."""
    num_codes, t, states = 3, 0.4, enumeration.STATES
    data = torch.randn(81, generator=torch.Generator().manual_seed(0)).mul(2).softmax(dim=0).double()
    is_code = torch.nn.functional.one_hot(states, num_codes).double()  # (81 samples, N, V)
    kept = t * (states.unsqueeze(1) == states).double() + (1 - t) / num_codes  # (81 samples, 81 states, N)
    plain, loo = torch.zeros(2, 81, 4, num_codes, dtype=torch.double)
    for n in range(4):
        others = [m for m in range(4) if m != n]
        plain[:, n] = torch.einsum("s,sx,sk->xk", data, kept.prod(dim=-1), is_code[:, n])
        loo[:, n] = torch.einsum("s,sx,sk->xk", data, kept[..., others].prod(dim=-1), is_code[:, n])
    plain, loo = (table.div(table.sum(dim=-1, keepdim=True)).log() for table in (plain, loo))
    scheduler, times = UniformDDIMScheduler(num_codes, prediction_type="leave_one_out"), torch.full((81,), t)
    for code in range(num_codes):
        labels = torch.full_like(states, code)
        pair = torch.stack([labels, states], dim=-1)
        for given, convert, expected in (
            (plain, scheduler.leave_one_out, loo),
            (loo, scheduler.undo_leave_one_out, plain),
        ):
            scores = convert(given.gather(-1, pair).float(), labels, states, times)
            torch.testing.assert_close(scores, expected[..., code].float(), rtol=1e-4, atol=1e-5)
    steps = []
    for prediction_type, logits in (("sample", plain), ("leave_one_out", loo)):
        scheduler = UniformDDIMScheduler(num_codes, 5, prediction_type)
        settings = {"timestep": 2, "sample": states, "generator": torch.Generator().manual_seed(0)}  # t = 0.4
        steps.append(scheduler.step(logits.float(), **settings).prev_sample)
    assert torch.equal(*steps)


def test_fine_tuning_and_scores_are_those_of_the_prediction_that_the_scheduler_names(tmp_path, enumeration):
    pipelines = [enumeration.build_pipeline(num_steps=0) for _ in range(2)]
    pipelines[1].scheduler = UniformDDIMScheduler(enumeration.NUM_CODES, 10, "leave_one_out")
    rows = Dataset.from_dict({"prompt": ["c"] * 8, "completion": ["acba"] * 8})
    args = UDMSFTConfig(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    trainers = [UDMSFTTrainer(pipeline, args, rows) for pipeline in pipelines]
    inputs = trainers[0].encode_rows(list(rows))
    losses = []
    for trainer in trainers:
        torch.manual_seed(0)
        losses.append(trainer.compute_loss(trainer.model, dict(inputs)))
    torch.manual_seed(0)
    t = torch.rand(8)
    states = pipelines[0].scheduler.add_noise(inputs["clean_samples"], t)
    logits = pipelines[0].denoise(inputs["prompt_ids"], inputs["prompt_mask"], states, (4,))
    likelihoods = t.view(8, 1, 1) * torch.nn.functional.one_hot(states, 3) + (1 - t.view(8, 1, 1)) / 3
    for loss, each in zip(losses, (logits, logits + likelihoods.log()), strict=True):
        expected = torch.nn.functional.cross_entropy(each.flatten(0, 1), inputs["clean_samples"].flatten())
        torch.testing.assert_close(loss, expected)
    # What the trainer of rewards scores without the token itself is what such a network predicts
    scores = []
    for pipeline, is_loo in ((pipelines[0], False), (pipelines[1], True)):
        trainer = enumeration.build_trainer(pipeline, str(tmp_path), leave_one_out=is_loo)
        torch.manual_seed(0)
        scores.append(enumeration.draw(trainer, enumeration.STATES))
    torch.testing.assert_close(*scores)
    scores.append(enumeration.draw(enumeration.build_trainer(pipelines[1], str(tmp_path)), enumeration.STATES))
    assert not torch.allclose(scores[2], scores[0])


def test_a_leave_one_out_score_is_finite_at_the_end_of_time():
    pairs = torch.zeros(1, 2, 2, requires_grad=True)
    tokens = torch.tensor([[3, 4]])
    score = UniformDDIMScheduler(10).leave_one_out(pairs, tokens, tokens, torch.ones(1))
    score.sum().backward()
    assert score.isfinite().all() and pairs.grad.isfinite().all()


def test_the_reference_is_scored_like_the_policy(tmp_path):
    trainer = build_trainer(tmp_path, leave_one_out=True, beta=0.1, kl_estimator="k3")
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == 0.0
    trainer = build_trainer(tmp_path, leave_one_out=True, beta=0.1, kl_estimator="full")
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)


# --- Antithetic noise ---


def test_states_of_a_pair_share_random_numbers(tmp_path):
    pipeline = build_toy_text_pipeline()
    pipeline.scheduler = UniformDDIMScheduler(codebook_size=10)
    args = build_args(tmp_path, antithetic_noise=True, shared_noise=True, num_train_timesteps=3)
    trainer = UDMGRPOTrainer(pipeline, count_a, args, train_dataset=PROMPTS)
    trainer.model.train()
    output = trainer._rollout(["ab"] * 400, "train").output
    output.clean_samples[:] = output.clean_samples[:1].clone()
    noised_samples, _, t = trainer._build_rows(output, group_size=4)
    noised_samples, t = noised_samples.view(400, 3, NUM_TOKENS), t.view(400, 3)
    clean = output.clean_samples[0]
    first, second, third = ((noised_samples[:, k] == clean) for k in range(3))
    is_complement = t[:, 0] + t[:, 1] > 0.99  # a token is in one of the two states then, or in both
    assert is_complement.any() and (first | second)[is_complement].all()
    assert not (first | third)[is_complement].all()
    assert (noised_samples.view(100, 4, 3, -1) == noised_samples.view(100, 4, 3, -1)[:, :1]).all()


# --- The bound of negative advantages ---


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("power", [0.3, 2.0])
def test_the_gradient_is_that_of_the_bound(tmp_path, power, level):
    trainer = build_trainer(tmp_path, negative_bound_power=power, beta=0.0, importance_sampling_level=level)
    _, batch = generate_batch(trainer)
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0, 0.0, -0.3, 2.0, -0.1])  # of 8 samples
    batch["advantages"] = trainer._spread_advantages(advantages, 8, batch)
    trainer.current_gradient_accumulation_steps = 1

    def gradient(loss):
        trainer.model.zero_grad()
        loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])

    actual = gradient(trainer._compute_loss(trainer.model, batch))
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, NUM_TOKENS)[0].mean(dim=1)  # (B * K,)
    logps = logps.view(8, 3)
    bounds = (power * NUM_TOKENS * logps).exp().mean(dim=1).log() / (power * NUM_TOKENS)
    expected = gradient(-(advantages * torch.where(advantages < 0, bounds, logps.mean(dim=1))).mean())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "scheduler", "message"),
    [
        ({"antithetic_noise": True}, KineticOptimalScheduler(alpha=None, codebook_size=10), "has no `mirrored`"),
        ({"leave_one_out": True}, KineticOptimalScheduler(codebook_size=10), "is not uniform"),
    ],
)
def test_an_estimator_that_the_scheduler_lacks_is_refused(tmp_path, options, scheduler, message):
    pipeline = build_toy_text_pipeline()
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=f"`{[*options][0]}` must be False with a Kinetic.*{message}"):
        UDMGRPOTrainer(pipeline, count_a, build_args(tmp_path, **options), Dataset.from_dict({"prompt": ["ab"] * 4}))


def test_what_a_network_without_the_token_itself_cannot_be_is_refused(tmp_path):
    pipeline = build_toy_text_pipeline()
    pipeline.scheduler = UniformDDIMScheduler(10, prediction_type="leave_one_out")
    rows = Dataset.from_dict({"prompt": ["ab"] * 4})
    args = build_args(tmp_path, kl_estimator="full", beta=0.1)
    with pytest.raises(ValueError, match="`kl_estimator` must be 'k3' where the scheduler's `prediction_type` is"):
        UDMGRPOTrainer(pipeline, count_a, args, rows)
    with pytest.raises(ValueError, match="must have the `prediction_type` 'sample', got 'leave_one_out': the ratio"):
        check_scheduler(DFlowGRPOConfig(str(tmp_path), bf16=False), pipeline.scheduler)
    with pytest.raises(ValueError, match="`prediction_type` must be 'sample' or 'leave_one_out', got 'loo'"):
        UniformDDIMScheduler(10, prediction_type="loo")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_bound_power": 0.0}, "`negative_bound_power` must be > 0 or None, got 0.0"),
        ({"antithetic_noise": True, "trajectory": "backward"}, "`antithetic_noise` must be False without noise"),
    ],
)
def test_a_bad_option_is_refused_by_name(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build_args(tmp_path, **options)
