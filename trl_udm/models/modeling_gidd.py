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
from torch import nn
from transformers import PreTrainedModel as PreTrainedModel  # diffusers looks a component's loader up by this name
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm, eager_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.nemotron.modeling_nemotron import NemotronMLP

from .configuration_gidd import GiddConfig


NEVER = -1e6
"""Logit of the mask token. Finite, so that entropies and differences of logits stay numbers."""


class GiddAttention(LlamaAttention):
    """
    Llama's attention with norms of queries and keys over all heads together, bounded scores, and one learned key and
    value that every token sees.

    Args:
        config ([`GiddConfig`]):
            The configuration.
        layer_idx (`int`):
            Number of the layer.
    """

    def __init__(self, config: GiddConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.q_norm = Gemma2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.k_norm = Gemma2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.k_bias = nn.Parameter(torch.zeros(config.num_attention_heads, self.head_dim))
        self.v_bias = nn.Parameter(torch.zeros(config.num_attention_heads, self.head_dim))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        def split(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, L, D / H)

        def prepend(bias: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
            bias = bias.unsqueeze(1).expand(len(states), -1, -1, -1)
            return torch.cat([bias, states], dim=2)  # (B, H, 1 + L, D / H)

        query = split(self.q_norm(self.q_proj(hidden_states)))
        key = split(self.k_norm(self.k_proj(hidden_states)))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key = prepend(self.k_bias, key)
        value = prepend(self.v_bias, split(self.v_proj(hidden_states)))
        options = {"scaling": self.scaling, "softcap": self.config.attn_soft_cap}
        output, _ = eager_attention_forward(self, query, key, value, attention_mask, **options)
        return self.o_proj(output.flatten(2))


class GiddLayer(GradientCheckpointingLayer):
    """
    Attention and an MLP with squared ReLU, each after a norm, and with a small factor before it is added.

    Args:
        config ([`GiddConfig`]):
            The configuration.
        layer_idx (`int`):
            Number of the layer.
    """

    def __init__(self, config: GiddConfig, layer_idx: int):
        super().__init__()
        self.resid_scale = config.resid_scale / config.num_hidden_layers
        self.attn_layernorm = Gemma2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = GiddAttention(config, layer_idx)
        self.mlp_layernorm = Gemma2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = NemotronMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attention_output = self.self_attn(self.attn_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.resid_scale * attention_output
        return hidden_states + self.resid_scale * self.mlp(self.mlp_layernorm(hidden_states))


class GiddPreTrainedModel(PreTrainedModel):
    """What [`GiddModel`] and [`GiddForMaskedLM`] share."""

    config_class = GiddConfig
    config: GiddConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GiddLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Gemma2RMSNorm):  # whose factor is 1 plus its weight
            init.zeros_(module.weight)


class GiddModel(GiddPreTrainedModel):
    """
    The backbone of [`GiddForMaskedLM`].

    Args:
        config ([`GiddConfig`]):
            The configuration.
    """

    def __init__(self, config: GiddConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.layers = nn.ModuleList([GiddLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = Gemma2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The arguments of [`GiddForMaskedLM`]. Returns the inputs of its head."""
        hidden_states = self.embed_tokens(input_ids)  # (B, L, D)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.size(1), device=input_ids.device).unsqueeze(0)
        is_seen = attention_mask[:, None, None, :].bool()  # (B, 1, 1, L)
        is_seen = is_seen & (token_type_ids[:, None, :, None] >= token_type_ids[:, None, None, :])  # (B, 1, L, L)
        is_seen = nn.functional.pad(is_seen, (1, 0), value=True)  # (B, 1, L, 1 + L), with the learned key
        mask = hidden_states.new_zeros(is_seen.shape)
        mask = mask.masked_fill(~is_seen, torch.finfo(mask.dtype).min)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings=position_embeddings, attention_mask=mask)
        return self.norm(hidden_states)


class GiddForMaskedLM(GiddPreTrainedModel):
    r"""
    The network of the uniform GIDD models (https://huggingface.co/papers/2512.10858): logits over the vocabulary for
    every position. It does not take the time. Tokens of the prompt do not see the canvas, as in the authors'
    generation.

    Args:
        config ([`GiddConfig`]):
            The configuration.
    """

    def __init__(self, config: GiddConfig):
        super().__init__(config)
        self.model = GiddModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **kwargs: torch.Tensor | None) -> MaskedLMOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Token ids.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                0 for tokens to hide.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Position of each token. By default they are counted from the first one.
            token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                0 for the prompt, which does not see the canvas, and 1 for the canvas. By default all see all.

        Returns:
            [`~transformers.modeling_outputs.MaskedLMOutput`]: With `logits` of shape `(batch_size, sequence_length,
            vocab_size)`.
        """
        logits = self.lm_head(self.model(input_ids, **kwargs)) * self.config.head_scaling
        logits[..., self.config.mask_token_id] = NEVER
        return MaskedLMOutput(logits=logits)


__all__ = ["GiddForMaskedLM", "GiddModel", "GiddPreTrainedModel"]
