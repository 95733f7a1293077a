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
How much of the time of a reward function `async_rewards` hides behind the rollout.

Draws generation batches of shapes in four micro-batches, with a reward function that waits as one on another machine would: for
a micro-batch as long as that takes to draw, times `--ratio`. Nothing is scored (`beta` is 0). Prints the median seconds of a
generation batch without the reward, with it, and with it beside the rollout, which take turns.

    python benchmarks/async_rewards.py
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from datasets import Dataset

from trl_udm import UDMGRPOConfig, UDMGRPOTrainer, URSAPipeline
from trl_udm.worlds.shapes import CHECKPOINT_PATH


NUM_MICRO_BATCHES = 4
PROMPTS = Dataset.from_dict({"prompt": ["a photo of a red circle", "a photo of a blue ring"]})


def build_trainer(
    output_dir: str, batch_size: int, reward_func: Callable, async_rewards: bool = False
) -> UDMGRPOTrainer:
    """A trainer whose generation batch has `batch_size` samples."""
    args = UDMGRPOConfig(
        output_dir,
        num_generations=batch_size // 2,
        per_device_train_batch_size=3 * batch_size,
        rollout_batch_size=batch_size // NUM_MICRO_BATCHES,
        async_rewards=async_rewards,
        beta=0.0,
        bf16=False,
        report_to="none",
    )
    return UDMGRPOTrainer(URSAPipeline.from_pretrained(CHECKPOINT_PATH), reward_func, args, train_dataset=PROMPTS)


def measure(function: Callable[[], object]) -> float:
    """Seconds that `function` takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32, help="samples of a generation batch, a multiple of 4")
    parser.add_argument(
        "--ratio",
        type=float,
        default=1.0,
        help="seconds of a call of the reward, over those of a micro-batch's rollout",
    )
    parser.add_argument("--num_repeats", type=int, default=5)
    parser.add_argument("--num_threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    seconds_a_sample = 0.0

    def waiting(completions: list, **kwargs) -> list[float]:
        time.sleep(seconds_a_sample * len(completions))
        return [float(index) for index in range(len(completions))]

    with tempfile.TemporaryDirectory() as folder:
        trainers = {option: build_trainer(folder, args.batch_size, waiting, option) for option in (False, True)}
        for trainer in trainers.values():
            trainer.model.train()
        rows = next(iter(trainers[False].get_train_dataloader()))

        def draw(async_rewards: bool) -> float:
            return measure(lambda: trainers[async_rewards]._generate_and_score_completions(rows))

        for option in (False, True):  # the first rewards are waited for
            draw(option)
        times = {"without": [], "with": [], "beside": []}
        for _ in range(args.num_repeats):
            seconds_a_sample = 0.0
            times["without"].append(draw(False))
            seconds_a_sample = args.ratio * statistics.median(times["without"]) / args.batch_size
            times["with"].append(draw(False))
            times["beside"].append(draw(True))
    without, along, beside = (statistics.median(values) for values in times.values())
    print("| without the reward | with it | with `async_rewards` | ratio | share hidden |")
    print("|---|---|---|---|---|")
    hidden = (along - beside) / (along - without)
    print(f"| {without:.2f} s | {along:.2f} s | {beside:.2f} s | {along / beside:.2f} | {hidden:.0%} |")


if __name__ == "__main__":
    main()
