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


import importlib.util
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLImageProcessorPil

from trl_udm.rewards.hpsv3 import HPSv3Model, HPSv3Reward

from .test_clip import build_images


PROMPTS = ["a red dog", "two blue cats, sitting", "a <|Reward|><|image_pad|>"]
IMAGES = build_images((40, 60), (64, 64), (90, 50))
SOURCE = '''import pdb
INSTRUCTION = """
Rate it.
Textual prompt - {text_prompt}

"""
prompt_with_special_token = """
The rating: <|Reward|>

END
"""
'''
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]


def load_script():
    path = Path(__file__).parents[2] / "scripts" / "convert_hpsv3.py"
    spec = importlib.util.spec_from_file_location("convert_hpsv3", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_tokenizer():
    # The printable bytes of GPT-2's alphabet, and the space and line break that it moves
    letters = ["<|endoftext|>", *map(chr, range(33, 127)), "\u0120", "\u010a"]
    tokenizer = Qwen2Tokenizer(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    tokenizer.add_tokens(SPECIAL_TOKENS, special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_original_files(folder):
    """Save the authors' files and the base model, small, and return the weights and the network that has them."""
    tokenizer = build_tokenizer()
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 10,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]},
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=len(tokenizer),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    config.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    Qwen2VLImageProcessorPil().save_pretrained(folder / "base")

    config.text_config.vocab_size = len(tokenizer) + 1
    torch.manual_seed(0)
    model = HPSv3Model(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    weights = {"lm_head.weight": torch.zeros(len(tokenizer) + 1, 32)}
    for name, weight in model.state_dict().items():
        weights[re.sub(r"^model\.visual\.|^model\.language_model\.", lambda m: m[0].split(".", 1)[1], name)] = weight
    weights = {name.replace("language_model.", "model.", 1): weight for name, weight in weights.items()}
    save_file(weights, folder / "HPSv3.safetensors")
    (folder / "data_collator_qwen.py").write_text(SOURCE)
    return weights, model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hpsv3")
    return folder, *save_original_files(folder)


def convert(folder, output_dir, checkpoint="HPSv3.safetensors", source="data_collator_qwen.py"):
    arguments = [str(folder / checkpoint), str(folder / source), str(output_dir), "--base_model", str(folder / "base")]
    load_script().main(arguments)
    return str(output_dir)


def score_by_hand(model, weights, tokenizer, prompt, pixels, grid):
    """The authors' steps: no padding, positions of a text, and their head."""
    image = "<|vision_start|>" + "<|image_pad|>" * (int(grid.prod()) // 4) + "<|vision_end|>"
    instruction = f"\nRate it.\nTextual prompt - {prompt}\n\n\nThe rating: <|Reward|>\n\nEND\n"
    text = f"<|im_start|>user\n{image}{instruction}<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        states = weights["model.embed_tokens.weight"][ids]
        image_mask = ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")
        states[image_mask] = model.model.visual(pixels, grid_thw=grid[None]).pooler_output
        states = model.model.language_model(inputs_embeds=states).last_hidden_state
        state = states[ids == tokenizer.convert_tokens_to_ids("<|Reward|>")]
        for index in (0, 3, 5):
            state = state.relu() if index else state
            state = state @ weights[f"rm_head.{index}.weight"].T + weights[f"rm_head.{index}.bias"]
    return state[0, 0].item()


def test_converted_files_score_as_the_authors_steps(files, tmp_path):
    folder, weights, model = files
    converted = convert(folder, tmp_path / "hpsv3")
    reward = HPSv3Reward(converted, dtype=torch.float32)
    scores = reward(prompts=PROMPTS, completions=IMAGES)

    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    # 256 * 28 * 28 pixels for an image of any size
    inputs = Qwen2VLImageProcessorPil(min_pixels=200704, max_pixels=200704)(images=IMAGES, return_tensors="pt")
    grids = inputs["image_grid_thw"]
    assert grids[1].tolist() == [1, 32, 32]
    pixels = inputs["pixel_values"].split(grids.prod(dim=-1).tolist())
    plain_prompts = [*PROMPTS[:2], "a < Reward >< image_pad >"]
    expected = [
        score_by_hand(model, weights, tokenizer, *sample) for sample in zip(plain_prompts, pixels, grids, strict=True)
    ]
    assert max(expected) - min(expected) > 1e-2
    assert scores == pytest.approx(expected, abs=1e-5)
    reward.batch_size = 1
    assert reward(prompts=PROMPTS, completions=IMAGES) == pytest.approx(scores, abs=1e-6)
    assert reward.__name__ == "hpsv3"

    half = HPSv3Reward(converted)
    assert half(prompts=PROMPTS, completions=IMAGES) == pytest.approx(scores, abs=0.1)
    dtypes = {name.split(".")[0]: parameter.dtype for name, parameter in half._model.named_parameters()}
    assert dtypes == {"model": torch.bfloat16, "rm_head": torch.float32}


def test_files_that_do_not_fit_are_refused(files, tmp_path):
    folder, weights, _ = files
    save_file({**weights, "rm_head.5.weight": torch.zeros(4, 16)}, folder / "other.safetensors")
    with pytest.raises(ValueError, match=r"differs in 1 weights: \['rm_head.5.weight'\]."):
        convert(folder, tmp_path / "hpsv3", checkpoint="other.safetensors")
    (folder / "other.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nINSTRUCTION = 'Rate it.'")
    with pytest.raises(ValueError, match=r"other.py must assign texts with {text_prompt} and <\|Reward\|> to"):
        convert(folder, tmp_path / "hpsv3", source="other.py")
    assert list(tmp_path.iterdir()) == []
