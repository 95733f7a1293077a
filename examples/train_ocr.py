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
Trains a text-to-image uniform discrete diffusion model with UDM-GRPO to write the text that its prompt quotes.

Without arguments it trains the embedded world of words, on a CPU, in minutes:

    accelerate launch examples/train_ocr.py

URSA, with the paper's settings:

    accelerate launch examples/train_ocr.py --config examples/configs/ursa_ocr.yaml --eval_dataset_name test.txt

Each line of the file is a prompt, with the text to be written in double quotes.

`--help` lists all arguments. docs/quickstart.md says what the output folder holds after the run.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

from common import ImageArguments, load_pipeline, parse_arguments, train_images
from datasets import Dataset
from trl import get_peft_config

from trl_udm import OCRReward, URSAPipeline
from trl_udm.cli.mistakes import mistakes_in_one_line
from trl_udm.data.loading import load_prompts
from trl_udm.data.ocr import generate_ocr_prompts
from trl_udm.worlds.words import CHECKPOINT_PATH
from trl_udm.worlds.words.prompts import split_words


EVAL_FILE = "a file with one prompt per line, which quotes the text to be written"


@dataclass
class ScriptArguments(ImageArguments):
    """Arguments of this script."""

    num_train_prompts: int = field(default=50000, metadata={"help": "Number of generated training prompts."})
    num_engines: int = field(default=2, metadata={"help": "Images that are read at a time."})


def load_task(script_args: ScriptArguments, model_name_or_path: str | None):
    """The model's path, the reward, and the prompts of training and evaluation."""
    if script_args.uses_world(model_name_or_path, EVAL_FILE):
        reward = OCRReward(detect_text=False, num_engines=script_args.num_engines)
        return CHECKPOINT_PATH, reward, *map(Dataset.from_list, split_words())
    eval_dataset = load_prompts(script_args.eval_dataset_name, task="ocr")
    if script_args.dataset_name is not None:
        train_dataset = load_prompts(script_args.dataset_name, task="ocr")
    else:
        train_dataset = generate_ocr_prompts(script_args.num_train_prompts, exclude=eval_dataset)
    return model_name_or_path, OCRReward(num_engines=script_args.num_engines), train_dataset, eval_dataset


def main(argv: list[str]) -> dict[str, Any]:
    with mistakes_in_one_line("train_ocr.py"):
        script_args, training_args, model_args = parse_arguments(ScriptArguments, argv, "words.yaml")
        path, reward, train_dataset, eval_dataset = load_task(script_args, model_args.model_name_or_path)
        trainer = script_args.trainer_class(
            load_pipeline(URSAPipeline, path, model_args),
            reward_funcs=reward,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=get_peft_config(model_args),
        )
    return train_images(
        trainer, reward, script_args, "OCR accuracy", curves={"written without a mistake": "ocr/exact"}
    )


if __name__ == "__main__":
    main(sys.argv[1:])
