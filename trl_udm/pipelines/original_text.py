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

"""Loading of the published text models of uniform diffusion: Duo, UDLM and GIDD."""

import os
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..models.configuration_duo import DuoConfig
from ..models.configuration_gidd import GiddConfig
from ..models.modeling_duo import DuoForMaskedLM
from ..models.modeling_gidd import GiddForMaskedLM
from ..schedulers.scheduling_uniform_ddim import UniformDDIMScheduler
from ..weights import check_state_dict, find_file, load_state_dict
from .original_checkpoint import find_folder, load_json
from .pipeline_udm import HUB_KWARGS


_TOKENIZERS = {
    "duo": "openai-community/gpt2",
    "udlm": "google-bert/bert-base-uncased",
    "gidd": "dvruette/nemotron-cc-bpe",
}
"""The families, by the `model_type` of their `config.json`, and the tokenizers that they were trained with."""

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_RENAMES = {
    "backbone.vocab_embed.embedding": "embed_tokens.weight",
    "backbone.sigma_map.mlp.0.": "time_embedding.linear_1.",
    "backbone.sigma_map.mlp.2.": "time_embedding.linear_2.",
    "backbone.output_layer.norm_final.": "norm.",
    "backbone.output_layer.linear.": "lm_head.",
    "backbone.output_layer.adaLN_modulation.": "modulation.",
    "backbone.blocks.": "layers.",
    ".norm1.": ".input_layernorm.",
    ".norm2.": ".post_attention_layernorm.",
    ".attn_out.": ".self_attn.o_proj.",
    ".mlp.0.": ".mlp.fc1.",
    ".mlp.2.": ".mlp.fc2.",
    ".adaLN_modulation.": ".modulation.",
}
"""Parts of the names of weights of Duo and UDLM, in order, and those here."""


def find_original_text(pretrained_model_name_or_path: str | os.PathLike, **hub_kwargs: Any) -> str | None:
    """
    Finds the family of a model in its authors' layout, which has a `config.json` beside the weights.

    Args:
        pretrained_model_name_or_path (`str` or `Path`):
            Folder or Hub repository.
        hub_kwargs:
            Hub options.

    Returns:
        `str`, *optional*: `"duo"`, `"udlm"` or `"gidd"`. None for any other layout.
    """
    try:
        file = find_file(pretrained_model_name_or_path, ["config.json"], **hub_kwargs)
    except FileNotFoundError:  # as in this library's layout
        return None
    family = str(load_json(file).get("model_type")).lower()
    return family if family in _TOKENIZERS else None


def load_original_text(
    pretrained_model_name_or_path: str | os.PathLike,
    family: str,
    dtype: torch.dtype | None = None,
    torch_dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """
    Loads the components of [`TextUDMPipeline`] from the layout of Duo, UDLM or GIDD. No code of the authors is run.

    Args:
        pretrained_model_name_or_path (`str` or `Path`):
            Folder or Hub repository.
        family (`str`):
            From `find_original_text`.
        dtype (`torch.dtype`, *optional*):
            Dtype of the transformer. Defaults to float32.
        torch_dtype (`torch.dtype`, *optional*):
            Former name of `dtype`.
        kwargs:
            Hub options, `max_completion_length`, and components to use instead of the stored ones. The tokenizer is
            one of them where the folder has no `tokenizer.json`.

    Returns:
        `dict[str, Any]`: Arguments of [`TextUDMPipeline`].

    Raises:
        OSError: If a part is missing.
        TypeError: If an argument is unknown.
        ValueError: If a part is damaged, lacks a weight, or is of a model that is not supported.
    """
    unknown = sorted(set(kwargs) - {*HUB_KWARGS, "transformer", "scheduler", "tokenizer", "max_completion_length"})
    if unknown:
        raise TypeError(f"Arguments not supported for checkpoints in the original layout: {unknown}.")
    components = {name: value for name, value in kwargs.items() if name not in HUB_KWARGS}
    hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
    folder = find_folder(pretrained_model_name_or_path, ["*.json", "*.safetensors"], **hub_kwargs)
    model_class, config_class = (GiddForMaskedLM, GiddConfig) if family == "gidd" else (DuoForMaskedLM, DuoConfig)
    try:
        config: Any = config_class.from_original_config(load_json(folder / "config.json"))
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} has no {error}.") from error
    if "tokenizer" not in components:
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"There is no `tokenizer.json` in {folder}. Pass `tokenizer`, such as "
                f"`AutoTokenizer.from_pretrained({_TOKENIZERS[family]!r})`."
            )
        components["tokenizer"] = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = components["tokenizer"] = convert_tokenizer(components["tokenizer"], config.vocab_size)
    if "transformer" not in components:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
        weights = load_state_dict(folder, "model")
        if family != "gidd":
            weights = convert_weights(weights)
        with torch.device("meta"):
            check_state_dict(weights, model_class(config).state_dict(), folder)
        components["transformer"] = model_class.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype or torch_dtype or torch.float32
        )
    components.setdefault("scheduler", UniformDDIMScheduler(config.vocab_size))
    return {**components, "time_argument": None if family == "gidd" else "t"}


def convert_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Renames the weights of Duo and UDLM, and gives queries, keys and values a matrix each.

    Args:
        weights (`dict[str, torch.Tensor]`):
            Original weights.

    Returns:
        `dict[str, torch.Tensor]`: The weights of [`DuoForMaskedLM`]. Unknown ones keep their names.
    """
    converted = {}
    for name, weight in weights.items():
        if name == "backbone.rotary_emb.inv_freq":  # no weight, and computed here
            continue
        for original, here in _RENAMES.items():
            name = name.replace(original, here)
        if ".attn_qkv." not in name:
            converted[name] = weight
            continue
        for letter, part in zip("qkv", weight.chunk(3), strict=True):
            converted[name.replace(".attn_qkv.", f".self_attn.{letter}_proj.")] = part
    return converted


def convert_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Makes a tokenizer of prompts, which begin as the texts of pretraining do and have no end.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the model, which is not changed.
        vocab_size (`int`):
            Number of tokens of the network.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: Its copy, which puts `bos_token`, or else `cls_token`, before a text
        and nothing after it. If there is no `pad_token`, it is `[PAD]`, a token more, as in Duo.

    Raises:
        ValueError: If there is no token for the beginning, or there are more tokens than the network has.
    """
    begin = tokenizer.bos_token or tokenizer.cls_token
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or begin is None:
        raise ValueError(
            "`tokenizer` must be a `PreTrainedTokenizerFast` with a `bos_token` or a `cls_token`, got "
            f"{type(tokenizer).__name__} with {tokenizer.special_tokens_map}."
        )
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(
        single=[begin, "$A"], special_tokens=[(begin, tokenizer.convert_tokens_to_ids(begin))]
    )
    special_tokens = {name: getattr(tokenizer, name) for name in _SPECIAL_TOKENS}
    # Of this class, because others build their own post-processor when they are loaded
    converted = PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=tokenizer.chat_template, **special_tokens
    )
    if converted.pad_token is None:
        converted.add_special_tokens({"pad_token": "[PAD]"})
    if len(converted) > vocab_size:
        raise ValueError(f"`tokenizer` must have at most the network's {vocab_size} tokens, got {len(converted)}.")
    return converted
