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

"""Running reward functions: named failures, a bound on their time, and threads that compute during the rollout."""

import asyncio
import functools
import math
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import nn
from trl.trainer.utils import get_callable_name, is_async_callable

from .udm_grpo_config import UDMGRPOConfig


logger = get_logger(__name__)


class RewardRunner:
    """
    A reward function as [`~trl.GRPOTrainer`] calls it, under its own name.

    An error says which function failed, and on which prompts. Between `submit` and `collect` the function runs in a
    thread, one micro-batch at a time and in order. [`AsyncRewardRunner`] does the same for coroutine functions: both
    run the coroutine `_run`, which never waits if the function is synchronous.

    Args:
        reward_func (`Callable`):
            Reward function `f(prompts, completions, **columns) -> list[float | None]`.
        timeout (`float`, *optional*):
            Seconds that a call may take. A synchronous function then runs in a thread. A call that is too slow is left
            behind there. By default there is no bound, and no thread.
        on_error (`str`, *optional*, defaults to `"raise"`):
            What happens on a failure. `"none"` calls the function again for each sample alone, unless it timed out.
            Samples that fail get `None`, and their share is logged as `rewards/<name>/failed`.
        abstains (`Callable[[], bool]`, *optional*):
            Tells whether to return `None` for all samples without a call.

    Raises:
        RuntimeError: If the function raises.
        TimeoutError: If a call takes too long.
        TypeError: If the function returns something other than numbers and `None`.
        ValueError: If the number of rewards is wrong, one is infinite, or some are NaN and none is a number.
    """

    is_async = False

    def __init__(
        self,
        reward_func: Callable,
        timeout: float | None = None,
        on_error: str = "raise",
        abstains: Callable[[], bool] = lambda: False,
    ):
        self.__name__ = get_callable_name(reward_func)
        self.reward_func = reward_func
        self.timeout = timeout
        self.on_error = on_error
        self.abstains = abstains
        self._submitted: list[tuple[Future, list[Callable]]] = []  # by micro-batch: rewards, and what the call logs
        self._has_given_rewards = False
        self._calls: SimpleQueue | None = None

    def __call__(self, **kwargs: Any) -> list[float | None]:
        if self._calls is None:
            return _run_without_waiting(self._run(**kwargs))
        if not self._submitted:
            self.submit(**kwargs)
        return self.collect()

    def start(self, device: torch.device, event_loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Starts the thread that `submit` needs, on a device. Coroutines run in `event_loop`, in another thread."""
        self._calls = SimpleQueue()
        run = _run_without_waiting
        if self.is_async:

            def run(coroutine: Coroutine) -> list[float | None]:
                return asyncio.run_coroutine_threadsafe(coroutine, event_loop).result()

        device_index = None if device.type == "cpu" else torch.accelerator.current_device_index()
        # The interpreter does not wait for a daemon when it exits. The thread holds the queue only, so it ends with
        # `self`.
        threading.Thread(target=_work, args=(self._calls, run, device_index), name=self.__name__, daemon=True).start()
        weakref.finalize(self, self._calls.put, None)

    def submit(self, log_metric: Callable, log_extra: Callable, **kwargs: Any) -> None:
        """
        Submits the next micro-batch to the thread.

        Until the function has given a reward, this waits for it. Rewards load their models in the first call, and
        loading changes settings of the whole process, such as the default dtype.

        What the function logs goes to `log_metric` and `log_extra` when the rewards are collected. `kwargs` are its
        other arguments.
        """
        logs = []

        def keep_metric(name: str, value: float) -> None:
            logs.append(functools.partial(log_metric, name, value))

        def keep_extra(column: str, values: list) -> None:
            logs.append(functools.partial(log_extra, column, list(values)))

        rewards = Future()
        self._submitted.append((rewards, logs))
        call = functools.partial(self._run, log_metric=keep_metric, log_extra=keep_extra, **kwargs)
        self._calls.put((rewards, call))
        if not self._has_given_rewards:
            self._has_given_rewards = any(reward is not None for reward in rewards.result())

    def collect(self) -> list[float | None]:
        """Waits for all micro-batches that were submitted. Returns their rewards, and passes on what they logged."""
        return self._join([rewards.result() for rewards, _ in self._submitted])

    def cancel(self) -> None:
        """Forgets micro-batches that were not collected, as after an error. Calls that have not begun never do."""
        for rewards, _ in self._submitted:
            rewards.cancel()
        self._submitted = []

    def _join(self, parts: list[list[float | None]]) -> list[float | None]:
        for _, logs in self._submitted:
            for log in logs:
                log()
        self._submitted = []
        return [reward for part in parts for reward in part]

    async def _run(self, prompts: list[Any], **kwargs: Any) -> list[float | None]:
        if self.abstains():
            return [None] * len(prompts)
        kwargs["prompts"] = prompts
        if self.on_error == "raise":
            return await self._invoke(**kwargs)
        outcomes = await self._attempt([kwargs])
        if isinstance(outcomes[0], RuntimeError | ValueError | TypeError) and len(prompts) > 1:
            outcomes = await self._attempt(_split(kwargs))
        errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        num_failed = len(prompts) * len(errors) // len(outcomes)
        kwargs["log_metric"](f"rewards/{self.__name__}/failed", num_failed / len(prompts))
        if errors:
            cause = "" if errors[0].__cause__ is None else f" {errors[0].__cause__!r}"
            logger.warning(
                f"{num_failed} of {len(prompts)} samples have no reward of '{self.__name__}'. The first failure: "
                f"{errors[0]}{cause}"
            )
        failed = [None] * (len(prompts) // len(outcomes))
        return [reward for one in outcomes for reward in (failed if isinstance(one, Exception) else one)]

    async def _attempt(self, calls: list[dict[str, Any]]) -> list[list[float | None] | Exception]:
        async def attempt(call: dict[str, Any]) -> list[float | None] | Exception:
            try:
                return await self._invoke(**call)
            except (RuntimeError, ValueError, TypeError, TimeoutError) as error:
                return error

        attempts = [attempt(call) for call in calls]
        return await asyncio.gather(*attempts) if self.is_async else [await one for one in attempts]

    async def _invoke(self, prompts: list[Any], **kwargs: Any) -> list[float | None]:
        call = functools.partial(self.reward_func, prompts=prompts, **kwargs)
        try:
            if self.is_async:
                rewards = await asyncio.wait_for(call(), self.timeout)
            else:
                rewards = call() if self.timeout is None else _call_in_thread(call, self.timeout)
        except TimeoutError as error:
            reason = f"took longer than the {self.timeout} s of `reward_timeout`" if self.timeout else "timed out"
            raise TimeoutError(self._describe(reason, prompts)) from error
        except Exception as error:
            raise RuntimeError(self._describe("failed", prompts)) from error
        self._check(rewards, prompts)
        return rewards

    def _check(self, rewards: Any, prompts: list[Any]) -> None:
        if not hasattr(rewards, "__len__") or len(rewards) != len(prompts):
            got = len(rewards) if hasattr(rewards, "__len__") else type(rewards).__name__
            raise ValueError(self._describe(f"must return one reward a completion, but returned {got}", prompts))
        num_finite = num_nan = 0
        for prompt, reward in zip(prompts, rewards, strict=True):
            if reward is None:
                continue
            try:
                is_infinite, is_nan = math.isinf(reward), math.isnan(reward)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"The reward function '{self.__name__}' must return numbers or None, but returned {reward!r} for "
                    f"the prompt {prompt!r}."
                ) from error
            if is_infinite:
                raise ValueError(f"The reward function '{self.__name__}' returned {reward} for the prompt {prompt!r}.")
            num_nan += is_nan
            num_finite += not is_nan
        if num_nan > 0 and num_finite == 0:
            raise ValueError(self._describe("returned NaN and no number", prompts))

    def _describe(self, reason: str, prompts: list[Any]) -> str:
        return (
            f"The reward function '{self.__name__}' {reason} on {len(prompts)} prompts, the first of which is "
            f"{prompts[0]!r}."
        )


class AsyncRewardRunner(RewardRunner):
    """A [`RewardRunner`] for a coroutine function, which [`~trl.GRPOTrainer`] awaits along with others."""

    is_async = True

    async def __call__(self, **kwargs: Any) -> list[float | None]:
        if not self._submitted:
            return await self._run(**kwargs)
        return self._join([await asyncio.wrap_future(rewards) for rewards, _ in self._submitted])


class RewardsMixin:
    """
    The reward functions of a run as [`RewardRunner`]s, in threads where `args.async_rewards` asks for it.

    Needs `args`, `model`, `state`, `accelerator`, `reward_funcs` and `_count_failure` of [`CheckpointMixin`].
    """

    def _wrap_reward_funcs(
        self,
        reward_funcs: Callable | list[Callable],
        eval_reward_funcs: Callable | list[Callable] | None,
        args: UDMGRPOConfig,
    ) -> list[Callable]:
        """Those of evaluation come last, have weight 0, and abstain in training. Reward models stay as they are."""
        reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        if not reward_funcs:
            raise ValueError("`reward_funcs` must have at least one function, got none.")
        if not isinstance(eval_reward_funcs, list):
            eval_reward_funcs = [] if eval_reward_funcs is None else [eval_reward_funcs]
        for reward_func in eval_reward_funcs:
            if isinstance(reward_func, nn.Module | str):
                raise TypeError(f"`eval_reward_funcs` must be functions, got {reward_func!r}.")
        self._num_eval_reward_funcs = len(eval_reward_funcs)
        if eval_reward_funcs:
            weights = args.reward_weights or [1.0] * len(reward_funcs)
            args.reward_weights = [*weights, *[0.0] * len(eval_reward_funcs)]

        def wrap(reward_func: Callable, abstains: Callable[[], bool] = lambda: False) -> Callable:
            if isinstance(reward_func, nn.Module | str):
                return reward_func
            runner_class = AsyncRewardRunner if is_async_callable(reward_func) else RewardRunner
            return runner_class(reward_func, args.reward_timeout, args.reward_error, abstains)

        return [*map(wrap, reward_funcs), *(wrap(one, lambda: self.model.training) for one in eval_reward_funcs)]

    def _start_reward_threads(self) -> None:
        event_loop = self.async_loop if self._has_async_funcs else None
        for runner in self._reward_runners:
            runner.start(self.accelerator.device, event_loop)

    @property
    def _reward_runners(self) -> list[RewardRunner]:
        return [reward_func for reward_func in self.reward_funcs if isinstance(reward_func, RewardRunner)]

    def _submit_rewards(self, inputs, prompts, completions, completion_ids_list) -> None:
        """Submits a micro-batch with the arguments that `_calculate_rewards` of [`~trl.GRPOTrainer`] would give."""
        columns = [key for key in inputs[0] if key not in ("prompt", "completion", "completion_ids")]
        for runner in self._reward_runners:
            runner.submit(
                prompts=prompts,
                completions=completions,
                completion_ids=completion_ids_list,
                trainer_state=self.state,
                log_extra=self._log_completion_extra,
                log_metric=self._log_metric,
                **{column: [example[column] for example in inputs] for column in columns},
            )

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        is_trained = self.reward_weights != 0
        if not torch.isnan(rewards_per_func[:, is_trained.to(rewards_per_func.device)]).all():
            self._num_failures["rewards"] = 0
            return rewards_per_func
        names = [name for name, trained in zip(self.reward_func_names, is_trained, strict=True) if trained]
        reason = (
            f"The reward functions {names} returned None or NaN for all {len(rewards_per_func)} samples of a batch, "
            f"the first of which has the prompt {prompts[0]!r}."
        )
        if self.args.reward_error == "raise":
            raise ValueError(reason)
        self._count_failure("rewards", reason)
        return rewards_per_func


def _work(calls: SimpleQueue, run: Callable[[Coroutine], Any], device_index: int | None) -> None:
    if device_index is not None:
        torch.accelerator.set_device_index(device_index)
    while (item := calls.get()) is not None:
        rewards, call = item
        if rewards.set_running_or_notify_cancel():
            try:
                rewards.set_result(run(call()))
            except BaseException as error:  # an exit too is raised by whoever collects
                rewards.set_exception(error)
        del item, rewards, call


def _run_without_waiting(coroutine: Coroutine) -> Any:
    """Runs a coroutine that never waits. It needs no event loop, so it also works in a notebook, which has one."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("The coroutine of a synchronous function must not wait.")


def _call_in_thread(call: Callable, timeout: float) -> Any:
    future = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # an exit too is raised by the caller
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # the interpreter does not wait for a daemon when it exits
    return future.result(timeout)


def _split(kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of a call, sample by sample."""
    size = len(kwargs["prompts"])
    columns = {key for key, value in kwargs.items() if isinstance(value, list) and len(value) == size}
    return [{key: [value[i]] if key in columns else value for key, value in kwargs.items()} for i in range(size)]
