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

"""The reward of the world: whether a video shows the objects, colors, counts and motions that the prompt asks for."""

from collections.abc import Callable
from typing import Any, Literal

from PIL import Image

from .detector import MovingDetector, Track
from .prompts import TAGS


class MovingReward:
    """
    Reward of videos, in the manner of [`~trl_udm.GenEvalReward`].

    A clause of `include` asks for `count` objects of a `class`. Each of them must have the clause's `color`,
    `direction` and `speed`, where it has these.

    * n objects where c are asked for score 1 - |c - n| / c, and at least 0. If n is not c, the color, direction and
      speed score 0.
    * Otherwise the color, direction and speed each score the share of the objects that have it.

    The dense reward is the mean of all scores. A video is right if all scores are 1. Other objects are ignored.

    The share of right videos is logged as `moving/<tag>` in both modes.

    Args:
        mode (`str`, *optional*, defaults to `"strict"`):
            `"strict"` rewards with 1.0 for right videos, else 0.0, under the name `moving_accuracy`. `"dense"` rewards
            with the mean of the scores, under the name `moving_reward`.
        detector ([`~trl_udm.worlds.moving.detector.MovingDetector`], *optional*):
            Finds the objects. By default one with its defaults.

    Raises:
        ImportError: If SciPy is missing.
        ValueError: If `mode` is neither of the two.

    Example:

    ```python
    >>> from trl_udm.worlds.moving.reward import MovingReward
    >>> from trl_udm.worlds.moving.world import MovingObject, render

    >>> video = render([MovingObject("circle", "red", 1, 3, "left", "quickly")])
    >>> clauses = [{"class": "circle", "count": 1, "color": "red", "direction": "right"}]
    >>> reward = MovingReward(mode="dense")
    >>> reward(["a red circle moving right"], [video], tag=["direction"], include=[clauses])
    [0.6666666666666666]
    ```
    """

    logs_samples = True  # each value that it logs is of one sample

    def __init__(self, mode: Literal["strict", "dense"] = "strict", detector: MovingDetector | None = None):
        if mode not in ("strict", "dense"):
            raise ValueError(f"`mode` must be 'strict' or 'dense', got {mode!r}.")
        self.mode = mode
        self.detector = detector or MovingDetector()
        self.__name__ = "moving_accuracy" if mode == "strict" else "moving_reward"

    def __call__(
        self,
        prompts: list[str],
        completions: list[list[Image.Image]],
        tag: list[str],
        include: list[list[dict[str, Any]]],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """
        Reward videos.

        Args:
            prompts (`list[str]`):
                The prompts, for messages.
            completions (`list[list[PIL.Image.Image]]`):
                The generated videos, of 5 frames of 20 x 20 pixels.
            tag (`list[str]`):
                The kind of each prompt, one of `TAGS`.
            include (`list[list[dict]]`):
                What each video must show, as in [`~trl_udm.worlds.moving.prompts.all_metadata`].
            log_metric (`Callable[[str, float], None]`, *optional*):
                The trainer's logging function.
            columns (`dict[str, Any]`):
                Other arguments of the trainer. They are not used.

        Returns:
            `list[float]`: A reward in `[0, 1]` for each video.

        Raises:
            TypeError: If a video is no list of PIL images.
            ValueError: If there is not one video for each prompt, a tag is unknown, or a video has another size.
        """
        if len(completions) != len(prompts):
            raise ValueError(
                f"`completions` must have a video for each of {len(prompts)} prompts, got {len(completions)} videos."
            )
        for index, name in enumerate(tag):
            if name not in TAGS:
                raise ValueError(f"Row {index} ({prompts[index]!r}): `tag` must be one of {TAGS}, got {name!r}.")
        rewards = []
        for tracks, name, clauses in zip(self.detector(completions), tag, include, strict=True):
            scores = [score for clause in clauses for score in _score_clause(tracks, clause)]
            is_right = float(min(scores) == 1)
            rewards.append(is_right if self.mode == "strict" else sum(scores) / len(scores))
            if log_metric is not None:
                log_metric(f"moving/{name}", is_right)
        return rewards


def _score_clause(tracks: list[Track], clause: dict[str, Any]) -> list[float]:
    """Scores in `[0, 1]` of the count, and of each property that the clause names."""
    found, count = [track for track in tracks if track.class_name == clause["class"]], clause["count"]
    # `datasets` fills missing keys with `None`
    asked = [name for name in ("color", "direction", "speed") if clause.get(name) is not None]
    if len(found) != count:
        return [max(0.0, 1 - abs(count - len(found)) / count), *[0.0] * len(asked)]
    return [1.0, *(sum(getattr(track, name) == clause[name] for track in found) / count for name in asked)]
