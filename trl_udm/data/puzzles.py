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
Puzzles with exact verifiers: 4 x 4 Sudoku, Countdown (numbers to a target), and chains of arithmetic.

All puzzles have the same columns and rewards, so that a dataset may mix them. A puzzle is for evaluation if the
checksum of what defines it says so. So puzzles of training and evaluation are disjoint for all seeds, sizes and
difficulties.
"""

import ast
import functools
import operator
import random
import re
import zlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal


DIGITS = "1234"
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
MAX_TARGET = 99
_NODES = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}

INSTRUCTIONS = {
    "sudoku": "Fill the empty cells (.) of this 4 x 4 Sudoku, whose rows are written one after the other. Each row, "
    "each column and each 2 x 2 box has the digits 1 to 4. Answer with the 16 digits between <answer> and </answer>.",
    "countdown": "The numbers before = must make the number after it. Use each of them once, with + - * / and "
    "parentheses. Answer with the expression between <answer> and </answer>.",
    "chain": "Compute this. Answer with the number between <answer> and </answer>.",
}
"""What a language model is asked to do, by task."""


@functools.cache
def list_sudoku_grids() -> tuple[str, ...]:
    """
    Lists the solved 4 x 4 Sudokus.

    Returns:
        `tuple[str, ...]`: The 288 grids, each with 16 digits, row after row.
    """

    def share_unit(first: int, second: int) -> bool:
        rows, columns = (first // 4, second // 4), (first % 4, second % 4)
        is_box = rows[0] // 2 == rows[1] // 2 and columns[0] // 2 == columns[1] // 2
        return rows[0] == rows[1] or columns[0] == columns[1] or is_box

    grids = [""]
    for cell in range(16):
        units = [other for other in range(cell) if share_unit(other, cell)]
        grids = [grid + digit for grid in grids for digit in DIGITS if all(grid[other] != digit for other in units)]
    return tuple(grids)


@functools.cache
def _grids_with(cell: int, digit: str) -> int:
    """The grids that have a digit in a cell, as a set of bits."""
    return sum(1 << index for index, grid in enumerate(list_sudoku_grids()) if grid[cell] == digit)


def count_sudoku_solutions(puzzle: str) -> int:
    """
    Counts the solutions of a 4 x 4 Sudoku.

    Args:
        puzzle (`str`):
            16 cells, row after row: digits 1 to 4, and "." for an empty cell.

    Returns:
        `int`: Number of solved grids with these digits.
    """
    clues = (_grids_with(cell, digit) for cell, digit in enumerate(puzzle) if digit != ".")
    return functools.reduce(operator.and_, clues, (1 << len(list_sudoku_grids())) - 1).bit_count()


def _draw_sudoku(rng: random.Random, num_empty: int, choices: range, operators: str) -> tuple[str, str, str]:
    while True:
        grid = rng.choice(list_sudoku_grids())
        empty = rng.sample(range(16), num_empty)
        puzzle = "".join("." if cell in empty else digit for cell, digit in enumerate(grid))
        if count_sudoku_solutions(puzzle) == 1:
            # Puzzles that differ in the names of their digits alone are one
            names = dict(zip(dict.fromkeys(puzzle.replace(".", "")), DIGITS, strict=False))
            return puzzle, grid, "".join(names.get(cell, cell) for cell in puzzle)


def _draw_expression(
    rng: random.Random, num_numbers: int, choices: range, operators: str
) -> tuple[list[int], str, int]:
    numbers = rng.choices(choices, k=num_numbers)
    expression = str(numbers[0]) + "".join(rng.choice(operators) + str(number) for number in numbers[1:])
    return numbers, expression, int(evaluate_expression(expression))


def _draw_countdown(rng: random.Random, num_numbers: int, choices: range, operators: str) -> tuple[str, str, str]:
    while True:
        numbers, expression, target = _draw_expression(rng, num_numbers, choices, operators)
        if choices[0] <= target <= MAX_TARGET:
            rng.shuffle(numbers)
            solution = _sort_terms(expression, [str(number) for number in numbers])
            # The order of the numbers does not make another puzzle
            return f"{','.join(map(str, numbers))}={target}", solution, f"{sorted(numbers)}={target}"


def _sort_terms(expression: str, numbers: list[str]) -> str:
    """Writes an expression without parentheses in the order of the numbers, the terms with a minus sign last."""
    terms = []
    for sign, product in re.findall(r"([+-]?)([0-9*]+)", expression):
        factors = sorted(product.split("*"), key=numbers.index)
        terms.append((sign == "-", [numbers.index(factor) for factor in factors], "*".join(factors)))
    return "".join(("-" if is_negative else "+") + product for is_negative, _, product in sorted(terms))[1:]


def _draw_chain(rng: random.Random, num_operators: int, choices: range, operators: str) -> tuple[str, str, str]:
    _, expression, value = _draw_expression(rng, num_operators + 1, choices, operators)
    return f"{expression}=", str(value), expression


# What draws a puzzle, its difficulties, and by default the difficulty and the largest number
_DRAW: dict[str, tuple[Callable[[random.Random, int, range, str], tuple[str, str, str]], range, int, int]] = {
    "sudoku": (_draw_sudoku, range(1, 13), 10, 9),
    "countdown": (_draw_countdown, range(2, 7), 3, 20),
    "chain": (_draw_chain, range(1, 9), 2, 9),
}
TASKS = tuple(_DRAW)
"""Names of the tasks."""


def generate_puzzles(
    task: str,
    num_puzzles: int,
    split: Literal["train", "eval"] = "train",
    difficulty: int | None = None,
    seed: int = 0,
    instructions: bool = False,
    min_number: int = 1,
    max_number: int | None = None,
    operators: str = "+-*",
) -> list[dict[str, Any]]:
    """
    Draws distinct puzzles.

    Args:
        task (`str`):
            `"sudoku"`: `"1..4.2..........3"`, say, with one solution. `"countdown"`: `"3,7,5=26"`, whose
            target is at most 99. `"chain"`: `"7+5*3="`.
        num_puzzles (`int`):
            Number of puzzles.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` or `"eval"`, which has a tenth of all puzzles. No puzzle of one is in the other. Neither is one
            with other names of the digits of Sudoku, or with another order of the numbers of Countdown.
        difficulty (`int`, *optional*):
            Empty cells of Sudoku, in `[1, 12]`, by default 10. Numbers of Countdown, in `[2, 6]`, by default 3.
            Operators of a chain, in `[1, 8]`, by default 2.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.
        instructions (`bool`, *optional*, defaults to `False`):
            Whether prompts are messages to a language model, with `INSTRUCTIONS`. By default they are the bare puzzle.
        min_number (`int`, *optional*, defaults to `1`):
            The smallest number of Countdown and chains, in `[1, 99]`, and the smallest target.
        max_number (`int`, *optional*):
            The largest number of Countdown, by default 20, and of chains, by default 9. It is > `min_number`.
        operators (`str`, *optional*, defaults to `"+-*"`):
            What the solutions of Countdown, and chains, are made with: some of `+`, `-` and `*`.

    Returns:
        `list[dict]`: Rows with `prompt`, `task`, `puzzle`, and one right `solution`. That of Countdown has its numbers
        in the order of the puzzle, those of the terms with a minus sign last.

    Raises:
        ValueError: If an argument is out of its range, or there are not as many puzzles.

    Example:

    ```python
    >>> from trl_udm.data.puzzles import generate_puzzles

    >>> generate_puzzles("chain", 1)[0]["task"]
    'chain'
    ```
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {TASKS}, got {task!r}.")
    if split not in ("train", "eval"):
        raise ValueError(f"`split` must be 'train' or 'eval', got {split!r}.")
    draw, difficulties, default_difficulty, default_max_number = _DRAW[task]
    difficulty = default_difficulty if difficulty is None else difficulty
    max_number = default_max_number if max_number is None else max_number
    if difficulty not in difficulties:
        raise ValueError(
            f"`difficulty` must be in [{difficulties[0]}, {difficulties[-1]}] for {task}, got {difficulty}."
        )
    if not 1 <= min_number <= MAX_TARGET:
        raise ValueError(f"`min_number` must be in [1, {MAX_TARGET}], got {min_number}.")
    if max_number <= min_number:
        raise ValueError(f"`max_number` must be > `min_number` {min_number}, got {max_number}.")
    if not operators or not set(operators) <= set("+-*"):
        raise ValueError(f"`operators` must be some of '+-*', got {operators!r}.")
    rng, num_misses = random.Random(f"{task} {split} {difficulty} {seed}"), 0
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < num_puzzles:
        puzzle, solution, key = draw(rng, difficulty, range(min_number, max_number + 1), operators)
        is_eval = zlib.crc32(key.encode()) % 10 == 0
        if puzzle in rows or is_eval != (split == "eval"):
            num_misses += 1
            if num_misses > 10000:
                raise ValueError(
                    f"`num_puzzles` must be at most about {len(rows)} for {task} of difficulty {difficulty} in "
                    f"{split!r}, got {num_puzzles}: there are no more."
                )
            continue
        num_misses = 0
        prompt: Any = puzzle
        if instructions:
            prompt = [{"role": "user", "content": f"{INSTRUCTIONS[task]}\n{puzzle}"}]
        rows[puzzle] = {"prompt": prompt, "task": task, "puzzle": puzzle, "solution": solution}
    return list(rows.values())


def evaluate_expression(expression: str) -> Fraction:
    """
    Computes an arithmetic expression exactly.

    Args:
        expression (`str`):
            Whole numbers, `+ - * /` between them, parentheses and spaces.

    Returns:
        `Fraction`: Its value.

    Raises:
        ValueError: If it is no such expression.
        ZeroDivisionError: If it divides by 0.
    """

    def evaluate(node: ast.AST) -> Fraction:
        if isinstance(node, ast.BinOp) and type(node.op) in _NODES:
            return OPERATORS[_NODES[type(node.op)]](evaluate(node.left), evaluate(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return Fraction(node.value)
        raise ValueError(f"`expression` must have numbers and + - * / only, got {expression!r}.")

    if re.fullmatch(r"[0-9+\-*/() ]{1,200}", expression) is None:  # `int` and Python would take more
        raise ValueError(f"`expression` must have 1 to 200 of the characters 0-9 + - * / ( ), got {expression!r}.")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"`expression` must be well formed, got {expression!r}: {error.msg}.") from error
    return evaluate(tree.body)


def extract_answer(completion: Any) -> str:
    """
    Takes the answer from a completion.

    Args:
        completion (`str` or `list[dict]`):
            A text, or messages, whose last one counts.

    Returns:
        `str`: What is between the last `<answer>` and the `</answer>` after it, or else the whole text, without white
        space around it.
    """
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return (re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL) or [text])[-1].strip()


def _check_sudoku(answer: str, puzzle: str) -> tuple[bool, bool]:
    grid = "".join(answer.split())
    keeps_clues = len(grid) == 16 and all(clue in (".", digit) for clue, digit in zip(puzzle, grid, strict=True))
    return re.fullmatch(f"[{DIGITS}]{{16}}", grid) is not None, keeps_clues and grid in list_sudoku_grids()


def _check_countdown(answer: str, puzzle: str) -> tuple[bool, bool]:
    numbers, _, target = puzzle.partition("=")
    expression = re.sub(rf"\s*=\s*{target}$", "", answer)  # a whole equation is an answer too
    try:
        value: Fraction | None = evaluate_expression(expression)
    except ZeroDivisionError:  # well formed, but without a value
        value = None
    except ValueError:
        return False, False
    uses_numbers = sorted(map(int, re.findall(r"\d+", expression))) == sorted(map(int, numbers.split(",")))
    return True, uses_numbers and value == int(target)


def _check_chain(answer: str, puzzle: str) -> tuple[bool, bool]:
    value = answer.rpartition("=")[2].strip()  # what is before it is the working
    is_number = re.fullmatch(r"0|-?[1-9][0-9]{0,19}", value) is not None
    return is_number, is_number and int(value) == evaluate_expression(puzzle.removesuffix("="))


_CHECKS = {"sudoku": _check_sudoku, "countdown": _check_countdown, "chain": _check_chain}


def puzzle_answer_reward(completions: list[Any], task: list[str], puzzle: list[str], **kwargs) -> list[float]:
    """
    Rewards right answers with 1, others with 0.

    A Sudoku's answer is right if it is a solved grid that keeps the digits of the puzzle, whichever it is if there are
    several. An answer of Countdown is right if it uses every number exactly once and its value is the target. It may
    end with "=" and the target. An answer of a chain is right if the text after its last "=", or all of it without
    one, is the number.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Texts or messages, with an answer as [`extract_answer`] takes it.
        task (`list[str]`):
            Their tasks.
        puzzle (`list[str]`):
            Their puzzles, as [`generate_puzzles`] writes them.

    Returns:
        `list[float]`: A reward for each completion.
    """
    return [float(right) for _, right in _check(completions, task, puzzle)]


def puzzle_format_reward(completions: list[Any], task: list[str], puzzle: list[str], **kwargs) -> list[float]:
    """
    Rewards well-formed answers with 1, others with 0, whether they are right or not.

    Well-formed are 16 digits 1 to 4 with any white space for Sudoku, an expression that [`evaluate_expression`] reads
    for Countdown, and a whole number without leading zeros for a chain.

    Args:
        completions, task, puzzle:
            As in [`puzzle_answer_reward`].

    Returns:
        `list[float]`: A reward for each completion.
    """
    return [float(well_formed) for well_formed, _ in _check(completions, task, puzzle)]


def _check(completions: list[Any], task: list[str], puzzle: list[str]) -> list[tuple[bool, bool]]:
    """Whether each answer is well formed, and whether it is right."""
    return [
        _CHECKS[name](extract_answer(completion), problem)
        for completion, name, problem in zip(completions, task, puzzle, strict=True)
    ]
