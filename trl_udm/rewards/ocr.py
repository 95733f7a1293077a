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

"""The OCR reward's scoring rule: does the image show the text that the prompt quotes?"""

import re
from collections.abc import Iterable


def extract_target(prompt: str) -> str:
    """
    Return the text that a prompt asks to be written: its first quoted part.

    Args:
        prompt (`str`):
            A prompt with the target in straight (`"..."`) or typographic (`“...”`) double quotes.

    Returns:
        `str`: The text between the quotes, as it stands.

    Raises:
        `ValueError`: If the prompt quotes no text, or an empty one.

    Example:

    ```python
    >>> extract_target('A storefront sign that says "New York"')
    'New York'
    ```
    """
    match = re.search(r'"([^"]*)"|“([^”]*)”', prompt)
    if match is None:
        raise ValueError(f"`prompt` must have its target text in double quotes, got {prompt!r}.")
    target = match[match.lastindex]
    if not _normalise(target):
        raise ValueError(f"`prompt` must quote a target text that is not empty, got {prompt!r}.")
    return target


def join_recognised(lines: Iterable[tuple[str, float]]) -> str:
    """
    Join what an OCR engine recognised into one text.

    Args:
        lines (`Iterable[tuple[str, float]]`):
            The recognised texts in the engine's reading order, each with its confidence in `[0, 1]`.

    Returns:
        `str`: The texts of positive confidence, joined without a separator.
    """
    return "".join(text for text, confidence in lines if confidence > 0)


def ocr_score(recognised_text: str, target_text: str) -> float:
    r"""
    Score a recognised text against the target, without regard to case and spaces.

    The score is \\( 1 - \min(\mathrm{distance}, n) / n \\), where n is the length of the target and the distance is
    the number of characters to insert, delete or replace. Text around the target is not penalised: the score is 1
    wherever the target is a substring.

    Args:
        recognised_text (`str`):
            What was read in the image.
        target_text (`str`):
            What the image should say.

    Returns:
        `float`: The score, in `[0, 1]`.

    Raises:
        `ValueError`: If the target is empty.

    Example:

    ```python
    >>> ocr_score("HELL0", "Hello")
    0.8
    ```
    """
    recognised, target = _normalise(recognised_text), _normalise(target_text)
    if not target:
        raise ValueError(f"`target_text` must have a character other than a space, got {target_text!r}.")
    if target in recognised:
        return 1.0
    return 1 - min(_edit_distance(recognised, target), len(target)) / len(target)


def _normalise(text: str) -> str:
    return text.replace(" ", "").lower()


def _edit_distance(source: str, target: str) -> int:
    # distances[j] is the distance between the part of `source` read so far and the first j characters of `target`.
    distances = list(range(len(target) + 1))
    for i, source_character in enumerate(source, start=1):
        row = [i]
        for j, target_character in enumerate(target, start=1):
            replaced = distances[j - 1] + (source_character != target_character)
            row.append(min(replaced, distances[j] + 1, row[j - 1] + 1))
        distances = row
    return distances[-1]
