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
Measures how much of a reward function's time `async_rewards` hides behind the rollout.

Draws generation batches of shapes in four micro-batches. The reward function only waits, as for an answer of another
machine: for each micro-batch `--ratio` times as long as its rollout takes. No log-probabilities are computed (`beta`
is 0). Prints the median seconds of a generation batch without the reward, with it, and with it beside the rollout. The
three cases alternate.

    python benchmarks/async_rewards.py
"""

import argparse
import statistics
import tempfile
import time

import torch
from shapes_runs import build_trainer


NUM_MICRO_BATCHES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32, help="samples of a generation batch, a multiple of 4")
    parser.add_argument(
        "--ratio",
        type=float,
        default=1.0,
        help="seconds of a call of the reward per second of a micro-batch's rollout",
    )
    parser.add_argument("--num_repeats", type=int, default=5)
    parser.add_argument("--num_threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    seconds_per_sample = 0.0

    def waiting(completions: list, **kwargs) -> list[float]:
        time.sleep(seconds_per_sample * len(completions))
        return [float(index) for index in range(len(completions))]

    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for async_rewards in (False, True):
            trainers[async_rewards] = build_trainer(
                folder,
                waiting,
                num_generations=args.batch_size // 2,
                per_device_train_batch_size=3 * args.batch_size,
                rollout_batch_size=args.batch_size // NUM_MICRO_BATCHES,
                async_rewards=async_rewards,
                beta=0.0,
            )
            trainers[async_rewards].model.train()
        rows = next(iter(trainers[False].get_train_dataloader()))

        def draw(async_rewards: bool) -> float:
            start = time.perf_counter()
            trainers[async_rewards]._generate_and_score_completions(rows)
            return time.perf_counter() - start

        for async_rewards in (False, True):  # warm-up
            draw(async_rewards)
        times = {"without": [], "with": [], "beside": []}
        for _ in range(args.num_repeats):
            seconds_per_sample = 0.0
            times["without"].append(draw(False))
            seconds_per_sample = args.ratio * statistics.median(times["without"]) / args.batch_size
            times["with"].append(draw(False))
            times["beside"].append(draw(True))
    without, after, beside = (statistics.median(values) for values in times.values())
    print("| without the reward | with it | with `async_rewards` | ratio | share hidden |")
    print("|---|---|---|---|---|")
    hidden = (after - beside) / (after - without)
    print(f"| {without:.2f} s | {after:.2f} s | {beside:.2f} s | {after / beside:.2f} | {hidden:.0%} |")


if __name__ == "__main__":
    main()
