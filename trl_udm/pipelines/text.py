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

"""What text families share: prompts padded on the left, and completions that end before the canvas does."""

from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence


class TextMixin:
    """
    Encoding and decoding of text, for a [`UDMPipeline`].

    Needs `tokenizer`, `end_token_ids` (the tokens that end a completion) and the method
    `_encode(text_or_messages, **chat_template_kwargs)`, which returns the ids of one prompt.
    """

    modality: Literal["image", "text", "video"] = "text"

    @staticmethod
    def _as_list(prompt: str | list[Any]) -> list[Any]:
        """One prompt, a text or its messages, as a list of one. Lists of prompts are returned as they are."""
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], dict) else prompt

    def encode_prompt(self, prompt: list[Any], **chat_template_kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As in [`UDMPipeline`]. The chat template turns messages into text, with `chat_template_kwargs`."""
        ids = [torch.tensor(self._encode(one, **chat_template_kwargs), dtype=torch.long) for one in prompt]
        padded: dict[str, Any] = {"batch_first": True, "padding_side": "left"}
        prompt_ids = pad_sequence(ids, padding_value=self.tokenizer.pad_token_id, **padded)  # (B, T)
        prompt_mask = pad_sequence([torch.ones_like(row) for row in ids], **padded)  # (B, T)
        return prompt_ids.to(self._execution_device), prompt_mask.to(self._execution_device)

    def completion_mask(self, clean_samples: torch.Tensor) -> torch.Tensor:
        """As in [`UDMPipeline`]. The first token that ends the completion is the last one that counts."""
        is_end = self._is_end(clean_samples).long()
        return (is_end.cumsum(dim=1) - is_end == 0).long()

    def encode_completions(self, completions: list[str], latent_shape: tuple[int, ...]) -> torch.Tensor:
        """
        As in [`UDMPipeline`]: the tokens of the texts, the first of `end_token_ids`, and padding.

        Raises:
            ValueError: If a text is longer than the canvas.
        """
        length = torch.Size(latent_shape).numel()
        samples = torch.full((len(completions), length), self.tokenizer.pad_token_id)
        for sample, text in zip(samples, completions, strict=True):
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) > length:
                raise ValueError(f"A completion must have at most {length} tokens, got {len(ids)}: {text!r}.")
            ids = (ids + self.end_token_ids[:1])[:length]  # one that fills the canvas needs no end
            sample[: len(ids)] = torch.tensor(ids)
        return samples.to(self._execution_device)

    def decode(self, clean_samples: torch.Tensor, latent_shape: tuple[int, ...]) -> list[str]:
        """As in [`UDMPipeline`]: the text before the token that ends the completion."""
        is_text = self.completion_mask(clean_samples).bool() & ~self._is_end(clean_samples)
        ids = [row[text].tolist() for row, text in zip(clean_samples.cpu(), is_text.cpu(), strict=True)]
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _is_end(self, clean_samples: torch.Tensor) -> torch.Tensor:
        return torch.isin(clean_samples, torch.tensor(self.end_token_ids, device=clean_samples.device))
