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

"""Random tensors for any device, drawn on the device of their generator."""

import torch


def check_generators(generator: torch.Generator | list[torch.Generator] | None, batch_size: int) -> None:
    """
    Checks that there is one generator for all samples, or one for each.

    Args:
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
            The generators.
        batch_size (`int`):
            Number of samples.

    Raises:
        TypeError: If one is no generator.
        ValueError: If a list has another length.
    """
    generators = generator if isinstance(generator, list) else [generator]
    if generator is not None and not all(isinstance(each, torch.Generator) for each in generators):
        raise TypeError(f"`generator` must be a `torch.Generator`, or a list of them, got {generator!r}.")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"`generator` must be one generator or a list of one for each of the {batch_size} samples, got a list of "
            f"{len(generator)}."
        )


def rand_tensor(
    shape: int | tuple[int, ...],
    generator: torch.Generator | list[torch.Generator] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """
    Uniform numbers in `[0, 1)`, drawn on the generator's device. With a generator on the CPU all devices get the same
    numbers, as with diffusers' `randn_tensor`.

    Args:
        shape (`int` or `tuple[int, ...]`):
            Shape of the result.
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
            RNG of the draw, or one for each entry of the first dimension, which gets the numbers that a tensor of that
            entry alone would get. Defaults to the global RNG of `device`.
        device (`str` or `torch.device`, *optional*):
            Device of the result.
        dtype (`torch.dtype`, *optional*):
            Dtype of the result. Defaults to PyTorch's default dtype.

    Returns:
        `torch.Tensor` of shape `shape`: The numbers.

    Raises:
        ValueError: If a list of generators has another length than the first dimension.
    """
    if isinstance(generator, list):
        size, *others = shape if isinstance(shape, tuple) else (shape,)
        check_generators(generator, size)
        return torch.cat([rand_tensor((1, *others), each, device, dtype) for each in generator])
    draw_device = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=draw_device, dtype=dtype).to(device)


def randint_tensor(
    high: int,
    shape: tuple[int, ...],
    generator: torch.Generator | list[torch.Generator] | None = None,
    device: str | torch.device | None = None,
) -> torch.Tensor:
    """
    Uniform integers in `[0, high)`, drawn on the generator's device as in `rand_tensor`.

    Args:
        high (`int`):
            Number of integers.
        shape (`tuple[int, ...]`):
            Shape of the result.
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
            RNG of the draw, as in `rand_tensor`. Defaults to the global RNG of `device`.
        device (`str` or `torch.device`, *optional*):
            Device of the result.

    Returns:
        `torch.LongTensor` of shape `shape`: The integers.

    Raises:
        ValueError: If a list of generators has another length than the first dimension.
    """
    if isinstance(generator, list):
        check_generators(generator, shape[0])
        return torch.cat([randint_tensor(high, (1, *shape[1:]), each, device) for each in generator])
    draw_device = device if generator is None else generator.device
    return torch.randint(high, shape, generator=generator, device=draw_device).to(device)


def widest_dtype(device: str | torch.device) -> torch.dtype:
    """
    The most precise floating dtype of a device: float64, or float32 on devices that have no float64.

    Args:
        device (`str` or `torch.device`):
            The device.

    Returns:
        `torch.dtype`: The dtype.
    """
    return torch.float32 if torch.device(device).type in ("mps", "npu") else torch.float64
