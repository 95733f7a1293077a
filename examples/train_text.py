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
Trains a text uniform discrete diffusion model on a verifiable reward, with UDM-GRPO.

Without arguments it trains the embedded world of sums, on a CPU, in minutes:

    accelerate launch examples/train_text.py

A model of yours, any folder that `TextUDMPipeline.from_pretrained` loads, with a reward of TRL:

    accelerate launch examples/train_text.py --model_name_or_path my-model --dataset_name train.jsonl \
        --eval_dataset_name test.jsonl --reward_funcs trl.rewards.accuracy_reward

The files have a row a line: `prompt`, a text or a list of messages, and what the rewards ask for, such as `solution`.

Every argument of `UDMGRPOConfig` and TRL's `ModelConfig` (LoRA among them) is a flag, and a key of the `--config` file.
The run leaves in its output folder the trained weights, `reward_curve.png`, and `results.json` with the mean reward of the
evaluation prompts and some completions, before and after.
"""

import json
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from transformers import set_seed
from trl import ModelConfig, TrlParser, get_peft_config

from trl_udm import TextUDMPipeline, UDMGRPOConfig, UDMGRPOTrainer
from trl_udm.evaluation.comparison import save_curves
from trl_udm.worlds.sums import CHECKPOINT_PATH
from trl_udm.worlds.sums.problems import split_problems, sum_reward


ARITHMETIC_CONFIG_PATH = Path(__file__).parent / "configs" / "arithmetic.yaml"


@dataclass
class ScriptArguments:
    """
    Arguments of this script.

    Args:
        dataset_name (`str`, *optional*):
            Training prompts: a `.jsonl` file, or a dataset on the Hub. Needed with a model of yours.
        eval_dataset_name (`str`, *optional*):
            Evaluation prompts, likewise.
        reward_funcs (`list[str]`, *optional*):
            Reward functions by their full names, such as `trl.rewards.accuracy_reward`. Needed with a model of yours.
        num_shown (`int`, *optional*, defaults to `8`):
            Evaluation prompts whose completions are shown, before and after.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Training prompts: a file or a Hub dataset."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Evaluation prompts, likewise."})
    reward_funcs: list[str] | None = field(default=None, metadata={"help": "Reward functions by their full names."})
    num_shown: int = field(default=8, metadata={"help": "Evaluation prompts whose completions are shown."})


def load_rows(name: str) -> Dataset:
    if name.endswith(".jsonl"):
        return load_dataset("json", data_files=name, split="train")
    return load_dataset(name, split="train")


def load_task(script_args: ScriptArguments, model_name_or_path: str | None):
    """The pipeline's name, the rewards, and the prompts to train and to evaluate on."""
    given = [script_args.dataset_name, script_args.eval_dataset_name, script_args.reward_funcs, model_name_or_path]
    if given == [None] * 4:
        train_rows, eval_rows = split_problems()
        return CHECKPOINT_PATH, [sum_reward], Dataset.from_list(train_rows), Dataset.from_list(eval_rows)
    if None in given:
        raise ValueError(
            "`--model_name_or_path`, `--dataset_name`, `--eval_dataset_name` and `--reward_funcs` must be given together."
        )
    reward_funcs = []
    for name in script_args.reward_funcs:
        module_name, _, function_name = name.rpartition(".")
        reward_funcs.append(getattr(import_module(module_name), function_name))
    return (
        model_name_or_path,
        reward_funcs,
        load_rows(script_args.dataset_name),
        load_rows(script_args.eval_dataset_name),
    )


def main(argv: list[str]) -> dict[str, Any]:
    parser = TrlParser((ScriptArguments, UDMGRPOConfig, ModelConfig))
    if not any(argument.partition("=")[0] in ("--config", "--model_name_or_path") for argument in argv):
        argv = ["--config", str(ARITHMETIC_CONFIG_PATH), *argv]
    script_args, training_args, model_args = parser.parse_args_and_config(args=argv)

    path, reward_funcs, train_dataset, eval_dataset = load_task(script_args, model_args.model_name_or_path)
    if model_args.lora_target_modules is None:
        model_args.lora_target_modules = "all-linear"
    trainer = UDMGRPOTrainer(
        TextUDMPipeline.from_pretrained(path),
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
    )

    def evaluate() -> tuple[float, list[str]]:
        set_seed(training_args.seed)
        reward = trainer.evaluate()["eval_reward"]
        trainer.model.eval()
        shown = eval_dataset[: script_args.num_shown]["prompt"]
        return reward, trainer.pipeline(shown, num_inference_steps=training_args.num_inference_steps_eval).texts

    before, completions_before = evaluate()
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    after, completions_after = evaluate()
    results = {
        "before": before,
        "after": after,
        "seconds": next(log["train_runtime"] for log in trainer.state.log_history if "train_runtime" in log),
        "completions": [
            {"prompt": prompt, "before": completion_before, "after": completion_after}
            for prompt, completion_before, completion_after in zip(
                eval_dataset[: script_args.num_shown]["prompt"], completions_before, completions_after, strict=True
            )
        ],
    }
    if trainer.accelerator.is_main_process:
        output_dir = Path(training_args.output_dir)
        save_curves(output_dir / "reward_curve.png", trainer.state.log_history, {"reward": "reward"})
        (output_dir / "results.json").write_text(json.dumps(results, indent=2))
        for row in results["completions"]:
            print(f"{row['prompt']}   before: {row['before']}   after: {row['after']}")
        print(f"Reward on the evaluation prompts: {before:.3f} before, {after:.3f} after")
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
