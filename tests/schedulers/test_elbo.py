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

"""The bound that `elbo_weights` is of, against the likelihood of the sampler's chain, by enumeration."""

import itertools

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from trl_udm import KineticOptimalScheduler


NUM_CODES, NUM_TOKENS, NUM_STEPS = 3, 4, 10
NUM_FINE_STEPS = 100  # of a grid whose weights are compared with the integral
STATES = torch.tensor(list(itertools.product(range(NUM_CODES), repeat=NUM_TOKENS)))  # (81, 4)
PLACES = NUM_CODES ** torch.arange(NUM_TOKENS - 1, -1, -1)  # a state's index is the sum of these times its tokens


def build_scheduler(alpha, shift=1.0):
    scheduler = KineticOptimalScheduler(alpha=alpha, c=3.0, shift=shift, codebook_size=NUM_CODES)
    if alpha is not None:
        scheduler.set_codebook(torch.tensor([[1.0, 0.2], [-0.3, 1.0], [0.1, -1.0]]))
    return scheduler


def build_denoiser(concentration=0.0):
    """p_θ(x₁ | x_t), of shape (81, 4, 3), which depends on the whole state."""
    logits = torch.randn(len(STATES), NUM_TOKENS, NUM_CODES, generator=torch.Generator().manual_seed(0))
    logits[..., 0] += concentration
    return logits.double().softmax(dim=-1)


def last_time(scheduler):
    scheduler.set_timesteps(NUM_STEPS)
    return scheduler.timestep_to_t(NUM_STEPS - 1)


def take(probabilities, clean):
    """Of the codes of one sample, or of one a state: (81, 4)."""
    return probabilities.gather(-1, clean.expand_as(STATES).unsqueeze(-1)).squeeze(-1)


def model_rates(scheduler, denoiser, t):
    """Rates Σ_j p_θ(j | x) u(k | x, j) at which each token of each state jumps to each code."""
    given = torch.stack(
        [scheduler.velocity(STATES, torch.full_like(STATES, code), t).double() for code in range(NUM_CODES)], dim=2
    )  # (81, 4, j, k)
    return (denoiser.unsqueeze(-1) * given).sum(dim=2)


def negative_log_likelihoods(scheduler, denoiser):
    """Of all 81 clean samples: those of Kolmogorov's equation up to the last step, which draws from p_θ."""

    def generator(t, _=None):
        rates = model_rates(scheduler, denoiser, t)
        matrix = -rates.sum(dim=(1, 2)).diag()  # of the probabilities' change: (81, 81)
        for token, code in itertools.product(range(NUM_TOKENS), range(NUM_CODES)):
            target = STATES.clone()
            target[:, token] = code
            matrix[(target * PLACES).sum(dim=1), torch.arange(len(STATES))] += rates[:, token, code]
        return matrix.numpy()

    uniform = np.full(len(STATES), 1 / len(STATES))
    solution = solve_ivp(
        lambda t, probabilities: generator(t) @ probabilities,
        (1e-9, last_time(scheduler)),
        uniform,
        method="LSODA",
        jac=generator,
        rtol=1e-6,
        atol=1e-9,
    )
    assert solution.y[:, -1].sum() == pytest.approx(1, abs=1e-4)
    drawn = torch.stack([take(denoiser, clean).prod(dim=1) for clean in STATES], dim=1)  # (81 states, 81 samples)
    return -np.log(solution.y[:, -1] @ drawn.numpy())


def bounds(scheduler, denoiser, clean_sample):
    """The bound by `elbo_weights`, and the one with the exact divergence of the two chains, of one clean sample."""
    nodes, node_weights = np.polynomial.legendre.leggauss(40)
    clean = clean_sample.expand_as(STATES)
    log_probs = take(denoiser, clean_sample).log()  # (81, 4)

    def path(t):  # (81,): p_t(x | x₁)
        return take(scheduler.probabilities(clean, t).double(), clean=STATES).prod(dim=1)

    last = last_time(scheduler)
    weights = scheduler.elbo_weights(clean, STATES, torch.full((len(STATES),), last), NUM_STEPS)
    totals = (path(last) @ -(weights / NUM_STEPS * log_probs).sum(dim=1)).repeat(2)
    for t, node_weight in zip((nodes + 1) / 2 * last, node_weights / 2 * last, strict=True):
        shift = scheduler.config.shift
        sigma = (1 - t) / (shift - (shift - 1) * (1 - t))
        step_size = scheduler._sigma_to_t(sigma - 1 / NUM_FINE_STEPS) - t
        weights = scheduler.elbo_weights(clean, STATES, torch.full((len(STATES),), t), NUM_FINE_STEPS).double()
        rates, given = model_rates(scheduler, denoiser, t), scheduler.velocity(STATES, clean, t).double()
        difference = (rates - given).sum(dim=(1, 2))
        by_weights = -(weights / (NUM_FINE_STEPS * step_size) * log_probs).sum(dim=1) + difference
        exact = torch.where(given > 0, given * (given / rates).log(), 0.0).sum(dim=(1, 2)) + difference
        totals += node_weight * torch.stack([path(t) @ by_weights, path(t) @ exact])
    return totals.tolist()


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.9])
def test_the_weights_bound_the_likelihood_of_every_sample(alpha, shift):
    scheduler, denoiser = build_scheduler(alpha, shift), build_denoiser()
    likelihoods = negative_log_likelihoods(scheduler, denoiser)
    assert np.exp(-likelihoods).sum() == pytest.approx(1, abs=1e-4)
    for index in range(0, len(STATES), 4):
        by_weights, exact = bounds(scheduler, denoiser, STATES[index])
        assert likelihoods[index] < exact + 1e-3
        if alpha is None:  # a jump can only lead to x₁, so that nothing is lost
            assert by_weights == pytest.approx(exact, rel=1e-3)
        else:
            assert exact + 0.01 < by_weights < 2 * exact


@pytest.mark.parametrize("alpha", [None, 0.9])
def test_the_bound_is_tight_where_the_denoiser_is_sure(alpha):
    scheduler, denoiser = build_scheduler(alpha), build_denoiser(concentration=20.0)
    by_weights, exact = bounds(scheduler, denoiser, torch.zeros(NUM_TOKENS, dtype=torch.long))
    likelihood = negative_log_likelihoods(scheduler, denoiser)[0]
    assert max(abs(by_weights), abs(exact), abs(likelihood)) < 1e-4


def test_the_weights_of_the_mixture_path():
    weights = build_scheduler(None).elbo_weights(
        torch.tensor([[0, 1], [2, 2], [1, 1]]),
        torch.tensor([[0, 2], [2, 0], [1, 0]]),
        torch.tensor([0.5, 0.75, 0.9]),
        10,
    )
    torch.testing.assert_close(weights, torch.tensor([[0.0, 2.0], [0.0, 4.0], [10.0, 10.0]]))
