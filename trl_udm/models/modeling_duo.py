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

from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn
from transformers import PreTrainedModel as PreTrainedModel  # diffusers looks a component's loader up by this name
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.siglip.modeling_siglip import SiglipMLP

from .configuration_duo import DuoConfig


NUM_FREQUENCIES = 256
"""Sines and cosines of the noise level that the embedding of the time is made of."""


def _modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The adaptive part of a norm, https://huggingface.co/papers/2212.09748."""
    return hidden_states * (1 + scale) + shift


class DuoLayer(GradientCheckpointingLayer):
    """
    Llama's attention in both directions and an MLP. Their inputs are shifted and scaled, and their outputs scaled, by
    numbers that a linear layer makes of the embedding of the time.

    Args:
        config ([`DuoConfig`]):
            The configuration.
        layer_idx (`int`):
            Number of the layer.
    """

    def __init__(self, config: DuoConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, bias=False)
        self.self_attn = LlamaAttention(config, layer_idx)
        self.self_attn.is_causal = False  # where there is no padding, and so no mask
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, bias=False)
        self.mlp = SiglipMLP(config)
        self.modulation = nn.Linear(config.time_embed_dim, 6 * config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, time_embeds: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        parts = self.modulation(time_embeds).unsqueeze(1).chunk(6, dim=-1)  # (B, 1, D) each
        inputs = _modulate(self.input_layernorm(hidden_states), *parts[:2])
        hidden_states = hidden_states + parts[2] * self.self_attn(inputs, **kwargs)[0]
        inputs = _modulate(self.post_attention_layernorm(hidden_states), *parts[3:5])
        return hidden_states + parts[5] * self.mlp(inputs)


class DuoForMaskedLM(PreTrainedModel):
    r"""
    The network of Duo (https://huggingface.co/papers/2506.10892) and UDLM (https://huggingface.co/papers/2412.10193):
    logits over the vocabulary for every position, and one time for all positions of a sample.

    The authors' networks take the noise level σ = −log α, where α is the probability that a token has survived. α is
    the time t of [`UniformDDIMScheduler`], so that σ = −log t.

    Args:
        config ([`DuoConfig`]):
            The configuration.

    Example:

    ```python
    >>> import torch
    >>> from trl_udm import DuoConfig, DuoForMaskedLM

    >>> model = DuoForMaskedLM(DuoConfig(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    >>> model(torch.randint(30, (1, 10)), torch.tensor([0.5])).logits.shape
    torch.Size([1, 10, 30])
    ```
    """

    config_class = DuoConfig
    config: DuoConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["DuoLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: DuoConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.time_proj = Timesteps(NUM_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(
            NUM_FREQUENCIES, config.time_embed_dim, act_fn="silu", post_act_fn="silu"
        )
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.layers = nn.ModuleList([DuoLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.modulation = nn.Linear(config.time_embed_dim, 2 * config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        t: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> MaskedLMOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Token ids.
            t (`torch.Tensor` of shape `(batch_size,)`):
                Time in `[0, 1]`: 0 for noise, 1 for a clean sample.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                0 for tokens to hide.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Position of each token. By default they are counted from the first one.

        Returns:
            [`~transformers.modeling_outputs.MaskedLMOutput`]: With `logits` of shape `(batch_size, sequence_length,
            vocab_size)`.
        """
        hidden_states = self.embed_tokens(input_ids)  # (B, L, D)
        sigma = -t.float().clamp(min=self.config.minimum_t).log()  # (B,)
        if not self.config.time_conditioning:
            sigma = torch.zeros_like(sigma)
        time_embeds = self.time_embedding(self.time_proj(sigma).to(hidden_states.dtype))
        mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        if position_ids is None:
            position_ids = torch.arange(input_ids.size(1), device=input_ids.device).unsqueeze(0)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        # The positions themselves stay out of the layers: FlashAttention would read them as packed sequences
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, time_embeds, attention_mask=mask, position_embeddings=position_embeddings
            )
        shift, scale = self.modulation(time_embeds).unsqueeze(1).chunk(2, dim=-1)
        return MaskedLMOutput(logits=self.lm_head(_modulate(self.norm(hidden_states), shift, scale)))


__all__ = ["DuoForMaskedLM", "DuoLayer"]
