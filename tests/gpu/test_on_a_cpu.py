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
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[2] / "trl_udm"

# Rewards are float64, and stay on the CPU. All else goes through `widest_dtype`, since MPS has no float64.
MAY_BE_FLOAT64 = {
    ("random_tensor.py", "widest_dtype"),
    ("trainer/completions.py", "_log_rollout"),
    ("trainer/reward_runner.py", "__init__"),
    ("trainer/reward_runner.py", "_calculate_rewards"),
    ("trainer/udm_grpo_trainer.py", "_compute_advantages"),
}

# The kernels of TRL's fused head against the same in plain PyTorch, for two tiles of which the last is not full
INTERPRET = """
import torch
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


def test_the_kernels_of_the_fused_head_are_right_in_tritons_interpreter(monkeypatch):
    if find_spec("triton") is None:
        pytest.skip("needs Triton, which comes with PyTorch's builds for CUDA")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run = subprocess.run([sys.executable, "-c", INTERPRET], capture_output=True, text=True)
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


def answer_about_contents():
    """A mode that answers what fake tensors cannot: nothing is found wrong, and every token jumps or has a label."""
    import torch
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.utils._python_dispatch import TorchDispatchMode

    class Answers(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            try:
                return func(*args, **(kwargs or {}))
            except DataDependentOutputException:
                return 0
            except DynamicOutputShapeException:
                if func is torch.ops.aten.nonzero.default:
                    return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.long)
                index = args[1][0].new_empty(args[1][0].numel(), dtype=torch.long)
                return func(args[0], [index] * args[1][0].ndim)

    return Answers()


def build_fake_pipeline():
    """A pipeline whose tensors are on a GPU that does not exist. To be called in a `FakeTensorMode`."""
    import torch

    from trl_udm.pipelines.ursa_sizes import URSASize

    size = URSASize(32, 64, 2, 2, 1, 16, 600, 8, 4, (32, 32), codebook_dim=8, text_vocab_size=40)
    return size.build_pipeline(torch.float32, "cuda")


def test_devices_are_not_mixed():
    """Sampling with guidance and generators of the CPU, decoding, noising, scoring and its gradient."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), answer_about_contents():
        pipeline = build_fake_pipeline()
        shape = pipeline.latent_shape()
        ids, mask = pipeline.encode_prompt(["a", "b"])
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        for generator in (None, generators[0], generators):
            output = pipeline.sample_tokens(
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
        images = pipeline.decode(samples, shape, output_type="pt")
        noised = pipeline.scheduler.add_noise(samples, torch.tensor([0.2, 0.4], device="cuda"), generator=generators)
        labels = pipeline.prepare_denoiser_inputs(ids, mask, noised, shape, labels=samples)["shift_labels"]
        tensors = [ids, mask, samples, *vars(output.trajectory).values(), images, noised, labels]
        # As for a head with an adapter: the kernels of the fused one do not run on such tensors
        logits = pipeline.denoise(ids, mask, noised, shape)
        log_probs, entropies = pipeline._score_logits(logits, samples)
        log_probs.sum().backward()
        tensors += [log_probs, entropies, *(parameter.grad for parameter in pipeline.transformer.parameters())]
        assert {tensor.device.type for tensor in tensors} == {"cuda"}


def test_mixed_devices_would_be_found():
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), answer_about_contents():
        pipeline = build_fake_pipeline()
        ids, mask = pipeline.encode_prompt(["a"])
        with pytest.raises(RuntimeError, match="two different devices|device"):
            pipeline.denoise(ids, mask, torch.zeros(1, 16, dtype=torch.long), pipeline.latent_shape())


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
