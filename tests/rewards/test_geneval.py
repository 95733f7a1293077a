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

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import nn
from trl.trainer.utils import get_callable_name

from trl_udm.rewards import geneval
from trl_udm.rewards.geneval import (
    Detection,
    GenEvalReward,
    check_metadata,
    compute_iou,
    evaluate,
    evaluate_reward,
    keep_detections,
    relative_position,
)


# Numbers of an independent run of the public reference code, Yovecent/UDM-GRPO at commit d1bec49.
ORACLE = Path(__file__).parents[1] / "oracle"
RECORD = json.loads((ORACLE / "geneval_cases.json").read_text(encoding="utf-8"))
CASES = [pytest.param(case, id=case["name"]) for case in RECORD["cases"]]
PAIRS = json.loads((ORACLE / "geneval_geometry.json").read_text(encoding="utf-8"))

IMAGE = Image.new("RGB", (512, 512))
BENCH = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
BLUE_CAR = {"class": "car", "count": 1, "color": "blue"}


class GivenDetector:
    """Returns the detections that it was given for each image, and remembers how often it was called."""

    class_names = RECORD["classnames"]

    def __init__(self, *detected):
        self.detected = list(detected)
        self.num_calls = 0

    def __call__(self, images):
        self.num_calls += 1
        return self.detected


class GivenColors:
    """Returns the color that each detection was given."""

    def __init__(self, colors):
        self.colors = colors

    def __call__(self, image, detections, class_name):
        return [self.colors[detection] for detection in detections]


def read_case(case):
    objects, colors = {}, {}
    for class_name, entries in case["detections"].items():
        objects[class_name] = [Detection(box=tuple(entry["box"][:4]), score=entry["box"][4]) for entry in entries]
        recorded_colors = [entry["color"] for entry in entries]
        colors.update(zip(objects[class_name], recorded_colors, strict=True))
    return objects, GivenColors(colors)


def bench(score=0.95, x=0):
    return Detection(box=(x, 0, x + 10, 10), score=score)


def reward_one(reward, row, **columns):
    columns = {key: [row[key]] for key in ("tag", "include", "exclude") if key in row} | columns
    (value,) = reward(prompts=[row["prompt"]], completions=[IMAGE], **columns)
    return value


def test_constants_are_the_benchmarks():
    recorded = RECORD["constants"]
    assert list(geneval.COLORS) == recorded.pop("COLORS")
    assert {name: getattr(geneval, name) for name in recorded} == recorded


@pytest.mark.parametrize("case", CASES)
def test_official_rule_matches_the_reference(case):
    objects, color_classifier = read_case(case)
    verdict = evaluate(IMAGE, objects, case["metadata"], color_classifier)
    assert {"correct": verdict.correct, "reason": verdict.reason} == case["evaluate"]
    assert verdict.reward == float(verdict.correct)


@pytest.mark.parametrize("case", CASES)
def test_training_rule_matches_the_reference(case):
    objects, color_classifier = read_case(case)
    verdict = evaluate_reward(IMAGE, objects, case["metadata"], color_classifier)
    assert vars(verdict) == case["evaluate_reward"]


# In the reference's detector path, `strict` selects the training rule's correctness, and without it the benchmark's.
@pytest.mark.parametrize("case", CASES)
def test_thresholds_match_the_reference(case):
    objects, color_classifier = read_case(case)
    recorded = case["detector_path strict=True"]
    kept = keep_detections(objects, case["metadata"]["tag"])
    verdict = evaluate_reward(IMAGE, kept, case["metadata"], color_classifier)
    assert {class_name: len(detections) for class_name, detections in kept.items()} == recorded["kept"]
    assert (verdict.correct, verdict.reward, verdict.reason) == tuple(
        recorded[key] for key in ("correct", "score", "reason")
    )


@pytest.mark.parametrize("case", CASES)
def test_rewards_match_the_reference(case):
    objects, color_classifier = read_case(case)
    recorded = case["detector_path strict=False"]
    official = GenEvalReward(GivenDetector(objects), color_classifier)
    dense = GenEvalReward(GivenDetector(objects), color_classifier, mode="dense")
    unclamped = GenEvalReward(GivenDetector(objects), color_classifier, mode="dense", clamp=False)
    assert reward_one(official, case["metadata"]) == float(recorded["correct"])
    assert reward_one(dense, case["metadata"]) == max(recorded["score"], 0)
    assert reward_one(unclamped, case["metadata"]) == recorded["score"]


@pytest.mark.parametrize("pair", PAIRS)
def test_geometry_matches_the_reference(pair):
    assert sorted(relative_position(pair["a"], pair["b"])) == pair["relative_position"]
    assert compute_iou(pair["a"], pair["b"]) == pair["compute_iou"]


def test_coinciding_boxes_have_no_relative_position():
    assert relative_position((0, 0, 10, 10), (0, 0, 10, 10)) == set()


def test_iou_of_empty_boxes_is_zero():
    assert compute_iou((5, 5, 4, 4), (5, 5, 4, 4)) == 0


def test_score_must_exceed_the_threshold():
    objects = {"bench": [bench(0.3), bench(0.31), bench(0.9), bench(0.91)]}
    assert [detection.score for detection in keep_detections(objects, "colors")["bench"]] == [0.91, 0.9, 0.31]
    assert [detection.score for detection in keep_detections(objects, "counting")["bench"]] == [0.91]


def test_of_equal_scores_the_later_comes_first():
    first, second = bench(), bench(x=20)
    assert keep_detections({"bench": [first, second]}, "colors") == {"bench": [second, first]}


def test_suppression_drops_overlapping_boxes_only_where_asked():
    best, same_place, elsewhere = bench(0.9), bench(0.8), bench(0.7, x=20)
    objects = {"bench": [best, same_place, elsewhere]}
    assert keep_detections(objects, "colors")["bench"] == [best, same_place, elsewhere]
    assert keep_detections(objects, "colors", nms_threshold=0.5)["bench"] == [best, elsewhere]


def test_wrong_color_leaves_the_position_out():
    chair, cow = Detection((200, 0, 300, 100), 0.9), Detection((0, 0, 100, 100), 0.9)
    row = {
        "tag": "position",
        "include": [
            {"class": "chair", "count": 1},
            {"class": "cow", "count": 1, "color": "black", "position": ["left of", 0]},
        ],
    }
    verdict = evaluate_reward(IMAGE, {"chair": [chair], "cow": [cow]}, row, GivenColors({cow: "red"}))
    assert verdict.reward == 2 / 3  # two counts right, the color wrong
    assert verdict.reason == "expected black cow>=1, found 0 black; and 1 red"


def test_rows_of_a_dataset_are_read():
    rows = [
        {
            "tag": "counting",
            "include": [{"class": "clock", "count": 1}],
            "exclude": [{"class": "clock", "count": 2}],
        },
        {"tag": "colors", "include": [BLUE_CAR]},
        {"tag": "position", "include": [BENCH["include"][0], {"class": "dog", "count": 1, "position": ["above", 0]}]},
    ]
    clocks = [Detection((0, 0, 10, 10), 0.95), Detection((20, 0, 30, 10), 0.95)]
    car = Detection((0, 0, 10, 10), 0.9)
    dog, below = Detection((0, 0, 10, 10), 0.9), Detection((0, 50, 10, 60), 0.9)
    detector = GivenDetector({"clock": clocks}, {"car": [car]}, {"bench": [below], "dog": [dog]})
    reward = GenEvalReward(detector, GivenColors({car: "blue"}))

    columns = Dataset.from_list(rows, on_mixed_types="use_json")[:]
    assert reward(prompts=["a", "b", "c"], completions=[IMAGE] * 3, **columns) == [0.0, 1.0, 1.0]


def test_absent_keys_may_be_none():
    clause = {"class": "bench", "count": 1, "color": None, "position": None}
    row = {**BENCH, "include": [clause], "exclude": None}
    assert reward_one(GenEvalReward(GivenDetector({"bench": [bench()]})), row) == 1.0
    assert reward_one(GenEvalReward(GivenDetector({}), mode="dense"), row) == 0.0


def test_unclamped_reward_reaches_minus_14():
    objects = {"bench": [bench() for _ in range(20)]}
    assert reward_one(GenEvalReward(GivenDetector(objects), mode="dense"), BENCH) == 0.0
    assert reward_one(GenEvalReward(GivenDetector(objects), mode="dense", clamp=False), BENCH) == -14.0


@pytest.mark.parametrize("mode", ["official", "dense"])
def test_rows_of_other_tasks_have_no_reward(mode):
    other = {"tag": None, "include": None, "prompt": 'a sign that says "Hello"'}
    columns = Dataset.from_list([other, BENCH, other, BENCH], on_mixed_types="use_json")[:]
    logged = []
    rewards = GenEvalReward(GivenDetector({"bench": [bench()]}, {}), mode=mode)(
        prompts=columns.pop("prompt"),
        completions=[IMAGE] * 4,
        **columns,
        log_metric=lambda name, value: logged.append((name, value)),
    )
    assert rewards == [None, 1.0, None, 0.0]
    assert logged == [("geneval/single_object", 1.0), ("geneval/single_object", 0.0)]


def test_rows_of_other_tasks_only_are_not_looked_at():
    detector = GivenDetector()
    assert reward_one(GenEvalReward(detector), {**BENCH, "include": None}) is None
    assert detector.num_calls == 0


def test_tensors_reach_the_detector_as_the_images_they_hold():
    class KeepImages(GivenDetector):
        def __call__(self, images):
            self.images = images
            return super().__call__(images)

    detector = KeepImages({}, {})
    completions = torch.randint(256, (2, 3, 4, 6), dtype=torch.uint8)
    columns = {key: [BENCH[key]] * 2 for key in ("tag", "include")}
    assert GenEvalReward(detector)(prompts=["a", "b"], completions=completions, **columns) == [0.0, 0.0]
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in detector.images)
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in detector.images])  # (B, H, W, 3)
    assert torch.equal(pixels.permute(0, 3, 1, 2), completions)


@pytest.mark.parametrize(
    "completions",
    [torch.zeros(1, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(1, 4, 4, 3, dtype=torch.uint8)],
)
def test_other_tensors_are_refused(completions):
    message = (
        "`completions` must be PIL images or a torch.uint8 tensor of shape (B, 3, H, W), got a "
        f"{completions.dtype} tensor of shape {tuple(completions.shape)}."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        GenEvalReward(GivenDetector({}))(["a"], completions, tag=[BENCH["tag"]], include=[BENCH["include"]])


def test_reward_takes_what_the_trainer_passes_and_logs_accuracy_by_tag():
    clock = {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "a photo of two clocks"}
    rows = [BENCH, BENCH, clock]
    logged = []
    reward = GenEvalReward(GivenDetector({"bench": [bench()]}, {}, {"clock": [bench()]}), mode="dense")
    rewards = reward(
        prompts=[row["prompt"] for row in rows],
        completions=[IMAGE] * 3,
        completion_ids=[[0], [1], [2]],
        tag=[row["tag"] for row in rows],
        include=[row["include"] for row in rows],
        trainer_state=None,
        log_extra=None,
        log_metric=lambda name, value: logged.append((name, value)),
    )
    assert rewards == [1.0, 0.0, 0.5]
    assert logged == [("geneval/single_object", 1.0), ("geneval/single_object", 0.0), ("geneval/counting", 0.0)]


def test_colors_are_named_once_for_both_rules():
    calls = []

    def classify(image, detections, class_name):
        calls.append(class_name)
        return ["blue"] * len(detections)

    reward = GenEvalReward(GivenDetector({"car": [bench()]}), classify, mode="dense")
    columns = {"tag": ["colors"], "include": [[BLUE_CAR]], "log_metric": lambda name, value: None}
    assert reward(["a photo of a blue car"], [IMAGE], **columns) == [1.0]
    assert calls == ["car"]


def test_reward_has_a_name_for_the_logs():
    official, dense = GenEvalReward(GivenDetector()), GenEvalReward(GivenDetector(), mode="dense")
    assert get_callable_name(official) == "geneval_accuracy"
    assert get_callable_name(dense) == "geneval_reward"
    assert not isinstance(official, nn.Module)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tag": "colours"}, "`tag` must be one of ('single_object', "),
        ({"tag": None}, "`tag` must be one of ('single_object', "),
        ({"include": []}, "`include` must be a list with at least one clause, got []."),
        ({"include": "bench"}, "`include` must be a list with at least one clause, got 'bench'."),
        ({"exclude": {"class": "dog"}}, "`exclude` must be a list of clauses or `None`, got {'class': 'dog'}."),
        (
            {"include": ["bench"]},
            "`include[0]` must be a dict with keys among ['class', 'color', 'count', 'position'], got 'bench'.",
        ),
        (
            {"include": [{**BLUE_CAR, "colour": "blue"}]},
            "`include[0]` must be a dict with keys among ['class', 'color', 'count', 'position'], got ['colour'].",
        ),
        (
            {"exclude": [BLUE_CAR]},
            "`exclude[0]` must be a dict with keys among ['class', 'count'], got ['color'].",
        ),
        (
            {"include": [{"class": "unicorn", "count": 1}]},
            "`include[0].class` must be a class that the detector knows, got 'unicorn'.",
        ),
        (
            {"exclude": [{"count": 1}]},
            "`exclude[0].class` must be a class that the detector knows, got None.",
        ),
        ({"include": [{"class": "bench"}]}, "`include[0].count` must be an integer >= 1, got None."),
        ({"include": [{"class": "bench", "count": 0}]}, "`include[0].count` must be an integer >= 1, got 0."),
        ({"include": [{"class": "bench", "count": 1.0}]}, "`include[0].count` must be an integer >= 1, got 1.0."),
        ({"exclude": [{"class": "bench", "count": True}]}, "`exclude[0].count` must be an integer >= 1, got True."),
        ({"include": [{**BLUE_CAR, "color": "teal"}]}, "`include[0].color` must be one of ('red', "),
    ],
)
def test_malformed_metadata_is_refused_before_detection(changes, message):
    detector = GivenDetector({})
    with pytest.raises(ValueError, match=re.escape(f"Row 0 ('a photo of a bench'): {message}")):
        reward_one(GenEvalReward(detector), {**BENCH, **changes})
    assert detector.num_calls == 0


@pytest.mark.parametrize(
    ("position", "message"),
    [
        ("above", "position` must be [relation, index of an earlier clause], got 'above'."),
        (["above"], "position` must be [relation, index of an earlier clause], got ['above']."),
        (["beside", 0], "position[0]` must be one of ('left of', 'right of', 'above', 'below'), got 'beside'."),
        (["above", 1], "position[1]` must be the index of a clause before include[1], got 1."),
        (["above", -1], "position[1]` must be the index of a clause before include[1], got -1."),
        (["above", "0"], "position[1]` must be the index of a clause before include[1], got '0'."),
    ],
)
def test_malformed_position_is_refused(position, message):
    row = {**BENCH, "include": [*BENCH["include"], {"class": "dog", "count": 1, "position": position}]}
    with pytest.raises(ValueError, match=re.escape(f"Row 7 ('a photo of a bench'): `include[1].{message}")):
        check_metadata(row, GivenDetector.class_names, index=7)


def test_missing_include_is_refused_by_the_check():
    with pytest.raises(ValueError, match="`include` must be a list with at least one clause, got None."):
        check_metadata({**BENCH, "include": None}, GivenDetector.class_names, index=0)


@pytest.mark.parametrize("case", CASES)
def test_wellformed_metadata_is_accepted(case):
    check_metadata(case["metadata"], GivenDetector.class_names, index=0)


def test_color_without_a_classifier_is_refused_before_detection():
    detector = GivenDetector({})
    row = {"tag": "colors", "include": [BLUE_CAR], "prompt": "a photo of a blue car"}
    message = "Row 0 ('a photo of a blue car') asks for a color: `color_classifier` must be given, got None."
    with pytest.raises(ValueError, match=re.escape(message)):
        reward_one(GenEvalReward(detector), row)
    assert detector.num_calls == 0


def test_an_unknown_mode_and_what_is_no_detector_are_refused():
    for detector in (3, len):
        with pytest.raises(TypeError, match="`detector` must be callable and have `class_names`"):
            GenEvalReward(detector)
    with pytest.raises(ValueError, match="`mode` must be 'official' or 'dense', got 'strict'."):
        GenEvalReward(GivenDetector(), mode="strict")


def test_missing_detector_results_are_an_error():
    with pytest.raises(ValueError, match="`detector` must return a dict for each of 1 images, got 2 results."):
        reward_one(GenEvalReward(GivenDetector({}, {})), BENCH)


@pytest.mark.parametrize("rule", [evaluate, evaluate_reward])
def test_the_rules_ask_for_a_classifier_of_colors(rule):
    objects = {"car": [Detection(box=(0, 0, 8, 8), score=1.0)]}
    with pytest.raises(ValueError, match="`color_classifier` must be given for the color 'blue', got None"):
        rule(IMAGE, objects, {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "blue"}]})


def test_missing_colors_are_an_error():
    def no_colors(image, detections, class_name):
        return []

    message = "`color_classifier` must return a color for each of 1 detections, got []."
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(IMAGE, {"car": [bench()]}, {"include": [BLUE_CAR]}, no_colors)
