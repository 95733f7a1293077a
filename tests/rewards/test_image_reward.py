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


import math
import re

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import BertTokenizer

from trl_udm.rewards.image_reward import ImageRewardReward

from .test_clip import build_images


SIZE, PATCH, DIM, NUM_HEADS, MLP_DIM = 28, 7, 128, 2, 48
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "dog", "two", "cats"]
PROMPTS = ["a red dog", "two blue cats", "a"]
IMAGES = build_images((40, 60), (64, 64), (90, 50))


def build_original_weights():
    """Random weights with the names of the authors' `ImageReward.pt`, small."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "blip.visual_encoder.cls_token": (1, 1, DIM),
        "blip.visual_encoder.pos_embed": (1, (SIZE // PATCH) ** 2 + 1, DIM),
        "blip.visual_encoder.patch_embed.proj.weight": (DIM, 3, PATCH, PATCH),
        "blip.visual_encoder.patch_embed.proj.bias": (DIM,),
        "blip.visual_encoder.norm.weight": (DIM,),
        "blip.visual_encoder.norm.bias": (DIM,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (len(WORDS), DIM),
        "blip.text_encoder.embeddings.position_embeddings.weight": (40, DIM),
        "blip.text_encoder.embeddings.LayerNorm.weight": (DIM,),
        "blip.text_encoder.embeddings.LayerNorm.bias": (DIM,),
        "blip.vision_proj.weight": (16, DIM),
        "blip.text_proj.weight": (16, DIM),
    }

    def add_linear(name, width, next_width):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (next_width, width), (next_width,)

    def add_norm(name):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (DIM,)

    for layer in range(2):
        block = f"blip.visual_encoder.blocks.{layer}"
        for name in ("norm1", "norm2"):
            add_norm(f"{block}.{name}")
        add_linear(f"{block}.attn.qkv", DIM, 3 * DIM)
        add_linear(f"{block}.attn.proj", DIM, DIM)
        add_linear(f"{block}.mlp.fc1", DIM, MLP_DIM)
        add_linear(f"{block}.mlp.fc2", MLP_DIM, DIM)
        block = f"blip.text_encoder.encoder.layer.{layer}"
        for attention in ("attention", "crossattention"):
            for name in ("self.query", "self.key", "self.value", "output.dense"):
                add_linear(f"{block}.{attention}.{name}", DIM, DIM)
            add_norm(f"{block}.{attention}.output.LayerNorm")
        add_linear(f"{block}.intermediate.dense", DIM, MLP_DIM)
        add_linear(f"{block}.output.dense", MLP_DIM, DIM)
        add_norm(f"{block}.output.LayerNorm")
    widths = [DIM, 12, 8, 6, 4, 1]
    for index, width, next_width in zip((0, 2, 4, 6, 7), widths[:-1], widths[1:], strict=True):
        add_linear(f"mlp.layers.{index}", width, next_width)
    weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return weights


def score_by_hand(weights, ids, pixels):
    """The paper's network for one prompt of shape `(L,)` and one image of shape `(3, H, W)`."""

    def linear(name, x):
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, x, eps):
        return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def attend(queries, keys, values):
        heads = [x.view(len(x), NUM_HEADS, -1).transpose(0, 1) for x in (queries, keys, values)]
        scores = heads[0] @ heads[1].transpose(1, 2) / math.sqrt(DIM // NUM_HEADS)
        return (scores.softmax(dim=-1) @ heads[2]).transpose(0, 1).flatten(1)

    weights = {name.replace("blip.visual_encoder.", "v."): value.double() for name, value in weights.items()}
    weights = {name.replace("blip.text_encoder.", "t."): value for name, value in weights.items()}
    kernel, bias = weights["v.patch_embed.proj.weight"], weights["v.patch_embed.proj.bias"]
    patches = functional.conv2d(pixels.double()[None], kernel, bias, stride=PATCH)[0].flatten(1).T
    image = torch.cat([weights["v.cls_token"][0], patches]) + weights["v.pos_embed"][0]
    for layer in range(2):
        block = f"v.blocks.{layer}"
        attended = attend(*linear(f"{block}.attn.qkv", norm(f"{block}.norm1", image, 1e-6)).chunk(3, dim=-1))
        image = image + linear(f"{block}.attn.proj", attended)
        hidden = functional.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", image, 1e-6)))
        image = image + linear(f"{block}.mlp.fc2", hidden)
    image = norm("v.norm", image, 1e-6)

    positions = weights["t.embeddings.position_embeddings.weight"][: len(ids)]
    text = weights["t.embeddings.word_embeddings.weight"][ids] + positions
    text = norm("t.embeddings.LayerNorm", text, 1e-12)
    for layer in range(2):
        block = f"t.encoder.layer.{layer}"
        for attention, source in (("attention", None), ("crossattention", image)):
            source, name = text if source is None else source, f"{block}.{attention}"
            queries, keys = linear(f"{name}.self.query", text), linear(f"{name}.self.key", source)
            attended = attend(queries, keys, linear(f"{name}.self.value", source))
            text = norm(f"{name}.output.LayerNorm", text + linear(f"{name}.output.dense", attended), 1e-12)
        hidden = functional.gelu(linear(f"{block}.intermediate.dense", text))
        text = norm(f"{block}.output.LayerNorm", text + linear(f"{block}.output.dense", hidden), 1e-12)
    state = text[0]
    for index in (0, 2, 4, 6, 7):
        state = linear(f"mlp.layers.{index}", state)
    return (state.item() - 0.16717362830052426) / 1.0333394966054072


def save_tiny_image_reward(folder, tokenizer_folder):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(build_original_weights(), folder / "ImageReward.pt")
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("image_reward")
    save_tiny_image_reward(path, path)
    return str(path)


def test_original_file_scores_as_the_formula(folder):
    reward = ImageRewardReward(folder, folder)
    scores = reward(prompts=PROMPTS, completions=IMAGES)
    pixels = reward._image_processor(images=IMAGES, return_tensors="pt")["pixel_values"]
    ids = [[WORDS.index(word) for word in ("[CLS]", *prompt.split(), "[SEP]")] for prompt in PROMPTS]
    expected = [score_by_hand(build_original_weights(), *pair) for pair in zip(ids, pixels, strict=True)]
    assert np.ptp(expected) > 0.05
    assert scores == pytest.approx(expected, abs=1e-5)
    singly = ImageRewardReward(folder, folder, batch_size=1)(prompts=PROMPTS, completions=IMAGES)
    assert singly == pytest.approx(scores, abs=1e-6)
    assert reward.__name__ == "image_reward"
    # Prompts are cut at 35 tokens, with the two special ones
    cut, longer, other = reward(["red " * 33, "red " * 60, "red " * 32], [IMAGES[0]] * 3)
    assert cut == longer != other


@pytest.mark.parametrize(
    "name", ["blip.visual_encoder.pos_embed", "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"]
)
def test_a_missing_weight_is_an_error(tmp_path, name):
    weights = build_original_weights()
    weights.pop(name)
    torch.save(weights, tmp_path / "ImageReward.pt")
    message = f"{tmp_path / 'ImageReward.pt'} must hold the weights of ImageReward, lacks "
    with pytest.raises(ValueError, match=re.escape(message)):
        ImageRewardReward(str(tmp_path))(prompts=PROMPTS, completions=IMAGES)
