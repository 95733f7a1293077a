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

"""Reward functions whose failures are named."""

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from trl.trainer.utils import get_callable_name, is_async_callable


def name_failures(reward_func: Callable, abstains: Callable[[], bool] = lambda: False) -> Callable:
    """
    Make a reward function's failures say whose they are, and on which prompts.

    Args:
        reward_func (`Callable`):
            A reward function, synchronous or not. Reward models and their names are returned as they are.
        abstains (`Callable[[], bool]`, *optional*):
            Whether the function is to return `None` for all, without being called.

    Returns:
        `Callable`: The function, under the same name. It raises a `RuntimeError` from what the function raises, a
        `ValueError` if that returns another number of rewards than there are prompts, an infinite one, or NaN and no
        number, and a `TypeError` if it returns something else than numbers and `None`.
    """
    if isinstance(reward_func, nn.Module | str):
        return reward_func
    name = get_callable_name(reward_func)

    def failed(prompts: list[Any], reason: str) -> str:
        return (
            f"The reward function '{name}' {reason} on {len(prompts)} prompts, the first of which is {prompts[0]!r}."
        )

    def check(prompts: list[Any], rewards: list[float | None]) -> list[float | None]:
        if not hasattr(rewards, "__len__") or len(rewards) != len(prompts):
            got = len(rewards) if hasattr(rewards, "__len__") else type(rewards).__name__
            raise ValueError(failed(prompts, f"must return one reward a completion, but returned {got}"))
        num_finite = num_nan = 0
        for prompt, reward in zip(prompts, rewards, strict=True):
            if reward is None:
                continue
            try:
                is_infinite, is_nan = math.isinf(reward), math.isnan(reward)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"The reward function '{name}' must return numbers or None, but returned {reward!r} for the prompt "
                    f"{prompt!r}."
                ) from error
            if is_infinite:
                raise ValueError(f"The reward function '{name}' returned {reward} for the prompt {prompt!r}.")
            num_nan += is_nan
            num_finite += not is_nan
        if num_nan > 0 and num_finite == 0:
            raise ValueError(failed(prompts, "returned NaN and no number"))
        return rewards

    if is_async_callable(reward_func):

        async def wrapper(prompts, **kwargs):
            if abstains():
                return [None] * len(prompts)
            try:
                rewards = await reward_func(prompts=prompts, **kwargs)
            except Exception as error:
                raise RuntimeError(failed(prompts, "failed")) from error
            return check(prompts, rewards)

    else:

        def wrapper(prompts, **kwargs):
            if abstains():
                return [None] * len(prompts)
            try:
                rewards = reward_func(prompts=prompts, **kwargs)
            except Exception as error:
                raise RuntimeError(failed(prompts, "failed")) from error
            return check(prompts, rewards)

    wrapper.__name__ = name
    return wrapper
