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


import asyncio
import functools

import pytest
import torch
from PIL import Image

from tests.trainer.test_udm_grpo_trainer import build_trainer, generate_batch
from trl_udm import DiversityReward
from trl_udm.evaluation import score_images


SIZES = []


def rank(prompts, completions, **kwargs):
    assert len(set(prompts)) == 1
    SIZES.append(len(completions))
    return [float(sorted(completions).index(completion)) for completion in completions]


async def later_rank(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return rank(prompts, completions)


rank.groupwise = later_rank.groupwise = True


def test_distances_are_those_of_tokens_or_features():
    reward = DiversityReward()
    ids = [[1, 2, 3, 4], [1, 2], [1, 5, 3, 4], []]
    distances = [(0.5 + 0.25 + 1) / 3, (0.5 + 0.75 + 1) / 3, (0.25 + 0.75 + 1) / 3, 1]
    assert reward(["a"] * 4, ["x"] * 4, completion_ids=ids) == pytest.approx(distances)
    assert reward(["a"], ["x"], completion_ids=[[1]]) == [None]
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    rewards = DiversityReward(lambda completions: features, "clip_diversity")(["a"] * 3, ["x"] * 3)
    assert rewards == pytest.approx([0.5, 0.5, 1.0])
    with pytest.raises(ValueError, match="`completion_ids` must be given without `embed`, got None"):
        reward(["a"] * 2, ["x"] * 2)


@pytest.mark.parametrize("async_rewards", [False, True])
@pytest.mark.parametrize("function", [rank, later_rank, functools.partial(rank, scale=1.0)])
def test_a_function_gets_whole_groups(tmp_path, function, async_rewards):
    SIZES.clear()
    options = {"async_rewards": async_rewards, "rollout_batch_size": 3, "reward_timeout": 20}
    trainer = build_trainer(tmp_path, [function, DiversityReward()], num_generations_eval=2, **options)
    generate_batch(trainer)
    assert SIZES == [4, 4]
    assert trainer._metrics["train"]["rewards/diversity_reward/mean"] == pytest.approx(
        trainer._metrics["train"]["diversity"]
    )
    trainer.evaluate()
    assert set(SIZES[2:]) == {2}


def test_a_failure_costs_the_group_its_reward(tmp_path, caplog):
    def failing(prompts, completions, **kwargs):
        if len(SIZES) == 1:
            SIZES.append(0)
            raise ConnectionError("no route")
        return rank(prompts, completions)

    failing.groupwise = True
    SIZES.clear()
    trainer = build_trainer(tmp_path, failing, reward_error="none")
    batch = generate_batch(trainer)[1]
    assert trainer._metrics["train"]["rewards/failing/failed"] == [0.5]
    assert batch["advantages"][:12].any() and not batch["advantages"][12:].any()
    assert "4 of 8 samples have no reward of 'failing'" in caplog.text


def test_evaluation_calls_it_for_each_prompt(tmp_path):
    def count(prompts, completions, **columns):
        return [len(completions)] * len(prompts)

    count.groupwise = True
    for index, num_images in enumerate((2, 3)):
        folder = tmp_path / f"{index:05}" / "samples"
        folder.mkdir(parents=True)
        (folder.parent / "metadata.jsonl").write_text('{"prompt": "ab"}')
        for number in range(num_images):
            Image.new("RGB", (4, 4)).save(folder / f"{number:05}.png")
    assert [row["score"] for row in score_images(tmp_path, count)] == [2, 2, 3, 3, 3]
