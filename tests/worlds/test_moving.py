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

import numpy as np
import pytest
import torch
from PIL import Image

from trl_udm import URSAPipeline
from trl_udm.worlds.moving import CHECKPOINT_PATH
from trl_udm.worlds.moving.benchmark import load_eval_rows
from trl_udm.worlds.moving.detector import MovingDetector, Track
from trl_udm.worlds.moving.prompts import TAGS, all_metadata, corrupt, sample_scene, split_metadata
from trl_udm.worlds.moving.reward import MovingReward
from trl_udm.worlds.moving.world import CLASS_NAMES, DIRECTIONS, SPEEDS, MovingObject, render
from trl_udm.worlds.shapes.world import BACKGROUND, COLORS


PARTS = (
    MovingObject("circle", "red", row=0, column=3, direction="left", speed="quickly"),
    MovingObject("cross", "blue", row=3, column=1, direction="right", speed="slowly"),
)


def column(rows, *names):
    return {name: [row[name] for row in rows] for name in names}


@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_every_object_is_found_by_class_color_direction_and_speed(class_name):
    for color in COLORS:
        for direction in DIRECTIONS:
            for speed in SPEEDS:
                start = 3 if direction in ("left", "up") else 0
                row, col = (1, start) if direction in ("left", "right") else (start, 1)
                video = render([MovingObject(class_name, color, row, col, direction, speed)])
                assert MovingDetector()([video]) == [[Track(class_name, color, direction, speed)]]


def test_what_is_unclear_or_does_not_stay_is_no_object():
    (both,) = MovingDetector()([render(list(PARTS))])
    assert both == [Track("circle", "red", "left", "quickly"), Track("cross", "blue", "right", "slowly")]
    first, second = (render([part]) for part in PARTS)
    assert MovingDetector()([[Image.new("RGB", (20, 20), BACKGROUND)] * 5]) == [[]]
    assert MovingDetector()([[first[0]] * 5]) == [[Track("circle", "red", None, None)]]
    assert MovingDetector()([first[:3] + second[3:]]) == [[]]  # a jump
    assert MovingDetector()([[*first[:4], Image.new("RGB", (20, 20), BACKGROUND)]]) == [[]]
    blue = render([MovingObject("square", "blue", row=0, column=3, direction="left", speed="quickly")])
    assert MovingDetector()([first[:3] + blue[3:]]) == [[Track(None, None, "left", "quickly")]]


@pytest.mark.parametrize("tag", TAGS)
def test_scenes_show_their_prompt_and_corrupted_ones_do_not(tag):
    rng = random.Random(0)
    rows = [rng.choice(all_metadata(tag)) for _ in range(40)]
    columns = {"prompts": [row["prompt"] for row in rows], **column(rows, "tag", "include")}
    assert MovingReward()(completions=[render(sample_scene(row, rng)) for row in rows], **columns) == [1.0] * 40
    videos = [render(sample_scene(corrupt(row, rng), rng)) for row in rows]
    assert MovingReward()(completions=videos, **columns) == [0.0] * 40
    assert 0 < np.mean(MovingReward(mode="dense")(completions=videos, **columns)) < 1


def test_the_dense_reward_is_the_mean_of_what_is_asked():
    clauses = {
        "all": [{"class": "circle", "count": 1, "color": "red", "direction": "left", "speed": "quickly"}],
        "half": [{"class": "circle", "count": 1, "color": "red", "direction": "right", "speed": "slowly"}],
        "absent": [{"class": "square", "count": 1, "color": "red"}, {"class": "cross", "count": 1, "color": None}],
        "too few": [{"class": "circle", "count": 2, "color": "red"}],
    }
    logged = []
    columns = {"tag": ["speed"] * 4, "include": list(clauses.values())}
    reward = MovingReward(mode="dense")
    rewards = reward(list(clauses), [render(list(PARTS))] * 4, **columns, log_metric=lambda *pair: logged.append(pair))
    assert rewards == pytest.approx([1.0, 0.5, 1 / 3, 0.25])
    assert logged == [("moving/speed", 1.0), *[("moving/speed", 0.0)] * 3]
    assert (reward.__name__, MovingReward().__name__) == ("moving_reward", "moving_accuracy")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"completions": []}, ValueError, "must have a video for each of 1 prompts, got 0 videos"),
        ({"completions": [render(list(PARTS))[:3]]}, ValueError, "must have 5 frames of 20 x 20 pixels, got 3 of"),
        ({"completions": [[Image.new("RGB", (32, 32))] * 5]}, ValueError, r"got 5 of \[\(32, 32\)\]"),
        ({"completions": [Image.new("RGB", (20, 20))]}, TypeError, "must be lists of PIL images, got Image"),
        ({"tag": ["position"]}, ValueError, r"Row 0 \('a circle'\): `tag` must be one of .* got 'position'"),
    ],
)
def test_other_videos_and_tags_are_refused(change, error, message):
    arguments = {
        "prompts": ["a circle"],
        "completions": [render(list(PARTS))],
        "tag": ["object"],
        "include": [[{"class": "circle", "count": 1}]],
    }
    assert MovingReward()(**arguments) == [1.0]
    with pytest.raises(error, match=message):
        MovingReward()(**{**arguments, **change})
    with pytest.raises(ValueError, match="`mode` must be 'strict' or 'dense', got 'official'"):
        MovingReward(mode="official")


def test_training_and_evaluation_prompts_are_disjoint_and_cover_all_kinds():
    train, evaluation = split_metadata()
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in evaluation}
    assert {row["tag"] for row in train} == {row["tag"] for row in evaluation} == set(TAGS)
    prompts = [row["prompt"] for tag in TAGS for row in all_metadata(tag)]
    assert len(set(prompts)) == len(prompts) == len(train) + len(evaluation)
    assert split_metadata() == (train, evaluation)
    with pytest.raises(ValueError, match="`tag` must be one of .* got 'size'"):
        all_metadata("size")


@pytest.fixture(scope="module")
def pipeline():
    pipeline = URSAPipeline.from_pretrained(CHECKPOINT_PATH)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_tokenizer_keeps_what_is_shown(pipeline):
    rng = random.Random(1)
    rows = load_eval_rows()
    videos = torch.stack(
        [torch.from_numpy(np.stack(render(sample_scene(row, rng)))).permute(3, 0, 1, 2) for row in rows]
    )
    # The first latent frame is that of the first frame alone, as where an image is continued
    first, whole = (pipeline.vae.encode_to_ids(part / 127.5 - 1) for part in (videos[:, :, :1], videos))
    decoded = pipeline.decode(torch.cat([first, whole[:, 1:]], dim=1).flatten(1), (2, 5, 5))
    columns = {"prompts": [row["prompt"] for row in rows], **column(rows, "tag", "include")}
    assert np.mean(MovingReward()(completions=decoded, **columns)) >= 0.97


def test_the_shipped_model_draws_clearly_and_often_something_else(pipeline):
    rows, rng = load_eval_rows(), random.Random(0)
    options = {"num_frames": 5, "num_inference_steps": 10, "guidance_scale": 1.0}
    columns = {"prompts": [row["prompt"] for row in rows], **column(rows, "tag", "include")}
    videos = pipeline(columns["prompts"], generator=torch.Generator().manual_seed(0), **options).frames
    assert 0.15 < np.mean(MovingReward()(completions=videos, **columns)) < 0.35
    assert np.mean([len(tracks) in (1, 2) for tracks in MovingDetector()(videos)]) > 0.75

    images = [render(sample_scene(row, rng))[0] for row in rows]
    videos = pipeline(columns["prompts"], image=images, generator=torch.Generator().manual_seed(0), **options).frames
    errors = [
        np.abs(np.subtract(video[0], image, dtype=float)).mean() for video, image in zip(videos, images, strict=True)
    ]
    assert np.mean(errors) < 8  # of 255
    assert np.mean(MovingReward()(completions=videos, **columns)) > 0.65
