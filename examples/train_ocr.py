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
Trains a text-to-image uniform discrete diffusion model to write the text that its prompt quotes, with UDM-GRPO.

Without arguments it trains the embedded world of words, on a CPU, in minutes:

    accelerate launch examples/train_ocr.py

URSA, with the paper's settings:

    accelerate launch examples/train_ocr.py --config examples/configs/ursa_ocr.yaml --eval_dataset_name test.txt

where the file has a prompt a line, the text to be written in double quotes.

Every argument of `UDMGRPOConfig` and TRL's `ModelConfig` (LoRA among them) is a flag, and a key of the `--config` file.
The run leaves in its output folder: `samples_before.png` and `samples_after.png` (same prompts, same seeds),
`reward_curve.png`, `results.json` with the OCR accuracy before and after, the trained weights, and in `before` and `after`
the images with their scores and confidence intervals.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import ModelConfig, TrlParser, get_peft_config

from trl_udm import OCRReward, UDMGRPOConfig, UDMGRPOTrainer, URSAPipeline
from trl_udm.data.loading import load_prompts
from trl_udm.data.ocr import generate_ocr_prompts
from trl_udm.evaluation.comparison import format_table, train_and_compare
from trl_udm.worlds.words import CHECKPOINT_PATH
from trl_udm.worlds.words.prompts import split_words


WORDS_CONFIG_PATH = Path(__file__).parent / "configs" / "words.yaml"


@dataclass
class ScriptArguments:
    """
    Arguments of this script.

    Args:
        dataset_name (`str`, *optional*):
            Training prompts: a file or a dataset on the Hub. By default those of the embedded world or, with a model of
            yours, generated ones, the evaluated texts left out.
        num_train_prompts (`int`, *optional*, defaults to `50000`):
            Number of generated training prompts.
        eval_dataset_name (`str`, *optional*):
            Evaluation prompts, likewise. Needed with a model of yours.
        num_engines (`int`, *optional*, defaults to `2`):
            Images that are read at a time.
        num_eval_images (`int`, *optional*, defaults to `4`):
            Images a prompt in the evaluation before and after.
        eval_images_batch_size (`int`, *optional*, defaults to `120`):
            Images at a time in that evaluation.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Training prompts: a file or a Hub dataset."})
    num_train_prompts: int = field(default=50000, metadata={"help": "Number of generated training prompts."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Evaluation prompts, likewise."})
    num_engines: int = field(default=2, metadata={"help": "Images that are read at a time."})
    num_eval_images: int = field(default=4, metadata={"help": "Images a prompt in the final evaluations."})
    eval_images_batch_size: int = field(default=120, metadata={"help": "Images at a time in the final evaluations."})


def load_world(script_args: ScriptArguments, model_name_or_path: str | None):
    """The pipeline's name, the reward, and the prompts to train and to evaluate on."""
    if model_name_or_path is None:
        if script_args.dataset_name is not None or script_args.eval_dataset_name is not None:
            raise ValueError("`--dataset_name` and `--eval_dataset_name` need `--model_name_or_path`.")
        train_rows, eval_rows = split_words()
        reward = OCRReward(detect_text=False, num_engines=script_args.num_engines)
        return CHECKPOINT_PATH, reward, Dataset.from_list(train_rows), Dataset.from_list(eval_rows)
    if script_args.eval_dataset_name is None:
        raise ValueError(
            "`--eval_dataset_name` is needed with `--model_name_or_path`: a file with a prompt a line, the text to be "
            "written in double quotes."
        )
    eval_dataset = load_prompts(script_args.eval_dataset_name, task="ocr")
    if script_args.dataset_name is None:
        train_dataset = generate_ocr_prompts(script_args.num_train_prompts, exclude=eval_dataset)
    else:
        train_dataset = load_prompts(script_args.dataset_name, task="ocr")
    return model_name_or_path, OCRReward(num_engines=script_args.num_engines), train_dataset, eval_dataset


def main(argv: list[str]) -> dict[str, Any]:
    parser = TrlParser((ScriptArguments, UDMGRPOConfig, ModelConfig))
    if not any(argument.partition("=")[0] in ("--config", "--model_name_or_path") for argument in argv):
        argv = ["--config", str(WORDS_CONFIG_PATH), *argv]
    script_args, training_args, model_args = parser.parse_args_and_config(args=argv)

    path, reward, train_dataset, eval_dataset = load_world(script_args, model_args.model_name_or_path)
    if model_args.lora_target_modules is None:
        model_args.lora_target_modules = "all-linear"
    dtype = None if model_args.dtype in (None, "auto") else getattr(torch, model_args.dtype)
    pipeline = URSAPipeline.from_pretrained(path, dtype=dtype)
    if model_args.attn_implementation is not None:
        pipeline.transformer.set_attn_implementation(model_args.attn_implementation)
    trainer = UDMGRPOTrainer(
        pipeline,
        reward_funcs=reward,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
    )
    results = train_and_compare(
        trainer,
        reward,
        list(eval_dataset),
        num_images_per_prompt=script_args.num_eval_images,
        batch_size=script_args.eval_images_batch_size,
        curves={"written without a mistake": "ocr/exact"},
    )
    if trainer.accelerator.is_main_process:
        print(f"OCR accuracy; samples and curves are in {training_args.output_dir}")
        print(format_table(results["before"], results["after"]))
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
