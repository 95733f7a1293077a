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
Trains DiffusionGemma with UDM-GRPO on mathematical problems whose answers are checked.

A LoRA, with settings to start from:

    accelerate launch examples/train_diffusion_gemma.py --config examples/configs/diffusion_gemma.yaml

A row of the dataset has a `prompt`, a text or a list of messages, and what the rewards need. The default reward is
`trl.rewards.accuracy_reward`. It needs a column `solution` and the package `math_verify`: `pip install
"trl-udm[math]"`.

`--help` lists all arguments. The output folder then holds the trained weights, `reward_curve.png`, and `results.json`
with the mean reward of held-out problems before and after training.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

from common import AlgorithmArguments, load_pipeline, parse_arguments, resolve_callable, train_texts
from datasets import DatasetDict
from trl import get_peft_config
from trl.import_utils import is_math_verify_available

from trl_udm import DiffusionGemmaUDMPipeline
from trl_udm.cli.mistakes import mistakes_in_one_line
from trl_udm.data.files import load_rows
from trl_udm.pipelines.pipeline_diffusion_gemma import LORA_TARGET_MODULES


ACCURACY_REWARD = "trl.rewards.accuracy_reward"


@dataclass
class ScriptArguments(AlgorithmArguments):
    """Arguments of this script."""

    dataset_name: str = field(
        default="trl-lib/DeepMath-103K", metadata={"help": "The problems: a file or a Hub dataset."}
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: [ACCURACY_REWARD], metadata={"help": "Full names of reward functions."}
    )
    system_prompt: str = field(
        default="Reason step by step, and put the final answer in \\boxed{}.",
        metadata={"help": "First message of every prompt. If empty, no message is added."},
    )
    num_eval_prompts: int = field(default=64, metadata={"help": "Problems that are held out."})
    self_conditioning: bool = field(
        default=False, metadata={"help": "Whether rollouts and scores self-condition, in two passes."}
    )


def load_problems(script_args: ScriptArguments) -> DatasetDict:
    """Problems for training ("train") and held-out ones ("test"). Prompts are messages, which TRL's rewards expect."""

    def to_messages(row: dict[str, Any]) -> dict[str, Any]:
        messages = row["prompt"]
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if script_args.system_prompt:
            messages = [{"role": "system", "content": script_args.system_prompt}, *messages]
        return {"prompt": messages}

    rows = load_rows(script_args.dataset_name)
    return rows.map(to_messages).train_test_split(test_size=script_args.num_eval_prompts, seed=0)


def main(argv: list[str]) -> dict[str, Any]:
    with mistakes_in_one_line("train_diffusion_gemma.py"):
        script_args, training_args, model_args = parse_arguments(
            ScriptArguments, argv, lora_target_modules=LORA_TARGET_MODULES
        )
        if model_args.model_name_or_path is None:
            raise ValueError("`--model_name_or_path` is needed, such as google/diffusiongemma-26B-A4B-it.")
        if ACCURACY_REWARD in script_args.reward_funcs and not is_math_verify_available():
            raise ImportError(
                f"`--reward_funcs {ACCURACY_REWARD}` needs the package `math_verify`: `pip install 'trl-udm[math]'`."
            )
        problems = load_problems(script_args)
        options = {"default_dtype": "auto", "self_conditioning": script_args.self_conditioning}
        trainer = script_args.trainer_class(
            load_pipeline(DiffusionGemmaUDMPipeline, model_args.model_name_or_path, model_args, **options),
            reward_funcs=[resolve_callable("reward_funcs", name) for name in script_args.reward_funcs],
            args=training_args,
            train_dataset=problems["train"],
            eval_dataset=problems["test"],
            peft_config=get_peft_config(model_args),
        )
    return train_texts(trainer, "Reward on held-out problems")


if __name__ == "__main__":
    main(sys.argv[1:])
