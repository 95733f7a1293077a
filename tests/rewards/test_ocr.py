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

import json
import re
from pathlib import Path

import pytest

from trl_udm.rewards.ocr import extract_target, join_recognised, ocr_score


# Numbers of an independent run of the public reference code, Yovecent/UDM-GRPO at commit d1bec49.
ORACLE = Path(__file__).parents[1] / "oracle" / "ocr_cases.json"
PAIRS = json.loads(ORACLE.read_text(encoding="utf-8"))["pairs"]


# Left out: the case in which the engine raises, which the reference turns into a reward of zero.
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair["recognised [text, confidence]"] != "RAISE"])
def test_score_matches_the_reference(pair):
    target = extract_target(pair["prompt"])
    recognised = join_recognised(pair["recognised [text, confidence]"] or [])
    assert target == pair["target"]
    assert ocr_score(recognised, target) == pair["reward"]


@pytest.mark.parametrize(
    ("recognised", "target", "score"),
    [
        ("", "abcd", 0.0),
        ("abd", "abcd", 0.75),  # deleted
        ("abxcd", "abcd", 0.75),  # inserted
        ("abxd", "abcd", 0.75),  # replaced
        ("bacd", "abcd", 0.5),  # swapped letters are two edits
        ("A B C D", "ab cd", 1.0),
    ],
)
def test_score_counts_edits(recognised, target, score):
    assert ocr_score(recognised, target) == score


def test_lines_without_confidence_are_ignored():
    assert join_recognised([("New", 0.9), ("Old", 0.0), ("York", 0.1)]) == "NewYork"


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('A sign that says "HELLO".', "HELLO"),
        ("A sign that says “HELLO”.", "HELLO"),
        ('A sign that says "New York" above "Paris".', "New York"),
        ('A sign that says “New York” above "Paris".', "New York"),
        ('A sign that says "it\'s “here”".', "it's “here”"),
    ],
)
def test_target_is_the_first_quoted_text(prompt, target):
    assert extract_target(prompt) == target


@pytest.mark.parametrize("prompt", ["A sign.", "A sign that says 'HELLO'.", 'A 5" sign.', "A sign that says “HELLO."])
def test_prompt_without_quoted_text_is_refused(prompt):
    message = f"`prompt` must have its target text in double quotes, got {prompt!r}."
    with pytest.raises(ValueError, match=re.escape(message)):
        extract_target(prompt)


@pytest.mark.parametrize("prompt", ['A sign that says "".', 'A sign that says "  ".', "A sign that says “”."])
def test_empty_quoted_text_is_refused(prompt):
    message = f"`prompt` must quote a target text that is not empty, got {prompt!r}."
    with pytest.raises(ValueError, match=re.escape(message)):
        extract_target(prompt)


def test_empty_target_is_refused():
    with pytest.raises(ValueError, match="`target_text` must have a character other than a space, got ' '."):
        ocr_score("HELLO", " ")
