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
Converts HPS v3 from its authors' files to a folder that `HPSv3Reward` loads.

    hf download MizzenAI/HPSv3 HPSv3.safetensors --local-dir .
    git clone --depth 1 https://github.com/MizzenAI/HPSv3
    python scripts/convert_hpsv3.py HPSv3.safetensors HPSv3/hpsv3/dataset/data_collator_qwen.py hpsv3

HPS v3 is a fine-tuned `Qwen/Qwen2-VL-7B-Instruct` with one more token and a head. The configuration, the tokenizer and
the image processor are those of that model. The instruction that the model was trained with is read from the authors'
source file. No code in the files is executed.
"""

import argparse
import ast
import re
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLImageProcessorPil

from trl_udm.rewards.hpsv3 import PROMPT_FILE, REWARD_TOKEN, HPSv3Model
from trl_udm.weights import load_tensors


NUM_PIXELS = 256 * 28 * 28
"""Number of pixels to which the authors resize images."""

# From names in transformers 4.45, which the authors used, to those of today. Names of today stay as they are.
NAMES = {r"^visual\.": "model.visual.", r"^model\.(?!visual\.|language_model\.)": "model.language_model."}

# The authors' variables, whose texts follow each other in the prompt.
INSTRUCTION_PARTS = ("INSTRUCTION", "prompt_with_special_token")


def read_template(source: Path) -> str:
    """
    Reads the instruction from the authors' source file, without running it.

    Args:
        source (`Path`):
            Their `hpsv3/dataset/data_collator_qwen.py`.

    Returns:
        `str`: The instruction, with `{text_prompt}` and the reward token.

    Raises:
        ValueError: If the file has no such texts.
    """
    texts = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id in INSTRUCTION_PARTS:
                texts[node.targets[0].id] = ast.literal_eval(node.value)
    template = "".join(texts.get(name, "") for name in INSTRUCTION_PARTS)
    if template.count("{text_prompt}") != 1 or template.count(REWARD_TOKEN) != 1:
        raise ValueError(f"{source} must assign texts with {{text_prompt}} and {REWARD_TOKEN} to {INSTRUCTION_PARTS}.")
    return template


def convert(checkpoint: Path, source: Path, output_dir: Path, base_model: str) -> None:
    """
    Converts the files.

    Args:
        checkpoint (`Path`):
            The authors' weights.
        source (`Path`):
            Their source file with the instruction.
        output_dir (`Path`):
            The folder to write.
        base_model (`str`):
            The model of transformers that was fine-tuned.

    Raises:
        ValueError: If a file is damaged or another one, or its weights do not fit the architecture of `base_model`.
    """
    template = read_template(source)
    weights = {}
    for name, tensor in load_tensors(checkpoint).items():
        for old, new in NAMES.items():
            name = re.sub(old, new, name)
        if name != "lm_head.weight":  # a reward model writes no text
            weights[name] = tensor

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    config = Qwen2VLConfig.from_pretrained(base_model)
    config.text_config.vocab_size = len(tokenizer)
    with torch.device("meta"):
        model = HPSv3Model(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    differing = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    if differing:
        raise ValueError(f"{checkpoint} must fit {base_model}, differs in {len(differing)} weights: {differing[:10]}.")

    model.save_pretrained(output_dir, state_dict=weights)
    tokenizer.save_pretrained(output_dir)
    size = {"shortest_edge": NUM_PIXELS, "longest_edge": NUM_PIXELS}
    Qwen2VLImageProcessorPil.from_pretrained(base_model, size=size).save_pretrained(output_dir)
    (output_dir / PROMPT_FILE).write_text(template, encoding="utf-8")


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Converts HPS v3 to a folder for transformers.")
    parser.add_argument("checkpoint", type=Path, help="The authors' weights, HPSv3.safetensors.")
    parser.add_argument("source", type=Path, help="The authors' data_collator_qwen.py, which has the instruction.")
    parser.add_argument("output_dir", type=Path, help="The folder to write.")
    parser.add_argument(
        "--base_model",
        default="Qwen/Qwen2-VL-7B-Instruct",
        help="The model of transformers that was fine-tuned: a Hub repository or a folder.",
    )
    arguments = parser.parse_args(args)
    convert(arguments.checkpoint, arguments.source, arguments.output_dir, arguments.base_model)
    print(f"Wrote {arguments.output_dir}.")


if __name__ == "__main__":
    main()
