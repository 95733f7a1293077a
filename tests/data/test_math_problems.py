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

import pytest
from trl.rewards import accuracy_reward

from trl_udm.data.math_problems import INSTRUCTION, load_math_problems


GSM8K = {"question": "How many clips?", "answer": "She sold 500 * 2 = <<500*2=1000>>1000 clips.\n#### 1,000"}
MATH = {
    "problem": "Half of a third?",
    "solution": r"It is $\frac12 \cdot \frac13 = \boxed{\frac{1}{6}}$.",
    "level": "1",
}


@pytest.mark.parametrize(
    ("row", "right", "wrong"),
    [(GSM8K, r"\boxed{1000}", r"\boxed{500}"), (MATH, r"so $\boxed{1/6}$", r"\boxed{\frac{1}{3}}")],
)
def test_the_accuracy_reward_of_trl_checks_the_answers(tmp_path, row, right, wrong):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (loaded,) = load_math_problems(tmp_path / "rows.jsonl")
    assert sorted(loaded) == ["prompt", "solution"]
    problem = row.get("question") or row["problem"]
    assert loaded["prompt"] == [{"role": "user", "content": f"{problem}\n{INSTRUCTION}"}]
    completions = [[{"role": "assistant", "content": text}] for text in (right, wrong, "no idea")]
    assert accuracy_reward(completions, [loaded["solution"]] * 3) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "2 + 2?", "answer": "4 ####"},
        {"question": "2 + 2?", "answer": "4"},
        {"question": "", "answer": "#### 4"},
        {"problem": "2 + 2?", "solution": "4"},
        {"problem": "2 + 2?"},
        {"prompt": "2 + 2?"},
    ],
)
def test_a_row_without_an_answer_is_refused(tmp_path, row):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="Row 0 must have a `question` and an `answer`"):
        load_math_problems(tmp_path / "rows.jsonl")
