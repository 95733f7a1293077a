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


class GiddConfig(LlamaConfig):
    r"""
    Configuration of [`GiddForMaskedLM`], the network of the uniform GIDD models
    (https://huggingface.co/papers/2512.10858). All other arguments are those of [`~transformers.LlamaConfig`].

    Args:
        attn_soft_cap (`float`, *optional*, defaults to `30.0`):
            Bound c of the attention scores s, as c·tanh(s / c).
        resid_scale (`float`, *optional*, defaults to `4.0`):
            Factor of the output of attention and MLP in all layers together: a layer has this over their number.
        head_scaling (`float`, *optional*, defaults to `1.0`):
            Factor of the logits.
        mask_token_id (`int`, *optional*, defaults to `3`):
            A token that is never predicted.
        type_vocab_size (`int`, *optional*, defaults to `2`):
            2, by which [`TextUDMPipeline`] tells the network which tokens are the prompt.
    """

    model_type = "gidd"

    attn_soft_cap: float = 30.0
    resid_scale: float = 4.0
    head_scaling: float = 1.0
    mask_token_id: int = 3
    type_vocab_size: int = 2
    vocab_size: int = 131072
    hidden_size: int = 3072
    intermediate_size: int = 12288
    num_hidden_layers: int = 19
    num_attention_heads: int = 24
    hidden_act: str = "relu2"
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    mlp_bias: bool = True
    use_cache: bool = False

    @classmethod
    def from_original_config(cls, config: dict[str, Any]) -> Self:
        """
        Translates the `config.json` of an original checkpoint.

        Args:
            config (`dict`):
                Its keys are `vocab_size`, `hidden_size`, `intermediate_size`, `num_hidden_layers`,
                `num_attention_heads`, `max_position_embeddings`, `rms_norm_eps`, `attn_soft_cap`, `resid_scale`,
                `head_scaling`, `rope_theta`, and those of the noise, `noise_type` and `min_log_snr`. The others must
                be as in the published models.

        Returns:
            [`GiddConfig`]: The configuration.

        Raises:
            ValueError: If the noise has mask tokens, or the network is another than the published ones.
        """
        # At log-SNR λ, a noised token is a uniform one with probability sigmoid(λ + noise_type), and else the mask
        if config["noise_type"] + config["min_log_snr"] < 20:
            raise ValueError(
                "`noise_type` in the original `config.json` must be that of uniform noise, such as 1000, got "
                f"{config['noise_type']}: the noise of this model has mask tokens."
            )
        published = {
            "is_causal": False,
            "use_qk_norm": True,
            "attention_bias": True,
            "mlp_bias": True,
            "weight_scaling": 1.0,
            "tie_word_embeddings": False,
            "rope_scaling": None,
        }
        for key, value in published.items():
            if config.get(key, value) != value:
                raise ValueError(f"`{key}` in the original `config.json` must be {value}, got {config[key]!r}.")
        same = [
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("max_position_embeddings", "rms_norm_eps", "attn_soft_cap", "resid_scale", "head_scaling"),
        ]
        return cls(
            **{key: config[key] for key in same},
            rope_parameters={"rope_type": "default", "rope_theta": float(config["rope_theta"])},
        )


__all__ = ["GiddConfig"]
