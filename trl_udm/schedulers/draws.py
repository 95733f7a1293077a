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

"""Draws of codes by inverting cumulative distributions, from probabilities or from logits that never exist whole."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ..random_tensor import widest_dtype


TILE_WIDTHS = (512, 4096)
"""Least and largest number of codes in a tile, where a codebook has as many. Few tokens do not make a tile wider."""

Compute: TypeAlias = Callable[[slice | torch.Tensor, slice], torch.Tensor]
"""Values in float32, of shape `(T, W)`, of T tokens and W codes."""


@dataclass
class TiledLogits:
    """
    Logits that are computed tile by tile, where a scheduler reads them. No tensor of all tokens and all codes is made.

    Args:
        shape (`tuple[int, int, int]`):
            Shape of the logits: `(batch_size, num_tokens, codebook_size)`.
        compute (`Callable`):
            Logits of some tokens and some codes, in float32: a function of the tokens, as a slice or indices of the
            `batch_size * num_tokens` tokens, and of a slice of the codes.
    """

    shape: tuple[int, int, int]
    compute: Compute

    def draw(self, uniforms: torch.Tensor, max_elements: int) -> torch.Tensor:
        """
        Draws a code for each token.

        Args:
            uniforms (`torch.Tensor` of shape `(batch_size, num_tokens, 2)`):
                Random numbers in `[0, 1)`.
            max_elements (`int`):
                Number of elements that a tile has at most.

        Returns:
            `torch.LongTensor` of shape `(batch_size, num_tokens)`: The codes, as of `draw_tiled_codes`.
        """
        codebook_size, uniforms = self.shape[-1], uniforms.flatten(0, 1)

        def draw(start: int, uniforms: torch.Tensor) -> torch.Tensor:
            def compute(rows: slice | torch.Tensor, codes: slice) -> torch.Tensor:
                chunk = slice(start, start + len(uniforms)) if isinstance(rows, slice) else start + rows
                return self.compute(chunk, codes)

            return draw_tiled_codes(compute, codebook_size, uniforms, max_elements)

        length = chunk_length(codebook_size, max_elements)
        chunks = [draw(i * length, chunk) for i, chunk in enumerate(uniforms.split(length))]
        return torch.cat(chunks).view(self.shape[:-1])


def draw_codes(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """
    Draws a code for each row by inverting the cumulative distribution: first that of blocks of about √V codes, then
    that of the codes in the block.

    For every V this takes one pass over the row and two random numbers. `torch.multinomial` would draw V numbers. One
    cumulative sum over the row would be a second copy of it, in float64: in float32 its last digit is 6e-8, 1 % of the
    mean probability at V = 131,072.

    Args:
        probabilities (`torch.Tensor` of shape `(T, V)`):
            Weights that need not sum to 1.
        uniforms (`torch.Tensor` of shape `(T, 2)`):
            Random numbers in `[0, 1)`.

    Returns:
        `torch.LongTensor` of shape `(T,)`: The codes, and -1 for rows with a NaN or infinity.
    """
    size = block_size(probabilities.shape[-1])
    blocks = probabilities.unflatten(-1, (-1, size))  # (T, V / size, size)
    block_sums = blocks.sum(dim=-1)
    block = invert_cumulative(block_sums, uniforms[:, 0])  # (T,)
    rows = torch.arange(len(blocks), device=blocks.device)
    codes = block * size + invert_cumulative(blocks[rows, block], uniforms[:, 1])
    return codes.where(block_sums.isfinite().all(dim=-1), -1)


def draw_uniform_codes(codebook_size: int, uniforms: torch.Tensor) -> torch.Tensor:
    """What `draw_codes` returns for V equal probabilities."""
    size = block_size(codebook_size)
    sizes = torch.tensor([codebook_size // size, size], device=uniforms.device)
    block, code = ((1 - uniforms) * sizes).ceil().long().sub(1).unbind(dim=-1)
    return block * size + code


def draw_tiled_codes(compute: Compute, codebook_size: int, uniforms: torch.Tensor, max_elements: int) -> torch.Tensor:
    """
    What `draw_codes` returns for the softmax of logits, but for the rounding of float32.

    Args:
        compute (`Callable`):
            The logits of some of T tokens and some of V codes.
        codebook_size (`int`):
            Number of codes V.
        uniforms (`torch.Tensor` of shape `(T, 2)`):
            Random numbers in `[0, 1)`.
        max_elements (`int`):
            Number of elements that a tile has at most.

    Returns:
        `torch.LongTensor` of shape `(T,)`: The codes, and -1 for tokens with a NaN or infinity among their logits.
    """
    size, device = block_size(codebook_size), uniforms.device
    # Not a list: small tensors that stay between large ones that go would fragment the memory
    block_logits = torch.empty(len(uniforms), codebook_size // size, dtype=torch.float32, device=device)
    for codes, blocks in split_codes(len(uniforms), codebook_size, max_elements):
        logits = compute(slice(None), codes).unflatten(-1, (-1, size))  # (T, W / size, size)
        block_logits[:, blocks] = logits.logsumexp(dim=-1)
    probabilities = block_logits.softmax(dim=-1)  # (T, V / size)
    block = invert_cumulative(probabilities, uniforms[:, 0])
    logits = compute_blocks(compute, block, codebook_size)  # (T, size)
    drawn = block * size + invert_cumulative(logits.softmax(dim=-1), uniforms[:, 1])
    return drawn.where(probabilities.isfinite().all(dim=-1), -1)


def compute_blocks(compute: Compute, block: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """
    Values of each token in a block of its own.

    Args:
        compute (`Callable`):
            The values of some tokens and some codes.
        block (`torch.LongTensor` of shape `(T,)`):
            The blocks, in `[0, codebook_size / block_size)`.
        codebook_size (`int`):
            Number of codes V.

    Returns:
        `torch.Tensor` of shape `(T, block_size)`: The values in float32.
    """
    size = block_size(codebook_size)
    values = torch.empty(len(block), size, dtype=torch.float32, device=block.device)
    # Tokens of one block are computed together. To gather the weights of each token's block would copy them.
    ordered, order = block.sort()
    ends = torch.searchsorted(ordered, torch.arange(1, codebook_size // size, device=block.device))
    for i, rows in enumerate(order.tensor_split(ends.tolist())):
        if len(rows) > 0:
            values[rows] = compute(rows, slice(i * size, (i + 1) * size))
    return values


@functools.cache
def block_size(codebook_size: int) -> int:
    """Number of codes in a block: the largest divisor of V up to √V."""
    return max(size for size in range(1, math.isqrt(codebook_size) + 1) if codebook_size % size == 0)


def chunk_length(codebook_size: int, max_elements: int) -> int:
    """Number of tokens whose tiles, and whose sums of blocks, have at most `max_elements` elements."""
    num_blocks = codebook_size // block_size(codebook_size)
    return max(1, max_elements // max(min(TILE_WIDTHS[0], codebook_size), num_blocks))


def split_codes(num_tokens: int, codebook_size: int, max_elements: int) -> Iterator[tuple[slice, slice]]:
    """Tiles of whole blocks, for a chunk of that many tokens: slices of the codes and of the blocks."""
    size = block_size(codebook_size)
    length = max(1, min(max_elements // max(num_tokens, 1), TILE_WIDTHS[1]) // size)
    for start in range(0, codebook_size // size, length):
        stop = min(start + length, codebook_size // size)
        yield slice(start * size, stop * size), slice(start, stop)


def invert_cumulative(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    cumulative = weights.cumsum(dim=-1, dtype=widest_dtype(weights.device))
    # 1 − u is in (0, 1]: the first entry to reach the threshold always exists and never has weight 0.
    thresholds = (1 - uniforms).unsqueeze(-1) * cumulative[:, -1:]
    # Only a row with NaN has no such entry. Its index stays in bounds, and the caller returns -1 for it.
    return torch.searchsorted(cumulative, thresholds).squeeze(-1).clamp_(max=weights.shape[-1] - 1)
