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
from PIL import Image

from trl_udm.rewards.geneval import GenEvalReward, check_metadata
from trl_udm.worlds.shapes.detector import ShapesColorClassifier, ShapesDetector
from trl_udm.worlds.shapes.prompts import TAGS, all_metadata, balance_metadata, corrupt, sample_scene, split_metadata
from trl_udm.worlds.shapes.world import BACKGROUND, CLASS_NAMES, COLORS, ShapesObject, class_mask, render


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_every_object_is_found_by_class_color_and_box(class_name, color):
    image = render([ShapesObject(class_name, color, row=1, column=4)])
    detections = ShapesDetector()([image])[0]
    assert {name for name, found in detections.items() if found} == {class_name}
    (detection,) = detections[class_name]
    assert detection.box == (17, 5, 27, 15)
    assert detection.score > 0.9
    assert detection.mask.shape == (32, 32)
    assert ShapesColorClassifier()(image, [detection], class_name) == [color]


def test_an_empty_image_has_no_objects():
    image = Image.new("RGB", (32, 32), BACKGROUND)
    assert all(not found for found in ShapesDetector()([image])[0].values())


def test_a_bar_and_two_merged_squares_are_no_confident_squares():
    bar = np.array(Image.new("RGB", (32, 32), BACKGROUND))
    bar[10:13, 4:24] = COLORS["red"]
    merged = np.array(render([ShapesObject("square", "red", 1, 1), ShapesObject("square", "red", 1, 4)]))
    merged[5:15, 5:27] = COLORS["red"]
    for pixels in (bar, merged):
        (detection,) = ShapesDetector()([Image.fromarray(pixels)])[0]["square"]
        assert detection.score < 0.75


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"Images must be 32 x 32 pixels, got \(64, 64\)"):
        ShapesDetector()([Image.new("RGB", (64, 64))])


@pytest.mark.parametrize("tag", TAGS)
def test_scenes_show_their_prompt_and_corrupted_ones_do_not(tag):
    rng = random.Random(0)
    reward = GenEvalReward(ShapesDetector(), ShapesColorClassifier(), mode="official")
    rows = [rng.choice(all_metadata(tag)) for _ in range(40)]
    columns = {name: [row[name] for row in rows] for name in ("tag", "include", "exclude")}
    prompts = [row["prompt"] for row in rows]
    assert reward(prompts, [render(sample_scene(row, rng)) for row in rows], **columns) == [1.0] * 40
    assert reward(prompts, [render(sample_scene(corrupt(row, rng), rng)) for row in rows], **columns) == [0.0] * 40


def test_all_metadata_follows_the_format_and_prompts_differ():
    rows = [row for tag in TAGS for row in all_metadata(tag)]
    for index, row in enumerate(rows):
        check_metadata(row, CLASS_NAMES, index)
    assert len({row["prompt"] for row in rows}) == len(rows) == 1110
    with pytest.raises(ValueError, match="`tag` must be one of .* got 'size'"):
        all_metadata("size")


def test_training_and_evaluation_prompts_are_disjoint_and_cover_all_kinds():
    train, evaluation = split_metadata()
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in evaluation}
    assert {row["tag"] for row in train} == {row["tag"] for row in evaluation} == set(TAGS)
    assert split_metadata() == (train, evaluation)
    balanced = balance_metadata(evaluation, dict.fromkeys(TAGS, 20))
    assert [sum(row["tag"] == tag for row in balanced) for tag in TAGS] == [20] * 6


def test_outlines_cover_what_their_geometry_says():
    areas = {"square": 1.0, "circle": np.pi / 4, "triangle": 0.5, "diamond": 0.5}
    for name, area in areas.items():
        assert class_mask(name).mean() == pytest.approx(area, abs=0.02)
    with pytest.raises(ValueError, match="`class_name` must be one of .* got 'heart'"):
        class_mask("heart")
