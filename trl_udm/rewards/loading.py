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

import inspect
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

from PIL import Image


_CLASSES = {
    "geneval": "trl_udm.rewards.geneval:GenEvalReward",
    "ocr": "trl_udm.rewards.ocr:OCRReward",
    "pickscore": "trl_udm.rewards.clip:PickScoreReward",
    "clipscore": "trl_udm.rewards.clip:CLIPScoreReward",
    "hpsv2": "trl_udm.rewards.clip:HPSv2Reward",
    "hpsv3": "trl_udm.rewards.hpsv3:HPSv3Reward",
    "imagereward": "trl_udm.rewards.image_reward:ImageRewardReward",
    "aesthetic": "trl_udm.rewards.clip:AestheticReward",
    "judge": "trl_udm.rewards.vlm_judge:VLMJudgeReward",
    "dpg": "trl_udm.rewards.dpg:DPGReward",
}

REWARD_NAMES = tuple(_CLASSES)
"""The names that [`load_reward`] knows, beside any `"module:attribute"`."""


def load_reward(name: str, options: dict[str, Any] | None = None) -> Callable:
    """
    Make a reward, and call it once so that its weights are loaded. A judge has none, and is not called.

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
    >>> from trl_udm.rewards.loading import load_reward

    >>> reward = load_reward("ocr", {"partial": True})
    >>> reward.__name__
    'ocr_partial_reward'
    ```
    """
    reward, options = find_reward(name, options), options or {}
    image = Image.new("RGB", (64, 64))
    if name == "geneval":
        from .clip_color import CLIPColorClassifier
        from .geneval import Detection
        from .mask2former import Mask2FormerDetector

        reward = reward(Mask2FormerDetector(), CLIPColorClassifier(), **options)
        reward.detector([image])
        reward.color_classifier(image, [Detection(box=(0, 0, 64, 64), score=1.0)], "dog")
        return reward
    if isinstance(reward, type):
        reward = reward(**options)
    if name in _CLASSES and name not in ("judge", "dpg"):
        reward(prompts=['the word "hello"'], completions=[image])
    return reward


def find_reward(name: str, options: dict[str, Any] | None = None) -> Callable:
    """
    Finds a reward without making it, and checks that it can be made with `options` and called as a reward.

    Args:
        name (`str`):
            As in [`load_reward`].
        options (`dict[str, Any]`, *optional*):
            As in [`load_reward`].

    Returns:
        `Callable`: A reward function, or a reward's class.

    Raises:
        ValueError: If there is no such reward, or it cannot be made or called so.
    """
    path = _CLASSES.get(name, name)
    if ":" not in path:
        raise ValueError(f"`name` must be one of {(*_CLASSES, 'module:attribute')}, got {name!r}.")
    try:
        reward = resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"The reward {name!r} cannot be imported: {error}.") from error
    call = reward
    if isinstance(reward, type):
        call = next((vars(base)["__call__"] for base in reward.__mro__ if "__call__" in vars(base)), None)
        judges = (None, None) if name == "geneval" else ()
        try:
            inspect.signature(reward).bind(*judges, **(options or {}))
        except TypeError as error:
            raise ValueError(f"The reward {name!r} cannot be made with `options` {options or {}}: {error}.") from error
    elif options:
        raise ValueError(f"`options` must be empty for {name}, which is not a class, got {options}.")
    parameters = inspect.signature(call).parameters if callable(call) else {}
    takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    if not takes_any and not {"prompts", "completions"} <= parameters.keys():
        raise ValueError(
            f"The reward {name!r} must be a function, or a class whose objects can be called, with `prompts` and "
            f"`completions`, got {reward!r}."
        )
    return reward
