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
import copy
import functools
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from trl.trainer.utils import get_callable_name, is_async_callable

from trl_udm import DiversityReward, FrameReward
from trl_udm.cut_prompts import PromptCutter, expect_prompts
from trl_udm.rewards.frames import flicker, motion_amount
from trl_udm.rewards.images import as_pil_images


def gray(level):
    return Image.new("RGB", (8, 6), (level, level, level))


VIDEOS = [[gray(level) for level in (0, 10, 20, 30, 40)], [gray(level) for level in (200, 100, 60)], gray(7)]


def level(completions, **kwargs):
    return [image.getpixel((0, 0))[0] for image in completions]


async def level_later(completions, **kwargs):
    await asyncio.sleep(0)
    return level(completions)


class Level:
    async def __call__(self, completions, **kwargs):
        return level(completions)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [20.0, 100.0, 7.0]),
        ({"frames": "first"}, [0.0, 200.0, 7.0]),
        ({"frames": "last"}, [40.0, 60.0, 7.0]),
        ({"frames": "all"}, [20.0, 120.0, 7.0]),
        ({"frames": "all", "reduce": "min"}, [0.0, 60.0, 7.0]),
        ({"frames": 1}, [20.0, 100.0, 7.0]),
        ({"frames": 2}, [20.0, 130.0, 7.0]),
        ({"frames": 3, "reduce": "min"}, [0.0, 60.0, 7.0]),
        ({"frames": 99}, [20.0, 120.0, 7.0]),
    ],
)
def test_the_chosen_frames_are_scored(options, expected):
    call = {"prompts": ["a", "b", "c"], "completions": VIDEOS}
    assert FrameReward(level, **options)(**call) == expected
    for reward in (level_later, Level(), functools.partial(level_later), functools.partial(Level())):
        lifted = FrameReward(reward, **options)
        assert asyncio.run(lifted(**call)) == expected
        assert is_async_callable(lifted)
    assert not is_async_callable(FrameReward(level))


def test_a_frame_comes_with_the_columns_of_its_video():
    seen, extras, state = [], [], object()

    def reward(prompts, completions, tag, trainer_state, note, log_extra, log_metric):
        seen.extend(zip(prompts, level(completions), tag, strict=True))
        assert trainer_state is state
        assert note == ["of no sample"]
        log_extra("level", level(completions))
        log_metric("levels", 1.0)
        return [0.0] * len(completions)

    metrics = []
    FrameReward(reward, frames=2)(
        prompts=["a", "b", "c"],
        completions=VIDEOS,
        tag=[1, 2, 3],
        note=["of no sample"],
        trainer_state=state,
        log_extra=lambda *args: extras.append(args),
        log_metric=lambda *args: metrics.append(args),
    )
    assert seen == [("a", 0, 1), ("a", 40, 1), ("b", 200, 2), ("b", 60, 2), ("c", 7, 3)]
    assert extras == [("level", [[0, 40], [200, 60], 7])]
    assert metrics == [("levels", 1.0)]


def test_frames_without_a_reward_do_not_count():
    def reward(completions, **kwargs):
        return np.array(
            [None if value in (0, 7) else math.nan if value == 200 else value for value in level(completions)]
        )

    call = {"prompts": ["a", "b", "c"], "completions": VIDEOS}
    for reduce, expected in (("mean", 25.0), ("min", 10.0)):
        first, second, third = FrameReward(reward, frames="all", reduce=reduce)(**call)
        assert first == expected
        assert math.isnan(second)
        assert third is None


def test_it_is_the_reward_for_the_trainer():
    class Reader(PromptCutter):
        logs_samples = True

        def __call__(self, completions, **kwargs):
            return level(completions)

    reader = Reader()
    reward = FrameReward(reader)
    assert get_callable_name(reward) == "Reader"
    assert reward.logs_samples
    expect_prompts(["a"], [reward])
    assert reader._expected_prompts == ("a",)
    for reward in (FrameReward(level, frames=3), FrameReward(level_later, frames=3)):
        assert get_callable_name(reward) == reward.reward.__name__
        assert copy.deepcopy(reward).frames == 3
        assert type(copy.deepcopy(reward)) is type(reward)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reward": "pickscore"}, TypeError, "`reward` must be a function of PIL images, got 'pickscore'."),
        ({"reward": None}, TypeError, "`reward` must be a function of PIL images, got None."),
        ({"frames": "every"}, ValueError, "`frames` must be 'first', 'middle', 'last', 'all' or a number > 0, got 'e"),
        ({"frames": 0}, ValueError, "or a number > 0, got 0."),
        ({"frames": True}, ValueError, "or a number > 0, got True."),
        ({"frames": 2.0}, ValueError, "or a number > 0, got 2.0."),
        ({"frames": None}, ValueError, "or a number > 0, got None."),
        ({"frames": [0, 1]}, ValueError, "or a number > 0, got [0, 1]."),
        ({"reward": DiversityReward(), "frames": "all"}, ValueError, "for a reward of whole groups, got 'all'"),
        ({"reward": DiversityReward(), "frames": 2}, ValueError, "for a reward of whole groups, got 2"),
        ({"reduce": "max"}, ValueError, "`reduce` must be 'mean' or 'min', got 'max'."),
        ({"reduce": None}, ValueError, "`reduce` must be 'mean' or 'min', got None."),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        FrameReward(**{"reward": level, **arguments})


@pytest.mark.parametrize("completion", [[], "video", None, ["frame"], [[gray(0)]]])
def test_what_is_no_video_is_refused(completion):
    for reward in (FrameReward(level), motion_amount, flicker):
        with pytest.raises(TypeError, match="`completions` must be lists of PIL images, or PIL images, got "):
            reward(prompts=["a"], completions=[completion])


def test_rewards_of_images_name_the_remedy_for_videos():
    with pytest.raises(TypeError, match="got a list with list. Wrap the reward in a `FrameReward` for videos."):
        as_pil_images(VIDEOS[:1], 1)


def test_wrong_numbers_of_rewards_are_refused():
    with pytest.raises(ValueError, match="The reward function '<lambda>' must return one reward a completion"):
        FrameReward(lambda completions, **kwargs: [1.0], frames="all")(prompts=["a"], completions=VIDEOS[:1])


def test_motion_and_flicker_tell_videos_apart():
    def bar(left, width=4):
        image = Image.new("RGB", (16, 4))
        ImageDraw.Draw(image).rectangle((left, 0, left + width - 1, 3), fill="white")
        return image

    still, moving = [bar(2)] * 5, [bar(left) for left in range(0, 10, 2)]
    fading = [gray(value) for value in (0, 60, 120, 180, 240)]
    flickering = [gray(value) for value in (0, 255, 0, 255, 0)]
    videos = [still, moving, fading, flickering, gray(0), [gray(0), gray(255)]]
    # 2 of 16 columns appear and 2 vanish with each step
    assert motion_amount(completions=videos) == pytest.approx([0, 0.25, 60 / 255, 1, None, 1])
    assert flicker(completions=videos) == [0, 0, 0, 1, None, None]
    trembling = [bar(2 + i % 2) for i in range(5)]
    assert flicker(completions=[trembling]) == pytest.approx([2 / 16])


def test_a_reward_of_whole_groups_gets_a_frame_of_each_video():
    diversity = DiversityReward(lambda images: torch.eye(2)[[int(image.getpixel((0, 0))[0] > 9) for image in images]])
    videos = [[gray(0), gray(0)], [gray(0), gray(99)]]
    for frames, distance in (("first", 0.0), ("last", 1.0)):
        wrapped = FrameReward(functools.partial(diversity), frames=frames)
        assert wrapped.groupwise
        assert wrapped(prompts=["a"] * 2, completions=videos) == pytest.approx([distance] * 2)
    assert not FrameReward(level).groupwise
