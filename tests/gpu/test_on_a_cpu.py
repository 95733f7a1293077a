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

"""What a CPU can check of a run on a GPU. These are ordinary tests, without the marker `gpu`."""

import ast
import contextlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[2] / "trl_udm"

# Rewards are float64, and stay on the CPU. All else goes through `widest_dtype`, since MPS has no float64.
MAY_BE_FLOAT64 = {
    ("random_tensor.py", "widest_dtype"),
    ("rewards/diversity.py", "__call__"),
    ("trainer/completions.py", "_log_rollout"),
    ("trainer/dynamic_sampling.py", "_select_groups"),
    ("trainer/reward_runner.py", "__init__"),
    ("trainer/reward_runner.py", "_calculate_rewards"),
    ("trainer/reward_runner.py", "_compute_advantages"),
    ("trainer/reward_runner.py", "_find_reward_weights"),
}

# The kernels of TRL's fused head against the same in plain PyTorch, for two tiles of which the last is not full
COMPARE_KERNELS = """
import torch
torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
from trl.kernels import chunked_logprob as kernels

settings = {"logit_scale": 0.7, "softcap": 5.0, "inv_t": 1 / 1.3, "BLOCK_SIZE": 32}
flags = ("HAS_ENTROPY", "HAS_LOG_SUM_SQ_PROBS", "HAS_MEAN_LOGITS", "HAS_IS_TOP1")
torch.manual_seed(0)
logits, targets = 3 * torch.randn(5, 100), torch.tensor([0, 99, 31, 64, 50])
for has_softcap in (False, True):
    outcomes = []
    for forward, backward in (
        (kernels._forward_tile, kernels._backward_tile),
        (kernels._forward_kernel[(5,)], kernels._backward_kernel[(5, 2)]),
    ):
        state = torch.zeros(7, 5)
        state[[0, 5]] = float("-inf")
        tiles = [tile.clone() for tile in logits.split(64, dim=1)]
        for tile, start in zip(tiles, (0, 64)):
            arguments = (tile, tile.stride(0), targets, *state, start, tile.shape[1])
            forward(*arguments, **settings, HAS_SOFTCAP=has_softcap, **dict.fromkeys(flags, True))
        log_z = state[0] + state[1].log()
        entropy = log_z - state[2] / state[1]
        weights = torch.linspace(-1, 1, 5), torch.linspace(0, 2, 5)
        for tile, start in zip(tiles, (0, 64)):
            arguments = (tile, tile.stride(0), targets, log_z, entropy, *weights, start, tile.shape[1])
            backward(
                *arguments, **settings, HAS_SOFTCAP=has_softcap, HAS_LOGPROB_GRAD=True, HAS_ENTROPY_GRAD=True
            )
        outcomes.append([state, *tiles])
    for one, other in zip(*outcomes):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert outcomes[0][1].abs().max() > 0.1
print("equal")
"""


def test_the_kernels_of_the_fused_head_are_right(monkeypatch):
    """On a GPU, and without one in Triton's interpreter."""
    import torch

    if find_spec("triton") is None:
        pytest.skip("needs Triton, which comes with PyTorch's builds for CUDA")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    run = subprocess.run([sys.executable, "-c", COMPARE_KERNELS], capture_output=True, text=True)
    assert run.stdout.strip() == "equal", run.stderr[-3000:]


def find_float64(path):
    """Functions in which a dtype of 64 bits is named."""
    functions = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    ]
    for function in functions:
        for node in ast.walk(function):
            names = [getattr(node, "attr", None), getattr(node, "value", None)]
            if isinstance(node, (ast.Attribute, ast.Constant)) and {"float64", "double"} & {
                name for name in names if isinstance(name, str)
            }:
                yield str(path.relative_to(PACKAGE)), function.name


def test_no_tensor_of_a_device_is_float64_where_the_device_may_have_none():
    assert {place for path in PACKAGE.rglob("*.py") for place in find_float64(path)} == MAY_BE_FLOAT64


@pytest.fixture
def meta_pipeline(monkeypatch):
    """
    A pipeline on PyTorch's device "meta", in a mode that refuses operations of tensors of two devices, as a GPU does.

    Tensors of that device have no contents. What depends on them is answered: nothing is found wrong, numbers are 1,
    such as that of a step, and every token jumps. (Fake tensors on "cuda" cannot be indexed where PyTorch was built
    for a CPU.)
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from trl_udm.pipelines.ursa_sizes import URSASize

    aten = torch.ops.aten
    copies = (aten._to_copy.default, aten.copy_.default)

    class OneDevice(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            devices = {tensor.device.type for tensor in tensors if tensor.ndim > 0}
            if len(devices) > 1 and func not in copies:
                raise RuntimeError(f"{func} got tensors on two devices, {sorted(devices)}.")
            if devices | {tensor.device.type for tensor in tensors} == {"meta"}:
                if func is aten._local_scalar_dense.default:
                    return int(args[0].dtype != torch.bool)
                if func is aten.all.default:
                    return torch.tensor(True)
                if func is aten.nonzero.default:
                    return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.long)
                if func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
                    return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            return func(*args, **(kwargs or {}))

    size = URSASize(32, 64, 2, 2, 1, 16, 600, 8, 4, (32, 32), codebook_dim=8, text_vocab_size=40)
    pipeline = size.build_pipeline()
    pipeline.scheduler.set_codebook(torch.zeros(600, 8))
    pipeline.scheduler.codebook = torch.empty(600, 8, device="meta")
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # does not know "meta"
    with OneDevice():
        yield pipeline


@pytest.mark.parametrize("max_untiled_codes", [600, 0])
def test_devices_are_not_mixed(meta_pipeline, max_untiled_codes):
    """Sampling with guidance and generators of the CPU, decoding, noising, scoring and its gradient."""
    import torch

    meta_pipeline.scheduler.max_untiled_codes = max_untiled_codes
    shape = meta_pipeline.latent_shape()
    ids, mask = meta_pipeline.encode_prompt(["a", "b"])
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    for generator in (None, generators[0], generators):
        output = meta_pipeline.sample_tokens(
            ids,
            mask,
            shape,
            num_inference_steps=3,
            guidance_scale=2.0,
            negative_prompt_ids=ids,
            negative_prompt_mask=mask,
            generator=generator,
            return_trajectory=True,
        )
    samples = output.clean_samples
    images = meta_pipeline.vae.decode_ids(samples.view(-1, *shape[1:])).sample
    noised = meta_pipeline.scheduler.add_noise(samples, torch.empty(2, device="meta"), generator=generators)
    inputs = meta_pipeline.prepare_denoiser_inputs(ids, mask, noised, shape, labels=samples)
    # As for a head with an adapter: TRL's kernels do not run on such tensors
    log_probs, entropies = meta_pipeline._score_logits(meta_pipeline.denoise(ids, mask, noised, shape), samples)
    log_probs.sum().backward()
    tensors = [ids, mask, samples, *vars(output.trajectory).values(), images, noised, *inputs.values()]
    tensors += [log_probs, entropies, *(parameter.grad for parameter in meta_pipeline.transformer.parameters())]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_mixed_devices_would_be_found(meta_pipeline):
    import torch

    ids, mask = meta_pipeline.encode_prompt(["a"])
    with pytest.raises(RuntimeError, match="two devices"):
        meta_pipeline.denoise(ids, mask, torch.zeros(1, 16, dtype=torch.long), meta_pipeline.latent_shape())


def test_layers_and_denoiser_are_one_graph_each():
    """A break would split what `torch_compile` makes of a layer, and with it a CUDA graph."""
    import torch

    from .models import build_network

    network = build_network("cpu", codebook_size=64).eval()
    ids = torch.arange(20).unsqueeze(0)
    positions = ids.unsqueeze(-1).expand(-1, -1, 3)
    hidden_states = torch.randn(1, 20, 64)
    embeddings = network.model.rotary_emb(hidden_states, positions)
    layer = torch._dynamo.explain(network.model.layers[0])(hidden_states, position_embeddings=embeddings)
    denoiser = torch._dynamo.explain(network)(input_ids=ids, position_ids=positions)
    for explained in (layer, denoiser):
        assert explained.graph_count == 1 and explained.graph_break_count == 0, explained.break_reasons
