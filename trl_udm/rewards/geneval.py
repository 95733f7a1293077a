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

"""
The GenEval reward: whether the image shows the objects, counts, colors and positions that the prompt asks for.

The benchmark is described in https://huggingface.co/papers/2310.11513. A detector finds the objects in an image, a
color classifier names their colors, and a row of metadata says what should be found. The functions of this module are
in the order in which they are applied: [`check_metadata`], [`keep_detections`], then [`evaluate`] or
[`evaluate_reward`].
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image

from .images import as_pil_images


TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# COCO's classes in COCO's order, under the benchmark's names
CLASS_NAMES = tuple(
    (
        "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, "
        "stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, "
        "backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, "
        "baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, "
        "banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, "
        "bed, dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, "
        "oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
    ).split(", ")
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
NMS_THRESHOLD = 1.0
POSITION_THRESHOLD = 0.1

Box = tuple[float, float, float, float]


# Compared by identity: masks are arrays, whose `==` has no single truth value.
@dataclass(frozen=True, eq=False)
class Detection:
    """
    One object found in an image.

    Args:
        box (`tuple[float, float, float, float]`):
            Corners `(x1, y1, x2, y2)` in pixels. The y axis points down.
        score (`float`):
            Confidence, in `[0, 1]`.
        mask (`np.ndarray` of shape `(height, width)` and dtype `bool`, *optional*):
            The object's pixels, for color classifiers that need them.
    """

    box: Box
    score: float
    mask: np.ndarray | None = None


class Detector(Protocol):
    """
    Finds objects in images.

    `class_names` are the classes that it knows, in GenEval's order. Called with a list of images, it returns a dict
    from class name to detections for each image. The detections may have any order and any score: [`keep_detections`]
    selects.
    """

    @property
    def class_names(self) -> Sequence[str]: ...

    def __call__(self, images: list[Image.Image], /) -> list[dict[str, list[Detection]]]: ...


class ColorClassifier(Protocol):
    """Names one of `COLORS` for each of an image's detections, all of one class."""

    def __call__(self, image: Image.Image, detections: list[Detection], class_name: str, /) -> list[str]: ...


@dataclass(frozen=True)
class Verdict:
    """
    The result of a rule for an image.

    Args:
        correct (`bool`):
            Whether every requirement is met.
        reward (`float`):
            From [`evaluate`], 1.0 or 0.0. From [`evaluate_reward`], the partial credit, at most 1.0.
        reason (`str`):
            The requirements that are not met, one a line. Empty if `correct`.
    """

    correct: bool
    reward: float
    reason: str


def check_metadata(row: Mapping[str, Any], class_names: Sequence[str], index: int) -> None:
    """
    Refuse a row of metadata that does not follow GenEval's format. A key whose value is `None` counts as absent,
    because `datasets` fills missing keys with `None`.

    Args:
        row (`Mapping[str, Any]`):
            A row with `"tag"`, `"include"` and optionally `"exclude"` and `"prompt"`.
        class_names (`Sequence[str]`):
            The classes that the detector knows.
        index (`int`):
            The row's number, for the message.

    Raises:
        ValueError: If a field is missing or breaks its rule. The message names the row, the field, the rule and the
        value.

    Example:

    ```python
    >>> from trl_udm.rewards.geneval import check_metadata

    >>> row = {"tag": "counting", "include": [{"class": "clock", "count": 0}], "prompt": "a photo of no clocks"}
    >>> check_metadata(row, class_names=["bench", "clock"], index=7)
    Traceback (most recent call last):
    ValueError: Row 7 ('a photo of no clocks'): `include[0].count` must be an integer >= 1, got 0.
    ```
    """

    def require(holds: bool, field: str, rule: str, value: Any) -> None:
        if not holds:
            raise ValueError(f"Row {index} ({row.get('prompt')!r}): `{field}` must be {rule}, got {value!r}.")

    tag, include, exclude = (row.get(key) for key in ("tag", "include", "exclude"))
    require(tag in TAGS, "tag", f"one of {TAGS}", tag)
    require(isinstance(include, list) and len(include) > 0, "include", "a list with at least one clause", include)
    require(exclude is None or isinstance(exclude, list), "exclude", "a list of clauses or `None`", exclude)

    for name, clauses, keys in (
        ("include", include, {"class", "count", "color", "position"}),
        ("exclude", exclude, {"class", "count"}),
    ):
        for number, clause in enumerate(clauses or []):
            field = f"{name}[{number}]"
            require(isinstance(clause, dict), field, f"a dict with keys among {sorted(keys)}", clause)
            unknown = sorted(key for key, value in clause.items() if value is not None and key not in keys)
            require(not unknown, field, f"a dict with keys among {sorted(keys)}", unknown)

            class_name, count = clause.get("class"), clause.get("count")
            require(class_name in class_names, f"{field}.class", "a class that the detector knows", class_name)
            require(type(count) is int and count >= 1, f"{field}.count", "an integer >= 1", count)

            color, position = clause.get("color"), clause.get("position")
            require(color is None or color in COLORS, f"{field}.color", f"one of {COLORS}", color)
            if position is not None:
                is_pair = isinstance(position, (list, tuple)) and len(position) == 2
                require(is_pair, f"{field}.position", "[relation, index of an earlier clause]", position)
                relation, target = position
                require(relation in RELATIONS, f"{field}.position[0]", f"one of {RELATIONS}", relation)
                is_earlier = type(target) is int and 0 <= target < number
                require(is_earlier, f"{field}.position[1]", f"the index of a clause before {field}", target)


def compute_iou(box_a: Box, box_b: Box) -> float:
    """
    Return the intersection over union of two boxes whose corners are inclusive pixels, as in the benchmark: a side
    from x1 to x2 is x2 - x1 + 1 long.

    Args:
        box_a (`tuple[float, float, float, float]`):
            Corners `(x1, y1, x2, y2)` of a box.
        box_b (`tuple[float, float, float, float]`):
            Corners of the other box.

    Returns:
        `float`: The ratio, in `[0, 1]`. It is 0.0 if both boxes are empty.
    """

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    intersection = area(*map(max, box_a[:2], box_b[:2]), *map(min, box_a[2:], box_b[2:]))
    union = area(*box_a) + area(*box_b) - intersection
    return intersection / union if union else 0.0


def keep_detections(
    detected: dict[str, list[Detection]], tag: str, nms_threshold: float = NMS_THRESHOLD
) -> dict[str, list[Detection]]:
    """
    Select the detections that count. In each class these are the best `MAX_OBJECTS` above the score threshold, which
    is higher for counting, by falling score.

    Args:
        detected (`dict[str, list[Detection]]`):
            What the detector found in an image, by class name.
        tag (`str`):
            The row's tag.
        nms_threshold (`float`, *optional*, defaults to `1.0`):
            Drop a detection whose overlap with a better one of its class, by [`compute_iou`], reaches this value. The
            benchmark's 1.0 drops none, not even a box that is found twice.

    Returns:
        `dict[str, list[Detection]]`: The selected detections. Classes without any are left out.
    """
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    kept = {}
    for class_name, detections in detected.items():
        # Reversed, not `reverse=True`: of equal scores the benchmark puts the later detection first.
        by_falling_score = sorted(detections, key=lambda detection: detection.score)[::-1]
        candidates = [detection for detection in by_falling_score if detection.score > threshold][:MAX_OBJECTS]
        group: list[Detection] = []
        for candidate in candidates:
            if nms_threshold == 1 or all(compute_iou(candidate.box, other.box) < nms_threshold for other in group):
                group.append(candidate)
        if group:
            kept[class_name] = group
    return kept


def relative_position(box_a: Box, box_b: Box) -> set[str]:
    """
    Return the relations in which box A stands to box B.

    The offset between the centers is first shortened, along each axis, by `POSITION_THRESHOLD` times the sum of the
    two boxes' sides. A relation holds if what remains along its axis is more than half of the length of the whole
    offset, so that two relations hold near the diagonal and none where the boxes nearly coincide.

    Args:
        box_a (`tuple[float, float, float, float]`):
            Corners `(x1, y1, x2, y2)` of box A.
        box_b (`tuple[float, float, float, float]`):
            Corners of box B.

    Returns:
        `set[str]`: The members of `RELATIONS` that hold, at most two.
    """
    offset, shortened = [], []
    for axis in (0, 1):
        (a1, a2), (b1, b2) = box_a[axis::2], box_b[axis::2]
        distance = (a1 + a2) / 2 - (b1 + b2) / 2
        margin = POSITION_THRESHOLD * (abs(a2 - a1) + abs(b2 - b1))
        offset.append(distance)
        shortened.append(math.copysign(max(abs(distance) - margin, 0), distance))
    if max(map(abs, shortened)) < 1e-3:
        return set()

    dx, dy = (component / math.sqrt(offset[0] ** 2 + offset[1] ** 2) for component in shortened)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation in RELATIONS if holds[relation]}


def evaluate(
    image: Image.Image,
    objects: dict[str, list[Detection]],
    metadata: dict[str, Any],
    color_classifier: ColorClassifier | None = None,
) -> Verdict:
    """
    Apply the benchmark's rule, whose mean is the accuracy on GenEval.

    For each `include` clause, the `count` best detections of its class must exist, must all have the `color`, and must
    all stand in the `position` to each detection of the target clause. Further detections are ignored, unless an
    `exclude` clause forbids `count` or more.

    Args:
        image (`Image.Image`):
            The image, for the color classifier.
        objects (`dict[str, list[Detection]]`):
            The detections that count, by class name and falling score.
        metadata (`dict[str, Any]`):
            A row that [`check_metadata`] accepts.
        color_classifier (`ColorClassifier`, *optional*):
            Needed for rows that name a color.

    Returns:
        [`Verdict`]: Its reward is 1.0 if the image is correct, else 0.0.
    """
    _, reasons = _check_include(image, objects, metadata["include"], color_classifier, exact=False)
    for clause in metadata.get("exclude") or []:
        num_found = len(objects.get(clause["class"], []))
        if num_found >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {num_found}")
    return Verdict(correct=not reasons, reward=float(not reasons), reason="\n".join(reasons))


def evaluate_reward(
    image: Image.Image,
    objects: dict[str, list[Detection]],
    metadata: dict[str, Any],
    color_classifier: ColorClassifier | None = None,
) -> Verdict:
    """
    Apply the training rule, which gives partial credit and requires exact counts.

    The requirement that n objects exist, or have a color, scores 1 - |n - found| / n, which is below 0 for more than
    2n. A position scores 1 or 0. If the count is wrong, color and position are not checked and score 0 together. If a
    color is wrong, the position is left out. The reward is the mean of the scores. `exclude` clauses are ignored: an
    image that shows a forbidden object can be correct here and wrong by [`evaluate`].

    Args:
        image (`Image.Image`):
            The image, for the color classifier.
        objects (`dict[str, list[Detection]]`):
            The detections that count, by class name and falling score.
        metadata (`dict[str, Any]`):
            A row that [`check_metadata`] accepts.
        color_classifier (`ColorClassifier`, *optional*):
            Needed for rows that name a color.

    Returns:
        [`Verdict`]: Its reward is at most 1.0, and 1.0 if the image is correct.
    """
    scores, reasons = _check_include(image, objects, metadata["include"], color_classifier, exact=True)
    return Verdict(correct=not reasons, reward=sum(scores) / len(scores), reason="\n".join(reasons))


def _check_include(
    image: Image.Image,
    objects: dict[str, list[Detection]],
    include: list[dict[str, Any]],
    color_classifier: ColorClassifier | None,
    exact: bool,
) -> tuple[list[float], list[str]]:
    """
    Return the scores of all requirements, and the reason for each clause that fails. The two rules differ only in the
    detections that count as found: all of the class (`exact`), or no more than the clause asks for.
    """
    scores, reasons = [], []
    groups: list[list[Detection] | None] = []
    for clause in include:
        found = objects.get(clause["class"], [])
        found = found if exact else found[: clause["count"]]
        clause_scores, reason = _check_clause(image, found, clause, groups, color_classifier, exact)
        scores.extend(clause_scores)
        if reason is not None:
            reasons.append(reason)
        groups.append(found if reason is None else None)
    return scores, reasons


def _check_clause(
    image: Image.Image,
    found: list[Detection],
    clause: dict[str, Any],
    groups: list[list[Detection] | None],
    color_classifier: ColorClassifier | None,
    exact: bool,
) -> tuple[list[float], str | None]:
    """
    Return the scores of one clause's requirements, up to the first that fails, and the reason for it. `groups` holds
    the detections of each earlier clause, or `None` where it failed.
    """
    class_name, count = clause["class"], clause["count"]
    color, position = clause.get("color"), clause.get("position")

    scores = [1 - abs(count - len(found)) / count]
    if len(found) != count:
        if color is not None or position is not None:
            scores.append(0.0)
        return scores, f"expected {class_name}{'==' if exact else '>='}{count}, found {len(found)}"

    if color is not None:
        if color_classifier is None:
            raise ValueError(f"`color_classifier` must be given for the color {color!r}, got None.")
        colors = color_classifier(image, found, class_name)
        if len(colors) != count:
            raise ValueError(f"`color_classifier` must return a color for each of {count} detections, got {colors!r}.")
        num_right = colors.count(color)
        scores.append(1 - abs(count - num_right) / count)
        if num_right != count:
            seen = ", ".join(f"{colors.count(name)} {name}" for name in COLORS if name in colors)
            return scores, f"expected {color} {class_name}>={count}, found {num_right} {color}; and {seen}"

    if position is not None:
        relation, target_index = position
        targets = groups[target_index]
        if targets is None:
            return [*scores, 0.0], f"no target for {class_name} to be {relation}"
        for detection, target in itertools.product(found, targets):
            relations = relative_position(detection.box, target.box)
            if relation not in relations:
                seen = " and ".join(sorted(relations))
                return [*scores, 0.0], f"expected {class_name} {relation} target, found {seen} target"
        scores.append(1.0)

    return scores, None


class GenEvalReward:
    """
    GenEval as a reward function for [`UDMGRPOTrainer`].

    The metadata is in the dataset's columns `tag`, `include` and `exclude`. All rows are checked before any detection.
    A row whose `include` is `None` has no reward, for datasets of several tasks. The accuracy by tag is logged as
    `geneval/<tag>`, by the benchmark's rule in both modes.

    Args:
        detector ([`Detector`]):
            Finds the objects.
        color_classifier ([`ColorClassifier`], *optional*):
            Names their colors. Needed if a row asks for a color.
        mode (`str`, *optional*, defaults to `"official"`):
            `"official"` rewards with 1.0 or 0.0 by [`evaluate`], under the name `geneval_accuracy`. `"dense"` rewards
            with the partial credit of [`evaluate_reward`], under the name `geneval_reward`.
        clamp (`bool`, *optional*, defaults to `True`):
            Whether the rewards of mode `"dense"` are clamped to `[0, 1]`. Otherwise an image with too many objects has
            a reward below 0: -14.0 if one object is asked for and `MAX_OBJECTS` are found.

    Raises:
        TypeError: If `detector` is no [`Detector`].
        ValueError: If `mode` is neither of the two.

    Example:

    ```python
    >>> from PIL import Image
    >>> from trl_udm.rewards.geneval import Detection, GenEvalReward

    >>> class WholeImageDetector:
    ...     class_names = ["bench", "dog"]
    ...
    ...     def __call__(self, images):
    ...         return [{"bench": [Detection(box=(0, 0, *image.size), score=0.95)]} for image in images]

    >>> reward = GenEvalReward(WholeImageDetector())
    >>> reward(
    ...     prompts=["a photo of a bench", "a photo of a dog"],
    ...     completions=[Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8))],
    ...     tag=["single_object", "single_object"],
    ...     include=[[{"class": "bench", "count": 1}], [{"class": "dog", "count": 1}]],
    ... )
    [1.0, 0.0]
    ```
    """

    logs_samples = True  # each value that it logs is of one sample

    def __init__(
        self,
        detector: Detector,
        color_classifier: ColorClassifier | None = None,
        mode: Literal["official", "dense"] = "official",
        clamp: bool = True,
    ):
        if mode not in ("official", "dense"):
            raise ValueError(f"`mode` must be 'official' or 'dense', got {mode!r}.")
        if not callable(detector) or not hasattr(detector, "class_names"):
            raise TypeError(
                f"`detector` must be callable and have `class_names`, as `Detector` says, got {detector!r}."
            )
        self.detector = detector
        self.color_classifier = color_classifier
        self.mode = mode
        self.clamp = clamp
        self.__name__ = "geneval_accuracy" if mode == "official" else "geneval_reward"

    def __call__(
        self,
        prompts: list[str],
        completions: list[Image.Image] | torch.Tensor,
        tag: list[str | None],
        include: list[list[dict[str, Any]] | None],
        exclude: list[list[dict[str, Any]] | None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """
        Reward images.

        Args:
            prompts (`list[str]`):
                The prompts, for messages.
            completions (`list[Image.Image]` or `torch.Tensor` of shape `(B, 3, H, W)` and dtype `torch.uint8`):
                The generated images.
            tag (`list[str | None]`):
                The kind of each prompt, one of `TAGS`.
            include (`list[list[dict[str, Any]] | None]`):
                What each image must show. `None` where GenEval does not apply.
            exclude (`list[list[dict[str, Any]] | None]`, *optional*):
                What each image must not show.
            log_metric (`Callable[[str, float], None]`, *optional*):
                The trainer's logging function.
            columns (`dict[str, Any]`):
                Other arguments of the trainer. They are not used.

        Returns:
            `list[float | None]`: A reward for each image, or `None` where `include` is `None`.

        Raises:
            ValueError: If `completions` is a tensor of another shape or dtype, if a row's metadata is malformed or
            asks for a color without a color classifier, or if the detector or the color classifier returns the wrong
            number of results.
        """
        completions = as_pil_images(completions, len(prompts))

        exclude = exclude if exclude is not None else [None] * len(prompts)
        applicable = []
        for index, (prompt, image, row_tag, row_include, row_exclude) in enumerate(
            zip(prompts, completions, tag, include, exclude, strict=True)
        ):
            if row_include is None:
                continue
            row: dict[str, Any] = {"prompt": prompt, "tag": row_tag, "include": row_include, "exclude": row_exclude}
            check_metadata(row, self.detector.class_names, index)
            if self.color_classifier is None and any(clause.get("color") is not None for clause in row_include):
                raise ValueError(
                    f"Row {index} ({prompt!r}) asks for a color: `color_classifier` must be given, got None."
                )
            applicable.append((index, image, row))

        rewards: list[float | None] = [None] * len(prompts)
        if not applicable:
            return rewards

        detected = self.detector([image for _, image, _ in applicable])
        if len(detected) != len(applicable):
            raise ValueError(
                f"`detector` must return a dict for each of {len(applicable)} images, got {len(detected)} results."
            )

        for (index, image, row), image_detected in zip(applicable, detected, strict=True):
            objects = keep_detections(image_detected, row["tag"])
            rewards[index], accuracy = self._evaluate(image, objects, row)
            if log_metric is not None:
                log_metric(f"geneval/{row['tag']}", accuracy)
        return rewards

    def _evaluate(
        self, image: Image.Image, objects: dict[str, list[Detection]], row: dict[str, Any]
    ) -> tuple[float, float]:
        """Return the reward of an image, and its accuracy by the benchmark's rule."""
        known_colors = {}

        def classify_once(image: Image.Image, found: list[Detection], class_name: str) -> list[str]:
            # Where the number of objects is right, both rules ask for the same ones
            key = (class_name, len(found))
            if key not in known_colors:
                assert self.color_classifier is not None  # checked with the rows
                known_colors[key] = self.color_classifier(image, found, class_name)
            return known_colors[key]

        accuracy = evaluate(image, objects, row, classify_once).reward
        if self.mode == "official":
            return accuracy, accuracy
        reward = evaluate_reward(image, objects, row, classify_once).reward
        return max(reward, 0.0) if self.clamp else reward, accuracy
