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

import re
import string
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from trl_udm.rewards.clip_color import CLIPColorClassifier, crop_object
from trl_udm.rewards.geneval import COLORS, Detection, GenEvalReward


GRAY = (153, 153, 153)


def build_tiny_clip():
    """A network of random weights over single characters, and its tokenizer."""
    specials = ["<|startoftext|>", "<|endoftext|>"]
    characters = [character + end for character in string.ascii_lowercase + "-" for end in ("", "</w>")]
    vocab = {token: index for index, token in enumerate(characters + specials)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[])
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(vocab), "bos_token_id": vocab[specials[0]], "eos_token_id": vocab[specials[1]]}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**layers, **text, "pad_token_id": vocab[specials[1]]},
            vision_config={**layers, "image_size": 32, "patch_size": 8},
            projection_dim=8,
        )
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1.0)
    return model, tokenizer


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    model, tokenizer = build_tiny_clip()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    return path


def random_image(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def masked(box, size, mask=None):
    if mask is None:
        mask = np.zeros((size[1], size[0]), dtype=bool)
        mask[box[1] : box[3], box[0] : box[2]] = True
    return Detection(box=box, score=0.9, mask=mask)


def embed_image(model, image):
    """The unit embedding of a square image, by the formula."""
    pixels = torch.from_numpy(np.array(image.resize((32, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    with torch.no_grad():
        embedding = model.get_image_features(((pixels - mean[:, None, None]) / std[:, None, None])[None]).pooler_output
    return embedding[0] / embedding.norm()


def embed_color(model, tokenizer, color, class_name):
    """The unit embedding of a color, by the formula, one caption at a time."""
    captions = [f"a photo of a {color} {class_name}", f"a photo of a {color}-colored {class_name}"]
    embeddings = []
    for caption in [*captions, f"a photo of a {color} object"]:
        with torch.no_grad():
            embedding = model.get_text_features(**tokenizer(caption, return_tensors="pt")).pooler_output[0]
        embeddings.append(embedding / embedding.norm())
    mean = torch.stack(embeddings).mean(dim=0)
    return mean / mean.norm()


def test_color_is_that_of_the_nearest_captions(model_path):
    model, tokenizer = build_tiny_clip()
    expected = torch.stack([embed_color(model, tokenizer, color, "wine glass") for color in COLORS])
    classify = CLIPColorClassifier(model_path, device="cpu")
    seen = set()
    for seed in range(8):
        image = random_image(40, 40, seed).point(lambda value, seed=seed: value * seed // 8)
        detections = [masked((4, 4, 36, 36), image.size), Detection(box=(8, 8, 24, 24), score=0.9)]
        colors = classify(image, detections, "wine glass")
        for detection, color in zip(detections, colors, strict=True):
            similarities = expected @ embed_image(model, crop_object(image, detection))
            assert color == COLORS[similarities.argmax()]
        seen.update(colors)
    assert len(seen) > 1
    torch.testing.assert_close(classify.text_embeddings["wine glass"], expected)


def test_weights_are_loaded_and_captions_embedded_on_first_use(model_path):
    classify = CLIPColorClassifier(model_path, device="cpu", dtype=torch.bfloat16)
    assert classify.model is None
    assert classify(random_image(8, 8), [], "dog") == [] and classify.model is None
    image, detection = random_image(8, 8), Detection(box=(0, 0, 8, 8), score=0.9)
    first = classify(image, [detection], "dog")
    assert classify.model.dtype == torch.bfloat16 and not classify.model.training
    embeddings = classify.text_embeddings["dog"]
    assert embeddings.shape == (10, 8)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(10))
    assert classify(image, [detection], "dog") == first
    assert classify.text_embeddings["dog"] is embeddings
    classify(image, [detection], "cat")
    assert classify.text_embeddings.keys() == {"dog", "cat"}


def test_object_is_shown_alone_on_gray():
    image = random_image(8, 6)
    mask = np.zeros((6, 8), dtype=bool)
    mask[1:4, 2:7] = True
    mask[2, 3] = False
    crop = np.array(crop_object(image, masked((2, 1, 7, 4), image.size, mask)))
    expected = np.array(image)
    expected[~mask] = GRAY
    assert np.array_equal(crop, expected[1:4, 2:7])


def test_without_a_mask_the_whole_box_is_shown():
    image = random_image(8, 6)
    crop = crop_object(image, Detection(box=(1.6, 0.4, 6.5, 3.7), score=0.9))
    assert np.array_equal(np.array(crop), np.array(image)[0:4, 2:6])


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((3, 2, 3, 2), (3, 2, 4, 3)),  # nothing
        ((3.2, 0, 3.4, 6), (3, 0, 4, 6)),  # thin
        ((5, 4, 2, 1), (5, 4, 6, 5)),  # inverted
        ((-9, -9, -5, -5), (0, 0, 1, 1)),  # outside
        ((20, 20, 30, 30), (7, 5, 8, 6)),
        ((8, 0, 8, 6), (7, 0, 8, 6)),  # on the edge
        ((-3, -3, 20, 20), (0, 0, 8, 6)),  # larger than the image
    ],
)
def test_degenerate_boxes_show_the_nearest_pixels(box, expected):
    image = random_image(8, 6)
    left, top, right, bottom = expected
    crop = crop_object(image, Detection(box=box, score=0.9))
    assert np.array_equal(np.array(crop), np.array(image)[top:bottom, left:right])


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0, 0, 3, 3), (0, 0, 1, 40), (0, 0, 40, 2)])
def test_small_and_thin_objects_have_a_color(model_path, box):
    image = random_image(40, 40)
    empty = np.zeros((40, 40), dtype=bool)
    classify = CLIPColorClassifier(model_path, device="cpu")
    colors = classify(image, [masked(box, image.size), masked(box, image.size, empty)], "kite")
    assert len(colors) == 2 and set(colors) <= set(COLORS)


def test_masks_of_another_size_are_refused():
    detection = Detection(box=(0, 0, 4, 4), score=0.9, mask=np.ones((8, 6), dtype=bool))
    with pytest.raises(ValueError, match=re.escape("`mask` must have the image's shape (6, 8), got (8, 6).")):
        crop_object(random_image(8, 6), detection)


def test_missing_weights_are_refused(tmp_path):
    model, _ = build_tiny_clip()
    state_dict = {name: weight for name, weight in model.state_dict().items() if name != "text_projection.weight"}
    model.save_pretrained(tmp_path, state_dict=state_dict)
    message = f"a trained CLIPModel, got {tmp_path!r}, which lacks 1 parameters, such as 'text_projection.weight'"
    with pytest.raises(ValueError, match=re.escape(message)):
        CLIPColorClassifier(tmp_path, device="cpu")(random_image(8, 8), [Detection((0, 0, 8, 8), 0.9)], "dog")


def test_missing_tokenizer_is_refused(tmp_path):
    model, tokenizer = build_tiny_clip()
    model.save_pretrained(tmp_path)
    message = f"The tokenizer in {tmp_path!r} must have the model's {len(tokenizer)} tokens, got "
    with pytest.raises(ValueError, match=re.escape(message)):
        CLIPColorClassifier(tmp_path, device="cpu")(random_image(8, 8), [Detection((0, 0, 8, 8), 0.9)], "dog")


def test_outputs_that_are_not_finite_are_an_error(model_path):
    classify = CLIPColorClassifier(model_path, device="cpu")
    image, detections = random_image(8, 8), [Detection((0, 0, 8, 8), 0.9)]
    classify(image, detections, "dog")
    nn.init.constant_(classify.model.visual_projection.weight, torch.nan)
    message = f"The outputs of {model_path!r} must be finite. If the weights are sound, use `dtype=torch.float32`"
    with pytest.raises(ValueError, match=re.escape(message)):
        classify(image, detections, "dog")


def test_classifier_serves_the_reward(model_path):
    class CarDetector:
        class_names = ["car"]

        def __call__(self, images):
            return [{"car": [Detection(box=(2, 2, 30, 30), score=0.9)]} for _ in images]

    classify = CLIPColorClassifier(model_path, device="cpu")
    image = random_image(32, 32)
    (color,) = classify(image, [Detection(box=(2, 2, 30, 30), score=0.9)], "car")
    rewards = GenEvalReward(CarDetector(), classify)(
        prompts=COLORS,
        completions=[image] * 10,
        tag=["colors"] * 10,
        include=[[{"class": "car", "count": 1, "color": name}] for name in COLORS],
    )
    assert rewards == [float(name == color) for name in COLORS]
    assert "torchvision" not in sys.modules
