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

"""Reward functions: their names, and what they return."""

import functools
import reprlib
from collections.abc import Callable, Mapping, Set
from decimal import Decimal
from numbers import Real
from typing import Any


def get_reward_name(reward_func: Callable) -> str:
    """
    Name of a reward function, under which its scores are stored. The trainer logs the function under the same name.

    Args:
        reward_func (`Callable`):
            A function, a partial of one, or an object that can be called.

    Returns:
        `str`: The function's name, or the name of the object's class if the object has no name.
    """
    reward_func = unwrap_reward(reward_func)
    return getattr(reward_func, "__name__", type(reward_func).__name__)


def get_reward_flag(reward_func: Callable, name: str) -> bool:
    """
    Whether a reward function has an attribute that is true, such as `groupwise`.

    Args:
        reward_func (`Callable`):
            A function, a partial of one, or an object that can be called.
        name (`str`):
            The attribute.

    Returns:
        `bool`: It is true, of the function that a partial is of.
    """
    return bool(getattr(unwrap_reward(reward_func), name, False))


def unwrap_reward(reward_func: Callable) -> Callable:
    """
    The reward function itself, which has its name and attributes such as `groupwise`.

    Args:
        reward_func (`Callable`):
            A function, a partial of one, or an object that can be called.

    Returns:
        `Callable`: What a partial is of, or else the function.
    """
    while isinstance(reward_func, functools.partial):
        reward_func = reward_func.func
    return reward_func


def read_rewards(name: str, returned: Any, prompts: list[Any]) -> list[float | None]:
    """
    Reads what a reward function returned, so that nothing else is taken for rewards.

    Args:
        name (`str`):
            The function's name, for messages.
        returned (`Any`):
            A list, a tuple, or a NumPy or PyTorch array of shape `(B,)` or `(B, 1)`, on any device. It has Python,
            NumPy or PyTorch numbers, booleans and `None`.
        prompts (`list`):
            The B prompts, for messages.

    Returns:
        `list[float | None]`: The rewards. A number that is too large for a float is infinite.

    Raises:
        TypeError: If it is no list and no array, or has something other than numbers and `None`.
        ValueError: If it has another length.
    """
    rule = f"The reward function '{name}' must return"
    place = f"on {len(prompts)} prompts, the first of which is {prompts[0]!r}."
    try:
        is_list = not isinstance(returned, str | bytes | bytearray | Mapping | Set)
        num_rewards = len(returned) if is_list else None
    except TypeError:
        num_rewards = None
    if num_rewards is None:
        got = f"{reprlib.repr(returned)} of type {type(returned).__name__}"
        raise TypeError(f"{rule} one reward a completion, in a list or an array, but returned {got} {place}")
    if num_rewards != len(prompts):
        raise ValueError(f"{rule} one reward a completion, but returned {num_rewards} {place}")
    rewards = []
    for index, (prompt, reward) in enumerate(zip(prompts, returned, strict=True)):
        try:
            rewards.append(_to_float(reward))
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{rule} numbers or None, but returned {reprlib.repr(reward)} for the prompt {prompt!r} (index "
                f"{index})."
            ) from error
    return rewards


def _to_float(value: Any) -> float | None:
    value = value.item() if hasattr(value, "item") else value
    if value is None:
        return None
    if not isinstance(value, Real | Decimal):
        raise TypeError(f"{type(value).__name__} is no number.")
    try:
        return float(value)
    except OverflowError:
        return float("inf")
