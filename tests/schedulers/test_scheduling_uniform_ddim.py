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

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from trl_udm import KineticOptimalScheduler, UniformDDIMScheduler


VOCABULARY = 5


def generator(seed):
    return torch.Generator().manual_seed(seed)


def forward_probabilities(clean, t):
    """p_t(· | x₁)"""
    return t * torch.nn.functional.one_hot(torch.tensor(clean), VOCABULARY) + (1 - t) / VOCABULARY


def assert_frequencies(draws, probabilities):
    counts = np.bincount(draws.flatten().numpy(), minlength=VOCABULARY)
    is_possible = probabilities.numpy() > 0
    assert counts[~is_possible].sum() == 0
    expected = probabilities.double().numpy()[is_possible]
    if len(expected) > 1:
        assert chisquare(counts[is_possible], expected / expected.sum() * draws.numel()).pvalue > 1e-3


# --- Forward process ---


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_noise_has_the_probabilities_of_the_path(t):
    scheduler = UniformDDIMScheduler(VOCABULARY)
    draws = scheduler.add_noise(torch.full((20000, 2), 3), t, generator=generator(0))
    assert draws.shape == (20000, 2) and draws.dtype == torch.long
    assert_frequencies(draws, forward_probabilities(3, t))


def test_a_clean_sample_stays_at_time_one_and_is_not_changed():
    clean = torch.randint(VOCABULARY, (50, 7), generator=generator(1))
    kept = clean.clone()
    assert torch.equal(UniformDDIMScheduler(VOCABULARY).add_noise(clean, 1.0, generator=generator(0)), kept)
    assert torch.equal(clean, kept)


def test_each_sample_may_have_its_time():
    scheduler = UniformDDIMScheduler(VOCABULARY)
    draws = scheduler.add_noise(torch.full((2, 20000), 1), torch.tensor([0.1, 0.8]), generator=generator(0))
    for row, t in zip(draws, (0.1, 0.8), strict=True):
        assert_frequencies(row, forward_probabilities(1, t))


def test_a_time_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"`t` must be a scalar or have the shape .* \(2, 3\), got \(3,\)"):
        UniformDDIMScheduler(VOCABULARY).add_noise(torch.zeros(2, 3, dtype=torch.long), torch.rand(3))


# --- Reverse process ---


@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize("state", [0, 2])
def test_a_step_has_the_probabilities_of_the_posterior(step, state):
    scheduler = UniformDDIMScheduler(VOCABULARY)
    scheduler.set_timesteps(5)
    t, s = step / 5, (step + 1) / 5
    logits = torch.tensor([1.0, -1.0, 0.5, 0.0, -2.0])
    expected = torch.zeros(VOCABULARY)
    for clean, weight in enumerate(logits.softmax(dim=-1)):
        # p(x_s | x_t, x₁) by Bayes' rule, with q(x_t | x_s) of a chain that survives from s to t with chance t / s
        joint = forward_probabilities(clean, s)
        joint = joint * ((t / s) * (torch.arange(VOCABULARY) == state) + (1 - t / s) / VOCABULARY)
        expected += weight * joint / joint.sum()
    sample = torch.full((40, 1000), state)
    output = scheduler.step(logits.expand(40, 1000, -1), step, sample, generator=generator(step))
    assert_frequencies(output.prev_sample, expected)
    # The clean tokens are drawn at temperature 1
    assert_frequencies(output.pred_original_sample, logits.softmax(dim=-1))
    assert (sample == state).all()


def test_the_last_step_returns_the_clean_sample():
    scheduler = UniformDDIMScheduler(VOCABULARY)
    scheduler.set_timesteps(5)
    output = scheduler.step(torch.zeros(10, 50, VOCABULARY), 4, torch.zeros(10, 50, dtype=torch.long))
    assert torch.equal(output.prev_sample, output.pred_original_sample)


def test_steps_from_a_known_clean_sample_keep_the_forward_distribution():
    scheduler = UniformDDIMScheduler(VOCABULARY)
    scheduler.set_timesteps(4)
    clean, draw = torch.full((20, 1000), 2), generator(0)
    logits = torch.full((20, 1000, VOCABULARY), -math.inf).scatter_(-1, clean.unsqueeze(-1), 0.0)
    sample = torch.randint(VOCABULARY, (20, 1000), generator=draw)
    for step in range(4):
        sample = scheduler.step(logits, step, sample, generator=draw).prev_sample
        assert_frequencies(sample, forward_probabilities(2, (step + 1) / 4))


def test_the_grid_is_that_of_the_mixture_path():
    scheduler = UniformDDIMScheduler(VOCABULARY)
    other = KineticOptimalScheduler(alpha=None, c=None, codebook_size=VOCABULARY)
    for each in (scheduler, other):
        each.set_timesteps(7)
    assert scheduler.timesteps.tolist() == other.timesteps.tolist()
    assert [scheduler.timestep_to_t(i) for i in scheduler.timesteps] == pytest.approx(
        [other.timestep_to_t(i) for i in other.timesteps]
    )


def test_saved_and_loaded(tmp_path):
    UniformDDIMScheduler(VOCABULARY, num_inference_steps=9).save_pretrained(tmp_path)
    scheduler = UniformDDIMScheduler.from_pretrained(tmp_path)
    assert scheduler.config.codebook_size == VOCABULARY and len(scheduler.timesteps) == 9


def test_the_config_of_another_scheduler_makes_one():
    scheduler = UniformDDIMScheduler(VOCABULARY, num_inference_steps=9)
    other = UniformDDIMScheduler.from_config(scheduler.config, num_inference_steps=4)
    scheduler.set_timesteps(2)
    assert other.config.codebook_size == VOCABULARY and len(other.timesteps) == 4
    kinetic = KineticOptimalScheduler(alpha=None, codebook_size=VOCABULARY, shift=2.0)
    other = UniformDDIMScheduler.from_config(kinetic.config)
    assert other.config.codebook_size == VOCABULARY
    assert KineticOptimalScheduler.from_config(other.config).config.shift == 2.0


def test_ids_and_times_out_of_range_are_refused():
    scheduler = UniformDDIMScheduler(VOCABULARY)
    with pytest.raises(ValueError, match=r"`original_samples` must be in \[0, 5\), got ids from 0 to 5"):
        scheduler.add_noise(torch.tensor([[0, 5]]), 0.5)
    with pytest.raises(TypeError, match="`original_samples` must be a `torch.long` tensor"):
        scheduler.add_noise(torch.zeros(1, 2), 0.5)
    with pytest.raises(ValueError, match=r"`t` must be in \[0, 1\], got values from 1.5 to 1.5"):
        scheduler.add_noise(torch.tensor([[0, 1]]), 1.5)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_mirrored_noise_is_as_likely_and_as_unlike_as_can_be(t):
    scheduler, num_codes = UniformDDIMScheduler(codebook_size=6), 6
    clean = torch.full((2, 40000), 2)
    mirrored = torch.tensor([False, True])
    states = scheduler.add_noise(clean, t, [torch.Generator().manual_seed(3) for _ in range(2)], mirrored=mirrored)
    assert (states[:1] == scheduler.add_noise(clean[:1], t, torch.Generator().manual_seed(3))).all()
    expected = torch.full((num_codes,), (1 - t) / num_codes)
    expected[2] += t
    for state in states:
        frequencies = state.bincount(minlength=num_codes) / 40000
        assert ((frequencies - expected).abs() <= 4 * (expected * (1 - expected) / 40000).sqrt() + 1e-9).all()
    both = (states == 2).all(dim=0).float().mean().item()
    assert both == pytest.approx(max(0.0, 2 * t - 1) + 2 * min(t, 1 - t) / num_codes, abs=0.01)
