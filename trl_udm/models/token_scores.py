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

"""Log-probabilities of tokens under a head with many codes, where TRL's fused head has no Triton kernel."""

import itertools
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput


TILE_WIDTH = 512
"""Number of codes in a tile. With 4,096 tokens a tile is 8 MiB of float32 logits, which caches hold."""
MAX_KEPT_LOGITS = 2**27
"""Number of logits that are kept for the backward pass at most: 512 MiB in float32. More are computed again."""
CHUNK_LENGTH = 256
"""Number of tokens in a chunk, for heads that are more than a matrix."""


@dataclass
class HeadInputsOutput(BaseModelOutput):
    """
    Inputs of a head that the caller applies, as `last_hidden_state`.

    Args:
        head_parameters (`tuple[torch.Tensor, ...]`, *optional*):
            An empty slice of each parameter of the head. DDP follows the outputs of `forward` to find the parameters
            that a step uses. Without these it would take those of the head for unused ones.
    """

    head_parameters: tuple[torch.Tensor, ...] | None = None

    @classmethod
    def from_backbone(cls, outputs: BaseModelOutput, head: nn.Module) -> "HeadInputsOutput":
        """What a backbone returned, with the empty slices of the head that follows it."""
        return cls(**outputs, head_parameters=tuple(parameter[:0] for parameter in head.parameters()))


def score_tokens(
    head: nn.Module, hidden_states: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of tokens and entropies of their distributions. No tensor of all tokens and all codes is made.

    A head that is one matrix is split into tiles of codes. All operations on a tile are done while a cache holds it.
    For the backward pass, the tiles are kept if there are at most `MAX_KEPT_LOGITS` logits, or else computed again.
    Any other head, such as one with an adapter or with a sharded weight, is called as a module on chunks of tokens,
    and its logits are computed again.

    Args:
        head (`nn.Module`):
            The head, from `(num_tokens, hidden_size)` to logits of shape `(num_tokens, codebook_size)`.
        hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`):
            Inputs of the head, one for each token to score.
        labels (`torch.LongTensor` of shape `(num_tokens,)` or `(num_tokens, num_labels)`):
            The tokens, in `[0, codebook_size)`, or several to score with one distribution.

    Returns:
        `tuple`: Log-probabilities, of the shape of the labels, and entropies of shape `(num_tokens,)`, in float32.
        Both are differentiable.
    """
    with _autocast_of(head, hidden_states.device.type):
        several = labels if labels.ndim == 2 else labels.unsqueeze(-1)  # (T, L)
        log_probs, entropies = _score_tokens(head, hidden_states, several)
    return log_probs.view_as(labels), entropies


def _autocast_of(head: nn.Module, device_type: str) -> torch.autocast:
    """Autocast as it is around, except for a head that TRL's `cast_lm_head_to_fp32` casts, which it would undo."""
    is_cast = "forward" in vars(head)
    return torch.autocast(device_type, enabled=torch.is_autocast_enabled(device_type) and not is_cast)


def _score_tokens(
    head: nn.Module, hidden_states: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if is_matrix(head):
        device_type = hidden_states.device.type
        is_autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if is_autocast else head.weight.dtype
        keeps_logits = torch.is_grad_enabled() and len(labels) * head.out_features <= MAX_KEPT_LOGITS
        return _TileScores.apply(hidden_states, head.weight, labels, dtype, keeps_logits)
    chunks = zip(hidden_states.split(CHUNK_LENGTH), labels.split(CHUNK_LENGTH), strict=True)
    scores = [checkpoint(_score_chunk, head, *chunk, use_reentrant=False) for chunk in chunks]
    log_probs, entropies = zip(*scores, strict=True)
    return torch.cat(log_probs), torch.cat(entropies)


def is_matrix(head: nn.Module) -> TypeGuard[nn.Linear]:
    """
    Whether the logits of a head are products with its weight.

    Args:
        head (`nn.Module`):
            The head.

    Returns:
        `bool`: It is not where the head has an adapter or a bias, or a weight that is sharded or quantized.
    """
    # Sharded and quantized weights are wrappers around others. DeepSpeed empties a sharded weight.
    is_plain = type(head) is nn.Linear and head.bias is None and not is_traceable_wrapper_subclass(head.weight)
    return is_plain and head.weight.shape == (head.out_features, head.in_features)


def compute_kl(
    head: nn.Module, hidden_states: torch.Tensor, ref_head: nn.Module, ref_hidden_states: torch.Tensor
) -> torch.Tensor:
    """
    Divergence of each token's distribution from that of a reference: Σ_k p_k · (log p_k − log q_k), over all codes.

    Logits are computed on chunks of tokens, and again for the backward pass.

    Args:
        head (`nn.Module`):
            The head, from `(num_tokens, hidden_size)` to logits of shape `(num_tokens, codebook_size)`.
        hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`):
            Inputs of the head, one for each token.
        ref_head (`nn.Module`):
            The reference's head, whose weights get no gradient.
        ref_hidden_states (`torch.Tensor` of shape `(num_tokens, ref_hidden_size)`):
            Its inputs.

    Returns:
        `torch.Tensor` of shape `(num_tokens,)`: The divergences in nats, in float32. They are differentiable.
    """
    chunks = zip(hidden_states.split(CHUNK_LENGTH), ref_hidden_states.split(CHUNK_LENGTH), strict=True)
    with _autocast_of(head, hidden_states.device.type):
        divergences = [
            checkpoint(_compute_kl_of_chunk, head, chunk, ref_head, ref_chunk, use_reentrant=False)
            for chunk, ref_chunk in chunks
        ]
    return torch.cat(divergences)


def _compute_kl_of_chunk(
    head: nn.Module, hidden_states: torch.Tensor, ref_head: nn.Module, ref_hidden_states: torch.Tensor
) -> torch.Tensor:
    with torch.no_grad():
        ref_log_probs = ref_head(ref_hidden_states).float().log_softmax(dim=-1)  # (T, V)
    log_probs = head(hidden_states).float().log_softmax(dim=-1)
    return nn.functional.kl_div(ref_log_probs, log_probs, reduction="none", log_target=True).sum(dim=-1)


def _score_chunk(
    head: nn.Module, hidden_states: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    log_probs = head(hidden_states).float().log_softmax(dim=-1)  # (T, V)
    entropies = -(log_probs.exp() * log_probs).sum(dim=-1)
    return log_probs.gather(-1, labels), entropies


class _TileScores(torch.autograd.Function):
    """
    Scores of one or several labels y a token, under a head that is one matrix W. With logits z = W h, normalizer ℓ =
    log Σ_k exp z_k, probabilities p_k = exp(z_k − ℓ) and entropy H = ℓ − Σ_k p_k z_k, the gradients are

        ∂ log p_y / ∂z_k = [k = y] − p_k,        ∂H / ∂z_k = −p_k · (log p_k + H).

    Logits are products in `dtype`. All else is float32.
    """

    @staticmethod
    def forward(
        ctx,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        dtype: torch.dtype,
        keeps_logits: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tiles, inputs, kept = _tiles(weight), hidden_states.to(dtype), []
        label_logits = torch.empty(labels.shape, device=labels.device)  # (T, L)
        # Not lists: small tensors that stay between large ones that go would fragment the memory
        normalizers, means = label_logits.new_empty(2, len(tiles), len(labels))  # (V / W, T), (V / W, T)
        for (start, tile), tile_normalizer, tile_mean in zip(tiles, normalizers, means, strict=True):
            logits = (inputs @ tile.to(dtype).T).float()  # (T, W)
            places, columns = _find_labels(labels, start)
            label_logits[places] = logits[places[0], columns]
            if keeps_logits:
                kept.append(logits)
            tile_normalizer.copy_(logits.logsumexp(dim=-1))
            tile_mean.copy_(logits.softmax(dim=-1).mul_(logits).sum(dim=-1))
        normalizer = normalizers.logsumexp(dim=0)  # (T,)
        entropies = normalizer - (normalizers.softmax(dim=0) * means).sum(dim=0)
        ctx.save_for_backward(hidden_states, weight, labels, normalizer, entropies, *kept)
        ctx.dtype = dtype
        ctx.set_materialize_grads(False)
        return label_logits - normalizer.unsqueeze(-1), entropies

    @staticmethod
    def backward(
        ctx, grad_log_probs: torch.Tensor | None, grad_entropies: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        hidden_states, weight, labels, normalizer, entropies, *kept = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        inputs, float_inputs = hidden_states.to(ctx.dtype), hidden_states.float()
        grad_hidden = torch.zeros_like(hidden_states, dtype=torch.float32) if needs_hidden else None
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if needs_weight else None
        for (start, tile), logits in itertools.zip_longest(_tiles(weight), kept):
            if logits is None:
                logits = (inputs @ tile.to(ctx.dtype).T).float()  # (T, W)
            logits = logits - normalizer.unsqueeze(-1)
            factors: float | torch.Tensor = 0.0
            if grad_entropies is not None:
                factors = -grad_entropies.unsqueeze(-1) * (logits + entropies.unsqueeze(-1))
            if grad_log_probs is not None:
                factors = factors - grad_log_probs.sum(dim=-1, keepdim=True)
            grad_logits = logits.exp_().mul_(factors)
            if grad_log_probs is not None:
                places, columns = _find_labels(labels, start)
                # Labels of a token may be equal
                grad_logits.index_put_((places[0], columns), grad_log_probs[places], accumulate=True)
            if grad_hidden is not None:
                grad_hidden.addmm_(grad_logits, tile.float())
            if grad_weight is not None:
                torch.mm(grad_logits.T, float_inputs, out=grad_weight[start : start + len(tile)])
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden_states.dtype)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _tiles(weight: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    return [(start, weight[start : start + TILE_WIDTH]) for start in range(0, len(weight), TILE_WIDTH)]


def _find_labels(labels: torch.Tensor, start: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The places of the labels that are in the tile which begins at `start`, and the tile's columns of them."""
    places = ((labels >= start) & (labels < start + TILE_WIDTH)).nonzero(as_tuple=True)
    return places, labels[places] - start
