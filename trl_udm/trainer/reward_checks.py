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

"""Reward functions whose failures are named, bounded in time, and counted."""

import asyncio
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from accelerate.logging import get_logger
from torch import nn
from trl.trainer.utils import get_callable_name, is_async_callable


logger = get_logger(__name__)


def handle_failures(
    reward_func: Callable,
    abstains: Callable[[], bool] = lambda: False,
    timeout: float | None = None,
    on_error: str = "raise",
) -> Callable:
    """
    Make a reward function's failures say whose they are, and on which prompts.

    Args:
        reward_func (`Callable`):
            A reward function, synchronous or not. Reward models and their names are returned as they are.
        abstains (`Callable[[], bool]`, *optional*):
            Whether the function is to return `None` for all, without being called.
        timeout (`float`, *optional*):
            Seconds that a call may take. A synchronous function then runs in a thread of its own, which a call that is too
            slow leaves behind. By default there is no bound, and no thread.
        on_error (`str`, *optional*, defaults to `"raise"`):
            What follows on a failure: `"raise"`, or `"none"`, which gives `None` for the samples that failed, found by
            calling the function again for each alone (for all of them after a timeout), and logs their share as
            `rewards/<name>/failed`.

    Returns:
        `Callable`: The function, under the same name. It raises a `RuntimeError` from what the function raises, a
        `ValueError` if that returns another number of rewards than there are prompts, an infinite one, or NaN and no
        number, a `TypeError` if it returns something else than numbers and `None`, and a `TimeoutError`.
    """
    if isinstance(reward_func, nn.Module | str):
        return reward_func
    name = get_callable_name(reward_func)

    def failed(prompts: list[Any], reason: str) -> str:
        return (
            f"The reward function '{name}' {reason} on {len(prompts)} prompts, the first of which is {prompts[0]!r}."
        )

    def raise_from(error: Exception, prompts: list[Any]) -> None:
        if isinstance(error, TimeoutError):
            reason = f"took longer than the {timeout} s of `reward_timeout`" if timeout else "timed out"
            raise TimeoutError(failed(prompts, reason)) from error
        raise RuntimeError(failed(prompts, "failed")) from error

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

        async def call(prompts: list[Any], **kwargs: Any) -> list[float | None]:
            try:
                rewards = await asyncio.wait_for(reward_func(prompts=prompts, **kwargs), timeout)
            except Exception as error:
                raise_from(error, prompts)
            return check(prompts, rewards)

        async def wrapper(prompts: list[Any], **kwargs: Any) -> list[float | None]:
            if abstains():
                return [None] * len(prompts)
            if on_error == "raise":
                return await call(prompts, **kwargs)
            outcomes = await asyncio.gather(call(prompts, **kwargs), return_exceptions=True)
            if isinstance(outcomes[0], RuntimeError | ValueError | TypeError) and len(prompts) > 1:
                singles = _split(prompts, kwargs)
                outcomes = await asyncio.gather(*(call(**single) for single in singles), return_exceptions=True)
            return _merge(name, len(prompts), outcomes, kwargs)

    else:

        def call(prompts: list[Any], **kwargs: Any) -> list[float | None]:
            try:
                if timeout is None:
                    rewards = reward_func(prompts=prompts, **kwargs)
                else:
                    rewards = _call_in_thread(reward_func, timeout, prompts=prompts, **kwargs)
            except Exception as error:
                raise_from(error, prompts)
            return check(prompts, rewards)

        def attempt(**kwargs: Any) -> list[float | None] | Exception:
            try:
                return call(**kwargs)
            except (RuntimeError, ValueError, TypeError, TimeoutError) as error:
                return error

        def wrapper(prompts: list[Any], **kwargs: Any) -> list[float | None]:
            if abstains():
                return [None] * len(prompts)
            if on_error == "raise":
                return call(prompts, **kwargs)
            outcomes = [attempt(prompts=prompts, **kwargs)]
            if isinstance(outcomes[0], RuntimeError | ValueError | TypeError) and len(prompts) > 1:
                outcomes = [attempt(**single) for single in _split(prompts, kwargs)]
            return _merge(name, len(prompts), outcomes, kwargs)

    wrapper.__name__ = name
    return wrapper


def _call_in_thread(function: Callable, timeout: float, **kwargs: Any) -> Any:
    future = Future()

    def run() -> None:
        try:
            future.set_result(function(**kwargs))
        except BaseException as error:  # an exit too is the caller's to make
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # the interpreter does not wait for a daemon when it exits
    return future.result(timeout)


def _split(prompts: list[Any], kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of a call, sample by sample."""
    kwargs = {"prompts": prompts, **kwargs}
    columns = {key for key, value in kwargs.items() if isinstance(value, list) and len(value) == len(prompts)}
    return [
        {key: [value[i]] if key in columns else value for key, value in kwargs.items()} for i in range(len(prompts))
    ]


def _merge(
    name: str, num_samples: int, outcomes: list[list[float | None] | BaseException], kwargs: dict[str, Any]
) -> list[float | None]:
    """The rewards of one call, or of a call a sample, with `None` where it failed."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    for error in errors:
        if not isinstance(error, Exception):  # a cancellation is no failure of the function
            raise error
    num_failed = num_samples * len(errors) // len(outcomes)
    kwargs["log_metric"](f"rewards/{name}/failed", num_failed / num_samples)
    if errors:
        cause = "" if errors[0].__cause__ is None else f" {errors[0].__cause__!r}"
        logger.warning(
            f"{num_failed} of {num_samples} samples have no reward of '{name}'. The first failure: {errors[0]}{cause}"
        )
    num_each = num_samples // len(outcomes)
    rewards = [[None] * num_each if isinstance(outcome, BaseException) else outcome for outcome in outcomes]
    return [reward for part in rewards for reward in part]
