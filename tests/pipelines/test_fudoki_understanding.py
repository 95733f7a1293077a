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

"""The numbers come from an independent run of the public reference code, WanZhengyan/dFlowGRPO at commit aa81e50."""

import copy
import json
import shutil

import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file

from trl_udm import FUDOKIUnderstandingPipeline, UDMGRPOConfig, UDMGRPOTrainer


QUESTION = "Is it red?"
SHORT = {"num_inference_steps": 4, "max_text_length": 130}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def load(folder, **kwargs):
    pipe = FUDOKIUnderstandingPipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def oracle(oracle_dir):
    return oracle_dir / "fudoki"


@pytest.fixture(scope="module")
def pipe(oracle):
    return load(oracle / "tiny-fudoki", num_vision_heads=2)


@pytest.fixture
def image():
    return Image.effect_noise((100, 40), 50).convert("RGB")


@torch.no_grad()
def test_ids_features_and_logits_are_the_references(pipe, oracle):
    recorded = load_file(oracle / "a_understanding.safetensors")
    features = pipe.encode_image(recorded["pixel_values"])
    torch.testing.assert_close(features, recorded["aligned"], atol=1e-6, rtol=0)
    questions = json.loads((oracle / "a_understanding.json").read_text(encoding="utf-8"))["questions"]
    for row, question in enumerate(questions):
        prompt_ids, prompt_mask = pipe.encode_prompt([question])
        is_answer = recorded["text_token_mask"][row].bool()
        assert prompt_ids[0].tolist() == recorded["clean_ids"][row, ~is_answer].tolist()
        noise = recorded["input_ids"][row, is_answer].unsqueeze(0)
        logits = pipe.denoise(prompt_ids, prompt_mask, noise, noise.shape[1:], image_features=features[[row]])[0]
        assert torch.equal(logits.argmax(dim=-1), recorded["sampler_argmax"][row, is_answer])
        is_recorded = is_answer[::4]
        torch.testing.assert_close(
            logits[is_answer.nonzero().squeeze(1) % 4 == 0],
            recorded["text_logits"][row, is_recorded],
            atol=1e-5,
            rtol=0,
        )


def test_the_codes_of_the_path_are_those_of_the_text(pipe, oracle):
    codes = load_file(oracle / "b_path.safetensors")["text.embedding"]
    torch.testing.assert_close(pipe.scheduler.codebook, torch.nn.functional.normalize(codes, dim=-1))


def test_answers_are_strings_and_those_of_their_generators(pipe, image):
    answers = pipe([image, image], [QUESTION, "What is it?"], generator=[seeded(1), seeded(2)], **SHORT)
    assert all(isinstance(answer, str) and answer for answer in answers)
    assert pipe(image, "What is it?", generator=seeded(2), **SHORT) == answers[1:]
    flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert pipe(flipped, "What is it?", generator=seeded(2), **SHORT) != answers[1:]
    assert pipe.decode(torch.tensor([[315, 306, pipe.tokenizer.eos_token_id, 315]]), (4,)) == ["You are"]


def test_each_step_but_the_first_goes_to_the_most_probable_token(pipe, image):
    prompt = pipe.encode_prompt([QUESTION])
    with torch.no_grad():
        features = pipe.encode_image(pipe.prepare_image(image))
        trajectory = pipe.sample_tokens(
            *prompt, (9,), 3, image_features=features, generator=seeded(), return_trajectory=True
        ).trajectory
        for state, clean in zip(trajectory.noised_samples, trajectory.pred_original_samples, strict=True):
            logits = pipe.denoise(*prompt, state, (9,), image_features=features)
            assert torch.equal(logits.argmax(dim=-1), clean)


@pytest.mark.parametrize("size", [(64, 64), (100, 40), (30, 60), (500, 1)])
def test_images_are_scaled_to_fit_and_padded_with_gray(pipe, size):
    pixels = pipe.prepare_image(Image.new("RGB", size, (255, 0, 0)))
    assert pixels.shape == (1, 3, 64, 64)
    is_red = pixels[0, 0] == 1
    rows, columns = is_red.nonzero().unbind(dim=1)
    height, width = (max(14, 64 * side // max(size)) for side in reversed(size))
    assert is_red.sum() == height * width
    assert (rows.min(), rows.max()) == ((64 - height) // 2, (64 - height) // 2 + height - 1)
    assert (columns.min(), columns.max()) == ((64 - width) // 2, (64 - width) // 2 + width - 1)
    gray = pixels[0][:, ~is_red]
    torch.testing.assert_close(gray, torch.full_like(gray, 127 / 127.5 - 1))


def test_what_is_saved_loads_again_with_its_adapter(pipe, oracle, tmp_path, image):
    before = pipe(image, QUESTION, generator=seeded(), **SHORT)
    pipe.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.float32)
    assert again(image, QUESTION, generator=seeded(), **SHORT) == before
    again.load_lora_weights(oracle / "release_layout")
    adapted = [name for name, _ in again.transformer.named_parameters() if "lora_" in name]
    assert len(adapted) == 28 and all(name.startswith("model.language_model.") for name in adapted)
    assert again(image, QUESTION, generator=seeded(), **SHORT) != before
    assert isinstance(load(tmp_path, dtype=torch.bfloat16)(image, QUESTION, **SHORT)[0], str)


@pytest.mark.parametrize(
    "name",
    ["aligner.layers.2.bias", "vision_model.vision_tower.pos_embed", "language_model.lm_head.weight"]
    + [f"vision_model.vision_tower.blocks.1.{name}.weight" for name in ("attn.qkv", "norm2", "mlp.fc1")],
)
def test_a_missing_weight_is_refused(oracle, tmp_path, name):
    folder = shutil.copytree(oracle / "tiny-fudoki", tmp_path / "original")
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="miss|cannot read images"):
        load(folder, num_vision_heads=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": []}, r"`questions` must be a string or a non-empty list of strings, got \[\]"),
        ({"questions": [QUESTION, 3]}, "`questions` must be a string or a non-empty list of strings"),
        ({"images": Image.new("L", (8, 8))}, r"`images` must be PIL images of mode RGB, got \['L'\]: use `image.conv"),
        ({"images": [Image.new("RGBA", (8, 8))]}, r"must be PIL images of mode RGB, got \['RGBA'\]"),
        ({"images": ["a.png"]}, r"must be PIL images of mode RGB, got \['str'\]"),
        ({"images": None}, r"must be PIL images of mode RGB, got \['NoneType'\]"),
        ({"images": torch.zeros(3, 8, 8)}, r"must be PIL images of mode RGB, got \['Tensor'\]"),
        ({"images": []}, "`images` must be one for each of the 1 questions, got 0"),
        ({"questions": [QUESTION] * 2}, "`images` must be one for each of the 2 questions, got 1"),
        ({"max_text_length": 90}, "`max_text_length` must be at least 95 for the longest question, got 90"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be > 0, got 0"),
        ({"generator": [seeded()] * 2}, "`generator` must be one generator or a list of one for each of the 1"),
    ],
)
def test_bad_arguments_are_refused(pipe, image, changes, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"images": image, "questions": QUESTION, **changes})


def test_other_components_and_training_are_refused(pipe, tmp_path):
    tokenizer = copy.deepcopy(pipe.tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"`tokenizer` must have BOS, EOS, .* got the ids \[340, None, 344, 345\]"):
        FUDOKIUnderstandingPipeline(pipe.transformer, pipe.scheduler, tokenizer)
    scheduler = type(pipe.scheduler)(metric_power=4.0)
    scheduler.set_codebook(torch.randn(64, 8, generator=seeded()))
    with pytest.raises(ValueError, match="`scheduler` must have a code for each of the 384 text tokens, got 64"):
        FUDOKIUnderstandingPipeline(pipe.transformer, scheduler, pipe.tokenizer)
    args = UDMGRPOConfig(str(tmp_path), bf16=False, report_to="none")
    with pytest.raises(NotImplementedError, match="`FUDOKIUnderstandingPipeline` cannot be trained"):
        UDMGRPOTrainer(pipe, lambda completions, **kwargs: [0.0], args, Dataset.from_dict({"prompt": [QUESTION]}))
