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

"""Sums of two numbers below 100, worked out in writing, and the reward that checks them."""

import random


MAX_COMPLETION_LENGTH = 12


def work_out(first: int, second: int, slip_rate: float = 0.0, rng: random.Random | None = None) -> str:
    """
    Writes out a sum as the model does: the sum of the tens, the sum of the units, and the result.

    Args:
        first (`int`):
            The first number, below 100.
        second (`int`):
            The second number, below 100.
        slip_rate (`float`, *optional*, defaults to `0.0`):
            Probability that a written number is wrong by 1 or 10. What follows is computed from the wrong number.
        rng (`random.Random`, *optional*):
            Source of the slips.

    Returns:
        `str`: The working, such as `"50+12=62"` for 17 and 45.
    """

    def write_down(number: int) -> int:
        if rng is not None and slip_rate > 0 and rng.random() < slip_rate:
            number += rng.choice([slip for slip in (-10, -1, 1, 10) if number + slip >= 0])
        return number

    tens = write_down(first // 10 * 10 + second // 10 * 10)
    units = write_down(first % 10 + second % 10)
    return f"{tens}+{units}={write_down(tens + units)}"


def split_problems(
    num_train: int = 8000, num_eval: int = 400, seed: int = 0
) -> tuple[list[dict[str, str | int]], list[dict[str, str | int]]]:
    """
    Splits all problems into disjoint training and evaluation problems.

    Args:
        num_train (`int`, *optional*, defaults to `8000`):
            Number of training problems.
        num_eval (`int`, *optional*, defaults to `400`):
            Number of evaluation problems. There are 10,000 problems in all.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the split.

    Returns:
        `tuple[list[dict], list[dict]]`: Rows with `prompt`, such as `"17+45="`, and `answer`.

    Raises:
        ValueError: If there are not enough problems.
    """
    if num_train + num_eval > 10000:
        raise ValueError(
            f"`num_train` and `num_eval` must sum to at most 10000, got {num_train} and {num_eval}: there are no more "
            "problems."
        )
    problems = [(first, second) for first in range(100) for second in range(100)]
    random.Random(seed).shuffle(problems)
    rows: list[dict[str, str | int]] = [
        {"prompt": f"{first}+{second}=", "answer": first + second} for first, second in problems
    ]
    return rows[:num_train], rows[len(rows) - num_eval :]


def sum_reward(completions: list[str], answer: list[int], **kwargs) -> list[float]:
    """
    Rewards a working with 1 if the text after its last "=" is the sum, else with 0.

    Args:
        completions (`list[str]`):
            Workings, such as `"50+12=62"`.
        answer (`list[int]`):
            The sums.

    Returns:
        `list[float]`: A reward for each completion.
    """
    return [
        float(completion.rpartition("=")[2] == str(total))
        for completion, total in zip(completions, answer, strict=True)
    ]
