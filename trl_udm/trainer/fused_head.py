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

"""The tiles of TRL's fused head, where there is no Triton to hold them in registers."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from trl.kernels.chunked_logprob import _use_triton
from trl.trainer import utils


TILE_WIDTH = 512
"""Codes in a tile: with the 4,096 tokens that TRL puts in one, 8 MiB of float32 logits, which caches hold."""


@contextlib.contextmanager
def small_tiles(scheduler: Any, device: torch.device) -> Iterator[None]:
    """
    A context in which TRL's fused head has tiles that fit a cache, and takes only the tokens that have a label.

    TRL's tiles of 4,096 x 32,768 logits suit a Triton kernel, which reads a tile once. On other devices a tile passes through
    a dozen PyTorch operations, each of which writes another of its size to memory, and the tokens of the conditioning are
    scored with the rest. Both are constants of TRL, replaced here for the while of a call; the backward pass keeps what the
    forward pass had. Nothing changes where Triton is used, or where one tile holds the codebook.

    Args:
        scheduler:
            Whose `config.codebook_size` is the number of codes V.
        device (`torch.device`):
            Where the head is.
    """
    if _use_triton(device) or scheduler.config.codebook_size <= TILE_WIDTH:
        yield
        return
    with (
        mock.patch.object(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", TILE_WIDTH),
        mock.patch.object(utils, "_use_triton", return_value=True),  # asked there only whether to leave tokens out
    ):
        yield
