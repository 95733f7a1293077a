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
from abc import ABC, abstractmethod

import torch
from torch import nn


class Quantizer(ABC, nn.Module):
    """
    Codes without a learned codebook: each channel of a latent is rounded by itself.

    It has no weights, and computes in float32 whatever the dtype of its input is.

    Attributes:
        num_channels (`int`):
            Number of channels C of a latent.
        num_codes (`int`):
            Number of codes V.
    """

    num_channels: int
    num_codes: int

    def encode(self, z: torch.Tensor) -> torch.Tensor:
        """
        Rounds latents to ids.

        Args:
            z (`torch.Tensor` of shape `(batch_size, C, ...)`):
                Latents of any floating dtype.

        Returns:
            `torch.LongTensor` of shape `(batch_size, ...)`: Ids in `[0, V)`.

        Raises:
            ValueError: If `z` has another number of channels, or a NaN.
        """
        if z.ndim < 2 or z.shape[1] != self.num_channels:
            raise ValueError(
                f"`z` must have shape (batch_size, {self.num_channels}, ...), with the channels second, got "
                f"{tuple(z.shape)}."
            )
        if z.isnan().any():
            raise ValueError("`z` must have no NaN, got some: they have no id.")
        return self._encode(z.float())

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """
        Turns ids into codes.

        Args:
            ids (`torch.LongTensor` of shape `(batch_size, ...)`):
                Ids in `[0, V)`.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, C, ...)`: The codes, in `[-1, 1]`.

        Raises:
            TypeError: If `ids` are no integers.
            ValueError: If an id is out of range.
        """
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"`ids` must be integers, got {ids.dtype}.")
        if ((ids < 0) | (ids >= self.num_codes)).any():
            raise ValueError(
                f"`ids` must be in [0, {self.num_codes}), got ids from {ids.min().item()} to {ids.max().item()}."
            )
        return self._decode(ids.long().unsqueeze(1))

    @abstractmethod
    def _encode(self, z: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _decode(self, ids: torch.Tensor) -> torch.Tensor: ...


class FSQuantizer(Quantizer):
    """
    Finite scalar quantization (https://huggingface.co/papers/2309.15505): channel i takes one of L_i values.

    With h = 1.001 · (L − 1) / 2, and o = 1/2 for even L and 0 for odd L,

        digit = round(tanh(z + atanh(o / h)) · h − o) + ⌊L / 2⌋        in [0, L), halves to even
        id    = Σ_i digit_i · Π_{j < i} L_j                            the first channel varies fastest
        code  = (digit − ⌊L / 2⌋) / ⌊L / 2⌋                            in [−1, 1]

    The codes are no fixed points. To round a code gives its own id for L = 3 and L = 5, and in general another id.

    Args:
        levels (`tuple[int, ...]`):
            Numbers of values L of the channels, in `[2, 1000]`. Their product is the number of codes.

    Raises:
        ValueError: If a level is out of range. Above 1000, the factor 1.001 would give digits that do not exist.

    Example:

    ```python
    >>> import torch
    >>> from trl_udm.models.quantizers import FSQuantizer

    >>> quantizer = FSQuantizer((8, 5, 5))
    >>> ids = quantizer.encode(torch.randn(1, 3, 4, 4))
    >>> quantizer.decode(ids).shape
    torch.Size([1, 3, 4, 4])
    ```
    """

    def __init__(self, levels: tuple[int, ...]):
        super().__init__()
        if not levels or min(levels) < 2 or max(levels) > 1000:
            raise ValueError(f"`levels` must be numbers of values, each in [2, 1000], got {levels}.")
        self.levels = tuple(levels)
        self.num_channels, self.num_codes = len(levels), math.prod(levels)

    def bound(self, z: torch.Tensor) -> torch.Tensor:
        """What is rounded: channels of `z`, of shape `(batch_size, C, ...)`, in about `(−L / 2, L / 2)`."""
        levels = self._expand_levels(z)
        half_width, offset = (levels - 1) * 1.001 / 2, (levels % 2 == 0) * 0.5
        return torch.tanh(z.float() + torch.atanh(offset / half_width)) * half_width - offset

    def _encode(self, z: torch.Tensor) -> torch.Tensor:
        levels = self._expand_levels(z)
        digits = self.bound(z).round().long() + levels // 2
        return (digits * self._place_values(levels)).sum(dim=1)

    def _decode(self, ids: torch.Tensor) -> torch.Tensor:
        levels = self._expand_levels(ids)
        return (ids // self._place_values(levels) % levels - levels // 2) / (levels // 2)

    def _expand_levels(self, like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.levels, device=like.device).view(-1, *[1] * (like.ndim - 2))  # (C, 1, ...)

    @staticmethod
    def _place_values(levels: torch.Tensor) -> torch.Tensor:
        return levels.cumprod(dim=0) // levels


class LFQuantizer(Quantizer):
    """
    Lookup-free quantization (https://huggingface.co/papers/2310.05737): the channels of code k are the signs of its
    bits, and the first channel is the highest bit.

    Args:
        num_channels (`int`):
            Number of channels C. There are 2^C codes.
    """

    def __init__(self, num_channels: int):
        super().__init__()
        self.num_channels, self.num_codes = num_channels, 2**num_channels

    def _encode(self, z: torch.Tensor) -> torch.Tensor:
        return ((z > 0) * self._place_values(z)).sum(dim=1)

    def _decode(self, ids: torch.Tensor) -> torch.Tensor:
        return 2.0 * ids.bitwise_and(self._place_values(ids)).ne(0) - 1

    def _place_values(self, like: torch.Tensor) -> torch.Tensor:
        exponents = torch.arange(self.num_channels - 1, -1, -1, device=like.device)
        return (2**exponents).view(-1, *[1] * (like.ndim - 2))


__all__ = ["FSQuantizer", "LFQuantizer", "Quantizer"]
