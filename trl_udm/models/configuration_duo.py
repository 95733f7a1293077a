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

from transformers.models.llama.configuration_llama import LlamaConfig


class DuoConfig(LlamaConfig):
    r"""
    Configuration of [`DuoForMaskedLM`], the network of Duo (https://huggingface.co/papers/2506.10892) and UDLM
    (https://huggingface.co/papers/2412.10193). The defaults are Duo's, `vocab_size` 50258: the tokens of GPT-2 and one
    of padding. All other arguments are those of [`~transformers.LlamaConfig`].

    Args:
        time_embed_dim (`int`, *optional*, defaults to `128`):
            Width of the embedding of the time.
        time_conditioning (`bool`, *optional*, defaults to `True`):
            Whether the network sees the time. Otherwise it sees that of a clean sample, whatever `t` is.
        minimum_t (`float`, *optional*, defaults to `0.001`):
            The least time that the network has seen, in `(0, 1)`. An earlier one is shown as this.
    """

    model_type = "duo"

    time_embed_dim: int = 128
    time_conditioning: bool = True
    minimum_t: float = 1e-3
    vocab_size: int = 50258
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 1024
    use_cache: bool = False

    @classmethod
    def from_original_config(cls, config: dict[str, Any]) -> Self:
        """
        Translates the `config.json` of an original checkpoint of Duo or UDLM.

        Args:
            config (`dict`):
                Its keys are `vocab_size`, `model_length`, `hidden_dim`, `cond_dim`, `n_blocks` and `n_heads`, and for
                some `time_conditioning`, `causal` and `cfg`.

        Returns:
            [`DuoConfig`]: The configuration, without the dropout of pretraining.

        Raises:
            ValueError: If the network is causal, or takes a class.
        """
        for key, meaning in {"causal": "an autoregressive network", "cfg": "a network that takes a class"}.items():
            if config.get(key, False):
                raise ValueError(f"`{key}` in the original `config.json` must be false, got true: {meaning}.")
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_dim"],
            intermediate_size=4 * config["hidden_dim"],
            num_hidden_layers=config["n_blocks"],
            num_attention_heads=config["n_heads"],
            max_position_embeddings=config["model_length"],
            time_embed_dim=config["cond_dim"],
            time_conditioning=config.get("time_conditioning", True),
        )


__all__ = ["DuoConfig"]
