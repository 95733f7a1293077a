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

"""One computation on the CPU and on the GPU gives one result."""

import pytest


pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("path", ["metric", "tiled metric", "mixture"])
@pytest.mark.parametrize("one_each", [False, True], ids=["one generator", "one for each sample"])
def test_a_generator_on_the_cpu_draws_the_same_tokens(both, path, one_each):
    """Noised states, and each step of the grid from the same logits and states."""
    import torch

    from trl_udm.schedulers.draws import TiledLogits

    from .models import build_scheduler

    def draw(device):
        scheduler = build_scheduler(device, path)
        inputs = torch.Generator().manual_seed(1)
        clean = torch.randint(128, (4, 64), generator=inputs)
        logits = 2 * torch.randn(5, 4, 64, 128, generator=inputs).to(device)
        generator = [torch.Generator().manual_seed(seed) for seed in range(4)]
        generator = generator if one_each else generator[0]
        samples = [scheduler.add_noise(clean.to(device), 0.3, generator=generator)]
        for timestep, step_logits in zip(scheduler.timesteps, logits, strict=True):
            if path == "tiled metric":
                tokens = step_logits.flatten(0, 1)
                step_logits = TiledLogits(step_logits.shape, lambda rows, codes, tokens=tokens: tokens[rows, codes])
            output = scheduler.step(step_logits, timestep, samples[0], generator=generator)
            samples += [output.prev_sample, output.pred_original_sample]
        return torch.stack(samples)

    expected, actual = both(draw)
    assert torch.equal(actual, expected)
    assert not torch.equal(actual[0], actual[3])  # step 0 of the metric path moves no token


@pytest.mark.parametrize("path", ["metric", "tiled metric", "mixture"])
def test_draws_have_the_probabilities_of_the_path(device, path):
    """Noised states and both outputs of a step, by the device's own generator. Each test fails once in a thousand."""
    import torch
    from scipy.stats import chisquare

    from .models import build_scheduler

    scheduler = build_scheduler(device, path, codebook_size=12)
    generator = torch.Generator(device).manual_seed(2)
    num_draws = 20_000
    clean = torch.full((1, num_draws), 3, device=device)
    noised = scheduler.add_noise(clean, 0.2, generator=generator)
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)).to(device)
    x_t, timestep = 5, 2
    t, end = scheduler.timestep_to_t(timestep), scheduler.timestep_to_t(timestep + 1)
    output = scheduler.step(logits.expand(1, num_draws, -1), timestep, torch.full_like(clean, x_t), generator)
    codes = torch.arange(12, device=device)
    velocity = scheduler.velocity(torch.full_like(codes, x_t), codes, t).double()  # (x₁, k)
    rates = velocity.sum(dim=-1, keepdim=True)
    jumps = -torch.expm1(-(end - t) * rates)
    moves = jumps * velocity / rates.clamp(min=1e-30)
    moves[:, x_t] = 1 - jumps[:, 0]
    x_1 = logits.double().softmax(dim=-1)
    for draws, expected in (
        (noised, scheduler.probabilities(clean[0, :1], 0.2)[0]),
        (output.pred_original_sample, x_1),
        (output.prev_sample, x_1 @ moves),
    ):
        counts = torch.bincount(draws.flatten(), minlength=12).cpu().numpy()
        expected = expected.double().cpu().numpy()
        is_drawn = expected > 1e-9
        assert counts[~is_drawn].sum() == 0
        frequencies = expected[is_drawn] / expected[is_drawn].sum() * num_draws
        assert chisquare(counts[is_drawn], frequencies).pvalue > 1e-3


def test_the_network_computes_the_same_logits(both):
    import torch

    from .models import PROMPTS, load_shapes

    def denoise(device):
        pipeline = load_shapes(device)
        shape = pipeline.latent_shape()
        tokens = torch.randint(128, (len(PROMPTS), 64), generator=torch.Generator().manual_seed(0)).to(device)
        with torch.no_grad():
            return pipeline.denoise(*pipeline.encode_prompt(PROMPTS), tokens, shape)

    expected, actual = both(denoise)
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)


def test_bfloat16_is_as_close_as_on_the_cpu(both, device):
    """To the float32 logits, apart from the rounding of bfloat16."""
    import torch

    from .models import PROMPTS, load_shapes

    def denoise(device, dtype=torch.bfloat16):
        pipeline = load_shapes(device, dtype)
        tokens = torch.randint(128, (len(PROMPTS), 64), generator=torch.Generator().manual_seed(0)).to(device)
        with torch.no_grad():
            return pipeline.denoise(*pipeline.encode_prompt(PROMPTS), tokens, pipeline.latent_shape()).float()

    exact = denoise(torch.device("cpu"), torch.float32)
    errors = [(logits - exact).square().mean().sqrt() / exact.std() for logits in both(denoise)]
    assert 1e-4 < errors[1] < 0.03 and errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("codebook_size", [128, 40_000])
@pytest.mark.parametrize("is_bf16", [False, True], ids=["float32", "bfloat16"])
def test_scores_and_gradients_are_those_of_a_softmax_over_the_logits(both, codebook_size, is_bf16):
    """Of TRL's fused head, which is a Triton kernel on a GPU, against plain PyTorch on the CPU."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    from .models import build_network

    is_plain = []

    def score(device):
        network = build_network(device, codebook_size)
        inputs = torch.Generator().manual_seed(1)
        ids = torch.randint(20, (2, 40), generator=inputs).to(device)
        labels = torch.randint(codebook_size, (2, 40), generator=inputs).to(device)
        labels[:, :5] = -100
        positions = torch.arange(40, device=device).view(1, 40, 1).expand(2, 40, 3)
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
            if not is_plain:
                is_plain.append(True)
                log_probs = network(input_ids=ids, position_ids=positions).logits.float().log_softmax(dim=-1)
                entropy = -(log_probs.exp() * log_probs).sum(dim=-1) * (labels >= 0)
                log_probs = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (labels >= 0)
            else:
                add_fused_lm_head(network, outputs=("entropy",))
                output = network(input_ids=ids, position_ids=positions, shift_labels=labels, fused_lm_head=True)
                log_probs, entropy = output.log_probs, output.entropy
        (log_probs.sum() + 0.1 * entropy.sum()).backward()
        return log_probs, entropy, [parameter.grad for parameter in network.parameters()]

    (log_probs, entropy, gradients), (fused_log_probs, fused_entropy, fused_gradients) = both(score)
    close = {"atol": 0.1, "rtol": 0.02} if is_bf16 else {"atol": 2e-4, "rtol": 1e-4}
    torch.testing.assert_close(fused_log_probs, log_probs, **close)
    torch.testing.assert_close(fused_entropy, entropy, **close)
    for fused, plain in zip(fused_gradients, gradients, strict=True):
        assert (fused - plain).norm() <= (0.05 if is_bf16 else 1e-4) * plain.norm() + 1e-6


def test_the_image_tokenizer_decodes_to_the_same_pixels(both):
    import torch

    from .models import load_shapes

    def decode(device):
        pipeline = load_shapes(device)
        tokens = torch.randint(128, (4, 64), generator=torch.Generator().manual_seed(0)).to(device)
        images = pipeline.decode(tokens, pipeline.latent_shape(), output_type="pt")
        return images, pipeline.vae.encode(2 * images - 1).latents

    (images, latents), (device_images, device_latents) = both(decode)
    torch.testing.assert_close(device_images, images, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(device_latents, latents, atol=1e-3, rtol=1e-3)


def test_images_of_a_seed_are_those_of_the_cpu(both):
    """A whole call. Of its 2,560 draws one may fall on the other side of a rounded bound, and change its image."""
    import torch

    from .models import PROMPTS, load_shapes

    def generate(device):
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
        return load_shapes(device)(PROMPTS, num_inference_steps=10, generator=generators, output_type="latent").images

    expected, actual = both(generate)
    assert (actual == expected).flatten(1).all(dim=1).sum() >= len(PROMPTS) - 1


def test_a_merged_adapter_computes_the_same_and_leaves_no_trace(device):
    import torch

    from trl_udm.pipelines.lora import merged_adapter

    from .models import add_adapter, build_network

    model = add_adapter(build_network(device, codebook_size=128))
    ids = torch.arange(20, device=device).unsqueeze(0)
    inputs = {"input_ids": ids, "position_ids": ids.unsqueeze(-1).expand(-1, -1, 3)}
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        expected = model(**inputs).logits
        with merged_adapter(model):
            merged = model(**inputs).logits
            assert not torch.equal(merged, expected)
        assert torch.equal(model(**inputs).logits, expected)
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
