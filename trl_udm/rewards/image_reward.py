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

"""
ImageReward (https://huggingface.co/papers/2304.05977), on transformers' BLIP.

A vision transformer encodes the image. A bidirectional text encoder reads the prompt, attends to the image in each
layer, and gives the state of its first token to a head of five linear layers. The authors' file is read as it is.
"""

import math
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import nn
from transformers import (
    AutoTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPImageProcessorPil,
)

from ..weights import find_file, load_tensors
from .model_reward import ModelReward, build_head


MAX_PROMPT_LENGTH = 35
HEAD_DIM = 64
"""Channels of an attention head, in both encoders."""

# The mean and the standard deviation of the head's outputs, which the authors' code subtracts and divides by.
MEAN, STD = 0.16717362830052426, 1.0333394966054072

# From parts of the authors' names to those of transformers.
_NAMES = {
    "blip.visual_encoder.cls_token": "vision.embeddings.class_embedding",
    "blip.visual_encoder.pos_embed": "vision.embeddings.position_embedding",
    "blip.visual_encoder.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    "blip.visual_encoder.blocks.": "vision.encoder.layers.",
    "blip.visual_encoder.norm.": "vision.post_layernorm.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
    "blip.text_encoder.": "text.",
}


class ImageRewardReward(ModelReward):
    r"""
    ImageReward (https://huggingface.co/papers/2304.05977): which image people would prefer for the prompt.

    With h the head's output for the first token, the score is \\( (h - 0.167) / 1.033 \\), which has mean 0 and
    deviation 1 on the authors' data. A prompt of more than 35 tokens, counting the two special tokens around it, is
    truncated, as the authors do. A warning tells the first time.

    Args:
        model_name_or_path (`str`, *optional*, defaults to `"THUDM/ImageReward"`):
            Repository on the Hub, or folder, with the authors' `ImageReward.pt`. No code in it is executed.
        tokenizer_name_or_path (`str`, *optional*, defaults to `"google-bert/bert-base-uncased"`):
            The tokenizer.
        batch_size (`int`, *optional*, defaults to `32`):
            Number of images that the model processes at a time.
        device (`str` or `torch.device`, *optional*):
            By default the device that Accelerate assigns to this process.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Dtype of the encoders. The head is always in float32.

    Raises:
        ValueError: If `batch_size` is out of range.

    Example:

    ```python
    >>> from PIL import Image
    >>> from trl_udm.rewards.image_reward import ImageRewardReward

    >>> reward = ImageRewardReward()
    >>> (score,) = reward(prompts=["a red square"], completions=[Image.new("RGB", (512, 512), "red")])
    ```
    """

    def __init__(
        self,
        model_name_or_path: str = "THUDM/ImageReward",
        tokenizer_name_or_path: str = "google-bert/bert-base-uncased",
        batch_size: int = 32,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(model_name_or_path, batch_size, device, dtype)
        self.tokenizer_name_or_path = tokenizer_name_or_path
        self.__name__ = "image_reward"

    def _load(self) -> None:
        file = find_file(self.model_name_or_path, ["ImageReward.pt"])
        model: Any = _build_model(load_tensors(file), str(file))
        self._tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name_or_path)
        image_size = model["vision"].config.image_size
        # CLIP's: the shorter edge is resized, the center cropped, and the same means and deviations are used.
        self._image_processor = CLIPImageProcessorPil(size=image_size, crop_size=image_size)
        model.to(self.device if self.device is not None else PartialState().device)
        model["vision"].to(self.dtype)
        model["text"].to(self.dtype)
        self._model = model.eval()

    def _score_batch(self, prompts: list[str], images: list[Image.Image]) -> torch.Tensor:
        vision, text = self._model["vision"], self._model["text"]
        self._warn_of_cut_prompts(prompts, self._tokenizer, MAX_PROMPT_LENGTH, type(self).__name__)
        inputs = self._tokenizer(
            prompts, padding=True, truncation=True, max_length=MAX_PROMPT_LENGTH, return_tensors="pt"
        ).to(vision.device)
        pixel_values = self._image_processor(images=images, return_tensors="pt")["pixel_values"]
        image_states = vision(pixel_values.to(vision.device, vision.dtype)).last_hidden_state  # (B, N, D)
        states = text(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            encoder_hidden_states=image_states,
        ).last_hidden_state  # (B, L, D)
        return (self._model["head"](states[:, 0].float()).squeeze(-1) - MEAN) / STD  # (B,)


def _build_model(weights: dict[str, torch.Tensor], source: str) -> nn.ModuleDict:
    """
    Make the network of ImageReward, of the sizes that the weights have.

    Args:
        weights (`dict[str, torch.Tensor]`):
            The authors' weights.
        source (`str`):
            Where they are from, for the errors.

    Returns:
        `nn.ModuleDict`: The encoders `"vision"` and `"text"`, and the `"head"`.

    Raises:
        ValueError: If a weight is missing.
    """
    renamed = {}
    for name, tensor in weights.items():
        for old, new in _NAMES.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    head = build_head(
        {name.removeprefix("mlp.layers."): renamed[name] for name in renamed if name.startswith("mlp.layers.")}, source
    )
    try:
        encoders = _build_encoders(renamed)
    except KeyError as error:
        raise ValueError(f"{source} must hold the weights of ImageReward, lacks {error}.") from error
    missing = sorted(encoders.state_dict().keys() - renamed.keys())
    if missing:
        raise ValueError(f"{source} must hold the weights of ImageReward, lacks {missing}.")
    # The authors' file has more: projections that ImageReward does not use.
    encoders.load_state_dict(renamed, strict=False)
    encoders["head"] = head
    return encoders


def _build_encoders(weights: dict[str, torch.Tensor]) -> nn.ModuleDict:
    def count_layers(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})

    _, num_positions, vision_dim = weights["vision.embeddings.position_embedding"].shape
    patch_size = weights["vision.embeddings.patch_embedding.weight"].shape[-1]
    vision_config = BlipVisionConfig(
        hidden_size=vision_dim,
        intermediate_size=weights["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=count_layers("vision.encoder.layers."),
        num_attention_heads=vision_dim // HEAD_DIM,
        image_size=math.isqrt(num_positions - 1) * patch_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,
    )
    vocab_size, text_dim = weights["text.embeddings.word_embeddings.weight"].shape
    text_config = BlipTextConfig(
        vocab_size=vocab_size,
        hidden_size=text_dim,
        encoder_hidden_size=vision_dim,
        intermediate_size=weights["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=count_layers("text.encoder.layer."),
        num_attention_heads=text_dim // HEAD_DIM,
        max_position_embeddings=len(weights["text.embeddings.position_embeddings.weight"]),
    )
    text = BlipTextModel(text_config, add_pooling_layer=False)
    return nn.ModuleDict({"vision": BlipVisionModel(vision_config), "text": text})
