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

import logging
import math
import re
import string
import sys
import warnings

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from trl.trainer.utils import get_callable_name

from trl_udm.rewards.clip import AestheticReward, CLIPReward, CLIPScoreReward, HPSv2Reward, PickScoreReward


SIZE = 28
MAX_LENGTH = 30
PROMPTS = ["a red dog", "two blue cats, sitting.", "zebra"]


def save_tiny_clip(folder, max_length=MAX_LENGTH):
    """Save a CLIP with random weights, whose tokens are letters."""
    letters = [*string.ascii_lowercase, *string.digits, ",", "."]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    encoder = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder["hidden_act"] = "gelu"
    config = CLIPConfig(
        text_config={
            **encoder,
            "vocab_size": len(tokens),
            "max_position_embeddings": max_length,
            "bos_token_id": len(tokens) - 2,
            "eos_token_id": len(tokens) - 1,
        },
        vision_config={**encoder, "image_size": SIZE, "patch_size": 7},
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)  # from the usual start, all images would score the same
    model.save_pretrained(folder)
    CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil(size=SIZE, crop_size=SIZE).save_pretrained(folder)


def build_images(*sizes):
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    kinds = [Image.new("RGB", (8, 8), "red"), Image.linear_gradient("L").convert("RGB"), Image.fromarray(noise)]
    return [image.resize(size) for image, size in zip(kinds, sizes, strict=True)]


IMAGES = build_images((40, 60), (64, 64), (90, 50))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    save_tiny_clip(path)
    return str(path)


@pytest.fixture(scope="module")
def reward(folder):
    return CLIPReward(folder)


def cosine_by_hand(model, tokenizer, prompt, image):
    scale = SIZE / min(image.size)
    width, height = (int(edge * scale) for edge in image.size)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    crop = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + SIZE, top + SIZE))
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.from_numpy((np.asarray(crop) / 255 - mean) / std).permute(2, 0, 1)[None]
    with torch.no_grad():
        image_state = model.vision_model(pixel_values=pixels).last_hidden_state[0, 0]
        image_state = model.vision_model.post_layernorm(image_state)
        text_state = model.text_model(input_ids=torch.tensor([tokenizer(prompt).input_ids])).last_hidden_state[0, -1]
    image_feature = model.visual_projection.weight.detach().numpy() @ image_state.numpy()
    text_feature = model.text_projection.weight.detach().numpy() @ text_state.numpy()
    return image_feature @ text_feature / np.linalg.norm(image_feature) / np.linalg.norm(text_feature)


def test_scores_match_the_formulas(folder):
    model, tokenizer = CLIPModel.from_pretrained(folder).double(), CLIPTokenizer.from_pretrained(folder)
    pairs = zip(PROMPTS, IMAGES, strict=True)
    cosines = [cosine_by_hand(model, tokenizer, prompt, image) for prompt, image in pairs]
    assert min(cosines) < -0.1 and max(cosines) > 0.1
    scale = math.exp(model.logit_scale.item())

    rewards = {
        CLIPReward(folder): cosines,
        PickScoreReward(folder, folder): [scale * cosine / 26 for cosine in cosines],
        PickScoreReward(folder, folder, normalize=False): [scale * cosine for cosine in cosines],
        CLIPScoreReward(folder, prefix=""): [2.5 * max(cosine, 0) for cosine in cosines],
    }
    for reward, expected in rewards.items():
        assert reward(prompts=PROMPTS, completions=IMAGES) == pytest.approx(expected, abs=1e-5), reward.__name__


def test_clip_score_puts_the_papers_words_before_the_prompt(folder, reward):
    prefixed = reward(prompts=["A photo depicts a red dog"] * 3, completions=IMAGES)
    assert max(prefixed) > 0.1
    expected = [2.5 * max(cosine, 0) for cosine in prefixed]
    assert CLIPScoreReward(folder)(prompts=["a red dog"] * 3, completions=IMAGES) == pytest.approx(expected, abs=1e-6)


def test_hpsv2_sees_the_whole_of_an_image_that_is_not_square(folder, reward):
    tall, square, wide = IMAGES
    padded_tall = Image.new("RGB", (SIZE, SIZE))
    padded_tall.paste(tall.resize((19, SIZE), Image.Resampling.BICUBIC), (4, 0))  # 40 * 28 / 60 = 18.7
    padded_wide = Image.new("RGB", (SIZE, SIZE))
    padded_wide.paste(wide.resize((SIZE, 16), Image.Resampling.BICUBIC), (0, 6))  # 50 * 28 / 90 = 15.6
    expected = reward(prompts=PROMPTS, completions=[padded_tall, square, padded_wide])
    assert HPSv2Reward(folder)(prompts=PROMPTS, completions=IMAGES) == pytest.approx(expected, abs=1e-6)


def save_head(path, indices, input_dim=16):
    """The authors' file of an aesthetic head, narrower than theirs."""
    generator = torch.Generator().manual_seed(0)
    weights, widths = {}, [input_dim, 12, 8, 6, 4, 1]
    for index, width, next_width in zip(indices, widths[:-1], widths[1:], strict=True):
        weights[f"layers.{index}.weight"] = torch.randn(next_width, width, generator=generator)
        weights[f"layers.{index}.bias"] = torch.randn(next_width, generator=generator)
    torch.save(weights, path)
    return [(weights[f"layers.{i}.weight"].numpy(), weights[f"layers.{i}.bias"].numpy()) for i in indices]


@pytest.mark.parametrize("indices", [(0, 2, 4, 6, 7), (0, 3, 6, 9, 11)])
def test_aesthetic_head_scores_the_normalized_features(folder, reward, tmp_path, indices):
    layers = save_head(tmp_path / "head.pth", indices)
    aesthetic = AestheticReward(str(tmp_path / "head.pth"), folder)
    reward(prompts=PROMPTS, completions=IMAGES)  # loads
    with torch.no_grad():
        states = reward._encode_images(IMAGES).numpy()
    for i, (weight, bias) in enumerate(layers):
        states = states @ weight.T + bias
        if indices[1] == 3 and i < 4:  # the file of a network with activations
            states = np.maximum(states, 0)
    expected = states[:, 0].tolist()
    assert max(expected) - min(expected) > 1e-2
    # Five layers whose terms cancel: float32 kernels of other CPUs or batches differ by up to 1e-6, relatively
    assert aesthetic(prompts=PROMPTS, completions=IMAGES) == pytest.approx(expected, rel=1e-5)
    assert aesthetic(prompts=["", *PROMPTS[1:]], completions=IMAGES) == pytest.approx(expected, rel=1e-5)
    scores = aesthetic(prompts=PROMPTS, completions=IMAGES)
    singly = AestheticReward(str(tmp_path / "head.pth"), folder, batch_size=1)(prompts=PROMPTS, completions=IMAGES)
    assert singly == pytest.approx(scores, rel=1e-5)
    assert get_callable_name(aesthetic) == "aesthetic"


def test_another_file_of_a_head_is_refused(folder, tmp_path):
    path = str(tmp_path / "head.pth")
    torch.save({"weight": torch.zeros(1, 16), "bias": torch.zeros(1)}, path)
    message = (
        f"{path} must hold weights and biases of layers (0, 2, 4, 6, 7) or (0, 3, 6, 9, 11), got ['bias', 'weight']."
    )
    reward = AestheticReward(path, folder)
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(message)):
            reward(prompts=PROMPTS, completions=IMAGES)


@pytest.mark.parametrize("reward_class", [CLIPReward, PickScoreReward, CLIPScoreReward, HPSv2Reward])
def test_tensors_and_images_score_the_same(folder, reward_class):
    images = build_images(*[(50, 40)] * 3)
    tensor = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])  # (B, 3, H, W)
    reward = reward_class(folder, processor_name_or_path=folder)
    scores = reward(prompts=PROMPTS, completions=images)
    assert reward(prompts=PROMPTS, completions=tensor) == scores
    assert all(type(score) is float for score in scores)


def test_images_of_other_modes_score_as_rgb(reward):
    for mode in ("L", "RGBA", "P"):
        image = IMAGES[0].convert(mode)
        expected = reward(prompts=["zebra"], completions=[image.convert("RGB")])
        assert reward(prompts=["zebra"], completions=[image]) == expected


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batches_change_nothing(folder, reward, batch_size):
    prompts, images = [*PROMPTS, *PROMPTS[:2]], [*IMAGES, *IMAGES[1:]]
    split = CLIPReward(folder, batch_size=batch_size)(prompts=prompts, completions=images)
    assert split == pytest.approx(reward(prompts=prompts, completions=images), abs=1e-5)


def test_no_images_have_no_rewards(reward):
    assert reward(prompts=[], completions=[]) == []


def test_each_prompt_is_encoded_once(folder):
    reward = CLIPReward(folder)
    first = reward(prompts=PROMPTS, completions=IMAGES)
    encoded = []
    reward._model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    assert reward(prompts=PROMPTS, completions=IMAGES) == first
    assert encoded == []
    scores = reward(prompts=["new", "zebra", "new"], completions=IMAGES[:1] * 3)
    assert encoded == [1]
    assert scores[0] == scores[2]


@pytest.mark.parametrize("text_cache_size", [0, 2])
def test_cache_of_prompts_is_bounded(folder, reward, text_cache_size):
    expected = reward(prompts=PROMPTS, completions=IMAGES)
    bounded = CLIPReward(folder, text_cache_size=text_cache_size)
    for _ in range(2):
        assert bounded(prompts=PROMPTS, completions=IMAGES) == pytest.approx(expected, abs=1e-5)
        assert len(bounded._text_features) == text_cache_size


def test_long_prompts_are_cut_at_their_end(reward):
    cut = "x" * (MAX_LENGTH - 3)  # room is left for the two tokens around the prompt, and one
    scores = reward(prompts=[cut + "yy", cut + "yz", cut + "z" * 100], completions=IMAGES[:1] * 3)
    assert scores[0] == scores[1] != scores[2]


def test_weights_load_on_first_use(tmp_path, reward):
    late = CLIPReward(str(tmp_path))
    save_tiny_clip(tmp_path)
    expected = reward(prompts=PROMPTS, completions=IMAGES)
    assert late(prompts=PROMPTS, completions=IMAGES) == pytest.approx(expected, abs=1e-6)
    assert late._model.device == PartialState().device


def test_dtype_can_be_chosen(folder, reward):
    half = CLIPReward(folder, dtype=torch.bfloat16)
    expected = reward(prompts=PROMPTS, completions=IMAGES)
    assert half(prompts=PROMPTS, completions=IMAGES) == pytest.approx(expected, abs=0.05)
    assert {parameter.dtype for parameter in half._model.parameters()} == {torch.bfloat16}


def test_device_can_be_chosen(folder):
    elsewhere = CLIPReward(folder, device="meta")
    with pytest.raises(RuntimeError, match="meta"):  # which has no values
        elsewhere(prompts=PROMPTS, completions=IMAGES)


def test_reward_takes_what_the_trainer_passes(reward):
    passed = {
        "completion_ids": [[0]] * 3,
        "trainer_state": None,
        "log_metric": print,
        "log_extra": print,
        "tag": "abc",
    }
    scores = reward(prompts=PROMPTS, completions=IMAGES, **passed)
    assert scores == reward(prompts=PROMPTS, completions=IMAGES)


def test_rewards_have_names_for_the_logs(folder):
    names = {
        PickScoreReward(): "pickscore_reward",
        PickScoreReward(normalize=False): "pickscore",
        CLIPScoreReward(): "clip_score",
        HPSv2Reward(folder): "hpsv2",
    }
    for reward, name in names.items():
        assert get_callable_name(reward) == name
        assert not isinstance(reward, nn.Module)


def test_older_checkpoints_load_without_torchvision_or_warnings(tmp_path, reward, caplog, monkeypatch):
    save_tiny_clip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = torch.arange(MAX_LENGTH)[None]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "preprocessor_config.json").write_text(
        f'{{"feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": {SIZE}, "crop_size": {SIZE}}}'
    )
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # to `caplog`
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = CLIPReward(str(tmp_path))(prompts=PROMPTS, completions=IMAGES)
    assert scores == pytest.approx(reward(prompts=PROMPTS, completions=IMAGES), abs=1e-6)
    assert caplog.messages == []
    assert "torchvision" not in sys.modules


def test_a_missing_weight_is_an_error(tmp_path):
    save_tiny_clip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    message = f"{str(tmp_path)!r}, which lacks 1 parameters, such as 'visual_projection.weight'."
    with pytest.raises(ValueError, match=re.escape(message)):
        CLIPReward(str(tmp_path))(prompts=PROMPTS, completions=IMAGES)


def test_a_missing_tokenizer_is_an_error(tmp_path):
    save_tiny_clip(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    message = f"The tokenizer in {str(tmp_path)!r} must have the model's 78 tokens, got 2."
    with pytest.raises(ValueError, match=re.escape(message)):
        CLIPReward(str(tmp_path))(prompts=PROMPTS, completions=IMAGES)


def test_a_score_that_is_not_finite_is_an_error(tmp_path):
    save_tiny_clip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["visual_projection.weight"][0, 0] = math.nan
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for reward_class in (CLIPReward, CLIPScoreReward):
        with pytest.raises(ValueError, match="The score of an image for 'a red dog' must be finite, got nan."):
            reward_class(str(tmp_path))(prompts=PROMPTS, completions=IMAGES)


@pytest.mark.parametrize(
    ("tensor", "got"),
    [
        (torch.zeros(3, 3, 8, 8), "a torch.float32 tensor of shape (3, 3, 8, 8)."),
        (torch.zeros(3, 8, 8, 3, dtype=torch.uint8), "a torch.uint8 tensor of shape (3, 8, 8, 3)."),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "a torch.uint8 tensor of shape (3, 8, 8)."),
    ],
)
def test_other_tensors_are_refused(reward, tensor, got):
    message = f"`completions` must be PIL images or a torch.uint8 tensor of shape (B, 3, H, W), got {got}"
    with pytest.raises(ValueError, match=re.escape(message)):
        reward(prompts=PROMPTS, completions=tensor)


def test_another_number_of_images_is_refused(reward):
    message = "`completions` must have an image for each of 3 prompts, got 1 images."
    with pytest.raises(ValueError, match=re.escape(message)):
        reward(prompts=PROMPTS, completions=IMAGES[:1])


def test_options_out_of_range_are_refused(folder):
    with pytest.raises(ValueError, match="`batch_size` must be >= 1, got 0."):
        PickScoreReward(batch_size=0)
    with pytest.raises(ValueError, match="`text_cache_size` must be >= 0, got -1."):
        HPSv2Reward(folder, text_cache_size=-1)


def test_prompts_that_are_cut_are_told_once(folder, caplog):
    reward = CLIPReward(folder, prefix="a ")
    long, longer = "b" * (MAX_LENGTH - 2), "c" * MAX_LENGTH
    with caplog.at_level(logging.WARNING):
        reward(["b" * (MAX_LENGTH - 3)], IMAGES[:1])  # the prefix and two special tokens fill it up
        assert caplog.text == ""
        reward([long, longer, "a dog"], IMAGES)
        reward([longer + "d"], IMAGES[:1])
    (record,) = caplog.records
    assert record.message == (
        f"2 of 3 prompts are longer than the {MAX_LENGTH} tokens that CLIPReward reads, and are cut. The first is "
        f"{long!r}. Further ones are not told."
    )
