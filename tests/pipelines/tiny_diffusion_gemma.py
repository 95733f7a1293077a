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

"""A DiffusionGemma of two layers with random weights, and a tokenizer of characters with a chat template."""

import string

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
    Gemma4VisionConfig,
    PreTrainedTokenizerFast,
)

from trl_udm import DiffusionGemmaUDMPipeline, UniformDDIMScheduler


CANVAS_LENGTH = 8
VOCAB_SIZE = 64
TURN_END_ID = 2


def build_tokenizer():
    characters = string.digits + string.ascii_lowercase + " :+-*/=(){}\\$.,;?!^_<>|&"
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<turn_end>", *characters])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = Split(Regex("<turn_end>|."), behavior="isolated")
    backend.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        chat_template=(
            "{% for message in messages %}"
            "{{ message['role'][0] + ':' + message['content'] + '<turn_end>' }}"
            "{% endfor %}"
            "{% if add_generation_prompt %}{{ 'm:' }}{% endif %}"
        ),
    )
    assert len(tokenizer) <= VOCAB_SIZE
    return tokenizer


def build_model(seed=0, **text_settings):
    """Its attention slides over 6 tokens in the first layer. Its logits are capped to ±2."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 16,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
        "initializer_range": 0.2,
        "final_logit_softcapping": 2.0,
    }
    vision_config = Gemma4VisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        position_embedding_size=16,
    )
    text_config = DiffusionGemmaTextConfig(**{**settings, **text_settings})
    config = DiffusionGemmaConfig(
        text_config=text_config, vision_config=vision_config, canvas_length=CANVAS_LENGTH, initializer_range=0.2
    )
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    model.generation_config.eos_token_id = [1, TURN_END_ID]
    return model


def build_pipeline(seed=0, model=None, **kwargs):
    model = build_model(seed) if model is None else model
    return DiffusionGemmaUDMPipeline(model, UniformDDIMScheduler(VOCAB_SIZE), build_tokenizer(), **kwargs)
