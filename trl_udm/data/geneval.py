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

"""Prompts with GenEval metadata: a generator in the benchmark's own phrasing, and datasets of checked rows."""

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, Json, List, Value

from ..rewards.geneval import CLASS_NAMES, COLORS, RELATIONS, TAGS, check_metadata


COUNT_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

# Flow-GRPO's shares (https://huggingface.co/papers/2505.05470): more prompts where the base model is worse
TAG_WEIGHTS = {"single_object": 0, "two_object": 1, "counting": 5, "colors": 1, "position": 7, "color_attr": 3}

# Clauses have different keys, and a position is a pair of a string and an integer: Arrow has no plain type for either
GENEVAL_FEATURES = Features(
    {"prompt": Value("string"), "tag": Value("string"), "include": List(Json()), "exclude": List(Json())}
)

_OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_SINGLES = [(name,) for name in CLASS_NAMES]
_PAIRS = list(itertools.permutations(CLASS_NAMES, 2))
# For each kind, the choices of classes, and of the other keys of their clauses. The benchmark gives persons no color
_CHOICES: dict[str, tuple[Sequence[tuple[str, ...]], Sequence[tuple[dict[str, Any], ...]]]] = {
    "single_object": (_SINGLES, [({},)]),
    "two_object": (_PAIRS, [({}, {})]),
    "counting": (_SINGLES, [({"count": count},) for count in (2, 3, 4)]),
    "colors": (_SINGLES[1:], [({"color": color},) for color in COLORS]),
    "position": (_PAIRS, [({}, {"position": [relation, 0]}) for relation in RELATIONS]),
    "color_attr": (
        [pair for pair in _PAIRS if "person" not in pair],
        [({"color": first}, {"color": second}) for first, second in itertools.permutations(COLORS, 2)],
    ),
}


def geneval_prompt(include: Sequence[Mapping[str, Any]]) -> str:
    """
    Phrases a row's metadata as the benchmark does: with "an" before a, e, i, o and u, with a plural in "s", or in "es"
    after an s, and with the object that has a position first.

    Args:
        include (`Sequence[Mapping[str, Any]]`):
            The objects that the image must show, in the format of [`~trl_udm.rewards.geneval.check_metadata`], with
            counts in `[1, 10]`.

    Returns:
        `str`: The prompt.

    Raises:
        ValueError: If a count is out of its range.

    Example:

    ```python
    >>> from trl_udm.data.geneval import geneval_prompt

    >>> geneval_prompt([{"class": "dog", "count": 1}, {"class": "apple", "count": 1, "position": ["left of", 0]}])
    'a photo of an apple left of a dog'
    >>> geneval_prompt([{"class": "bus", "count": 3}])
    'a photo of three buses'
    ```
    """
    phrases: list[str] = []
    targets = set()
    for clause in include:
        words = clause["class"] if clause.get("color") is None else f"{clause['color']} {clause['class']}"
        if clause["count"] not in range(1, len(COUNT_WORDS) + 1):
            raise ValueError(f"`count` must be in [1, {len(COUNT_WORDS)}], got {clause['count']}.")
        if clause["count"] == 1:
            phrase = f"an {words}" if words[0] in "aeiou" else f"a {words}"
        else:
            phrase = f"{COUNT_WORDS[clause['count'] - 1]} {words}{'es' if words.endswith('s') else 's'}"
        if clause.get("position") is not None:
            relation, target = clause["position"]
            phrase = f"{phrase} {relation} {phrases[target]}"
            targets.add(target)
        phrases.append(phrase)
    return "a photo of " + " and ".join(phrase for i, phrase in enumerate(phrases) if i not in targets)


def generate_geneval_prompts(
    num_prompts: int,
    tag_weights: Mapping[str, float] = TAG_WEIGHTS,
    exclude: Iterable[str | Mapping[str, Any]] = (),
    seed: int = 0,
) -> Dataset:
    """
    Draws training prompts of the six kinds, as the benchmark phrases its evaluation prompts.

    Objects are drawn from `CLASS_NAMES`. The two objects of a prompt differ, and so do its two colors. Counts are two
    to four, and persons have no color. There are 80 such prompts of `single_object`, 6,320 of `two_object`, 240 of
    `counting`, 790 of `colors`, 25,280 of `position` and 554,580 of `color_attr`. The prompts of a kind are all
    different until none is left. Then they are repeated.

    Args:
        num_prompts (`int`):
            Number of prompts.
        tag_weights (`Mapping[str, float]`, *optional*, defaults to `TAG_WEIGHTS`):
            Share of each kind, in any unit. A kind that is left out has none. By default the shares of Flow-GRPO
            (https://huggingface.co/papers/2505.05470), where `single_object` has none, because the benchmark evaluates
            all of its prompts. `dict.fromkeys(TAGS, 1)` makes all shares equal.
        exclude (`Iterable[str | Mapping[str, Any]]`, *optional*):
            Prompts, or rows of GenEval metadata, that must not be drawn. Prompts of the same meaning are not drawn
            either: "a cow and a bench" excludes "a bench and a cow", and "a cow left of a bench" excludes "a bench
            right of a cow".
        seed (`int`, *optional*, defaults to `0`):
            Seed of the choice and the order.

    Returns:
        [`~datasets.Dataset`]: With the columns `prompt`, `tag`, `include` and `exclude`. The kinds are mixed.

    Raises:
        ValueError: If `num_prompts` is not positive, `tag_weights` names another kind, is negative or all zero, or
            `exclude` leaves no prompt of a kind that has a share.
        TypeError: If `exclude` is a single string.

    Example:

    ```python
    >>> from trl_udm.data.geneval import generate_geneval_prompts

    >>> dataset = generate_geneval_prompts(4, tag_weights={"colors": 1, "position": 1})
    >>> sorted(dataset["tag"])
    ['colors', 'colors', 'position', 'position']
    ```
    """
    weights = [tag_weights.get(tag, 0) for tag in TAGS]
    if num_prompts <= 0:
        raise ValueError(f"`num_prompts` must be > 0, got {num_prompts}.")
    if not set(tag_weights) <= set(TAGS) or min(weights) < 0 or sum(weights) == 0:
        raise ValueError(f"`tag_weights` must give some of {TAGS} a weight >= 0, not all 0, got {tag_weights}.")
    if isinstance(exclude, str):
        raise TypeError(
            f"`exclude` must be prompts or rows, got the string {exclude!r}. Read a file with `load_prompts`."
        )

    excluded: set[str] = set()
    for item in exclude:
        texts = [item] if isinstance(item, str) else [item["prompt"], geneval_prompt(item["include"])]
        excluded.update(" ".join(text.lower().split()) for text in texts)

    # The running sum of the shares is rounded, so the counts add up to `num_prompts`
    ends = [round(num_prompts * weight / sum(weights)) for weight in itertools.accumulate(weights)]
    rows = []
    for tag, (start, end) in zip(TAGS, itertools.pairwise([0, *ends]), strict=True):
        choices_of_names, choices_of_details = _CHOICES[tag]
        num_choices = len(choices_of_names) * len(choices_of_details)
        # These are enough, because an excluded prompt excludes only itself and its mirror image
        num_drawn = min(num_choices, end - start + 2 * len(excluded))
        of_tag: list[dict[str, Any]] = []
        for choice in random.Random(f"{seed} {tag}").sample(range(num_choices), num_drawn):
            if len(of_tag) == end - start:
                break
            names = choices_of_names[choice // len(choices_of_details)]
            details = choices_of_details[choice % len(choices_of_details)]
            include = [{"class": name, "count": 1, **detail} for name, detail in zip(names, details, strict=True)]
            prompt = geneval_prompt(include)
            if excluded.isdisjoint((prompt, geneval_prompt(_mirror(include)))):
                forbidden = [{"class": names[0], "count": include[0]["count"] + 1}] if tag == "counting" else []
                of_tag.append({"prompt": prompt, "tag": tag, "include": include, "exclude": forbidden})
        if end > start and not of_tag:
            raise ValueError(
                f"`tag_weights` must be 0 for {tag!r}, got {tag_weights[tag]}: `exclude` leaves none of its "
                f"{num_choices} prompts."
            )
        rows += [of_tag[i % len(of_tag)] for i in range(end - start)]
    random.Random(seed).shuffle(rows)
    return Dataset.from_list(rows, features=GENEVAL_FEATURES)


def _mirror(include: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Swaps the clauses without a change of meaning."""
    *others, last = include
    if "position" not in last:
        return [last, *others]
    relation, target = last["position"]
    return [{"class": last["class"], "count": 1}, {**others[target], "position": [_OPPOSITES[relation], 0]}]


def check_row(row: Mapping[str, Any], class_names: Sequence[str], index: int) -> dict[str, Any]:
    """
    Checks a row of GenEval metadata and picks the columns of `GENEVAL_FEATURES`.

    Args:
        row (`Mapping[str, Any]`):
            A row with `prompt`, `tag`, `include` and optionally `exclude`.
        class_names (`Sequence[str]`):
            The classes that the detector knows.
        index (`int`):
            The row's number, for the message of an error.

    Returns:
        `dict[str, Any]`: The columns.

    Raises:
        ValueError: If the row is malformed. The message names the row and the field.
    """
    check_metadata(row, class_names, index)
    if not isinstance(row.get("prompt"), str):
        raise ValueError(f"Row {index}: `prompt` must be a string, got {row.get('prompt')!r}.")
    return {
        "prompt": row["prompt"],
        "tag": row["tag"],
        "include": row["include"],
        "exclude": row.get("exclude") or [],
    }


def geneval_dataset(rows: Iterable[Mapping[str, Any]], class_names: Sequence[str] = CLASS_NAMES) -> Dataset:
    """
    Checks rows of GenEval metadata and makes them a dataset for [`UDMGRPOTrainer`].

    Args:
        rows (`Iterable[Mapping[str, Any]]`):
            Rows with `prompt`, `tag`, `include` and optionally `exclude`.
        class_names (`Sequence[str]`, *optional*, defaults to `CLASS_NAMES`):
            The classes that the detector knows.

    Returns:
        [`~datasets.Dataset`]: With the columns `prompt`, `tag`, `include` and `exclude`.

    Raises:
        ValueError: If a row is malformed. The message names the row and the field.
    """
    return Dataset.from_list(
        [check_row(row, class_names, index) for index, row in enumerate(rows)], features=GENEVAL_FEATURES
    )
