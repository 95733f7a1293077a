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
Trains the models of the embedded worlds of Sudoku and Countdown: a small BERT that denoises solutions. Some of them
are wrong.

    python scripts/train_puzzles.py --task sudoku --output_dir sudoku_checkpoint --bf16
    python scripts/train_puzzles.py --task countdown --output_dir countdown_checkpoint --bf16 --num_steps 6000 \\
        --slip_rate 0.25

Each filled cell of a Sudoku, and each operator of an expression, is sometimes another one. So the model learns the
form of a solution, and its solutions are often wrong. It sees only training puzzles. A second call of the command
continues from its last checkpoint.
"""

import random

import torch
from train_arithmetic import build_parser, build_pipeline, train

from trl_udm.data.puzzles import DIGITS, MAX_TARGET, generate_puzzles, puzzle_answer_reward


# A number of Countdown is one token: from digits, this network did not learn which operators to choose
TOKENS = {"sudoku": [*DIGITS, "."], "countdown": [*map(str, range(MAX_TARGET + 1)), *",=+-*"]}
MAX_COMPLETION_LENGTH = {"sudoku": 17, "countdown": 6}
MAX_LENGTH = {"sudoku": 36, "countdown": 14}
NUM_PUZZLES = 40000
SLIPS = {"sudoku": DIGITS, "countdown": "+-*"}  # a slip takes another of these


def main():
    parser = build_parser(__doc__, num_steps=2000, slip_rate=0.08)
    parser.add_argument("--task", choices=[*TOKENS], required=True, help="The world.")
    parser.add_argument("--noise", choices=["uniform", "masked"], default="uniform", help="The forward process.")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    rows = generate_puzzles(args.task, NUM_PUZZLES)
    eval_rows = generate_puzzles(args.task, 200, "eval")
    slips = SLIPS[args.task]

    def slip(solution: str, puzzle: str, rng: random.Random) -> str:
        is_given = [args.task == "sudoku" and cell in DIGITS for cell in puzzle]
        return "".join(
            rng.choice(slips.replace(character, ""))
            if character in slips and not is_given[place] and rng.random() < args.slip_rate
            else character
            for place, character in enumerate(solution)
        )

    def write_batch(num_samples: int, rng: random.Random) -> tuple[list[str], list[str]]:
        drawn = rng.choices(rows, k=num_samples)
        return [row["prompt"] for row in drawn], [slip(row["solution"], row["puzzle"], rng) for row in drawn]

    columns = {name: [row[name] for row in eval_rows] for name in ("task", "puzzle")}
    train(
        build_pipeline(TOKENS[args.task], MAX_COMPLETION_LENGTH[args.task], MAX_LENGTH[args.task], noise=args.noise),
        args,
        write_batch,
        [row["prompt"] for row in eval_rows],
        lambda texts: puzzle_answer_reward(texts, **columns),
    )


if __name__ == "__main__":
    main()
