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

"""Tiny networks of several architectures for [`TextUDMPipeline`], with random weights."""

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    EuroBertConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
)

from trl_udm import TextUDMPipeline, UniformDDIMScheduler


NUM_TOKENS = 6


class TimedBert(BertForMaskedLM):
    """A BERT that takes the time, as the networks of Duo and UDLM do."""

    def __init__(self, config):
        super().__init__(config)
        self.time = nn.Linear(1, config.hidden_size)
        self.post_init()

    def forward(self, input_ids, timesteps, **kwargs):
        embeddings = self.bert.embeddings.word_embeddings(input_ids) + self.time(timesteps[:, None, None])
        return super().forward(inputs_embeds=embeddings, **kwargs)


def build_tokenizer(pieces=("<think>", "</think>", *"abc ")):
    """A token for each of `pieces`. The chat template puts a role's first letter before each message."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *pieces])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = Split(Regex("</?think>|."), behavior="isolated")
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        chat_template=(
            "{% for message in messages %}{{ message['content'] }} {% endfor %}"
            "{% if add_generation_prompt %}{{ 'a' }}{% endif %}"
        ),
    )


def build_text_pipeline(architecture="bert", tokenizer=None, num_tokens=NUM_TOKENS, seed=0):
    """`architecture` is "bert", "modernbert", "eurobert" (a backbone and a linear head), or "timed"."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer() if tokenizer is None else tokenizer
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "initializer_range": 0.2,  # for predictions that differ from token to token
    }
    if architecture in ("bert", "timed"):
        config = BertConfig(**sizes, max_position_embeddings=64)
    elif architecture == "modernbert":
        config = ModernBertConfig(**sizes, cls_token_id=None, sep_token_id=None, local_attention=8)
    else:
        config = EuroBertConfig(**sizes)
    network = TimedBert(config) if architecture == "timed" else AutoModelForMaskedLM.from_config(config)
    return TextUDMPipeline(
        network.eval(),
        UniformDDIMScheduler(len(tokenizer)),
        tokenizer,
        max_completion_length=num_tokens,
        time_argument="timesteps" if architecture == "timed" else None,
    )
