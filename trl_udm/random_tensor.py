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


def rand_tensor(
    shape: int | tuple[int, ...],
    generator: torch.Generator | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """
    Uniform numbers in `[0, 1)`, drawn on the generator's device. With a generator on the CPU all devices get the same
    numbers, as with diffusers' `randn_tensor`.

    Args:
        shape (`int` or `tuple[int, ...]`):
            Shape of the result.
        generator (`torch.Generator`, *optional*):
            RNG of the draw. Defaults to the global RNG of `device`.
        device (`str` or `torch.device`, *optional*):
            Device of the result.
        dtype (`torch.dtype`, *optional*):
            Dtype of the result. Defaults to PyTorch's default dtype.

    Returns:
        `torch.Tensor` of shape `shape`: The numbers.
    """
    draw_device = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=draw_device, dtype=dtype).to(device)


def randint_tensor(
    high: int,
    shape: tuple[int, ...],
    generator: torch.Generator | None = None,
    device: str | torch.device | None = None,
) -> torch.LongTensor:
    """
    Uniform integers in `[0, high)`, drawn on the generator's device as in `rand_tensor`.

    Args:
        high (`int`):
            Number of integers.
        shape (`tuple[int, ...]`):
            Shape of the result.
        generator (`torch.Generator`, *optional*):
            RNG of the draw. Defaults to the global RNG of `device`.
        device (`str` or `torch.device`, *optional*):
            Device of the result.

    Returns:
        `torch.LongTensor` of shape `shape`: The integers.
    """
    draw_device = device if generator is None else generator.device
    return torch.randint(high, shape, generator=generator, device=draw_device).to(device)
