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

Without arguments it trains the embedded world of colored shapes, on a CPU, in minutes:

    accelerate launch examples/train_geneval.py

URSA, with the paper's settings, and GenEval's evaluation prompts from https://github.com/djghosh13/geneval:

    accelerate launch examples/train_geneval.py --config examples/configs/ursa_geneval.yaml \
        --eval_dataset_name evaluation_metadata.jsonl

`--help` lists all arguments. docs/quickstart.md says what the output folder holds after the run.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

from common import ImageArguments, load_pipeline, parse_arguments, resolve_callable, train_images
from trl import get_peft_config

from trl_udm import DiagnosticsCallback, GenEvalReward
from trl_udm.cli.mistakes import mistakes_in_one_line
from trl_udm.data.geneval import generate_geneval_prompts, geneval_dataset
from trl_udm.data.loading import load_prompts
from trl_udm.pipelines.image_families import find_image_pipeline_class
from trl_udm.worlds.shapes import CHECKPOINT_PATH
from trl_udm.worlds.shapes.prompts import EVAL_NUM_PROMPTS, TRAIN_NUM_PROMPTS, balance_metadata, split_metadata
from trl_udm.worlds.shapes.world import CLASS_NAMES


EVAL_FILE = "GenEval's evaluation_metadata.jsonl, from https://github.com/djghosh13/geneval"


@dataclass
class ScriptArguments(ImageArguments):
    """Arguments of this script. `detector` and `color_classifier` are for a model of yours."""

    num_train_prompts: int = field(default=50000, metadata={"help": "Number of generated training prompts."})
    detector: str = field(
        default="trl_udm.rewards.mask2former:Mask2FormerDetector",
        metadata={"help": "'module:callable' that builds a `trl_udm.rewards.geneval.Detector`."},
    )
    color_classifier: str = field(
        default="trl_udm.rewards.clip_color:CLIPColorClassifier",
        metadata={"help": "'module:callable' that builds the color classifier."},
    )
    reward_mode: str = field(
        default="dense",
        metadata={"help": "Reward of the training: with partial credit or not.", "choices": ["dense", "official"]},
    )
    diagnostics_steps: int | None = field(
        default=None, metadata={"help": "Steps between measurements of `DiagnosticsCallback`. By default none."}
    )


def load_task(script_args: ScriptArguments, model_name_or_path: str | None):
    """The model's path, the detector, the color classifier, and the prompts of training and evaluation."""
    if script_args.uses_world(model_name_or_path, EVAL_FILE):
        from trl_udm.worlds.shapes.detector import ShapesColorClassifier, ShapesDetector  # needs SciPy

        train_rows, eval_rows = split_metadata()
        train_dataset = geneval_dataset(balance_metadata(train_rows, TRAIN_NUM_PROMPTS), CLASS_NAMES)
        eval_dataset = geneval_dataset(balance_metadata(eval_rows, EVAL_NUM_PROMPTS), CLASS_NAMES)
        return CHECKPOINT_PATH, ShapesDetector(), ShapesColorClassifier(), train_dataset, eval_dataset
    detector = resolve_callable("detector", script_args.detector)()
    color_classifier = resolve_callable("color_classifier", script_args.color_classifier)()
    eval_dataset = load_prompts(script_args.eval_dataset_name, task="geneval", class_names=detector.class_names)
    if script_args.dataset_name is not None:
        train_dataset = load_prompts(script_args.dataset_name, task="geneval", class_names=detector.class_names)
    else:
        rows = generate_geneval_prompts(script_args.num_train_prompts, exclude=eval_dataset)
        train_dataset = geneval_dataset(rows, detector.class_names)
    return model_name_or_path, detector, color_classifier, train_dataset, eval_dataset


def main(argv: list[str]) -> dict[str, Any]:
    with mistakes_in_one_line("train_geneval.py"):
        script_args, training_args, model_args = parse_arguments(ScriptArguments, argv, "shapes.yaml")
        path, *judges, train_dataset, eval_dataset = load_task(script_args, model_args.model_name_or_path)
        trainer = script_args.trainer_class(
            load_pipeline(find_image_pipeline_class(path), path, model_args),
            reward_funcs=GenEvalReward(*judges, mode=script_args.reward_mode),
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=get_peft_config(model_args),
        )
    if script_args.diagnostics_steps is not None:
        prompts = train_dataset.shuffle(seed=0)["prompt"][:64]
        trainer.add_callback(DiagnosticsCallback(trainer, prompts, measure_steps=script_args.diagnostics_steps))
    accuracy = GenEvalReward(*judges, mode="official")
    return train_images(trainer, accuracy, script_args, "GenEval accuracy", curves={"strict accuracy": "geneval/"})


if __name__ == "__main__":
    main(sys.argv[1:])
