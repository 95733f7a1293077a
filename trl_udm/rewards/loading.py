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

"""Rewards by name, for the command line."""

import importlib
from collections.abc import Callable
from typing import Any

from PIL import Image


_CLASSES = {
    "ocr": "trl_udm.rewards.ocr:OCRReward",
    "pickscore": "trl_udm.rewards.clip:PickScoreReward",
    "clipscore": "trl_udm.rewards.clip:CLIPScoreReward",
    "hpsv2": "trl_udm.rewards.clip:HPSv2Reward",
}

REWARD_NAMES = ("geneval", *_CLASSES)
"""The names that [`load_reward`] knows, beside any `"module:attribute"`."""


def load_reward(name: str, options: dict[str, Any] | None = None) -> Callable:
    """
    Make a reward, and call it once so that its weights are loaded.

    Args:
        name (`str`):
            One of `REWARD_NAMES`, or the `"module:attribute"` of a reward function or of a reward's class. Those of a
            module are not called.
        options (`dict[str, Any]`, *optional*):
            Arguments of the reward's constructor.

    Returns:
        `Callable`: The reward.

    Raises:
        ValueError: If there is no such reward, or if `options` are given for a function.

    Example:

    ```python
    >>> reward = load_reward("ocr", {"partial": True})
    >>> reward.__name__
    'ocr_partial_reward'
    ```
    """
    options = options or {}
    image = Image.new("RGB", (64, 64))
    if name == "geneval":
        from .clip_color import CLIPColorClassifier
        from .geneval import Detection, GenEvalReward
        from .mask2former import Mask2FormerDetector

        reward = GenEvalReward(Mask2FormerDetector(), CLIPColorClassifier(), **options)
        reward.detector([image])
        reward.color_classifier(image, [Detection(box=(0, 0, 64, 64), score=1.0)], "dog")
        return reward

    module_name, separator, attribute = _CLASSES.get(name, name).partition(":")
    if not separator:
        raise ValueError(f"`name` must be one of {(*REWARD_NAMES, 'module:attribute')}, got {name!r}.")
    reward = getattr(importlib.import_module(module_name), attribute)
    if isinstance(reward, type):
        reward = reward(**options)
    elif options:
        raise ValueError(f"`options` must be empty for {name}, which is not a class, got {options}.")
    if name in _CLASSES:
        reward(prompts=['the word "hello"'], completions=[image])
    return reward
