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
Trains a text uniform discrete diffusion model with UDM-GRPO on a verifiable reward.

Without arguments it trains the embedded world of sums, on a CPU, in minutes. `--task` names another world:

    accelerate launch examples/train_text.py --task sudoku

A model of yours, any folder that `TextUDMPipeline.from_pretrained` loads, with a reward function of TRL:

    accelerate launch examples/train_text.py --model_name_or_path my-model --dataset_name train.jsonl \
        --eval_dataset_name test.jsonl --reward_funcs trl.rewards.accuracy_reward

Each line of the files is a row: `prompt`, a text or a list of messages, and what the rewards need, such as `solution`.

`--help` lists all arguments. The output folder then holds the trained weights, `reward_curve.png`, and `results.json`
with the mean reward of the evaluation prompts and some completions, before and after training.
"""

import argparse
import sys
from dataclasses import dataclass, field
from typing import Any

from common import AlgorithmArguments, load_pipeline, parse_arguments, resolve_callable, train_texts
from datasets import Dataset
from trl import get_peft_config

from trl_udm import TextUDMPipeline
from trl_udm.cli.mistakes import mistakes_in_one_line
from trl_udm.data.files import load_rows
from trl_udm.data.puzzles import generate_puzzles
from trl_udm.worlds import WORLDS
from trl_udm.worlds.sums.problems import split_problems


CONFIGS = {"sums": "arithmetic.yaml", "sudoku": "sudoku.yaml", "countdown": "countdown.yaml"}


@dataclass
class ScriptArguments(AlgorithmArguments):
    """Arguments of this script. The three after the first are required with a model of yours."""

    task: str = field(
        default="sums",
        metadata={"help": "Embedded world, without a model of yours.", "choices": list(CONFIGS)},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Training prompts: a file or a Hub dataset."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Evaluation prompts, likewise."})
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Full names of reward functions, such as 'trl.rewards.accuracy_reward'."}
    )
    num_shown: int = field(default=8, metadata={"help": "Evaluation prompts whose completions are shown."})


def load_task(script_args: ScriptArguments, model_name_or_path: str | None):
    """The model's path, the reward functions, and the prompts of training and evaluation."""
    given = [script_args.dataset_name, script_args.eval_dataset_name, script_args.reward_funcs, model_name_or_path]
    if given == [None] * 4:
        world, task = WORLDS[script_args.task], script_args.task
        train_rows = split_problems()[0] if task == "sums" else generate_puzzles(task, 4000)
        datasets = map(Dataset.from_list, (train_rows, world.load_eval_rows()))
        return world.checkpoint_path, [world.make_reward()], *datasets
    if None in given:
        raise ValueError(
            "`--model_name_or_path`, `--dataset_name`, `--eval_dataset_name` and `--reward_funcs` must be given "
            "together."
        )
    reward_funcs = [resolve_callable("reward_funcs", name) for name in script_args.reward_funcs]
    return (
        model_name_or_path,
        reward_funcs,
        load_rows(script_args.dataset_name),
        load_rows(script_args.eval_dataset_name),
    )


def main(argv: list[str]) -> dict[str, Any]:
    with mistakes_in_one_line("train_text.py"):
        # The world has a configuration, whose values are defaults of the parser
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--task", default="sums")
        config = CONFIGS.get(parser.parse_known_args(argv)[0].task, "arithmetic.yaml")
        script_args, training_args, model_args = parse_arguments(ScriptArguments, argv, config)
        path, reward_funcs, train_dataset, eval_dataset = load_task(script_args, model_args.model_name_or_path)
        trainer = script_args.trainer_class(
            load_pipeline(TextUDMPipeline, path, model_args),
            reward_funcs=reward_funcs,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=get_peft_config(model_args),
        )
    return train_texts(trainer, "Reward on the evaluation prompts", script_args.num_shown)


if __name__ == "__main__":
    main(sys.argv[1:])
