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

"""Masked diffusion against its equations, and by enumeration of four tokens with three codes and a mask."""

import itertools

import pytest
import torch

from trl_udm import MaskedDDIMScheduler


NUM_CODES, NUM_TOKENS, NUM_STEPS = 3, 4, 3
MASK = NUM_CODES
STATES = torch.tensor(list(itertools.product(range(NUM_CODES + 1), repeat=NUM_TOKENS)))  # (256, 4)
IS_CLEAN = (STATES != MASK).all(dim=1)
SAMPLES = STATES[IS_CLEAN]  # (81, 4)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def build_scheduler(num_steps=NUM_STEPS, **kwargs):
    scheduler = MaskedDDIMScheduler(NUM_CODES + 1, MASK, **kwargs)
    scheduler.set_timesteps(num_steps)
    return scheduler


def assert_frequencies(draws, probabilities):
    frequencies = draws.flatten().bincount(minlength=NUM_CODES + 1) / draws.numel()
    assert (frequencies[probabilities == 0] == 0).all()
    errors = (probabilities * (1 - probabilities) / draws.numel()).sqrt()
    assert ((frequencies - probabilities).abs() <= 4 * errors).all()


# --- Forward process ---


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, 1.0])
def test_noise_has_the_probabilities_of_the_path(t):
    clean = torch.full((2, 10000), 1)
    mirrored = torch.tensor([False, True])
    states = build_scheduler().add_noise(clean, t, [generator(0), generator(0)], mirrored=mirrored)
    for state in states:
        assert_frequencies(state, torch.tensor([0.0, t, 0.0, 1 - t]))
    # As unlike as can be
    both = (states == 1).all(dim=0).float().mean()
    assert both.item() == pytest.approx(max(0.0, 2 * t - 1), abs=0.02)


def test_noise_alone_is_masks():
    scheduler = build_scheduler()
    assert (scheduler.draw_noise((2, 5)) == MASK).all()
    assert torch.equal(scheduler.add_noise(SAMPLES, 0.0), scheduler.draw_noise((81, NUM_TOKENS)))


# --- Reverse process ---


@pytest.mark.parametrize("step", range(NUM_STEPS))
def test_a_step_has_the_probabilities_of_the_posterior(step):
    scheduler = build_scheduler()
    logits = torch.tensor([1.0, -1.0, 0.5, 3.0])
    state = torch.tensor([MASK, 1]).repeat_interleave(10000).view(2, 10000)
    output = scheduler.step(logits.expand(2, 10000, -1), step, state, generator=generator(step), num_draws=2)
    a = (1 / NUM_STEPS) / (1 - step / NUM_STEPS)  # (s − t) / (1 − t)
    clean = torch.cat([logits[:MASK].softmax(dim=0), torch.zeros(1)])
    assert_frequencies(output.prev_sample[0], torch.cat([a * clean[:MASK], torch.tensor([1 - a])]).clamp(min=0))
    for draw in output.pred_original_sample[0].unbind(dim=-1):
        assert_frequencies(draw, clean)
    # A visible token stays, and is its own prediction
    assert (output.prev_sample[1] == 1).all() and (output.pred_original_sample[1] == 1).all()


def test_generators_of_samples_and_the_most_likely_tokens():
    scheduler = build_scheduler()
    logits, state = torch.randn(3, 8, NUM_CODES + 1, generator=generator(0)), scheduler.draw_noise((3, 8))
    together = scheduler.step(logits, 0, state, generator=[generator(i) for i in range(3)]).prev_sample
    for i in range(3):
        alone = scheduler.step(logits[i : i + 1], 0, state[:1], generator=generator(i)).prev_sample
        assert torch.equal(together[i : i + 1], alone)
    likely = scheduler.step(logits, NUM_STEPS - 1, state, temperature=0.0).prev_sample
    assert torch.equal(likely, logits[..., :MASK].argmax(dim=-1))


def test_the_most_confident_tokens_become_visible_first():
    scheduler = build_scheduler(remasking="low_confidence")
    # Token n is sure of code 0 by n
    logits = torch.zeros(2, NUM_TOKENS, NUM_CODES + 1)
    logits[..., 0] = torch.tensor([2.0, 8.0, 4.0, 6.0])
    state = scheduler.draw_noise((2, NUM_TOKENS))
    for step, visible in enumerate([[1], [1, 3], [0, 1, 2, 3]]):
        state = scheduler.step(logits, step, state, temperature=0.0).prev_sample
        assert (state != MASK)[0].nonzero().squeeze(1).tolist() == visible
        assert torch.equal(state[0], state[1])


# --- What is predicted ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_masked_tokens_are_uncertain(dtype):
    logits = torch.randn(256, NUM_TOKENS, NUM_CODES + 1, generator=generator(0)).to(dtype).requires_grad_()
    constrained = build_scheduler().constrain_logits(logits, STATES)
    logps = constrained.float().log_softmax(dim=-1)
    is_masked = STATES == MASK
    torch.testing.assert_close(logps[is_masked][:, :MASK], logits[is_masked][:, :MASK].float().log_softmax(dim=-1))
    assert (logps[is_masked][:, MASK].exp() == 0).all()
    expected = torch.nn.functional.one_hot(STATES, NUM_CODES + 1)[~is_masked]
    assert torch.equal(logps[~is_masked].exp(), expected.float())
    entropies = -(logps.exp() * logps).sum(dim=-1)
    entropies.sum().backward()
    assert entropies.isfinite().all() and logits.grad.isfinite().all()
    assert (logits.grad[~is_masked] == 0).all()


# --- Likelihoods by enumeration ---


def build_denoiser():
    """p_θ(x₁ⁿ | x) of all states, (256, 4, 4), in float64."""
    logits = 2 * torch.randn(256, NUM_TOKENS, NUM_CODES + 1, generator=generator(0), dtype=torch.double)
    return logits, build_scheduler().constrain_logits(logits, STATES).softmax(dim=-1)


def build_kernel(scheduler, denoiser, timestep):
    """p_θ(x_s | x_t) token by token, (256 states, 4, x_s)."""
    clean = torch.arange(NUM_CODES + 1).expand(*STATES.shape, -1)
    given = [
        scheduler.transition_probabilities(STATES, torch.full_like(STATES, code), clean, timestep).double()
        for code in range(NUM_CODES + 1)
    ]
    return (torch.stack(given, dim=2) * denoiser.unsqueeze(2)).sum(dim=-1)


def enumerate_chain(scheduler, denoiser):
    """log p_θ(x₁) of all samples (81,): those of the sampler's chain."""
    probabilities = (STATES == MASK).all(dim=1).double()
    for timestep in range(scheduler.num_inference_steps):
        kernel = build_kernel(scheduler, denoiser, timestep)
        matrix = torch.stack([kernel[:, n][:, STATES[:, n]] for n in range(NUM_TOKENS)]).prod(dim=0)
        torch.testing.assert_close(matrix.sum(dim=1), torch.ones(256, dtype=torch.double))
        probabilities = probabilities @ matrix
    assert (probabilities[~IS_CLEAN] == 0).all()
    return probabilities[IS_CLEAN].log()


def tabulate_noise(t):
    """p_t(x | x₁) of all samples and states, (81, 256)."""
    is_same, is_masked = SAMPLES.unsqueeze(1) == STATES, STATES == MASK
    return (t * is_same.double() + (1 - t) * is_masked.double()).prod(dim=-1)


def compute_bounds(scheduler, denoiser):
    """The evidence lower bounds of all samples (81,): by `elbo_weights`, and by the divergences of the steps."""
    num_steps = scheduler.num_inference_steps
    pairs = torch.cartesian_prod(torch.arange(81), torch.arange(256))
    samples, states = SAMPLES[pairs[:, 0]], STATES[pairs[:, 1]]
    logps = denoiser[pairs[:, 1]].gather(-1, samples.unsqueeze(-1)).squeeze(-1).log()  # (81 * 256, 4)
    by_weights, by_steps = torch.zeros(2, 81, dtype=torch.double)
    for timestep in range(num_steps):
        t = scheduler.timestep_to_t(timestep)
        noise = tabulate_noise(t)  # 0 for states that the sample cannot have
        weights = scheduler.elbo_weights(samples, states, torch.full((len(pairs),), t), num_steps)
        scores = (weights * logps).sum(dim=1).view(81, 256)
        by_weights += torch.where(noise > 0, noise * scores, 0).sum(dim=1) / num_steps
        kernel = build_kernel(scheduler, denoiser, timestep)[pairs[:, 1]]  # (81 * 256, 4, x_s)
        given = torch.stack(
            [
                scheduler.transition_probabilities(
                    states, torch.full_like(states, code), samples.unsqueeze(-1), timestep
                ).squeeze(-1)
                for code in range(NUM_CODES + 1)
            ],
            dim=-1,
        ).double()
        divergences = torch.where(given > 0, given * (given / kernel).log(), 0).sum(dim=(1, 2)).view(81, 256)
        by_steps -= torch.where(noise > 0, noise * divergences, 0).sum(dim=1)
    return by_weights, by_steps


def test_the_sampler_has_the_enumerated_probabilities():
    scheduler, (logits, denoiser) = build_scheduler(), build_denoiser()
    truth = enumerate_chain(scheduler, denoiser)
    assert truth.exp().sum().item() == pytest.approx(1)
    states, draw = scheduler.draw_noise((8000, NUM_TOKENS)), generator(0)
    places = (NUM_CODES + 1) ** torch.arange(NUM_TOKENS - 1, -1, -1)
    for timestep in range(NUM_STEPS):
        states = scheduler.step(logits[states @ places], timestep, states, generator=draw).prev_sample
        # So many tokens are visible as in the forward process
        assert (states != MASK).float().mean().item() == pytest.approx((timestep + 1) / NUM_STEPS, abs=0.01)
    counts = (states @ places).bincount(minlength=256)[IS_CLEAN]
    assert ((counts - 8000 * truth.exp()).square() / (8000 * truth.exp())).sum() < 81 + 4 * 12.7  # chi-square


def test_the_weights_bound_the_likelihood_of_every_sample():
    _, denoiser = build_denoiser()
    for num_steps in (1, 3):
        scheduler = build_scheduler(num_steps)
        truth = enumerate_chain(scheduler, denoiser)
        by_weights, by_steps = compute_bounds(scheduler, denoiser)
        torch.testing.assert_close(by_weights, by_steps, rtol=1e-5, atol=1e-5)
        if num_steps == 1:  # all tokens are drawn at once, from masks
            torch.testing.assert_close(by_weights, truth)
        else:
            assert (by_weights < truth).all()


# --- Settings ---


def test_saved_and_loaded(tmp_path):
    MaskedDDIMScheduler(9, 4, num_inference_steps=7, remasking="low_confidence").save_pretrained(tmp_path)
    scheduler = MaskedDDIMScheduler.from_pretrained(tmp_path)
    assert len(scheduler.timesteps) == 7
    config = {name: scheduler.config[name] for name in ("codebook_size", "mask_token_id", "remasking")}
    assert config == {"codebook_size": 9, "mask_token_id": 4, "remasking": "low_confidence"}


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"`mask_token_id` must be in \[0, 4\), got 4"):
        MaskedDDIMScheduler(4, 4)
    with pytest.raises(ValueError, match="`remasking` must be 'random' or 'low_confidence', got 'entropy'"):
        MaskedDDIMScheduler(4, 3, remasking="entropy")
    with pytest.raises(ValueError, match="`original_samples` must not have the mask token 3"):
        build_scheduler().add_noise(torch.tensor([[0, 3]]), 0.5)
