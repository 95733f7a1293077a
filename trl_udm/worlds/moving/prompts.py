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

"""Prompts of the world with metadata, and scenes that show what they say."""

import itertools
import random
from typing import Any

from ..shapes.prompts import split_kinds
from ..shapes.world import COLORS
from .world import CLASS_NAMES, DIRECTIONS, NUM_CELLS, SPEEDS, MovingObject


TAGS = ("object", "color", "count", "direction", "speed", "two_object")
# Rows a kind of `examples/train_video.py`: the harder a kind, the more it is trained on
TRAIN_NUM_PROMPTS = {"object": 64, "color": 64, "count": 96, "direction": 96, "speed": 96, "two_object": 160}
EVAL_NUM_PROMPTS = dict.fromkeys(TAGS, 20)
_COUNTS = {"one": 1, "two": 2}
_OPPOSITES = {"left": "right", "right": "left", "up": "down", "down": "up"}
_AXES = (("left", "right"), ("up", "down"))


def all_metadata(tag: str) -> list[dict[str, Any]]:
    """
    Lists every prompt of one kind.

    Args:
        tag (`str`):
            One of `TAGS`.

    Returns:
        `list[dict]`: Each with `tag`, `prompt`, and `include`: a list of clauses, each with `class` and `count`, and
        `color`, `direction` and `speed` where the prompt names them.

    Raises:
        ValueError: If there is no such kind.
    """
    rows: list[tuple[list[dict[str, Any]], str]] = []
    if tag == "object":
        rows += [([{"class": name, "count": 1}], f"a {name}") for name in CLASS_NAMES]
        for first, second in itertools.permutations(CLASS_NAMES, 2):
            include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
            rows.append((include, f"a {first} and a {second}"))
    elif tag == "color":
        for name, color in itertools.product(CLASS_NAMES, COLORS):
            rows.append(([{"class": name, "count": 1, "color": color}], f"a {color} {name}"))
    elif tag == "count":
        for name, color, (word, count) in itertools.product(CLASS_NAMES, COLORS, _COUNTS.items()):
            noun = name if count == 1 else f"{name}es" if name.endswith("s") else f"{name}s"
            rows.append(([{"class": name, "count": count, "color": color}], f"{word} {color} {noun}"))
    elif tag == "direction":
        for name, color, direction in itertools.product(CLASS_NAMES, COLORS, DIRECTIONS):
            clause = {"class": name, "count": 1, "color": color, "direction": direction}
            rows.append(([clause], f"a {color} {name} moving {direction}"))
    elif tag == "speed":
        for name, color, speed, direction in itertools.product(CLASS_NAMES, COLORS, SPEEDS, DIRECTIONS):
            clause = {"class": name, "count": 1, "color": color, "direction": direction, "speed": speed}
            rows.append(([clause], f"a {color} {name} moving {speed} {direction}"))
    elif tag == "two_object":
        names, colors = itertools.permutations(CLASS_NAMES, 2), list(itertools.permutations(COLORS, 2))
        ways = [pair for axis in _AXES for pair in itertools.product(axis, repeat=2)]
        for classes, pair, directions in itertools.product(names, colors, ways):
            include = [
                {"class": name, "count": 1, "color": color, "direction": direction}
                for name, color, direction in zip(classes, pair, directions, strict=True)
            ]
            texts = [f"a {clause['color']} {clause['class']} moving {clause['direction']}" for clause in include]
            rows.append((include, " and ".join(texts)))
    else:
        raise ValueError(f"`tag` must be one of {TAGS}, got {tag!r}.")
    return [{"tag": tag, "include": include, "prompt": prompt} for include, prompt in rows]


def sample_scene(metadata: dict[str, Any], rng: random.Random) -> list[MovingObject]:
    """
    Draws a scene that shows what a prompt says and nothing else. Two objects move along the same axis, on two tracks
    that do not touch. The first is on the upper or left one.

    Args:
        metadata (`dict`):
            A row of [`all_metadata`].
        rng (`random.Random`):
            Source of the choices that the prompt leaves open.

    Returns:
        `list[MovingObject]`: One or two objects.
    """
    clauses = [clause for clause in metadata["include"] for _ in range(clause["count"])]
    last = NUM_CELLS - 2  # the last cell at which an object can be
    tracks = [rng.randint(0, last)] if len(clauses) == 1 else [0, last]
    axis = rng.choice([axis for axis in _AXES if clauses[0].get("direction") in (None, *axis)])
    objects = []
    for clause, track in zip(clauses, tracks, strict=True):
        color = clause.get("color") or rng.choice(list(COLORS))
        direction, speed = clause.get("direction") or rng.choice(axis), clause.get("speed") or rng.choice(list(SPEEDS))
        start = rng.randint(0, last - SPEEDS[speed])
        if direction in ("left", "up"):
            start = last - start
        row, column = (track, start) if axis == _AXES[0] else (start, track)
        objects.append(MovingObject(clause["class"], color, row, column, direction, speed))
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
        `dict`: The metadata with a wrong class, color, count, direction or speed, one that the kind is about.
    """
    include = [dict(clause) for clause in metadata["include"]]
    clause = rng.choice(include)
    name = {"object": "class", "two_object": rng.choice(["color", "direction"])}.get(metadata["tag"], metadata["tag"])
    used = {other["class"] for other in include}
    clause[name] = {
        "class": rng.choice([other for other in CLASS_NAMES if other not in used]),
        "color": rng.choice([color for color in COLORS if color != clause.get("color")]),
        "count": 3 - clause["count"],
        "direction": _OPPOSITES.get(clause.get("direction", "")),
        "speed": rng.choice([speed for speed in SPEEDS if speed != clause.get("speed")]),
    }[name]
    return {**metadata, "include": include}


def split_metadata(num_eval_prompts: int = 20, seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    Splits the prompts of all kinds into disjoint training and evaluation prompts.

    Args:
        num_eval_prompts (`int`, *optional*, defaults to `20`):
            Evaluation prompts a kind, at most a third of the kind's prompts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the split.

    Returns:
        `tuple[list[dict], list[dict]]`: Training rows and evaluation rows, as in [`all_metadata`].
    """
    return split_kinds({tag: all_metadata(tag) for tag in TAGS}, num_eval_prompts, seed)
