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

import ast
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import trl_udm
from trl_udm import UniformDDIMScheduler
from trl_udm.random_tensor import rand_tensor, randint_tensor, widest_dtype


DRAWS = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "multinomial", "bernoulli", "normal"}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_generator_on_the_cpu_serves_every_device(device):
    generator = torch.Generator().manual_seed(0)
    assert rand_tensor((2, 3), generator, device).device.type == device
    assert randint_tensor(5, (2, 3), generator, device).device.type == device
    # The generator has moved on as if the draws had been plain ones
    plain = torch.Generator().manual_seed(0)
    torch.rand(2, 3, generator=plain)
    torch.randint(5, (2, 3), generator=plain)
    assert torch.equal(torch.rand(1, generator=generator), torch.rand(1, generator=plain))


def test_draws_are_pytorchs():
    for generator, plain in ((None, None), (torch.Generator().manual_seed(1), torch.Generator().manual_seed(1))):
        torch.manual_seed(0)
        draws = rand_tensor((2, 3), generator, "cpu", torch.float64), randint_tensor(5, (4,), generator)
        torch.manual_seed(0)
        expected = torch.rand(2, 3, generator=plain, dtype=torch.float64), torch.randint(5, (4,), generator=plain)
        assert torch.equal(draws[0], expected[0]) and torch.equal(draws[1], expected[1])


def test_a_list_of_generators_draws_row_by_row():
    for draw in (rand_tensor, lambda *args: randint_tensor(50, *args)):
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        rows = draw((3, 4), generators)
        for seed, row in enumerate(rows):
            assert torch.equal(row, draw((1, 4), torch.Generator().manual_seed(seed))[0])
        with pytest.raises(ValueError, match="one for each of the 2 samples, got a list of 3"):
            draw((2, 4), generators)


class RefuseForeignGenerators(TorchDispatchMode):
    """What devices do, which fake ones do not: a generator serves the tensors of its own device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            devices = {arg.device.type for arg in args if isinstance(arg, torch.Tensor)}
            devices |= {torch.device(kwargs["device"]).type} if kwargs.get("device") else set()
            assert devices == {kwargs["generator"].device.type}, function
        return function(*args, **kwargs)


@pytest.mark.parametrize("as_list", [False, True])
def test_a_step_of_diffusers_takes_a_generator_of_another_device(as_list):
    generator = torch.Generator().manual_seed(0)
    with FakeTensorMode(), RefuseForeignGenerators():
        logits = torch.zeros(2, 4, 12, device="cuda")
        sample = torch.zeros(2, 4, dtype=torch.long, device="cuda")
        output = UniformDDIMScheduler(12).step(logits, 3, sample, generator=[generator] * 2 if as_list else generator)
        assert {field.device.type for field in output.to_tuple()} == {"cuda"}


def test_there_is_no_float64_on_devices_without_it():
    assert [widest_dtype(device) for device in ("cpu", "cuda:1", "mps")] == [torch.float64] * 2 + [torch.float32]


@pytest.mark.parametrize("room", ["models", "schedulers", "pipelines"])
def test_random_numbers_and_float64_come_from_one_place(room):
    for path in (Path(trl_udm.__file__).parent / room).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                assert node.attr not in {"float64", "double"}, f"{path}:{node.lineno}"
                is_torchs = isinstance(node.value, ast.Name) and node.value.id == "torch"
                assert not (is_torchs and node.attr in DRAWS), f"{path}:{node.lineno}"
