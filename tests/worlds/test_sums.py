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

import random

import pytest
import torch

from trl_udm import TextUDMPipeline
from trl_udm.worlds.sums import CHECKPOINT_PATH
from trl_udm.worlds.sums.problems import MAX_COMPLETION_LENGTH, split_problems, sum_reward, work_out


def test_sums_are_worked_out_rightly():
    assert work_out(17, 45) == "50+12=62"
    assert work_out(3, 4) == "0+7=7"
    for first in range(100):
        for second in range(100):
            working = work_out(first, second)
            tens, units = map(int, working.partition("=")[0].split("+"))
            assert tens % 10 == 0 and tens + units == first + second
            assert sum_reward([working], [first + second]) == [1.0]


def test_slips_are_carried_on_and_fit_the_canvas():
    rng = random.Random(0)
    num_right, num_consistent = 0, 0
    for _ in range(4000):
        first, second = rng.randrange(100), rng.randrange(100)
        working = work_out(first, second, slip_rate=0.25, rng=rng)
        assert len(working) < MAX_COMPLETION_LENGTH  # the end follows
        steps, _, result = working.partition("=")
        num_right += int(result) == first + second
        num_consistent += int(result) == sum(map(int, steps.split("+")))
    # Three numbers without a slip; a few slips cancel out
    assert num_right / 4000 == pytest.approx(0.75**3, abs=0.04)
    assert num_consistent / 4000 == pytest.approx(0.75, abs=0.03)


def test_training_and_evaluation_problems_are_apart():
    train, evaluation = split_problems()
    assert (len(train), len(evaluation)) == (8000, 400)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in evaluation}
    for row in [*train, *evaluation]:
        first, second = map(int, row["prompt"].removesuffix("=").split("+"))
        assert row["answer"] == first + second
    assert split_problems() == (train, evaluation)
    with pytest.raises(ValueError, match="`num_train` and `num_eval` must sum to at most 10000, got 9000 and 2000"):
        split_problems(9000, 2000)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("50+12=62", 1.0),
        ("62", 1.0),
        ("50+12=61", 0.0),
        ("50+12=062", 0.0),
        ("62=", 0.0),
        ("", 0.0),
        ("50+12=62+", 0.0),
    ],
)
def test_an_answer_is_checked_exactly(completion, reward):
    assert sum_reward(completions=[completion], answer=[62], prompts=["17+45="]) == [reward]


def test_the_shipped_model_writes_sums_and_often_errs():
    rows = split_problems()[1]
    pipeline = TextUDMPipeline.from_pretrained(CHECKPOINT_PATH)
    prompts, answers = [row["prompt"] for row in rows], [row["answer"] for row in rows]
    texts = pipeline(prompts, num_inference_steps=10, generator=torch.Generator().manual_seed(0)).texts
    assert 0.4 < sum(sum_reward(texts, answers)) / len(rows) < 0.65
    is_sum = [text.count("+") == text.count("=") == 1 and text.index("+") < text.index("=") for text in texts]
    assert sum(is_sum) / len(rows) > 0.9
