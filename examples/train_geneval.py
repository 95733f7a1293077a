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
Trains a text-to-image uniform discrete diffusion model on the GenEval reward with UDM-GRPO.

Without arguments, the embedded world of coloured shapes, on a CPU in minutes (settings in configs/shapes.yaml):

    accelerate launch examples/train_geneval.py

URSA, with the paper's settings:

    accelerate launch examples/train_geneval.py --config examples/configs/ursa_geneval.yaml \
        --eval_dataset_name evaluation_metadata.jsonl

where the file is GenEval's, from https://github.com/djghosh13/geneval.

Every argument of `UDMGRPOConfig` and TRL's `ModelConfig` (LoRA among them) is a flag, and a key of the `--config` file.
The run leaves in its output folder: `samples_before.png` and `samples_after.png` (same prompts, same seeds),
`reward_curve.png`, `results.json` with the accuracy by tag before and after, the trained weights, and in `before` and
`after` the images with their scores and confidence intervals.
"""

import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl import ModelConfig, TrlParser, get_peft_config

from trl_udm import DiagnosticsCallback, EMACallback, GenEvalReward, UDMGRPOConfig, UDMGRPOTrainer, URSAPipeline
from trl_udm.data.geneval import generate_geneval_prompts, geneval_dataset
from trl_udm.data.loading import load_prompts
from trl_udm.evaluation.comparison import format_table, train_and_compare
from trl_udm.worlds.shapes import CHECKPOINT_PATH
from trl_udm.worlds.shapes.prompts import EVAL_NUM_PROMPTS, TRAIN_NUM_PROMPTS, balance_metadata, split_metadata
from trl_udm.worlds.shapes.world import CLASS_NAMES


SHAPES_CONFIG_PATH = Path(__file__).parent / "configs" / "shapes.yaml"


@dataclass
class ScriptArguments:
    """
    Arguments of this script.

    Args:
        dataset_name (`str`, *optional*):
            Training prompts with GenEval metadata: a file or a dataset on the Hub. By default those of the embedded world
            or, with a model of yours, generated ones, the evaluation prompts left out.
        num_train_prompts (`int`, *optional*, defaults to `50000`):
            Number of generated training prompts.
        eval_dataset_name (`str`, *optional*):
            Evaluation prompts, such as GenEval's `evaluation_metadata.jsonl`. Needed with a model of yours.
        detector (`str`, *optional*):
            `module:callable` that builds the detector; see `trl_udm.rewards.geneval.Detector`. Not for the embedded world.
        color_classifier (`str`, *optional*):
            `module:callable` that builds the color classifier, likewise.
        reward_mode (`str`, *optional*, defaults to `"dense"`):
            Reward that is trained on: `"dense"` (partial credit, as in the paper) or `"official"`.
        num_eval_images (`int`, *optional*, defaults to `4`):
            Images a prompt in the evaluation before and after.
        eval_images_batch_size (`int`, *optional*, defaults to `120`):
            Images at a time in that evaluation.
        diagnostics_steps (`int`, *optional*):
            Training steps between two measurements of `DiagnosticsCallback`, on 64 training prompts. By default none.
        ema_decay (`float`, *optional*):
            Decay of an exponential moving average of the weights, which is saved beside them. By default none.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Training prompts: a file or a Hub dataset."})
    num_train_prompts: int = field(default=50000, metadata={"help": "Number of generated training prompts."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Evaluation prompts, likewise."})
    detector: str = field(
        default="trl_udm.rewards.mask2former:Mask2FormerDetector",
        metadata={"help": "'module:callable' that builds the detector."},
    )
    color_classifier: str = field(
        default="trl_udm.rewards.clip_color:CLIPColorClassifier",
        metadata={"help": "'module:callable' that builds the color classifier."},
    )
    reward_mode: str = field(
        default="dense", metadata={"help": "Reward that is trained on.", "choices": ["dense", "official"]}
    )
    num_eval_images: int = field(default=4, metadata={"help": "Images a prompt in the final evaluations."})
    eval_images_batch_size: int = field(default=120, metadata={"help": "Images at a time in the final evaluations."})
    diagnostics_steps: int | None = field(
        default=None, metadata={"help": "Training steps between two measurements of `DiagnosticsCallback`."}
    )
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of an average of the weights."})


def import_callable(path: str):
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def load_world(script_args: ScriptArguments, model_name_or_path: str | None):
    """The pipeline's name, the detector, the color classifier, and the prompts to train and to evaluate on."""
    if model_name_or_path is None:
        if script_args.dataset_name is not None or script_args.eval_dataset_name is not None:
            raise ValueError("`--dataset_name` and `--eval_dataset_name` need `--model_name_or_path`.")
        from trl_udm.worlds.shapes.detector import ShapesColorClassifier, ShapesDetector

        train_rows, eval_rows = split_metadata()
        return (
            CHECKPOINT_PATH,
            ShapesDetector(),
            ShapesColorClassifier(),
            geneval_dataset(balance_metadata(train_rows, TRAIN_NUM_PROMPTS), CLASS_NAMES),
            geneval_dataset(balance_metadata(eval_rows, EVAL_NUM_PROMPTS), CLASS_NAMES),
        )
    if script_args.eval_dataset_name is None:
        raise ValueError(
            "`--eval_dataset_name` is needed with `--model_name_or_path`: GenEval's evaluation_metadata.jsonl, from "
            "https://github.com/djghosh13/geneval."
        )
    detector = import_callable(script_args.detector)()
    color_classifier = import_callable(script_args.color_classifier)()
    eval_dataset = load_prompts(script_args.eval_dataset_name, task="geneval", class_names=detector.class_names)
    if script_args.dataset_name is None:
        rows = generate_geneval_prompts(script_args.num_train_prompts, exclude=eval_dataset)
        train_dataset = geneval_dataset(rows, detector.class_names)
    else:
        train_dataset = load_prompts(script_args.dataset_name, task="geneval", class_names=detector.class_names)
    return model_name_or_path, detector, color_classifier, train_dataset, eval_dataset


def main(argv: list[str]) -> dict[str, Any]:
    parser = TrlParser((ScriptArguments, UDMGRPOConfig, ModelConfig))
    if not any(argument.partition("=")[0] in ("--config", "--model_name_or_path") for argument in argv):
        argv = ["--config", str(SHAPES_CONFIG_PATH), *argv]
    script_args, training_args, model_args = parser.parse_args_and_config(args=argv)

    path, detector, color_classifier, train_dataset, eval_dataset = load_world(
        script_args, model_args.model_name_or_path
    )
    if model_args.lora_target_modules is None:
        model_args.lora_target_modules = "all-linear"
    dtype = None if model_args.dtype in (None, "auto") else getattr(torch, model_args.dtype)
    pipeline = URSAPipeline.from_pretrained(path, dtype=dtype)
    if model_args.attn_implementation is not None:
        pipeline.transformer.set_attn_implementation(model_args.attn_implementation)
    trainer = UDMGRPOTrainer(
        pipeline,
        reward_funcs=GenEvalReward(detector, color_classifier, mode=script_args.reward_mode),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
        callbacks=None if script_args.ema_decay is None else [EMACallback(script_args.ema_decay)],
    )
    if script_args.diagnostics_steps is not None:
        prompts = train_dataset.shuffle(seed=0)["prompt"][:64]
        trainer.add_callback(DiagnosticsCallback(trainer, prompts, measure_steps=script_args.diagnostics_steps))
    results = train_and_compare(
        trainer,
        GenEvalReward(detector, color_classifier, mode="official"),
        list(eval_dataset),
        num_images_per_prompt=script_args.num_eval_images,
        batch_size=script_args.eval_images_batch_size,
        curves={"strict accuracy": "geneval/"},
    )
    if trainer.accelerator.is_main_process:
        print(f"GenEval accuracy; samples and curves are in {training_args.output_dir}")
        print(format_table(results["before"], results["after"]))
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
