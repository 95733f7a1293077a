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
Trains a uniform discrete diffusion model of images or videos with UDM-GRPO on human preference, as PickScore predicts
it.

URSA, with the paper's settings. Each line of the text files is a prompt:

    accelerate launch examples/train_pickscore.py --config examples/configs/ursa_pickscore.yaml \
        --dataset_name train.txt --eval_dataset_name test.txt

`ursa_1024.yaml` has images of 1,024 pixels, and `ursa_video.yaml` videos, whose frames are scored.

`--help` lists all arguments. docs/quickstart.md says what the output folder holds after the run.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

from common import ImageArguments, load_pipeline, parse_arguments, train_images
from trl import get_peft_config

from trl_udm import FrameReward
from trl_udm.cli.mistakes import mistakes_in_one_line
from trl_udm.data.loading import load_prompts
from trl_udm.pipelines.image_families import find_image_pipeline_class
from trl_udm.rewards.frames import flicker, motion_amount
from trl_udm.rewards.loading import load_reward


@dataclass
class ScriptArguments(ImageArguments):
    """Arguments of this script."""

    dataset_name: str = field(metadata={"help": "Training prompts: a file or a Hub dataset."})
    eval_dataset_name: str = field(metadata={"help": "Evaluation prompts, likewise."})
    num_eval_images: int = field(default=1, metadata={"help": "Images per prompt in the evaluations."})
    eval_images_batch_size: int = field(default=16, metadata={"help": "Images at a time in the evaluations."})
    frames: str = field(
        default="4", metadata={"help": "Frames of videos that are scored: first, middle, last, all or a number."}
    )
    pickscore_model: str = field(default="yuvalkirstain/PickScore_v1", metadata={"help": "The model that scores."})
    pickscore_processor: str = field(
        default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", metadata={"help": "Its tokenizer and image processor."}
    )


def main(argv: list[str]) -> dict[str, Any]:
    with mistakes_in_one_line("train_pickscore.py"):
        script_args, training_args, model_args = parse_arguments(ScriptArguments, argv)
        if model_args.model_name_or_path is None:
            raise ValueError("`--model_name_or_path` is needed, such as BAAI/URSA-1.7B-IBQ512.")
        path = model_args.model_name_or_path
        names = {"model_name_or_path": script_args.pickscore_model}
        names["processor_name_or_path"] = script_args.pickscore_processor
        # Called once, so that a mistake is told now
        frames: Any = int(script_args.frames) if script_args.frames.isdecimal() else script_args.frames
        reward = FrameReward(load_reward("pickscore", names), frames)
        reward_funcs: list[Any] = [reward]
        if (training_args.pipeline_kwargs or {}).get("num_frames", 1) > 1:
            reward_funcs += [motion_amount, flicker]  # watched: a model may learn to stand still
            training_args.reward_weights = [1.0, 0.0, 0.0]

        def pickscore(**kwargs):
            # The scale of the figures in papers. The large model of the reward is loaded once
            return [26 * value for value in reward(**kwargs)]

        trainer = script_args.trainer_class(
            load_pipeline(find_image_pipeline_class(path), path, model_args),
            reward_funcs=reward_funcs,
            args=training_args,
            train_dataset=load_prompts(script_args.dataset_name),
            eval_dataset=load_prompts(script_args.eval_dataset_name),
            peft_config=get_peft_config(model_args),
        )
    return train_images(trainer, pickscore, script_args, "PickScore")


if __name__ == "__main__":
    main(sys.argv[1:])
