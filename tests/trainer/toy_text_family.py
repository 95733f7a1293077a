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

"""A second model family, as small as they come: text over a dozen characters, on the mixture path, by a stock causal
LM that a mask makes bidirectional. It shows that the trainer knows no family."""

from types import SimpleNamespace

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trl_udm import KineticOptimalScheduler, UDMPipeline


CHARACTERS = "abcdefgh"
NUM_TOKENS = 6


class ToyTextPipeline(UDMPipeline):
    """Prompt and answer are characters; the answer has `NUM_TOKENS` of them, each predicted where it stands."""

    modality = "text"

    def __init__(self, transformer, scheduler, tokenizer):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, tokenizer=tokenizer)

    def latent_shape(self, length=NUM_TOKENS):
        return (length,)

    def encode_prompt(self, prompt):
        encoded = self.tokenizer(prompt, padding=True, padding_side="left", return_tensors="pt")
        return encoded["input_ids"].to(self.device), encoded["attention_mask"].to(self.device)

    def prepare_denoiser_inputs(self, prompt_ids, prompt_mask, noised_samples, latent_shape, labels=None, t=None):
        input_ids = torch.cat([prompt_ids, noised_samples], dim=1)
        visible = torch.cat([prompt_mask, torch.ones_like(noised_samples)], dim=1)
        hidden = torch.zeros(visible.shape).masked_fill(visible == 0, torch.finfo(torch.float32).min)
        inputs = {
            "input_ids": input_ids,
            # A mask of four dimensions is taken as it is: every token sees every other but the padding
            "attention_mask": hidden[:, None, None, :].expand(-1, 1, input_ids.size(1), -1),
            "position_ids": (visible.cumsum(dim=1) - 1).clamp(min=0),
        }
        if labels is not None:
            inputs["shift_labels"] = torch.full_like(input_ids, -100)
            inputs["shift_labels"][:, -labels.size(1) :] = labels
        return inputs

    def denoise(self, prompt_ids, prompt_mask, noised_samples, latent_shape, t=None):
        inputs = self.prepare_denoiser_inputs(prompt_ids, prompt_mask, noised_samples, latent_shape)
        return self.transformer(**inputs, use_cache=False).logits[:, -noised_samples.size(1) :]

    def decode(self, clean_samples, latent_shape):
        return self.tokenizer.batch_decode(clean_samples)

    def __call__(self, prompt, num_inference_steps=10, guidance_scale=1.0, generator=None, **kwargs):
        latent_shape = self.latent_shape(**kwargs)
        output = self.sample_tokens(
            *self.encode_prompt([prompt]), latent_shape, num_inference_steps, guidance_scale, generator=generator
        )
        return SimpleNamespace(texts=self.decode(output.clean_samples, latent_shape))


def build_toy_text_pipeline(seed=0):
    """A `ToyTextPipeline` with random weights."""
    torch.manual_seed(seed)
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = Split(Regex("."), behavior="isolated")
    backend.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)  # of the scale that a trained head has
    scheduler = KineticOptimalScheduler(alpha=None, c=None, codebook_size=len(vocabulary))
    return ToyTextPipeline(model, scheduler, tokenizer)
