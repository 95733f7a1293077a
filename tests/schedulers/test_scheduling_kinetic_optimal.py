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

# The files in tests/oracle come from an independent run of the public reference code Yovecent/UDM-GRPO, commit
# d1bec49, and those in tests/oracle/fudoki from WanZhengyan/dFlowGRPO, commit aa81e50.

import copy
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare
from torch.utils._python_dispatch import TorchDispatchMode

from trl_udm.schedulers.draws import TiledLogits, draw_codes, draw_uniform_codes
from trl_udm.schedulers.scheduling_kinetic_optimal import KineticOptimalScheduler, KineticOptimalSchedulerOutput
from trl_udm.schedulers.scheduling_uniform_ddim import UniformDDIMScheduler


ORACLE = Path(__file__).parents[1] / "oracle"
SCALARS = json.loads((ORACLE / "scheduler_scalars.json").read_text())
PATHS = ["metric", "mixture"]


def load_oracle(path):
    return load_file(ORACLE / f"scheduler_{path}.safetensors")


def load_scheduler(path):
    folder = {"metric": "tiny-ursa/scheduler", "mixture": "tiny-scheduler-mixture"}[path]
    return KineticOptimalScheduler.from_pretrained(ORACLE / folder)


def make_scheduler(codebook_size=6, alpha=0.9, **kwargs):
    scheduler = KineticOptimalScheduler(alpha=alpha, codebook_size=codebook_size, **kwargs)
    scheduler.set_codebook(torch.randn(codebook_size, 4, generator=generator(0)))
    return scheduler


def generator(seed):
    return torch.Generator().manual_seed(seed)


def point_logits(token_ids, codebook_size):
    """Logits from which x₁ is always `token_ids`."""
    return torch.full((*token_ids.shape, codebook_size), -torch.inf).scatter_(-1, token_ids.unsqueeze(-1), 0.0)


def assert_frequencies(draws, probabilities):
    """Pearson's chi-square test; codes expected fewer than 5 times are counted together."""
    probabilities = probabilities.double().numpy() / probabilities.double().sum().item()
    counts = np.bincount(draws.flatten().numpy(), minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * draws.numel()
    is_rare = expected < 5
    counts = np.append(counts[~is_rare], counts[is_rare].sum())
    expected = np.append(expected[~is_rare], expected[is_rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    if len(expected) > 1:
        assert chisquare(counts, expected).pvalue > 1e-3
    else:
        assert counts == expected


# The time grid


@pytest.mark.parametrize("key", SCALARS["timestep_to_t"])
def test_the_time_grid_is_exact(key):
    num_inference_steps, shift = (entry.split("=")[1] for entry in key.split(","))
    scheduler = KineticOptimalScheduler(shift=float(shift))
    scheduler.set_timesteps(int(num_inference_steps))
    assert [scheduler.timestep_to_t(timestep) for timestep in scheduler.timesteps] == SCALARS["timestep_to_t"][key]


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_sample_timesteps_is_the_oracles(shift):
    expected = SCALARS["sample_timesteps(torch.Generator)"][f"shift={shift},seed=5,size=8"]
    timesteps = KineticOptimalScheduler(shift=shift).sample_timesteps(8, generator=generator(5))
    assert timesteps.dtype == torch.float32
    assert timesteps.tolist() == expected


def test_sample_timesteps_takes_a_shape():
    timesteps = KineticOptimalScheduler(shift=3.0).sample_timesteps((4, 1000), generator=generator(0))
    assert timesteps.shape == (4, 1000)
    assert 0 <= timesteps.min() and timesteps.max() < 1


@pytest.mark.parametrize("key", SCALARS["beta"])
def test_beta_is_the_oracles(key):
    alpha, c, t = (float(entry.split("=")[1]) for entry in key.split(","))
    beta_t = KineticOptimalScheduler(alpha=alpha, c=c).beta(torch.tensor(t, dtype=torch.float64))
    for expected in SCALARS["beta"][key].values():
        assert beta_t.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 0.9, 1.0, 2.0])
def test_beta_derivative_is_the_derivative_of_beta(alpha):
    scheduler = KineticOptimalScheduler(alpha=alpha)
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(scheduler.beta(t).sum(), t)
    torch.testing.assert_close(scheduler.beta_derivative(t.detach()), gradient)
    assert scheduler.beta_derivative(0.0) == 0


# The forward path


def test_codebook_and_distances_are_the_oracles():
    oracle, scheduler = load_oracle("metric"), load_scheduler("metric")
    torch.testing.assert_close(scheduler.codebook, oracle["emb_normalised"], rtol=0, atol=1e-6)
    distances = scheduler._distances(torch.arange(256))
    torch.testing.assert_close(distances, oracle["dist_matrix"], rtol=0, atol=1e-5)
    assert (distances > 0).all()


def test_a_short_embedding_is_divided_by_eps():
    scheduler = KineticOptimalScheduler(eps=0.1)
    scheduler.set_codebook(torch.tensor([[3.0, 4.0], [0.0, 0.01], [0.0, 0.0]]))
    torch.testing.assert_close(scheduler.codebook, torch.tensor([[0.6, 0.8], [0.0, 0.1], [0.0, 0.0]]))


@pytest.mark.parametrize("path", PATHS)
def test_probabilities_are_the_oracles(path):
    oracle, scheduler = load_oracle(path), load_scheduler(path)
    original_samples = oracle["x1"].expand(len(oracle["t"]), -1)
    probabilities = scheduler.probabilities(original_samples, oracle["t"])  # a time per row
    torch.testing.assert_close(probabilities, oracle["prob_xt_given_x1"].float(), rtol=0, atol=1e-5)


def test_probabilities_take_a_time_per_token():
    oracle, scheduler = load_oracle("metric"), load_scheduler("metric")
    probabilities = scheduler.probabilities(oracle["x1"], oracle["t"][:8])
    torch.testing.assert_close(probabilities, oracle["prob_tvec"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("index", [0, 3, 6, 9])
def test_add_noise_follows_the_probabilities(path, index):
    oracle, scheduler = load_oracle(path), load_scheduler(path)
    original_samples = oracle["x1"][:2].repeat(20_000, 1)
    noised_samples = scheduler.add_noise(original_samples, oracle["t"][index].item(), generator=generator(index))
    assert noised_samples.shape == original_samples.shape and noised_samples.dtype == torch.long
    for token in range(2):
        assert_frequencies(noised_samples[:, token], oracle["prob_xt_given_x1"][index, token])


def test_add_noise_of_a_vocabulary_that_no_block_size_divides():
    scheduler = make_scheduler(codebook_size=131)
    original_samples = torch.full((40_000,), 7)
    noised_samples = scheduler.add_noise(original_samples, 0.3, generator=generator(0))
    assert_frequencies(noised_samples, scheduler.probabilities(original_samples[:1], 0.3)[0])


@pytest.mark.parametrize("path", PATHS)
def test_noise_is_uniform_at_time_0_and_absent_at_time_1(path):
    scheduler = load_scheduler(path)
    original_samples = torch.arange(256).repeat(100, 1)
    assert_frequencies(scheduler.add_noise(original_samples, 0, generator=generator(0)), torch.full((256,), 1 / 256))
    assert torch.equal(scheduler.add_noise(original_samples, 1), original_samples)
    almost_clean = scheduler.add_noise(original_samples, 1 - 1e-6, generator=generator(0))
    assert (almost_clean == original_samples).float().mean() > 0.99
    probabilities = scheduler.probabilities(original_samples[0], 1.0)
    assert torch.equal(probabilities, torch.eye(256))


def test_noise_is_absent_at_time_1_between_equal_codes():
    scheduler = KineticOptimalScheduler()
    scheduler.set_codebook(torch.ones(4, 2))
    assert torch.equal(scheduler.probabilities(torch.arange(4), 1.0), torch.eye(4))
    torch.testing.assert_close(scheduler.probabilities(torch.arange(4), 0.9), torch.full((4, 4), 0.25))


@pytest.mark.parametrize("shape", [(), (3,), (3, 5), (3, 5, 2)])
def test_times_broadcast_from_the_first_dimension(shape):
    scheduler = make_scheduler()
    original_samples = torch.randint(6, (3, 5, 2), generator=generator(0))
    t = torch.rand(shape, generator=generator(1))
    probabilities = scheduler.probabilities(original_samples, t)
    expanded = t.reshape(*shape, *[1] * (3 - len(shape))).expand(3, 5, 2)
    for index in np.ndindex(3, 5, 2):
        torch.testing.assert_close(
            probabilities[index], scheduler.probabilities(original_samples[index], expanded[index].item())
        )


def test_probabilities_are_float32_under_autocast():
    scheduler = load_scheduler("metric")
    token_ids = torch.arange(256)
    expected = scheduler.probabilities(token_ids, 0.7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(scheduler.probabilities(token_ids, 0.7), expected, rtol=0, atol=0)


# The reverse step


@pytest.mark.parametrize("path", PATHS)
def test_velocity_and_jump_probability_are_the_oracles(path):
    oracle, scheduler = load_oracle(path), load_scheduler(path)
    scheduler.set_timesteps(10)
    x_t, x_1 = oracle["vel.x_t"], oracle["vel.x_1"]
    for i in range(9):
        t = scheduler.timestep_to_t(i)
        velocity = scheduler.velocity(x_t, x_1, t)
        # The oracle's velocity still has an entry at x_t, which is no jump.
        expected = oracle["vel.v"][i].scatter(-1, x_t.unsqueeze(-1), 0.0)
        torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-5)
        jump_probability = -torch.expm1(-(scheduler.timestep_to_t(i + 1) - t) * velocity.sum(dim=-1))
        torch.testing.assert_close(jump_probability, oracle["vel.jump_prob_from_step"][i], rtol=0, atol=1e-5)
        if path == "metric":
            torch.testing.assert_close(jump_probability, oracle["vel.jump_prob"][i], rtol=0, atol=1e-5)
            jumps = jump_probability.unsqueeze(-1) * velocity / velocity.sum(dim=-1, keepdim=True).clamp(min=1e-30)
            kernel = jumps.scatter(-1, x_t.unsqueeze(-1), 1 - jump_probability.unsqueeze(-1))
            torch.testing.assert_close(kernel, oracle["vel.one_step_kernel"][i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("codes", ["image", "text"])
def test_the_fourth_power_of_the_distance_is_the_path_of_fudoki(codes):
    oracle = load_file(ORACLE / "fudoki" / "b_path.safetensors")
    oracle = {name.removeprefix(f"{codes}."): tensor for name, tensor in oracle.items() if name.startswith(codes)}
    scheduler = KineticOptimalScheduler(metric_power=4.0)
    scheduler.set_codebook(oracle["embedding"])
    assert scheduler.probabilities(oracle["x1"], 0.3).shape == oracle["prob"][0].shape
    for t, probabilities, rates in zip(oracle["t"], oracle["prob"], oracle["rate"], strict=True):
        torch.testing.assert_close(scheduler.probabilities(oracle["x1"], t), probabilities, rtol=0, atol=1e-6)
        velocity = scheduler.velocity(oracle["x_t"], oracle["x1"], t)
        torch.testing.assert_close(velocity, rates, rtol=0, atol=1e-6 * max(1.0, rates.max().item()))
    metric = scheduler._distances(oracle["x1"].flatten())
    torch.testing.assert_close(metric, oracle["metric"].view_as(metric), rtol=0, atol=2e-6)


@pytest.mark.parametrize("timestep", [0, 2, 5, 8])
def test_step_follows_the_one_step_kernel(timestep):
    oracle, scheduler = load_oracle("metric"), load_scheduler("metric")
    scheduler.set_timesteps(10)
    x_t, x_1 = (oracle[f"vel.{name}"].view(1, 12).expand(5000, -1) for name in ("x_t", "x_1"))
    logits = point_logits(x_1[:1], 256).expand(5000, -1, -1)
    output = scheduler.step(logits, timestep, x_t, generator=generator(timestep))
    assert isinstance(output, KineticOptimalSchedulerOutput)
    assert torch.equal(output.pred_original_sample, x_1)
    kernel = oracle["vel.one_step_kernel"][timestep].view(12, 256)
    for token in range(12):
        assert_frequencies(output.prev_sample[:, token], kernel[token])


@pytest.mark.parametrize("timestep", [0, 5, 8])
def test_step_on_the_mixture_path_jumps_to_the_clean_token_only(timestep):
    oracle, scheduler = load_oracle("mixture"), load_scheduler("mixture")
    scheduler.set_timesteps(10)
    x_t, x_1 = (oracle[f"vel.{name}"].view(1, 12).expand(5000, -1) for name in ("x_t", "x_1"))
    logits = point_logits(x_1[:1], 256).expand(5000, -1, -1)
    prev_sample = scheduler.step(logits, timestep, x_t, generator=generator(timestep)).prev_sample
    assert ((prev_sample == x_t) | (prev_sample == x_1)).all()
    for token, jump_probability in enumerate(oracle["vel.jump_prob_from_step"][timestep].flatten()):
        if x_t[0, token] != x_1[0, token]:
            has_jumped = (prev_sample[:, token] == x_1[:, token]).long()
            assert_frequencies(has_jumped, torch.stack([1 - jump_probability, jump_probability]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_clean_sample_follows_the_softmax_of_the_logits(dtype):
    oracle, scheduler = load_oracle("metric"), load_scheduler("metric")
    scheduler.set_timesteps(10)
    logits = (3 * oracle["vel.logits"].view(1, 12, 256)[:, :3]).to(dtype)
    sample = torch.zeros(20_000, 3, dtype=torch.long)
    output = scheduler.step(logits.expand(20_000, -1, -1), 4, sample, generator=generator(1))
    for token in range(3):
        assert_frequencies(output.pred_original_sample[:, token], logits[0, token].float().softmax(dim=-1))


@pytest.mark.parametrize("alpha", [0.9, None])
def test_the_clean_sample_and_the_jump_are_drawn_apart(alpha):
    scheduler = make_scheduler(alpha=alpha)
    scheduler.set_timesteps(4)
    logits = torch.randn(1, 1, 6, generator=generator(3))
    sample = torch.full((200_000, 1), 2)
    output = scheduler.step(logits.expand(200_000, -1, -1), 2, sample, generator=generator(0))
    t, step_size = 0.5, 0.25
    velocity = scheduler.velocity(sample[:6, 0], torch.arange(6), t)  # (x₁, x_t + h)
    total = velocity.sum(dim=-1, keepdim=True)
    kernel = -torch.expm1(-step_size * total) * velocity / total.clamp(min=1e-30)
    kernel[:, 2] = torch.exp(-step_size * total[:, 0])
    joint = logits.flatten().softmax(dim=-1).unsqueeze(-1) * kernel
    assert_frequencies(6 * output.pred_original_sample + output.prev_sample, joint.flatten())


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_a_code_of_no_probability_is_never_drawn(uniform):
    probabilities = torch.zeros(16, 16).scatter_(-1, torch.arange(16).unsqueeze(-1), 0.3)
    uniforms = torch.full((16, 2), uniform, dtype=torch.float64)
    assert torch.equal(draw_codes(probabilities, uniforms), torch.arange(16))


@pytest.mark.parametrize("path", PATHS)
def test_the_last_step_returns_the_clean_sample(path):
    scheduler = load_scheduler(path)
    sample = torch.randint(256, (2, 64), generator=generator(0))
    logits = torch.randn(2, 64, 256, generator=generator(1))
    for num_inference_steps in (1, 10):
        scheduler.set_timesteps(num_inference_steps)
        output = scheduler.step(logits, scheduler.timesteps[-1], sample)
        assert torch.equal(output.prev_sample, output.pred_original_sample)


def test_nothing_moves_in_the_first_step_of_the_metric_path():
    scheduler = load_scheduler("metric")
    scheduler.set_timesteps(10)
    sample = torch.randint(256, (2, 64), generator=generator(0))
    assert torch.equal(scheduler.step(torch.randn(2, 64, 256), 0, sample).prev_sample, sample)


@pytest.mark.parametrize("path", PATHS)
def test_the_reverse_process_ends_at_a_certain_clean_sample(path):
    scheduler = load_scheduler(path)
    scheduler.set_timesteps(25)
    x_1 = torch.randint(256, (2, 64), generator=generator(0))
    sample = torch.randint(256, (2, 64), generator=generator(1))
    num_correct = []
    for timestep in scheduler.timesteps:
        sample, x_1_drawn = scheduler.step(point_logits(x_1, 256), timestep, sample, return_dict=False)
        assert torch.equal(x_1_drawn, x_1)
        num_correct.append((sample == x_1).sum())
    assert torch.equal(sample, x_1)
    assert num_correct == sorted(num_correct)


# Random numbers, chunks and the caller's tensors


@pytest.mark.parametrize("path", PATHS)
def test_a_generator_decides_every_draw_and_the_global_state_none(path):
    scheduler = load_scheduler(path)
    scheduler.set_timesteps(10)
    sample = torch.randint(256, (2, 64), generator=generator(0))
    logits = torch.randn(2, 64, 256, generator=generator(1))
    draws = {
        "add_noise": lambda seed: scheduler.add_noise(sample, 0.4, generator=generator(seed)),
        "sample_timesteps": lambda seed: scheduler.sample_timesteps(64, generator=generator(seed)),
        "step": lambda seed: torch.stack(
            scheduler.step(logits, 6, sample, generator=generator(seed), return_dict=False)
        ),
    }
    for draw in draws.values():
        torch.manual_seed(0)
        state = torch.get_rng_state()
        first = draw(3)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(1)
        assert torch.equal(draw(3), first)
        assert not torch.equal(draw(4), first)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens_per_chunk", [1, 7, 50])
def test_chunks_do_not_change_the_draws(path, tokens_per_chunk):
    scheduler, chunked = load_scheduler(path), load_scheduler(path)
    chunked.max_chunk_elements = tokens_per_chunk * 256
    sample = torch.randint(256, (3, 40), generator=generator(0))
    # As a pipeline does, the logits are cut from a longer sequence.
    logits = torch.randn(3, 60, 256, generator=generator(1))[:, -41:-1]
    t = torch.tensor([0.1, 0.5, 0.9])
    results = []
    for each in (scheduler, chunked):
        each.set_timesteps(10)
        step = each.step(logits, 7, sample, generator=generator(2), return_dict=False)
        results.append(torch.stack([*step, each.add_noise(sample, t, generator=generator(2))]))
    # Matrix products round by shape: a draw at the very edge of two codes may fall on the other side.
    assert (results[0] == results[1]).float().mean() > 0.99


def tile(logits):
    """Logits (B, N, V) as a network gives them that computes them tile by tile."""
    return TiledLogits(logits.shape, lambda rows, codes: logits.flatten(0, 1)[rows, codes].float())


def make_large_scheduler(**kwargs):
    """With 6,000 codes, whose rows are computed in parts, of which two are equal and one is zero."""
    scheduler = KineticOptimalScheduler(**kwargs)
    codebook = torch.randn(6000, 4, generator=generator(0))
    codebook[1], codebook[2] = codebook[0], 0
    scheduler.set_codebook(codebook)
    scheduler.set_timesteps(10)
    return scheduler


@pytest.mark.parametrize("max_chunk_elements", [1000, 2**17, 2**24])
@pytest.mark.parametrize(
    ("dtype", "metric_power"),
    [(torch.float32, 2.0), (torch.bfloat16, 2.0), (torch.float32, 4.0), (torch.float32, 1.5)],
)
def test_rows_that_are_computed_in_parts_give_the_same_draws(max_chunk_elements, dtype, metric_power):
    tiled, whole = (make_large_scheduler(metric_power=metric_power) for _ in range(2))
    tiled.max_chunk_elements, whole.max_untiled_codes = max_chunk_elements, 6000
    sample = torch.randint(6000, (2, 60), generator=generator(0))
    sample[0, :3] = torch.arange(3)
    logits = 4 * torch.randn(2, 60, 6000, generator=generator(1)).to(dtype)
    logits[:, :, 100:400] = -torch.inf
    for timestep in (0, 1, 5, 8, 9):
        expected = whole.step(logits, timestep, sample, generator(2), return_dict=False)
        assert (expected[0] != sample).any() or timestep == 0
        for output in (tile(logits), logits):
            for tokens, expected_tokens in zip(
                tiled.step(output, timestep, sample, generator(2), return_dict=False), expected, strict=True
            ):
                assert torch.equal(tokens, expected_tokens)
    for t in (0.0, 0.3, 0.9, 0.999999, 1.0, torch.tensor([0.2, 1.0]), torch.rand(2, 60, generator=generator(3))):
        assert torch.equal(tiled.add_noise(sample, t, generator(4)), whole.add_noise(sample, t, generator(4)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_computed_in_parts_refuse_what_is_not_finite(value):
    scheduler = make_large_scheduler()
    logits = torch.zeros(1, 3, 6000)
    logits[0, 1, 4000] = value
    for output in (logits, tile(logits), tile(torch.full_like(logits, -torch.inf))):
        with pytest.raises(ValueError, match="logits must be finite"):
            scheduler.step(output, 9, torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.parametrize("codebook_size", [5, 128, 6000, 131_072, 997])
def test_the_noise_at_time_0_is_what_equal_probabilities_give(codebook_size):
    uniforms = torch.rand(200, 2, generator=generator(0), dtype=torch.float64)
    uniforms[:2] = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    scheduler = KineticOptimalScheduler(alpha=None, codebook_size=codebook_size)
    noise = scheduler.add_noise(torch.zeros(200, dtype=torch.long), 0.0, generator(0))
    expected = draw_codes(torch.full((200, codebook_size), 1 / codebook_size), uniforms)
    assert torch.equal(draw_uniform_codes(codebook_size, uniforms), expected)
    assert torch.equal(noise[2:], expected[2:])


@pytest.mark.parametrize("shift", [0.1, 0.3, 1.0, 3.3])
def test_the_first_step_of_the_metric_path_moves_nothing_and_needs_no_logits(shift):
    scheduler = make_scheduler(shift=shift)
    scheduler.set_timesteps(3)
    sample = torch.randint(6, (2, 50), generator=generator(0))
    assert [scheduler.needs_model_output(timestep) for timestep in range(3)] == [False, True, True]
    logits = torch.randn(2, 50, 6, generator=generator(1))
    states = []
    for output in (None, logits):
        used = generator(2)
        result = scheduler.step(output, 0, sample, generator=used)
        assert torch.equal(result.prev_sample, sample)
        assert (result.pred_original_sample is None) == (output is None)
        states.append(used.get_state())
    assert torch.equal(*states)
    with pytest.raises(ValueError, match="`model_output` must be given at timestep 1, got None"):
        scheduler.step(None, 1, sample)
    scheduler.set_timesteps(1)
    assert scheduler.needs_model_output(0)
    assert UniformDDIMScheduler(6).needs_model_output(0)
    mixture = make_scheduler(alpha=None)
    mixture.set_timesteps(3)
    assert mixture.needs_model_output(0)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes, views left out."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.num_elements = max(self.num_elements, result.numel())
        return result


@pytest.mark.parametrize("path", PATHS)
def test_no_tensor_is_larger_than_a_chunk(path):
    scheduler = load_scheduler(path)
    scheduler.set_timesteps(10)
    scheduler.max_chunk_elements = 16 * 256
    sample = torch.randint(256, (2, 100), generator=generator(0))
    logits = torch.randn(2, 120, 256, generator=generator(1))[:, -101:-1]
    with LargestTensor() as largest:
        scheduler.step(logits, 7, sample)
        scheduler.add_noise(sample, 0.5)
    assert largest.num_elements <= 16 * 256


def test_no_tensor_has_all_tokens_and_all_codes():
    scheduler = make_large_scheduler()
    scheduler.max_chunk_elements = 2**15
    sample = torch.randint(6000, (2, 100), generator=generator(0))
    inputs, weight = torch.randn(200, 4, generator=generator(1)), torch.randn(6000, 4, generator=generator(2))
    logits = TiledLogits((2, 100, 6000), lambda rows, codes: inputs[rows] @ weight[codes].T)
    with LargestTensor() as largest:
        scheduler.step(logits, 7, sample)
        scheduler.add_noise(sample, 0.5)
    assert largest.num_elements <= 2**15


class HostReads(TorchDispatchMode):
    """Counts the operations whose result the host waits for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", PATHS)
def test_the_host_waits_once_a_chunk_of_moving_tokens_at_most(path):
    scheduler = load_scheduler(path)
    scheduler.set_timesteps(10)
    scheduler.max_chunk_elements = 10 * 256
    sample = torch.randint(256, (1, 100), generator=generator(0))
    logits = torch.full((1, 100, 256), -1e9).scatter(-1, sample.unsqueeze(-1), 0.0)
    logits[:, :25] = logits[:, :25].roll(1, dims=-1)  # 25 tokens, 3 chunks of 10, are not what is predicted
    counts = []
    for timestep in (7, 9):
        with HostReads() as reads:
            scheduler.step(logits, timestep, sample)
        counts.append(reads.count)
    # The last step draws the clean sample only; the ids and the draws are checked once each, for all chunks
    assert counts[0] == counts[1] + 1 + 3 + 1
    assert counts[1] <= 3


@pytest.mark.parametrize("path", PATHS)
def test_the_callers_tensors_are_not_changed(path):
    scheduler = load_scheduler(path)
    scheduler.set_timesteps(10)
    sample = torch.randint(256, (2, 64), generator=generator(0))
    logits = torch.randn(2, 64, 256, generator=generator(1), requires_grad=True)
    t = torch.tensor([0.2, 0.6])
    copies = sample.clone(), logits.detach().clone(), t.clone()
    for timestep in (4, 9):
        output = scheduler.step(logits, timestep, sample)
        output.prev_sample.zero_()
    scheduler.add_noise(sample, t).zero_()
    scheduler.velocity(sample, sample.flip(0), t).zero_()
    for tensor, kept in zip((sample, logits, t), copies, strict=True):
        assert torch.equal(tensor, kept)


def test_set_codebook_copies_what_it_is_given():
    embeddings = torch.eye(4)
    scheduler = KineticOptimalScheduler()
    scheduler.set_codebook(embeddings)
    embeddings.zero_()
    assert torch.equal(scheduler.codebook, torch.eye(4))


# Saving and loading


@pytest.mark.parametrize("path", PATHS)
def test_original_files_load(path):
    scheduler = load_scheduler(path)
    assert scheduler.config.alpha == {"metric": 0.9, "mixture": None}[path]
    assert (scheduler.config.codebook_size, scheduler.config.codebook_dim) == (256, 8)
    assert scheduler.config.shift == 2.0


@pytest.mark.parametrize("path", PATHS)
def test_a_saved_scheduler_loads_as_it_was(path, tmp_path):
    scheduler = load_scheduler(path)
    scheduler.save_pretrained(tmp_path / "pipeline" / "scheduler")
    files = {file.name for file in (tmp_path / "pipeline" / "scheduler").iterdir()}
    assert files == {"scheduler_config.json", "diffusion_pytorch_model.safetensors"}
    loaded = KineticOptimalScheduler.from_pretrained(tmp_path / "pipeline", subfolder="scheduler")
    assert torch.equal(loaded.codebook, scheduler.codebook)
    for name in ("alpha", "c", "shift", "eps", "codebook_size", "codebook_dim"):
        assert loaded.config[name] == scheduler.config[name]


def test_a_mixture_path_needs_no_codebook(tmp_path):
    scheduler = KineticOptimalScheduler(alpha=None, codebook_size=5)
    scheduler.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["scheduler_config.json"]
    loaded = KineticOptimalScheduler.from_pretrained(tmp_path)
    assert_frequencies(loaded.add_noise(torch.zeros(5000, dtype=torch.long), 0.0), torch.full((5,), 0.2))


def test_from_pretrained_overrides_settings_and_returns_what_is_unused():
    scheduler, unused = KineticOptimalScheduler.from_pretrained(
        ORACLE / "tiny-ursa", subfolder="scheduler", shift=5.0, color="red", return_unused_kwargs=True
    )
    assert scheduler.config.shift == 5.0
    assert unused["color"] == "red"


def test_from_pretrained_reads_the_cache_of_the_hub(tmp_path):
    repository = tmp_path / "models--someone--something"
    commit = "0123456789abcdef0123456789abcdef01234567"
    load_scheduler("metric").save_pretrained(repository / "snapshots" / commit / "scheduler")
    (repository / "refs").mkdir()
    (repository / "refs" / "candidate").write_text(commit)
    scheduler = KineticOptimalScheduler.from_pretrained(
        "someone/something", subfolder="scheduler", revision="candidate", cache_dir=tmp_path, local_files_only=True
    )
    assert scheduler.codebook.shape == (256, 8)


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def save_settings(folder, **kwargs):
    KineticOptimalScheduler(**kwargs).save_pretrained(folder)


@pytest.mark.parametrize("save", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content))])
def test_a_pickle_that_runs_code_is_refused(save, tmp_path):
    save_settings(tmp_path)
    save({"path.emb": torch.ones(4, 2), "more": Malicious(tmp_path / "executed")}, tmp_path / "scheduler_model.pth")
    with pytest.raises(ValueError, match=r"scheduler_model\.pth is damaged, or holds more than tensors"):
        KineticOptimalScheduler.from_pretrained(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [{"codebook": torch.ones(4, 2)}, {"path.emb": [1.0]}, torch.ones(4, 2), [1, 2]])
def test_an_original_file_without_its_tensor_is_refused(content, tmp_path):
    save_settings(tmp_path)
    torch.save(content, tmp_path / "scheduler_model.pth")
    with pytest.raises(ValueError, match=r"scheduler_model\.pth: it has no tensor `path\.emb`"):
        KineticOptimalScheduler.from_pretrained(tmp_path)


def test_a_file_of_safetensors_without_its_tensor_is_refused(tmp_path):
    save_settings(tmp_path)
    save_file({"path.emb": torch.ones(4, 2)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors: it has no tensor `codebook`"):
        KineticOptimalScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "scheduler_model.pth"])
@pytest.mark.parametrize("content", [b"", b"not a file of tensors"])
def test_a_broken_file_is_refused(name, content, tmp_path):
    save_settings(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        KineticOptimalScheduler.from_pretrained(tmp_path)


def test_a_codebook_of_another_shape_than_the_configs_is_refused(tmp_path):
    save_settings(tmp_path, codebook_size=5)
    save_file({"codebook": torch.ones(4, 2)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors: `codebook_size` is 5 in the config"):
        KineticOptimalScheduler.from_pretrained(tmp_path)
    save_file({"codebook": torch.ones(4)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors: A codebook must be a finite matrix"):
        KineticOptimalScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize("settings", [{}, {"alpha": None, "c": None}])
def test_a_missing_codebook_is_an_error(settings, tmp_path):
    save_settings(tmp_path, **settings)
    with pytest.raises(
        OSError, match=r"no `diffusion_pytorch_model\.safetensors` or `scheduler_model\.pth`.*" + tmp_path.name
    ):
        KineticOptimalScheduler.from_pretrained(tmp_path)


# Schedulers made from the config of another


def copy_by_pickle(scheduler):
    return pickle.loads(pickle.dumps(scheduler))


def copy_by_folder(scheduler, folder):
    scheduler.save_pretrained(folder)
    return KineticOptimalScheduler.from_pretrained(folder)


@pytest.mark.parametrize("path", PATHS)
def test_another_shift_keeps_the_codes(path):
    scheduler = load_scheduler(path)
    other = KineticOptimalScheduler.from_config(scheduler.config, shift=3.0)
    assert torch.equal(other.codebook, scheduler.codebook)
    assert (other.config.shift, scheduler.config.shift) == (3.0, 2.0)
    assert (other.config.alpha, other.config.codebook_size) == (scheduler.config.alpha, 256)
    clean_samples = torch.randint(256, (2, 10), generator=generator(0))
    draws = [each.add_noise(clean_samples, 0.5, generator=generator(1)) for each in (scheduler, other)]
    assert torch.equal(*draws)


def test_codes_are_kept_where_their_sizes_were_defaults():
    scheduler = KineticOptimalScheduler()
    scheduler.set_codebook(torch.randn(6, 4, generator=generator(0)))
    config = KineticOptimalScheduler.from_config(scheduler.config, shift=3.0).config
    assert (config.codebook_size, config.codebook_dim) == (6, 4)
    assert UniformDDIMScheduler.from_config(scheduler.config).config.codebook_size == 6


def test_settings_given_by_position_are_kept():
    scheduler = KineticOptimalScheduler(None, None, 2.0, 1e-5, 6)
    assert KineticOptimalScheduler.from_config(scheduler.config).config == scheduler.config


def test_a_change_of_one_scheduler_does_not_show_in_the_other():
    scheduler = make_scheduler()
    codes = scheduler.codebook.clone()
    config = scheduler.config
    other = KineticOptimalScheduler.from_config(config)
    other.codebook.zero_()
    other.set_timesteps(3)
    other.register_to_config(shift=7.0)
    assert torch.equal(scheduler.codebook, codes)
    assert scheduler.timesteps is None and scheduler.config.shift == config.shift == 1.0
    scheduler.set_codebook(torch.ones(6, 4))
    assert not other.codebook.any()


def test_the_config_of_a_scheduler_stays_plain(tmp_path):
    scheduler = make_scheduler()
    other = KineticOptimalScheduler.from_config(scheduler.config, shift=3.0)
    other.save_pretrained(tmp_path / "other")
    make_scheduler(shift=3.0).save_pretrained(tmp_path / "same")
    jsons = [(tmp_path / name / "scheduler_config.json").read_text() for name in ("other", "same")]
    assert json.loads(jsons[0]) == json.loads(jsons[1])
    assert "tensor" not in jsons[0] and "tensor" not in repr(other) and "tensor" not in repr(other.config)
    assert not any(isinstance(value, torch.Tensor) for value in other.config.values())


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, copy_by_pickle, copy_by_folder])
def test_copies_of_schedulers_and_of_configs_keep_the_codes(how, tmp_path):
    scheduler = KineticOptimalScheduler.from_config(make_scheduler().config, shift=3.0)
    copied = how(scheduler, tmp_path) if how is copy_by_folder else how(scheduler)
    schedulers = [copied, KineticOptimalScheduler.from_config(copied.config)]
    if how is not copy_by_folder:
        schedulers.append(KineticOptimalScheduler.from_config(how(scheduler.config)))
    for each in schedulers:
        assert torch.equal(each.codebook, scheduler.codebook)
        assert each.config.shift == 3.0


def test_settings_without_codes_fail_at_first_use_and_take_codes(tmp_path):
    scheduler = make_scheduler()
    scheduler.save_pretrained(tmp_path)
    token_ids = torch.zeros(2, 3, dtype=torch.long)
    for settings in (KineticOptimalScheduler.load_config(tmp_path), dict(scheduler.config)):
        loaded = KineticOptimalScheduler.from_config(settings, shift=3.0)
        with pytest.raises(ValueError, match="A plain dictionary of settings has no codes"):
            loaded.add_noise(token_ids, 0.5)
        loaded.set_codebook(scheduler.codebook)
        assert torch.equal(loaded.add_noise(token_ids, 1.0), token_ids)


def test_codes_of_another_size_than_is_asked_for_are_refused():
    with pytest.raises(ValueError, match="`codebook_size` is 7 in the config, got a codebook with 6"):
        KineticOptimalScheduler.from_config(make_scheduler().config, codebook_size=7)


def test_unused_arguments_are_returned_with_the_scheduler():
    scheduler, unused = KineticOptimalScheduler.from_config(
        make_scheduler().config, return_unused_kwargs=True, color="red"
    )
    assert unused["color"] == "red" and scheduler.codebook is not None


def test_codes_move_to_the_other_path_and_back():
    scheduler = make_scheduler()
    mixture = KineticOptimalScheduler.from_config(scheduler.config, alpha=None)
    assert not mixture.needs_codebook and scheduler.needs_codebook
    back = KineticOptimalScheduler.from_config(mixture.config, alpha=0.9)
    assert torch.equal(back.codebook, scheduler.codebook)


# Errors


@pytest.mark.parametrize("name", ["alpha", "c", "shift", "eps"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a number > 0, got {value}"):
        KineticOptimalScheduler(**{name: value})


def test_the_metric_path_needs_c():
    with pytest.raises(ValueError, match="`c` must be a number > 0, got None"):
        KineticOptimalScheduler(c=None)


def test_a_codebook_that_is_none_is_refused():
    scheduler = KineticOptimalScheduler(codebook_dim=3)
    with pytest.raises(ValueError, match=r"finite matrix of shape .*, got shape \(4,\)"):
        scheduler.set_codebook(torch.ones(4))
    with pytest.raises(ValueError, match="with NaN or infinite entries"):
        scheduler.set_codebook(torch.full((4, 3), torch.nan))
    with pytest.raises(ValueError, match="`codebook_dim` is 3 in the config, got a codebook with 2"):
        scheduler.set_codebook(torch.ones(4, 2))
    assert scheduler.codebook is None


def test_a_scheduler_without_codes_says_what_it_needs():
    token_ids = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="does not know its `codebook_size`"):
        KineticOptimalScheduler().add_noise(token_ids, 0.5)
    with pytest.raises(ValueError, match="needs a codebook: call `set_codebook`"):
        KineticOptimalScheduler(codebook_size=4).add_noise(token_ids, 0.5)


@pytest.mark.parametrize("num_inference_steps", [0, -3])
def test_a_grid_of_no_steps_is_refused(num_inference_steps):
    with pytest.raises(ValueError, match=f"`num_inference_steps` must be > 0, got {num_inference_steps}"):
        KineticOptimalScheduler().set_timesteps(num_inference_steps)


def test_a_step_outside_the_grid_is_refused():
    scheduler = make_scheduler()
    sample, logits = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, 6)
    with pytest.raises(ValueError, match="call `set_timesteps` first"):
        scheduler.step(logits, 0, sample)
    scheduler.set_timesteps(10)
    for timestep in (-1, 10, 0.5, torch.tensor(10)):
        with pytest.raises(ValueError, match=r"`timestep` must be a step index in \[0, 9\]"):
            scheduler.step(logits, timestep, sample)
        with pytest.raises(ValueError, match=r"`timestep` must be a step index in \[0, 9\]"):
            scheduler.timestep_to_t(timestep)


@pytest.mark.parametrize(
    ("logits_shape", "sample_shape"), [((1, 2, 5), (1, 2)), ((2, 1, 6), (1, 2)), ((2, 6), (1, 2)), ((2, 6), (2,))]
)
def test_shapes_that_do_not_fit_are_refused(logits_shape, sample_shape):
    scheduler = make_scheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="`model_output` must have shape"):
        scheduler.step(torch.zeros(logits_shape), 0, torch.zeros(sample_shape, dtype=torch.long))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(value):
    scheduler = make_scheduler()
    scheduler.set_timesteps(10)
    logits = torch.zeros(1, 2, 6)
    logits[0, 1, 3] = value
    with pytest.raises(ValueError, match="logits must be finite"):
        scheduler.step(logits, 0, torch.zeros(1, 2, dtype=torch.long))


def test_token_ids_out_of_range_are_refused():
    scheduler = make_scheduler()
    scheduler.set_timesteps(10)
    valid = torch.zeros(1, 2, dtype=torch.long)
    for wrong in (torch.tensor([[0, 6]]), torch.tensor([[-1, 0]])):
        with pytest.raises(ValueError, match=r"`original_samples` must be in \[0, 6\), got ids from"):
            scheduler.add_noise(wrong, 0.5)
        with pytest.raises(ValueError, match=r"`original_samples` must be in \[0, 6\)"):
            scheduler.velocity(valid, wrong, 0.5)
        with pytest.raises(ValueError, match=r"`noised_samples` must be in \[0, 6\)"):
            scheduler.velocity(wrong, valid, 0.5)
        with pytest.raises(ValueError, match=r"`sample` must be in \[0, 6\)"):
            scheduler.step(torch.zeros(1, 2, 6), 0, wrong)
    with pytest.raises(TypeError, match="`original_samples` must be a `torch.long` tensor, got torch.float32"):
        scheduler.add_noise(valid.float(), 0.5)


@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan"), torch.tensor([0.5, 2.0])])
def test_times_out_of_range_are_refused(t):
    with pytest.raises(ValueError, match=r"`t` must be in \[0, 1\], got values from"):
        make_scheduler().add_noise(torch.zeros(2, 3, dtype=torch.long), t)


@pytest.mark.parametrize("shape", [(3,), (2, 1), (2, 3, 1)])
def test_times_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"first dimensions of the samples, \(2, 3\), got"):
        make_scheduler().add_noise(torch.zeros(2, 3, dtype=torch.long), torch.zeros(shape))


def test_a_velocity_at_time_1_or_between_two_shapes_is_refused():
    scheduler = make_scheduler()
    token_ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"`t` must be in \[0, 1\), got 1"):
        scheduler.velocity(token_ids, token_ids, 1.0)
    with pytest.raises(ValueError, match="must have one shape"):
        scheduler.velocity(token_ids, token_ids[:1], 0.5)
