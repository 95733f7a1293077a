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

"""The ratio by brute force: all states, draws and next states of two tokens with three codes."""

import itertools

import pytest
import torch

from trl_udm import KineticOptimalScheduler, UniformDDIMScheduler
from trl_udm.dflow_grpo.dflow_grpo_trainer import log_mean_exp


NUM_CODES, NUM_TOKENS, NUM_STEPS = 3, 2, 4
STATES = torch.tensor(list(itertools.product(range(NUM_CODES), repeat=NUM_TOKENS)))  # (9, 2)


def build_scheduler(path):
    if path == "ddim":
        scheduler = UniformDDIMScheduler(codebook_size=NUM_CODES)
    else:
        scheduler = KineticOptimalScheduler(alpha=None if path == "mixture" else 0.9, codebook_size=NUM_CODES)
    if path == "metric":
        scheduler.set_codebook(torch.tensor([[1.0, 0.2], [-0.3, 1.0], [0.1, -1.0]]))
    scheduler.set_timesteps(NUM_STEPS)
    return scheduler


def kernels(scheduler, timestep):
    """b(x_s | x_t, x₁) of all next states and clean tokens, for the tokens of all states: (9, 2, x_s, x₁)."""
    clean = torch.arange(NUM_CODES).expand(*STATES.shape, -1)
    columns = [
        scheduler.transition_probabilities(STATES, torch.full_like(STATES, code), clean, timestep)
        for code in range(NUM_CODES)
    ]
    return torch.stack(columns, dim=2)


def build_policies():
    """log p_old and log p_θ of clean tokens at all states, (9, 2, 3), in float64."""
    logits = torch.randn(2, len(STATES), NUM_TOKENS, NUM_CODES, generator=torch.Generator().manual_seed(0)).double()
    return logits.log_softmax(dim=-1)


def enumerate_ratios(kernel, old_logps, logps, num_draws):
    """
    Ratios of tokens (9, 2, draws, x_s), and the probabilities that the sampler draws these n clean tokens and then
    jumps to x_s from the first.
    """
    draws = torch.tensor(list(itertools.product(range(NUM_CODES), repeat=num_draws)))  # (M, n)
    tiny = torch.finfo(torch.float32).tiny  # as in the trainer
    transition_logps = kernel[..., draws].transpose(2, 3).clamp(min=tiny).log()  # (9, 2, M, x_s, n)
    differences = (logps - old_logps)[..., draws].unsqueeze(3)  # (9, 2, M, 1, n)
    log_ratios = log_mean_exp(transition_logps + differences) - log_mean_exp(transition_logps)
    probabilities = old_logps[..., draws].sum(dim=-1, keepdim=True).exp() * transition_logps[..., 0].exp()
    return log_ratios.exp(), probabilities


@pytest.mark.parametrize("num_draws", [1, 2, 3])
@pytest.mark.parametrize("timestep", range(NUM_STEPS))
@pytest.mark.parametrize("path", ["metric", "mixture", "ddim"])
def test_the_ratio_is_exact(path, timestep, num_draws):
    kernel = kernels(build_scheduler(path), timestep).double()  # (9, 2, x_s, x₁)
    torch.testing.assert_close(kernel.sum(dim=2), torch.ones_like(kernel[:, :, 0]), atol=1e-6, rtol=0)
    old_logps, logps = build_policies()
    ratios, probabilities = enumerate_ratios(kernel, old_logps, logps, num_draws)
    # The expectation of the ratio of every token in every state is 1, for any other policy
    expectations = (ratios * probabilities).sum(dim=(2, 3))
    torch.testing.assert_close(expectations, torch.ones_like(expectations), atol=1e-6, rtol=0)
    # So are those of the ratio given the next state, up to the ratio of the policies' probabilities of it
    transition = (logps.exp().unsqueeze(2) * kernel).sum(dim=-1)  # (9, 2, x_s)
    torch.testing.assert_close((ratios * probabilities).sum(dim=2), transition, atol=1e-6, rtol=0)


@pytest.mark.parametrize("path", ["metric", "mixture", "ddim"])
def test_the_gradient_is_the_policy_gradient(path):
    """Where p_θ is p_old, the gradient of E[r₁ r₂ A] is that of Σ P_θ(x_s | x_t) A(x_t, x_s) over all next states."""
    kernel = kernels(build_scheduler(path), timestep=1).double()
    old_logps = build_policies()[0]
    generator = torch.Generator().manual_seed(1)
    advantages = torch.randn(
        len(STATES), NUM_CODES, NUM_CODES, generator=generator
    ).double()  # of pairs of next tokens

    def gradient(objective):
        logits = old_logps.clone().requires_grad_()
        (grad,) = torch.autograd.grad(objective(logits.log_softmax(dim=-1)), logits)
        return grad

    def expected_ratio(logps):
        ratios, probabilities = enumerate_ratios(kernel, old_logps, logps, num_draws=2)
        weighted = (ratios * probabilities).sum(dim=2)  # (9, 2, x_s), the tokens are independent
        return torch.einsum("sa,sb,sab->", weighted[:, 0], weighted[:, 1], advantages)

    def expected_advantage(logps):
        transition = (logps.exp().unsqueeze(2) * kernel).sum(dim=-1)
        return torch.einsum("sa,sb,sab->", transition[:, 0], transition[:, 1], advantages)

    expected = gradient(expected_advantage)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(gradient(expected_ratio), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("has_generators", [False, True])
@pytest.mark.parametrize("average_rates", [False, True])
@pytest.mark.parametrize("path", ["metric", "mixture", "ddim"])
def test_the_sampler_draws_what_the_ratio_assumes(path, average_rates, has_generators):
    scheduler, timestep, num_tokens = build_scheduler(path), 2, 40_000
    if average_rates and path == "ddim":
        pytest.skip("its steps have no rates")
    logits = torch.tensor([0.3, -0.5, 0.9]).expand(1, num_tokens, -1)
    sample = torch.full((1, num_tokens), 1)
    generator = torch.Generator().manual_seed(0)
    options = {"generator": [generator] if has_generators else generator, "num_draws": 2}
    output = scheduler.step(logits, timestep, sample, **options, **({"average_rates": True} if average_rates else {}))
    draws, next_sample = output.pred_original_sample, output.prev_sample
    assert draws.shape == (1, num_tokens, 2) and next_sample.shape == sample.shape
    frequencies = torch.stack([(draws == code).float().mean(dim=1)[0] for code in range(NUM_CODES)])  # (3, 2)
    torch.testing.assert_close(frequencies, logits[0, 0].softmax(dim=0).unsqueeze(1).expand(-1, 2), atol=0.01, rtol=0)
    for pair in itertools.product(range(NUM_CODES), repeat=2):
        drawn = (draws[0] == torch.tensor(pair)).all(dim=-1)
        used = torch.tensor(pair).expand(NUM_CODES, 1, -1)
        codes = torch.arange(NUM_CODES).unsqueeze(1)
        expected = scheduler.transition_probabilities(torch.ones_like(codes), codes, used, timestep)[:, 0, 0]
        if average_rates:
            t = scheduler.timestep_to_t(timestep)
            rates = scheduler.velocity(torch.tensor([1, 1]), torch.tensor(pair), t).mean(dim=0)
            rate = rates.sum()
            expected = rates / rate.clamp(min=1e-30) * -torch.expm1(-rate / NUM_STEPS)
            expected[1] = torch.exp(-rate / NUM_STEPS)
        reached = torch.stack([(next_sample[0, drawn] == code).float().mean() for code in range(NUM_CODES)])
        torch.testing.assert_close(reached, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("path", ["metric", "mixture", "ddim"])
def test_further_draws_do_not_change_a_step(path):
    scheduler, logits, sample = build_scheduler(path), torch.randn(2, 5, NUM_CODES), torch.randint(3, (2, 5))
    for timestep in (1, NUM_STEPS - 1):
        outputs = [
            scheduler.step(logits, timestep, sample, generator=torch.Generator().manual_seed(0), num_draws=num_draws)
            for num_draws in (None, 1, 3)
        ]
        for output in outputs[1:]:
            assert torch.equal(output.prev_sample, outputs[0].prev_sample)
            assert torch.equal(output.pred_original_sample[..., 0], outputs[0].pred_original_sample)
    with pytest.raises(ValueError, match="`num_draws` must be > 0 or None, got 0"):
        scheduler.step(logits, 1, sample, num_draws=0)
