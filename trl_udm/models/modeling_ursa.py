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

import os
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM
from transformers import PreTrainedModel as PreTrainedModel  # diffusers looks a component's loader up by this name
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3PreTrainedModel, Qwen3RotaryEmbedding
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from ..weights import load_every_weight
from .configuration_ursa import URSAConfig
from .token_scores import HeadInputsOutput, score_tokens


class URSARotaryEmbedding(Qwen3RotaryEmbedding):
    r"""
    Rotary embedding over three axes (frame, row, column).

    A head with D channels has D/2 frequencies base^(−2j/D). The first 3·(D/8) of them take the axes frame, row,
    column, frame, row, column, …, and the others row, column, row, column, … . On text, where the three positions are
    equal, this is the ordinary rotary embedding.

    `config.rope_parameters` may scale it. The length that `"dynamic"` and `"longrope"` look at is the largest position
    of the three axes, plus one.
    """

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x (`torch.Tensor`):
                Only its dtype and device are used.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length, 3)`):
                Frame, row and column of each token.

        Returns:
            `tuple`: Cosine and sine, each of shape `(batch_size, sequence_length, head_dim)`.
        """
        inv_freq = self.inv_freq.to(device=x.device, dtype=torch.float)  # (D/2,)
        index = torch.arange(inv_freq.numel(), device=x.device)
        num_interleaved = 3 * (inv_freq.numel() // 4)
        axes = torch.where(index < num_interleaved, index % 3, 1 + (index - num_interleaved) % 2)
        freqs = position_ids[..., axes].float() * inv_freq  # (B, L, D/2)
        emb = torch.cat((freqs, freqs), dim=-1)  # (B, L, D)
        cos, sin = emb.cos() * self.attention_scaling, emb.sin() * self.attention_scaling
        return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


class URSAPreTrainedModel(Qwen3PreTrainedModel):
    config_class = URSAConfig
    config: URSAConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args, **kwargs) -> Self:
        """
        As in transformers, except that a missing weight is an error. Transformers would leave it random and warn, and
        does so here with `ignore_mismatched_sizes=True`.

        Raises:
            ValueError: If a weight is missing or has the wrong shape, or a file is damaged.
        """
        return load_every_weight(super().from_pretrained, pretrained_model_name_or_path, *model_args, **kwargs)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As in transformers, for the size that the embeddings have.

        Raises:
            ValueError: For another size. Image code k is token `text_vocab_size + k`, so that tokens at the end would
                be no text, and the head has a row for each code, not for each token.
        """
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"`new_num_tokens` must be {self.config.vocab_size}, got {new_num_tokens}: image codes follow the text"
                " tokens. Build a model from another `text_vocab_size` and copy the weights."
            )
        return self.get_input_embeddings()


class URSAModel(URSAPreTrainedModel, Qwen3Model):
    """
    The Qwen3 backbone with bidirectional attention and three-axis rotary positions.

    Args:
        config ([`URSAConfig`]):
            The configuration.
    """

    _keys_to_ignore_on_load_unexpected = ["lm_head.weight"]

    def __init__(self, config: URSAConfig):
        super().__init__(config)
        self.rotary_emb = URSARotaryEmbedding(config=config)
        for layer in self.layers:
            layer.self_attn.is_causal = False

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of `input_ids` or `inputs_embeds`.")
        if use_cache or kwargs.get("past_key_values") is not None:
            raise ValueError("`use_cache` must be False, without a cache: every token is predicted anew in each step.")
        if position_ids is None or position_ids.dim() != 3 or position_ids.size(-1) != 3:
            raise ValueError(
                "`position_ids` must have shape (batch_size, sequence_length, 3), got "
                f"{None if position_ids is None else tuple(position_ids.shape)}. Build them with "
                "`URSAPipeline.prepare_position_ids`."
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds  # (B, L, D)
        # The positions themselves stay out of the layers: FlashAttention would read them as packed sequences
        for decoder_layer in self.layers:
            hidden_states = decoder_layer(
                hidden_states, attention_mask=mask, position_embeddings=position_embeddings, **kwargs
            )
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


@dataclass
class URSAScoreOutput(ModelOutput):
    """
    Scores of tokens, under the names that TRL's fused head gives them.

    Args:
        log_probs (`torch.FloatTensor` of shape `(batch_size, sequence_length)`):
            Log-probabilities of the labels, and 0 where there is none.
        entropy (`torch.FloatTensor` of shape `(batch_size, sequence_length)`):
            Entropies of the distributions over the codes, and 0 where there is no label.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*):
            As in [`~transformers.modeling_outputs.MaskedLMOutput`].
        attentions (`tuple[torch.FloatTensor]`, *optional*):
            As in [`~transformers.modeling_outputs.MaskedLMOutput`].
    """

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class URSAForImageGeneration(URSAPreTrainedModel):
    """
    URSA's denoiser: logits over the image codebook for every position.

    The logits are shifted by one: those at the beginning-of-vision token predict image token 0, those at image token
    `n` predict image token `n + 1`. [`URSAPipeline`] builds the inputs and undoes the shift.

    Args:
        config ([`URSAConfig`]):
            The configuration.

    Example:

    ```python
    >>> import torch
    >>> from trl_udm import URSAConfig, URSAForImageGeneration

    >>> config = URSAConfig(
    ...     text_vocab_size=320, codebook_size=256, bov_token_id=315, hidden_size=64, intermediate_size=128,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    ... )
    >>> model = URSAForImageGeneration(config)
    >>> positions = torch.arange(10).view(1, 10, 1).expand(1, 10, 3)
    >>> model(input_ids=torch.zeros(1, 10, dtype=torch.long), position_ids=positions).logits.shape
    torch.Size([1, 10, 256])
    ```
    """

    def __init__(self, config: URSAConfig):
        super().__init__(config)
        self.model = URSAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.codebook_size, bias=False)
        self.loss_type = "ForCausalLM"  # by its shift of the logits
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        shift_labels: torch.Tensor | None = None,
        skip_logits: bool = False,
        **kwargs,
    ) -> MaskedLMOutput | URSAScoreOutput | HeadInputsOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Text ids, the beginning-of-vision id, and image codes plus `config.text_vocab_size`.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                0 for tokens to hide. Leave it out for URSA's weights, which were trained with visible text padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length, 3)`):
                Frame, row and column of each token.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Instead of `input_ids`.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Image codes at their own positions, in `[0, codebook_size)`, and -100 elsewhere. The loss is the
                cross-entropy of the logits at the positions before them.
            logits_to_keep (`int`, *optional*, defaults to `0`):
                Number of positions, at the end, to compute logits for. 0 means all.
            shift_labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Image codes to score, at the positions that predict them, and -100 elsewhere. With labels no logits are
                returned.
            skip_logits (`bool`, *optional*, defaults to `False`):
                Whether to return the inputs of the head instead of logits, as `last_hidden_state`.

        Returns:
            [`~transformers.modeling_outputs.MaskedLMOutput`]: With `logits` of shape `(batch_size, sequence_length,
            codebook_size)`, and with `labels` the `loss`. With `shift_labels` a [`URSAScoreOutput`] instead, and with
            `skip_logits` a `HeadInputsOutput`.

        Raises:
            ValueError: If inputs are missing or have another shape, or a label is no image code.
        """
        if labels is not None and (shift_labels is not None or labels.max() >= self.config.codebook_size):
            raise ValueError(
                f"`labels` must be image codes in [0, {self.config.codebook_size}), without `text_vocab_size` added, "
                f"or -100, and not be given with `shift_labels`, got labels up to {labels.max().item()}."
            )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        if shift_labels is not None:
            is_label = shift_labels != -100
            scores = score_tokens(self.lm_head, outputs.last_hidden_state[is_label], shift_labels[is_label])
            log_probs, entropy = (score.new_zeros(is_label.shape).masked_scatter(is_label, score) for score in scores)
            return URSAScoreOutput(
                log_probs=log_probs,
                entropy=entropy,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
            )
        if skip_logits:
            outputs.last_hidden_state = outputs.last_hidden_state[:, -logits_to_keep:]
            return HeadInputsOutput.from_backbone(outputs, self.lm_head)
        # In two dimensions: on a CPU, PyTorch multiplies a batch of slices in bfloat16 many times slower
        hidden_states = outputs.last_hidden_state[:, -logits_to_keep:]
        logits, loss = self.lm_head(hidden_states.flatten(0, 1)).unflatten(0, hidden_states.shape[:2]), None
        if labels is not None:
            labels = labels[:, -logits_to_keep:]
            loss = self.loss_function(logits, labels, vocab_size=self.config.codebook_size, **kwargs)
        return MaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


AutoConfig.register("ursa", URSAConfig)
AutoModel.register(URSAConfig, URSAModel)
AutoModelForMaskedLM.register(URSAConfig, URSAForImageGeneration)


__all__ = ["URSAForImageGeneration", "URSAModel", "URSAPreTrainedModel", "URSAScoreOutput"]
