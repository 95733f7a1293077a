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

"""Which family of images a model is of, and the published sizes of all of them."""

import os
from typing import TYPE_CHECKING, TypeAlias

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ..weights import find_file
from .original_checkpoint import is_original_fudoki, load_json
from .pipeline_ursa import URSAPipeline
from .ursa_sizes import PUBLISHED_SIZES


if TYPE_CHECKING:  # Janus takes a while to import
    from .pipeline_fudoki import FUDOKIPipeline

ImagePipeline: TypeAlias = "URSAPipeline | FUDOKIPipeline"

FUDOKI_NAME = "LucasJinWang/FUDOKI"
"""Repository of the published FUDOKI on the Hub."""

PUBLISHED_NAMES = (*PUBLISHED_SIZES, FUDOKI_NAME)
"""Repositories of the models whose sizes are known, so that `build_published_pipeline` needs no network."""


def find_image_pipeline_class(pretrained_model_name_or_path: str | os.PathLike) -> type[ImagePipeline]:
    """
    Finds the family of a model of images.

    Args:
        pretrained_model_name_or_path (`str` or `Path`):
            Folder or Hub repository, in this library's layout or in an original one.

    Returns:
        `type`: [`FUDOKIPipeline`] or [`URSAPipeline`].

    Raises:
        FileNotFoundError: If there is no model.
    """
    try:
        is_fudoki = is_original_fudoki(pretrained_model_name_or_path)
    except FileNotFoundError:
        is_fudoki = False
    if not is_fudoki:
        index = load_json(find_file(pretrained_model_name_or_path, ["model_index.json"]))
        if index.get("_class_name") != "FUDOKIPipeline":
            return URSAPipeline
    from .pipeline_fudoki import FUDOKIPipeline

    return FUDOKIPipeline


def build_published_pipeline(name: str, dtype: torch.dtype = torch.float32) -> ImagePipeline:
    """
    Builds a pipeline of a published size without its weights. Nothing is read or downloaded.

    Args:
        name (`str`):
            One of `PUBLISHED_NAMES`.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Dtype of transformer and VQ autoencoder.

    Returns:
        [`URSAPipeline`] or [`FUDOKIPipeline`]: The pipeline, on PyTorch's `"meta"` device, with a tokenizer of a few
        words.

    Example:

    ```python
    >>> from trl_udm.pipelines.image_families import build_published_pipeline

    >>> pipe = build_published_pipeline("LucasJinWang/FUDOKI")
    >>> f"{pipe.transformer.num_parameters():,}"
    '1,485,053,952'
    ```
    """
    if name != FUDOKI_NAME:
        return PUBLISHED_SIZES[name].build_pipeline(dtype)
    from transformers.models.janus import JanusConfig

    from .pipeline_fudoki import FUDOKIPipeline

    text_config = {"model_type": "llama", "vocab_size": 102_400, "hidden_size": 2048, "intermediate_size": 5632}
    text_config |= {"num_hidden_layers": 24, "num_attention_heads": 16, "max_position_embeddings": 16_384}
    config = JanusConfig(text_config=text_config, vision_config={"image_size": 384}, tie_word_embeddings=False)
    words = ["<pad>", "<bos>", "<unk>", "<begin_of_image>", "<end_of_image>"]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    special_tokens = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens)
    return FUDOKIPipeline.from_janus_config(config, tokenizer, dtype)
