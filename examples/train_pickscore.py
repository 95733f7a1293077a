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
Trains a text-to-image uniform discrete diffusion model on human preference, as PickScore predicts it, with UDM-GRPO.

URSA, with the paper's settings, on text files of one prompt a line:

    accelerate launch examples/train_pickscore.py --config examples/configs/ursa_pickscore.yaml \
        --dataset_name train.txt --eval_dataset_name test.txt

Every argument of `UDMGRPOConfig` and TRL's `ModelConfig` (LoRA among them) is a flag, and a key of the `--config` file.
The run leaves in its output folder: `samples_before.png` and `samples_after.png` (same prompts, same seeds),
`reward_curve.png`, `results.json` with the PickScore before and after, the trained weights, and in `before` and `after` the
images with their scores and confidence intervals.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import ModelConfig, TrlParser, get_peft_config

from trl_udm import PickScoreReward, UDMGRPOConfig, UDMGRPOTrainer, URSAPipeline
from trl_udm.data.loading import load_prompts
from trl_udm.evaluation.comparison import format_table, train_and_compare


@dataclass
class ScriptArguments:
    """
    Arguments of this script.

    Args:
        dataset_name (`str`):
            Training prompts: a file or a dataset on the Hub.
        eval_dataset_name (`str`):
            Evaluation prompts, likewise.
        pickscore_model (`str`, *optional*, defaults to `"yuvalkirstain/PickScore_v1"`):
            The model that scores.
        pickscore_processor (`str`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            Its tokenizer and image processor.
        num_eval_images (`int`, *optional*, defaults to `1`):
            Images a prompt in the evaluation before and after.
        eval_images_batch_size (`int`, *optional*, defaults to `16`):
            Images at a time in that evaluation.
    """

    dataset_name: str = field(metadata={"help": "Training prompts: a file or a Hub dataset."})
    eval_dataset_name: str = field(metadata={"help": "Evaluation prompts, likewise."})
    pickscore_model: str = field(default="yuvalkirstain/PickScore_v1", metadata={"help": "The model that scores."})
    pickscore_processor: str = field(
        default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", metadata={"help": "Its tokenizer and image processor."}
    )
    num_eval_images: int = field(default=1, metadata={"help": "Images a prompt in the final evaluations."})
    eval_images_batch_size: int = field(default=16, metadata={"help": "Images at a time in the final evaluations."})


def main(argv: list[str]) -> dict[str, Any]:
    parser = TrlParser((ScriptArguments, UDMGRPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config(args=argv)
    if model_args.model_name_or_path is None:
        raise ValueError("`--model_name_or_path` is needed, such as BAAI/URSA-1.7B-IBQ512.")
    train_dataset = load_prompts(script_args.dataset_name)
    eval_dataset = load_prompts(script_args.eval_dataset_name)

    if model_args.lora_target_modules is None:
        model_args.lora_target_modules = "all-linear"
    dtype = None if model_args.dtype in (None, "auto") else getattr(torch, model_args.dtype)
    pipeline = URSAPipeline.from_pretrained(model_args.model_name_or_path, dtype=dtype)
    if model_args.attn_implementation is not None:
        pipeline.transformer.set_attn_implementation(model_args.attn_implementation)
    pickscore_reward = PickScoreReward(script_args.pickscore_model, script_args.pickscore_processor)

    def pickscore(**kwargs):
        # What papers report; by the same model, which is large
        return [26 * reward for reward in pickscore_reward(**kwargs)]

    trainer = UDMGRPOTrainer(
        pipeline,
        reward_funcs=pickscore_reward,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
    )
    results = train_and_compare(
        trainer,
        pickscore,
        list(eval_dataset),
        num_images_per_prompt=script_args.num_eval_images,
        batch_size=script_args.eval_images_batch_size,
    )
    if trainer.accelerator.is_main_process:
        print(f"PickScore; samples and curves are in {training_args.output_dir}")
        print(format_table(results["before"], results["after"]))
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
