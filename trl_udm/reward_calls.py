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

"""Calls of reward functions: named failures, a bound on their time, and threads."""

import asyncio
import functools
import math
import reprlib
import statistics
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import gather_object

from .reward_values import get_reward_flag, get_reward_name, read_rewards
from .threads import Worker, call_in_thread


logger = get_logger(__name__)


class RewardRunner:
    """
    A reward function as [`~trl.GRPOTrainer`] calls it, under its own name.

    An error says which function failed, and on which prompts. After `start` the function runs in a thread, one
    submitted micro-batch at a time and in order, and a call collects the rewards. [`AsyncRewardRunner`] does the same
    for coroutine functions: both run the coroutine `_run`, which never waits if the function is synchronous.

    Rows that only fill a batch up, for which the column `is_padding` is true, come last. The function does not get
    them. What it gives to `log_metric` is logged once for each sample of the call: as it is if it gives one value for
    each sample, else the mean of the values. With an attribute `logs_samples`, that is true, a function says that each
    value is of one sample. NaN and `None` are left out.

    With an attribute `groupwise`, that is true, a function is called once for each group, with all samples of it. It
    runs where it is called, after the rollout. If processes share a group, the one where it begins scores it.

    Args:
        reward_func (`Callable`):
            Reward function `f(prompts, completions, **columns) -> list[float | None]`.
        timeout (`float`, *optional*):
            Seconds that a call may take. A synchronous function then runs in a thread. A call that is too slow is left
            behind there. By default there is no bound, and no thread.
        on_error (`str`, *optional*, defaults to `"raise"`):
            What happens on a failure. `"none"` calls the function again for each sample alone, unless it timed out.
            Samples that fail have NaN for a reward. Their share is logged as `rewards/<name>/failed`.
        abstains (`Callable[[], bool]`, *optional*):
            Tells whether to return `None` for all samples without a call.
        get_group_size (`Callable[[], int]`, *optional*):
            Tells how many samples a group has. Needed for a function that is `groupwise`.

    Raises:
        RuntimeError: If the function raises. Always raised if it is asynchronous and exits.
        TimeoutError: If a call takes too long.
        TypeError: If the function does not return a list or an array of numbers and `None`. Always raised.
        ValueError: If the number of rewards is wrong, which is always raised. If a reward is infinite or too large for
            a float, or some are NaN and none is a number.
    """

    is_async = False

    def __init__(
        self,
        reward_func: Callable,
        timeout: float | None = None,
        on_error: str = "raise",
        abstains: Callable[[], bool] = lambda: False,
        get_group_size: Callable[[], int] = lambda: 1,
    ):
        self.__name__ = get_reward_name(reward_func)
        self.reward_func = reward_func
        self.timeout = timeout
        self.on_error = on_error
        self.abstains = abstains
        self.get_group_size = get_group_size
        self.logs_samples = get_reward_flag(reward_func, "logs_samples")
        self.is_groupwise = get_reward_flag(reward_func, "groupwise")
        self.rewards: list[float | None] = []
        """The last rewards, without padding: `None` where the function abstained, NaN where it failed."""
        self._submitted: list[Future] = []  # by micro-batch
        self._has_given_rewards = False
        self._worker: Worker | None = None

    def __call__(self, prompts: list[Any], **kwargs: Any) -> list[float | None]:
        if self._worker is None:
            return self._collect([_run_coroutine(self._run(prompts, **kwargs))], len(prompts))
        if not self._submitted:
            self.submit(prompts=prompts, **kwargs)
        return self._collect([outcome.result() for outcome in self._submitted], len(prompts))

    def start(self, event_loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Starts the thread that `submit` needs. The function runs there, or in the `event_loop` of another thread."""
        if not self.is_groupwise:  # a micro-batch has parts of groups
            self._worker = Worker(self.__name__)
            self._event_loop = event_loop

    def submit(self, **kwargs: Any) -> None:
        """
        Submits the next micro-batch to the thread. `kwargs` are the arguments of the function.

        Until the function has given a reward, this waits for it. Rewards load their models in the first call, and
        loading changes settings of the whole process, such as the default dtype.
        """
        outcome = self._worker.submit(lambda: _run_coroutine(self._run(**kwargs), self._event_loop))
        self._submitted.append(outcome)
        if not self._has_given_rewards:
            rewards, _ = outcome.result()
            self._has_given_rewards = any(reward is not None and not math.isnan(reward) for reward in rewards)

    def cancel(self) -> None:
        """Forgets micro-batches that were not collected, as after an error. Calls that have not begun never do."""
        for outcome in self._submitted:
            outcome.cancel()
        self._submitted = []

    def _collect(self, outcomes: list[tuple[list[float | None], list[Callable]]], num_rows: int) -> list[float | None]:
        self._submitted = []
        self.rewards = [reward for rewards, _ in outcomes for reward in rewards]
        for _, logs in outcomes:
            for log in logs:
                log()
        return self.rewards + [0.0] * (num_rows - len(self.rewards))  # `GRPOTrainer` expects one for each row

    async def _run(
        self,
        prompts: list[Any],
        log_metric: Callable,
        log_extra: Callable,
        is_padding: Sequence[bool] = (),
        **kwargs: Any,
    ) -> tuple[list[float | None], list[Callable]]:
        """The rewards of a micro-batch without its padding, and what is to be logged then."""
        num_samples = len(prompts) - sum(is_padding)
        if self.abstains() or (num_samples == 0 and not self.is_groupwise):
            return [None] * num_samples, []
        kwargs = _take(slice(num_samples), prompts=prompts, **kwargs)
        own, size = slice(num_samples), num_samples
        if self.is_groupwise:
            size = self.get_group_size()
            kwargs, own = gather_groups(size, **kwargs)
        num_samples = len(kwargs["prompts"])
        outcomes = await self._attempt_parts(size, **kwargs)
        failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        if self.on_error == "raise" and failures:
            raise failures[0]
        if not self.is_groupwise and num_samples > 1 and isinstance(outcomes[0], RuntimeError | ValueError):
            size, outcomes = 1, await self._attempt_parts(1, **kwargs)
        errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        rewards, logs = [], []
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                rewards += [math.nan] * size
                continue
            rewards += outcome.rewards
            for name, values in outcome.metrics.items():
                known = [value for value in values if not math.isnan(value)]
                if known and len(values) != size and not self.logs_samples:
                    known = [statistics.fmean(known)] * size
                logs += [functools.partial(log_metric, name, value) for value in known]
            logs += [functools.partial(log_extra, column, values) for column, values in outcome.extras]
        if self.on_error == "none" and outcomes:
            failed = functools.partial(log_metric, f"rewards/{self.__name__}/failed", len(errors) / len(outcomes))
            logs += [failed] * num_samples
        if errors:
            cause = "" if errors[0].__cause__ is None else f" {errors[0].__cause__!r}"
            logger.warning(
                f"{len(errors) * size} of {num_samples} samples have no reward of '{self.__name__}'. The first "
                f"failure: {errors[0]}{cause}",
                main_process_only=False,
            )
        if self.is_groupwise:
            rewards = gather_object(rewards)[own]
        return rewards, logs

    async def _attempt_parts(self, size: int, **kwargs: Any) -> "list[_Outcome | Exception]":
        """What calls with `size` samples each give. Coroutines run at the same time."""
        starts = range(0, len(kwargs["prompts"]), size)
        attempts = [self._attempt(**_take(slice(start, start + size), **kwargs)) for start in starts]
        return await asyncio.gather(*attempts) if self.is_async else [await attempt for attempt in attempts]

    async def _attempt(self, prompts: list[Any], **kwargs: Any) -> "_Outcome | Exception":
        """What a call gives, or its failure. Raises what is no failure but a mistake in the function."""
        outcome = _Outcome()
        call = functools.partial(
            self.reward_func, prompts=prompts, log_metric=outcome.log_metric, log_extra=outcome.log_extra, **kwargs
        )
        try:
            returned = await self._invoke(call, prompts)
        except _ExitError:
            raise
        except (RuntimeError, TimeoutError) as error:
            return error
        outcome.rewards = read_rewards(self.__name__, returned, prompts)
        for index, reward in enumerate(outcome.rewards):
            if reward is not None and math.isinf(reward):
                value = reprlib.repr(list(returned)[index])
                return ValueError(
                    f"The reward function '{self.__name__}' returned {value} for the prompt {prompts[index]!r} (index "
                    f"{index}): a reward must be finite, and no larger than a float can be."
                )
        numbers = [reward for reward in outcome.rewards if reward is not None]
        if numbers and all(map(math.isnan, numbers)):
            return ValueError(self._describe("returned NaN and no number", prompts))
        return outcome

    async def _invoke(self, call: Callable, prompts: list[Any]) -> Any:
        def call_to_end() -> Any:
            returned = call()
            return list(returned) if isinstance(returned, Iterator) else returned

        try:
            if self.is_async:
                return await asyncio.wait_for(raise_exit_as_error(call()), self.timeout)
            return call_to_end() if self.timeout is None else call_in_thread(call_to_end, self.timeout)
        except TimeoutError as error:
            reason = f"took longer than the {self.timeout} s of `reward_timeout`" if self.timeout else "timed out"
            raise TimeoutError(self._describe(reason, prompts)) from error
        except _ExitError as error:
            raise _ExitError(self._describe(f"raised {error.__cause__!r}", prompts)) from error.__cause__
        except Exception as error:
            raise RuntimeError(self._describe("failed", prompts)) from error

    def _describe(self, reason: str, prompts: list[Any]) -> str:
        return (
            f"The reward function '{self.__name__}' {reason} on {len(prompts)} prompts, the first of which is "
            f"{prompts[0]!r}."
        )


class AsyncRewardRunner(RewardRunner):
    """A [`RewardRunner`] for a coroutine function, which [`~trl.GRPOTrainer`] awaits along with others."""

    is_async = True

    async def __call__(self, prompts: list[Any], **kwargs: Any) -> list[float | None]:
        if not self._submitted:
            return self._collect([await self._run(prompts, **kwargs)], len(prompts))
        return self._collect([await asyncio.wrap_future(outcome) for outcome in self._submitted], len(prompts))


class _Outcome:
    """The rewards of a call, and what it logged."""

    def __init__(self):
        self.rewards: list[float | None] = []
        self.metrics: dict[str, list[float]] = {}
        self.extras: list[tuple[str, list]] = []

    def log_metric(self, name: str, value: float | None) -> None:
        self.metrics.setdefault(name, []).append(math.nan if value is None else float(value))

    def log_extra(self, column: str, values: list) -> None:
        self.extras.append((column, list(values)))


class _ExitError(RuntimeError):
    """An exit in a coroutine. The exit itself would end the event loop, and whoever waits for it would never know."""


async def raise_exit_as_error(coroutine: Coroutine) -> Any:
    try:
        return await coroutine
    except (SystemExit, KeyboardInterrupt) as error:
        raise _ExitError(f"A coroutine raised {error!r}.") from error


def _run_coroutine(coroutine: Coroutine, event_loop: asyncio.AbstractEventLoop | None = None) -> Any:
    """Runs a coroutine in the loop of another thread. One that never waits needs none, so notebooks may run it too."""
    if event_loop is not None:
        return asyncio.run_coroutine_threadsafe(coroutine, event_loop).result()
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("The coroutine of a synchronous function must not wait.")


def gather_groups(group_size: int, **kwargs: Any) -> tuple[dict[str, Any], slice]:
    """
    The arguments of a call for the whole groups that begin on this process.

    All processes must call it. Only where a group is shared by several of them, samples are sent.

    Args:
        group_size (`int`):
            Number of samples of a group.
        kwargs (`dict[str, Any]`):
            The arguments, with lists for the samples of this process.

    Returns:
        `tuple[dict, slice]`: The arguments, and which of the rewards of all processes are those of its samples.
    """
    process_index, num_samples = PartialState().process_index, len(kwargs["prompts"])
    counts = gather_object([num_samples])
    first = sum(counts[:process_index])
    own = slice(first, first + num_samples)
    if all(count % group_size == 0 for count in counts):
        return kwargs, own
    lists = {name: value for name, value in kwargs.items() if isinstance(value, list) and len(value) == num_samples}
    parts = gather_object([lists])
    begin, end = (-(-place // group_size) * group_size for place in (own.start, own.stop))
    groups = {name: [value for part in parts for value in part[name]][begin:end] for name in lists}
    return {**kwargs, **groups}, own


def _take(rows: slice, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call, for some of its rows."""
    size = len(kwargs["prompts"])
    return {k: v[rows] if isinstance(v, list) and len(v) == size else v for k, v in kwargs.items()}
