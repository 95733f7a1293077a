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

"""Prompts of the world with GenEval metadata, and scenes that show what they say."""

import itertools
import random
from typing import Any

from .world import CLASS_NAMES, COLORS, ShapesObject


TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# Rows a kind of `examples/train_geneval.py`: the harder a kind, the more it is trained on
TRAIN_NUM_PROMPTS = {
    "single_object": 54,
    "two_object": 72,
    "counting": 108,
    "colors": 90,
    "position": 144,
    "color_attr": 108,
}
EVAL_NUM_PROMPTS = dict.fromkeys(TAGS, 20)
_COUNTS = {"two": 2, "three": 3, "four": 4}
_QUADRANTS = ((0, 0), (0, 1), (1, 0), (1, 1))
# The quadrants (row, column) of the clause without a position and of the one with it
_POSITIONS = {
    "left of": ((0, 1), (0, 0)),
    "right of": ((0, 0), (0, 1)),
    "above": ((1, 0), (0, 0)),
    "below": ((0, 0), (1, 0)),
}


def _plural(class_name: str) -> str:
    return class_name + ("es" if class_name.endswith("s") else "s")


def all_metadata(tag: str) -> list[dict[str, Any]]:
    """
    Lists every prompt of one GenEval kind, in GenEval's metadata format.

    Args:
        tag (`str`):
            One of `TAGS`.

    Returns:
        `list[dict]`: Each with `tag`, `include`, `exclude` and `prompt`.

    Raises:
        ValueError: If there is no such kind.
    """
    rows: list[tuple[list[dict], list[dict], str]] = []
    if tag == "single_object":
        for name in CLASS_NAMES:
            rows.append(([{"class": name, "count": 1}], [], f"a {name}"))
    elif tag == "two_object":
        for first, second in itertools.permutations(CLASS_NAMES, 2):
            include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
            rows.append((include, [], f"a {first} and a {second}"))
    elif tag == "counting":
        for name, (word, count) in itertools.product(CLASS_NAMES, _COUNTS.items()):
            include, exclude = [{"class": name, "count": count}], [{"class": name, "count": count + 1}]
            rows.append((include, exclude, f"{word} {_plural(name)}"))
    elif tag == "colors":
        for name, color in itertools.product(CLASS_NAMES, COLORS):
            rows.append(([{"class": name, "count": 1, "color": color}], [], f"a {color} {name}"))
    elif tag == "position":
        for (first, second), relation in itertools.product(itertools.permutations(CLASS_NAMES, 2), _POSITIONS):
            include = [{"class": second, "count": 1}, {"class": first, "count": 1, "position": [relation, 0]}]
            rows.append((include, [], f"a {first} {relation} a {second}"))
    elif tag == "color_attr":
        names, colors = itertools.permutations(CLASS_NAMES, 2), itertools.permutations(COLORS, 2)
        for (first, second), (color, other) in itertools.product(names, list(colors)):
            include = [
                {"class": first, "count": 1, "color": color},
                {"class": second, "count": 1, "color": other},
            ]
            rows.append((include, [], f"a {color} {first} and a {other} {second}"))
    else:
        raise ValueError(f"`tag` must be one of {TAGS}, got {tag!r}.")
    return [
        {"tag": tag, "include": include, "exclude": exclude, "prompt": f"a photo of {text}"}
        for include, exclude, text in rows
    ]


def sample_scene(metadata: dict[str, Any], rng: random.Random) -> list[ShapesObject]:
    """
    Draws a scene that shows what a prompt says and nothing else. The objects are in reading order, one in each
    quadrant, unless the prompt says where they are.

    Args:
        metadata (`dict`):
            A row of [`all_metadata`].
        rng (`random.Random`):
            Source of the choices that the prompt leaves open.

    Returns:
        `list[ShapesObject]`: At most four objects.
    """
    clauses = [clause for clause in metadata["include"] for _ in range(clause["count"])]
    quadrants = _QUADRANTS[: len(clauses)]
    for clause in metadata["include"]:
        if "position" in clause:
            quadrants = _POSITIONS[clause["position"][0]]
    objects = []
    for clause, (row, column) in zip(clauses, quadrants, strict=True):
        color = clause.get("color") or rng.choice(list(COLORS))
        row, column = 4 * row + rng.randrange(2), 4 * column + rng.randrange(2)
        objects.append(ShapesObject(clause["class"], color, row, column))
    return objects


def corrupt(metadata: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """
    Makes one mistake of meaning, as in a careless caption.

    Args:
        metadata (`dict`):
            A row of [`all_metadata`].
        rng (`random.Random`):
            Source of the choice.

    Returns:
        `dict`: The metadata of another prompt of the same kind with a wrong class, color, count or side.
    """
    include = [dict(clause) for clause in metadata["include"]]
    tag = metadata["tag"]
    clause = rng.choice(include)
    if tag == "counting":
        clause["count"] = rng.choice([count for count in (1, 2, 3, 4) if abs(count - clause["count"]) == 1])
    elif tag == "position":
        include[1]["position"] = [rng.choice([name for name in _POSITIONS if name != include[1]["position"][0]]), 0]
    elif tag in ("colors", "color_attr"):
        clause["color"] = rng.choice([color for color in COLORS if color != clause["color"]])
    else:
        used = {other["class"] for other in include}
        clause["class"] = rng.choice([name for name in CLASS_NAMES if name not in used])
    return {**metadata, "include": include}


def split_metadata(num_eval_prompts: int = 20, seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    Splits the prompts of all six kinds into disjoint training and evaluation prompts.

    Args:
        num_eval_prompts (`int`, *optional*, defaults to `20`):
            Evaluation prompts a kind, at most a third of the kind's prompts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the split.

    Returns:
        `tuple[list[dict], list[dict]]`: Training rows and evaluation rows, as in [`all_metadata`].
    """
    return split_kinds({tag: all_metadata(tag) for tag in TAGS}, num_eval_prompts, seed)


def split_kinds(
    kinds: dict[str, list[dict[str, Any]]], num_eval_prompts: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    Splits the rows of each kind into training and evaluation rows.

    Args:
        kinds (`dict[str, list[dict]]`):
            The rows of each kind. They are shuffled in place.
        num_eval_prompts (`int`):
            Evaluation rows a kind, at most a third of its rows.
        seed (`int`):
            Seed of the split.

    Returns:
        `tuple[list[dict], list[dict]]`: Training rows and evaluation rows, kind by kind.
    """
    train, evaluation = [], []
    for tag, rows in kinds.items():
        random.Random(f"{seed} {tag}").shuffle(rows)
        num_eval = min(num_eval_prompts, len(rows) // 3)
        evaluation += rows[:num_eval]
        train += rows[num_eval:]
    return train, evaluation


def balance_metadata(rows: list[dict[str, Any]], num_prompts: dict[str, int]) -> list[dict[str, Any]]:
    """
    Repeats or drops rows so that each kind has its share. Some kinds have four prompts, others hundreds.

    Args:
        rows (`list[dict]`):
            Rows of [`split_metadata`].
        num_prompts (`dict[str, int]`):
            Number of rows of each kind. A kind's rows are repeated in order until there are enough.

    Returns:
        `list[dict]`: The rows, kind by kind.
    """
    balanced = []
    for tag, num_rows in num_prompts.items():
        of_kind = [row for row in rows if row["tag"] == tag]
        balanced += [of_kind[i % len(of_kind)] for i in range(num_rows)]
    return balanced
