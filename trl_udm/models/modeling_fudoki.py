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
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.models.janus import JanusConfig, JanusPreTrainedModel
from transformers.models.janus.modeling_janus import JanusVQVAEAlignerMLP, JanusVQVAEHead
from transformers.models.llama import LlamaModel
from transformers.utils import can_return_tuple

from .token_scores import HeadInputsOutput


class FUDOKIModel(JanusPreTrainedModel):
    """
    What FUDOKI draws images with: transformers' parts of [`~transformers.JanusModel`], under the same names, with
    bidirectional attention. Its output is the input of the head's last layer, so that this layer is a plain matrix.

    Args:
        config ([`~transformers.JanusConfig`]):
            The configuration.
    """

    def __init__(self, config: JanusConfig):
        super().__init__(config)
        config.text_config.is_causal = False
        self.language_model = LlamaModel(config.text_config)
        for layer in self.language_model.layers:
            layer.self_attn.is_causal = False  # where there is no padding, and so no mask
        self.generation_embeddings = nn.Embedding(config.vq_config.num_embeddings, config.vq_config.embed_dim)
        self.generation_aligner = JanusVQVAEAlignerMLP(config.vq_config)
        self.generation_head = JanusVQVAEHead(config.vq_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    @can_return_tuple
    def forward(self, input_ids: torch.Tensor, use_cache: bool = False, **kwargs: Any) -> BaseModelOutput:
        codes = input_ids - self.config.text_config.vocab_size  # (B, L), negative for text
        text_embeds = self.get_input_embeddings()(input_ids.where(codes < 0, 0))  # (B, L, D)
        code_embeds = self.generation_aligner(self.generation_embeddings(codes.clamp(min=0)))  # (B, L, D)
        inputs_embeds = text_embeds.where(codes.unsqueeze(-1) < 0, code_embeds)
        outputs = self.language_model(inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs)
        head = self.generation_head
        return BaseModelOutput(
            last_hidden_state=head.activation_fn(head.proj_out(outputs.last_hidden_state)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class FUDOKIForImageGeneration(JanusPreTrainedModel):
    """
    FUDOKI's denoiser: logits over the image codebook for every position.

    The logits are shifted by one: those at the token before the image predict image token 0, those at image token `n`
    predict image token `n + 1`. [`FUDOKIPipeline`] builds the inputs and undoes the shift.

    Args:
        config ([`~transformers.JanusConfig`]):
            The configuration.
    """

    _no_split_modules = ["LlamaDecoderLayer"]

    def __init__(self, config: JanusConfig):
        super().__init__(config)
        self.model = FUDOKIModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.generation_head.vision_head

    @can_return_tuple
    def forward(
        self, input_ids: torch.Tensor, logits_to_keep: int = 0, skip_logits: bool = False, **kwargs: Any
    ) -> MaskedLMOutput | HeadInputsOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Text ids, and image codes plus `config.text_config.vocab_size`.
            logits_to_keep (`int`, *optional*, defaults to `0`):
                Number of positions, at the end, to compute logits for. 0 means all.
            skip_logits (`bool`, *optional*, defaults to `False`):
                Whether to return the inputs of the head's last layer instead of logits, as `last_hidden_state`.
            kwargs:
                Those of [`~transformers.LlamaModel`], such as `attention_mask` and `position_ids`.

        Returns:
            [`~transformers.modeling_outputs.MaskedLMOutput`]: With `logits` of shape `(batch_size, sequence_length,
            codebook_size)`. With `skip_logits` a `HeadInputsOutput` instead.
        """
        outputs = self.model(input_ids, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state[:, -logits_to_keep:]
        if skip_logits:
            return HeadInputsOutput.from_backbone(outputs, self.get_output_embeddings())
        return MaskedLMOutput(
            logits=self.get_output_embeddings()(outputs.last_hidden_state),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["FUDOKIForImageGeneration", "FUDOKIModel"]
