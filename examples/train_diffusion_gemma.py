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
Trains DiffusionGemma on mathematical problems with checked answers, with UDM-GRPO.

A LoRA, with settings to start from:

    accelerate launch examples/train_diffusion_gemma.py --config examples/configs/diffusion_gemma.yaml

A row of the dataset has a `prompt`, a text or a list of messages, and what the rewards ask for: a `solution`, for the default
one, `trl.rewards.accuracy_reward`. That reward needs the package `math_verify`: `pip install "trl-udm[math]"`.

Every argument of `UDMGRPOConfig` and TRL's `ModelConfig` (LoRA among them) is a flag, and a key of the `--config` file.
The run leaves in its output folder the trained weights, `reward_curve.png`, and `results.json` with the mean reward of
held-out problems before and after.
"""

import json
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict, load_dataset
from transformers import set_seed
from trl import ModelConfig, TrlParser, get_peft_config
from trl.import_utils import is_math_verify_available

from trl_udm import DiffusionGemmaUDMPipeline, UDMGRPOConfig, UDMGRPOTrainer
from trl_udm.evaluation.comparison import save_curves
from trl_udm.pipelines.pipeline_diffusion_gemma import LORA_TARGET_MODULES


ACCURACY_REWARD = "trl.rewards.accuracy_reward"


@dataclass
class ScriptArguments:
    r"""
    Arguments of this script.

    Args:
        dataset_name (`str`, *optional*, defaults to `"trl-lib/DeepMath-103K"`):
            The problems: a `.jsonl` file, or a dataset on the Hub.
        reward_funcs (`list[str]`, *optional*):
            Reward functions by their full names. By default `trl.rewards.accuracy_reward`.
        system_prompt (`str`, *optional*, defaults to `"Reason step by step, and put the final answer in \\boxed{}."`):
            First message of every prompt. Nothing is put first where it is empty.
        num_eval_prompts (`int`, *optional*, defaults to `64`):
            Problems that are held out.
        self_conditioning (`bool`, *optional*, defaults to `False`):
            As in [`DiffusionGemmaUDMPipeline`].
    """

    dataset_name: str = field(
        default="trl-lib/DeepMath-103K", metadata={"help": "The problems: a file or a Hub dataset."}
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: [ACCURACY_REWARD], metadata={"help": "Reward functions by their full names."}
    )
    system_prompt: str = field(
        default="Reason step by step, and put the final answer in \\boxed{}.",
        metadata={"help": "First message of every prompt."},
    )
    num_eval_prompts: int = field(default=64, metadata={"help": "Problems that are held out."})
    self_conditioning: bool = field(
        default=False, metadata={"help": "Whether rollouts and scores self-condition, in two passes."}
    )


def load_problems(script_args: ScriptArguments) -> DatasetDict:
    """Problems to train on ("train") and held-out ones ("test"). Their prompts are messages, as TRL's rewards ask for."""
    if script_args.dataset_name.endswith(".jsonl"):
        dataset = load_dataset("json", data_files=script_args.dataset_name, split="train")
    else:
        dataset = load_dataset(script_args.dataset_name, split="train")

    def to_messages(row: dict[str, Any]) -> dict[str, Any]:
        messages = row["prompt"]
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if script_args.system_prompt:
            messages = [{"role": "system", "content": script_args.system_prompt}, *messages]
        return {"prompt": messages}

    return dataset.map(to_messages).train_test_split(test_size=script_args.num_eval_prompts, seed=0)


def main(argv: list[str]) -> dict[str, Any]:
    parser = TrlParser((ScriptArguments, UDMGRPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config(args=argv)
    if model_args.model_name_or_path is None:
        raise ValueError("`--model_name_or_path` is needed, such as google/diffusiongemma-26B-A4B-it.")
    if ACCURACY_REWARD in script_args.reward_funcs and not is_math_verify_available():
        raise ImportError(
            f"`--reward_funcs {ACCURACY_REWARD}` needs the package `math_verify`: `pip install 'trl-udm[math]'`."
        )
    reward_funcs = []
    for name in script_args.reward_funcs:
        module_name, _, function_name = name.rpartition(".")
        reward_funcs.append(getattr(import_module(module_name), function_name))
    problems = load_problems(script_args)

    if model_args.lora_target_modules is None:
        model_args.lora_target_modules = LORA_TARGET_MODULES
    dtype = "auto" if model_args.dtype in (None, "auto") else getattr(torch, model_args.dtype)
    pipeline = DiffusionGemmaUDMPipeline.from_pretrained(
        model_args.model_name_or_path, dtype=dtype, self_conditioning=script_args.self_conditioning
    )
    if model_args.attn_implementation is not None:
        pipeline.transformer.set_attn_implementation(model_args.attn_implementation)
    trainer = UDMGRPOTrainer(
        pipeline,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=problems["train"],
        eval_dataset=problems["test"],
        peft_config=get_peft_config(model_args),
    )

    def evaluate() -> float:
        set_seed(training_args.seed)  # the same noise before and after
        return trainer.evaluate()["eval_reward"]

    results = {"before": evaluate()}
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    results["after"] = evaluate()
    if trainer.accelerator.is_main_process:
        output_dir = Path(training_args.output_dir)
        save_curves(output_dir / "reward_curve.png", trainer.state.log_history, {"reward": "reward"})
        (output_dir / "results.json").write_text(json.dumps(results, indent=2))
        print(f"Reward on held-out problems: {results['before']:.3f} before, {results['after']:.3f} after")
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
