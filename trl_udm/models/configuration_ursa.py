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

from typing import Any, Self

from transformers import Qwen3Config


class URSAConfig(Qwen3Config):
    r"""
    Configuration of [`URSAForImageGeneration`], the network of URSA (https://huggingface.co/papers/2510.24717): Qwen3
    decoder layers over `[text tokens, beginning-of-vision token, image tokens]` with bidirectional attention,
    three-axis rotary positions and a head over the image codebook. All other arguments are those of
    [`~transformers.Qwen3Config`].

    Args:
        text_vocab_size (`int`, *optional*, defaults to `151669`):
            Number of text tokens. Image code `k` is embedded as token `text_vocab_size + k`, so that `vocab_size` is
            `text_vocab_size + codebook_size`.
        codebook_size (`int`, *optional*, defaults to `131072`):
            Number of image codes V, the width of the head.
        bov_token_id (`int`, *optional*, defaults to `151652`):
            Text token between the text and the image tokens (beginning of vision).

    Raises:
        ValueError: If `bov_token_id` is not a text token, or `use_sliding_window`, `tie_word_embeddings` or a
            `partial_rotary_factor` is set.
    """

    model_type = "ursa"

    text_vocab_size: int = 151669
    codebook_size: int = 131072
    bov_token_id: int = 151652
    vocab_size: int = 282741
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 8
    use_cache: bool = False

    def __post_init__(self, **kwargs):
        # Derived, so that a caller states each size once
        self.vocab_size = self.text_vocab_size + self.codebook_size
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
        if not 0 <= self.bov_token_id < self.text_vocab_size:
            raise ValueError(
                f"`bov_token_id` must be a text token, in [0, {self.text_vocab_size}), got {self.bov_token_id}."
            )
        if self.use_sliding_window or "sliding_attention" in (self.layer_types or []):
            raise ValueError("`use_sliding_window` must be False: every token of URSA attends to every other.")
        if self.tie_word_embeddings:
            raise ValueError("`tie_word_embeddings` must be False: the head has image codes, and no text tokens.")
        super().__post_init__(**kwargs)
        if self.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("`partial_rotary_factor` must be 1.0: the three axes take all channels of a head.")

    @classmethod
    def from_original_config(cls, config: dict[str, Any]) -> Self:
        """
        Translates the `config.json` of an original checkpoint (`URSATransformer3DModel`).

        Args:
            config (`dict`):
                Its keys are `hidden_size`, `intermediate_size`, `num_attention_heads`, `num_key_value_heads`,
                `num_hidden_layers`, `rope_theta`, `lm_vocab_size` (text tokens), `lm_head_size` (codes) and
                `bov_token_id`. A head has 128 channels for every hidden size.

        Returns:
            [`URSAConfig`]: The configuration.
        """
        same = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
        return cls(
            **{key: config[key] for key in same},
            text_vocab_size=config["lm_vocab_size"],
            codebook_size=config["lm_head_size"],
            bov_token_id=config["bov_token_id"],
            rope_parameters={"rope_type": "default", "rope_theta": float(config["rope_theta"])},
        )


__all__ = ["URSAConfig"]
