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

import itertools
import random
from fractions import Fraction

import pytest

from trl_udm.data.puzzles import (
    INSTRUCTIONS,
    TASKS,
    count_sudoku_solutions,
    evaluate_expression,
    extract_answer,
    generate_puzzles,
    list_sudoku_grids,
    puzzle_answer_reward,
    puzzle_format_reward,
)


def score(task, puzzle, *completions):
    """Rewards of the answer and of the format."""
    columns = {"task": [task] * len(completions), "puzzle": [puzzle] * len(completions)}
    completions = list(completions)
    return puzzle_answer_reward(completions, **columns), puzzle_format_reward(completions, prompts=[], **columns)


def is_solved(grid):
    """By the rules, and not by the list of grids."""
    units = [[4 * row + column for column in range(4)] for row in range(4)]
    units += [[4 * row + column for row in range(4)] for column in range(4)]
    units += [[corner + offset for offset in (0, 1, 4, 5)] for corner in (0, 2, 8, 10)]
    return all(sorted(grid[cell] for cell in unit) == [*"1234"] for unit in units)


def fill(puzzle):
    """All ways to fill the empty cells."""
    for digits in itertools.product("1234", repeat=puzzle.count(".")):
        remaining = iter(digits)
        yield "".join(next(remaining) if cell == "." else cell for cell in puzzle)


def test_there_are_288_solved_sudokus_and_all_keep_the_rules():
    assert len(set(list_sudoku_grids())) == 288
    assert all(map(is_solved, list_sudoku_grids()))


@pytest.mark.parametrize("puzzle", ["12..34..2.4.4.21", "1.34..122...43.1", "..34341221434.21", "1234341......3.1"])
def test_all_right_sudokus_and_no_others_are_accepted(puzzle):
    right = [is_solved(grid) for grid in fill(puzzle)]
    assert score("sudoku", puzzle, *fill(puzzle)) == ([float(one) for one in right], [1.0] * len(right))
    assert count_sudoku_solutions(puzzle) == sum(right)
    for grid in list_sudoku_grids():  # solved grids that change a given digit are wrong
        keeps = all(clue in (".", digit) for clue, digit in zip(puzzle, grid, strict=True))
        assert score("sudoku", puzzle, grid) == ([float(keeps)], [1.0])


@pytest.mark.parametrize(("numbers", "target"), [((3, 7), 21), ((2, 2, 5), 12), ((9, 4, 1), 12)])
def test_all_right_expressions_and_no_others_are_accepted(numbers, target):
    shapes = {2: ["{}{}{}"], 3: ["{}{}{}{}{}", "({}{}{}){}{}", "{}{}({}{}{})"]}[len(numbers)]
    expressions = set()
    for chosen in itertools.product(sorted({1, 2, *numbers}), repeat=len(numbers)):
        for signs in itertools.product("+-*/", repeat=len(numbers) - 1):
            parts = [part for pair in zip(chosen, (*signs, ""), strict=True) for part in pair][:-1]
            expressions |= {(shape.format(*parts), chosen) for shape in shapes}
    expressions = sorted(expressions)
    right = []
    for expression, chosen in expressions:
        try:
            value = eval(expression.translate({ord(str(number)): f"Fraction({number})" for number in chosen}))
        except ZeroDivisionError:
            value = None
        right.append(float(value == target and sorted(chosen) == sorted(numbers)))
    puzzle = f"{','.join(map(str, numbers))}={target}"
    assert sum(right) > 0
    assert score("countdown", puzzle, *(expression for expression, _ in expressions)) == (right, [1.0] * len(right))


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_a_chain_has_one_right_number(difficulty):
    for row in generate_puzzles("chain", 5, difficulty=difficulty):
        value = eval(row["puzzle"].removesuffix("="))
        numbers = range(value - 200, value + 200)
        answers, formats = score("chain", row["puzzle"], *map(str, numbers))
        assert answers == [float(number == value) for number in numbers] and formats == [1.0] * len(numbers)
        assert row["solution"] == str(value)


SUDOKU, COUNTDOWN, CHAIN = "1234341221434.21", "3,7,5=26", "7-5*3="


@pytest.mark.parametrize(
    ("task", "puzzle", "completion", "answer", "well_formed"),
    [
        ("sudoku", SUDOKU, "1234341221434321", 1, 1),
        ("sudoku", SUDOKU, "1 2 3 4\n3412\n2143\n4321\n", 1, 1),
        ("sudoku", SUDOKU, "So: <answer>\n1234341221434321</answer>.", 1, 1),
        ("sudoku", SUDOKU, "<answer>1</answer> no, <answer>1234341221434321</answer>", 1, 1),
        ("sudoku", SUDOKU, "<answer>1234341221434321</answer> or <answer>1</answer>", 0, 0),
        ("sudoku", SUDOKU, "<answer>1234341221434321", 0, 0),
        ("sudoku", SUDOKU, "1234341221434421", 0, 1),
        ("sudoku", SUDOKU, "4321341221431234", 0, 1),  # another digit where one is given
        ("sudoku", SUDOKU, "123434122143432", 0, 0),
        ("sudoku", SUDOKU, "12343412214343211", 0, 0),
        ("sudoku", SUDOKU, "1234341221434.21", 0, 0),
        ("sudoku", SUDOKU, "1234341221434３21", 0, 0),  # a wide digit
        ("sudoku", SUDOKU, "", 0, 0),
        ("countdown", COUNTDOWN, "3*7+5", 1, 1),
        ("countdown", COUNTDOWN, "5 + (7 * 3)", 1, 1),
        ("countdown", COUNTDOWN, "3*7+5=26", 1, 1),
        ("countdown", COUNTDOWN, "<answer>3*7+5 = 26</answer>", 1, 1),
        ("countdown", COUNTDOWN, "3*7+5=27", 0, 0),
        ("countdown", COUNTDOWN, "26", 0, 1),
        ("countdown", COUNTDOWN, "3*7+5+0", 0, 1),
        ("countdown", COUNTDOWN, "3*7+5-5+5", 0, 1),
        ("countdown", COUNTDOWN, "37-5-6", 0, 1),
        ("countdown", "1,0=1", "1/0", 0, 1),
        ("countdown", "2,3=8", "2**3", 0, 0),
        ("countdown", "7,2=3", "7//2", 0, 0),
        ("countdown", "3,5=2", "-3+5", 0, 0),
        ("countdown", "3,5=8", "3+05", 0, 0),
        ("countdown", "3,5=15", "3(5)", 0, 0),
        ("countdown", "3,5=8", "3+5)", 0, 0),
        ("countdown", "3,5=8", "3+", 0, 0),
        ("countdown", "3,5=8", "", 0, 0),
        ("countdown", "3,5=8", "3+5 #", 0, 0),
        ("countdown", "3,5=8", "__import__('os')", 0, 0),
        ("countdown", "3,5=8", "(" * 5000 + "3+5" + ")" * 5000, 0, 0),
        ("countdown", "3,5=8", "(" * 95 + "3+5" + ")" * 95, 1, 1),
        ("countdown", "3,5=8", "9" * 199, 0, 1),
        ("chain", CHAIN, "-8", 1, 1),
        ("chain", CHAIN, "5*3=15,7-15=-8", 1, 1),
        ("chain", CHAIN, "<answer> -8 </answer>", 1, 1),
        ("chain", CHAIN, "8", 0, 1),
        ("chain", CHAIN, "-08", 0, 0),
        ("chain", CHAIN, "-8.0", 0, 0),
        ("chain", CHAIN, "=-8=", 0, 0),
        ("chain", "5-5=", "0", 1, 1),
        ("chain", "5-5=", "-0", 0, 0),
        ("chain", CHAIN, "9" * 6000, 0, 0),
    ],
)
def test_answers_are_checked_exactly(task, puzzle, completion, answer, well_formed):
    assert score(task, puzzle, completion) == ([answer], [well_formed])
    messages = [{"role": "assistant", "content": completion}]
    assert score(task, puzzle, messages) == ([answer], [well_formed])


def test_tasks_may_be_mixed():
    rows = [row for task in TASKS for row in generate_puzzles(task, 20, seed=1)]
    random.Random(0).shuffle(rows)
    columns = {name: [row[name] for row in rows] for name in ("task", "puzzle")}
    solutions = [row["solution"] for row in rows]
    assert puzzle_answer_reward(solutions, **columns) == puzzle_format_reward(solutions, **columns) == [1.0] * 60
    shifted = solutions[1:] + solutions[:1]
    assert sum(puzzle_answer_reward(shifted, **columns)) < 5


@pytest.mark.parametrize("task", TASKS)
def test_puzzles_of_training_and_evaluation_are_apart_for_all_seeds(task):
    def key(row):
        puzzle = row["puzzle"]
        if task == "countdown":
            numbers, _, target = puzzle.partition("=")
            return *sorted(numbers.split(",")), target
        if task == "sudoku":  # the places at which digits are equal
            return tuple(puzzle.index(cell) if cell != "." else -1 for cell in puzzle)
        return puzzle

    num = {"sudoku": 400, "countdown": 400, "chain": 150}[task]
    train = [row for seed in range(3) for row in generate_puzzles(task, 3 * num, seed=seed)]
    evaluation = [row for seed in range(3) for row in generate_puzzles(task, num, "eval", seed=seed)]
    assert len({row["puzzle"] for row in train[: 3 * num]}) == 3 * num
    assert not set(map(key, train)) & set(map(key, evaluation))
    assert generate_puzzles(task, 5, seed=1) == train[3 * num : 3 * num + 5]
    assert train[:5] != train[3 * num : 3 * num + 5]
    if task == "sudoku":
        assert all(row["puzzle"].count(".") == 10 for row in train)
        assert all(count_sudoku_solutions(row["puzzle"]) == 1 for row in train)
        assert all(
            len([*filter(is_solved, fill(row["puzzle"]))]) == 1 for row in generate_puzzles(task, 5, difficulty=5)
        )


def test_prompts_may_be_messages():
    (row,) = generate_puzzles("countdown", 1, instructions=True)
    content = f"{INSTRUCTIONS['countdown']}\n{row['puzzle']}"
    assert row["prompt"] == [{"role": "user", "content": content}]
    assert extract_answer([{"role": "assistant", "content": " 7 "}]) == "7"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "chess"}, "`task` must be one of .*, got 'chess'"),
        ({"split": "test"}, "`split` must be 'train' or 'eval', got 'test'"),
        ({"difficulty": 13}, r"`difficulty` must be in \[1, 12\] for sudoku, got 13"),
        ({"min_number": 0}, r"`min_number` must be in \[1, 99\], got 0"),
        ({"min_number": 9}, "`max_number` must be > `min_number` 9, got 9"),
        ({"operators": "+/"}, r"`operators` must be some of '\+-\*', got '\+/'"),
        ({"operators": ""}, r"`operators` must be some of '\+-\*', got ''"),
        ({"task": "chain", "difficulty": 0}, r"`difficulty` must be in \[1, 8\] for chain, got 0"),
        (
            {"task": "chain", "num_puzzles": 300, "difficulty": 1},
            "`num_puzzles` must be at most about 2.. for chain of difficulty 1 in 'train', got 300: there are no more",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_puzzles(**{"task": "sudoku", "num_puzzles": 1, **arguments})


def test_numbers_and_operators_are_those_asked_for():
    rows = generate_puzzles("countdown", 300, min_number=10, max_number=30, operators="+-")
    numbers = [int(number) for row in rows for number in row["puzzle"].partition("=")[0].split(",")]
    assert (min(numbers), max(numbers)) == (10, 30)
    assert all(10 <= int(row["puzzle"].partition("=")[2]) <= 99 for row in rows)
    assert set("".join(row["solution"] for row in rows)) == {*"0123456789+-"}
    columns = {name: [row[name] for row in rows] for name in ("task", "puzzle")}
    assert set(puzzle_answer_reward([row["solution"] for row in rows], **columns)) == {1.0}


def test_expressions_are_exact():
    assert evaluate_expression("1/3+1/3+1/3") == 1
    assert evaluate_expression(" (7-2) * 3 ") == 15
    assert evaluate_expression("1/8") == Fraction(1, 8)
    with pytest.raises(ZeroDivisionError):
        evaluate_expression("1/(3-3)")
    with pytest.raises(ValueError, match=r"`expression` must be well formed, got '\(3'"):
        evaluate_expression("(3")
