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
import reprlib
import statistics
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import nn
from trl.trainer.utils import get_callable_name, get_config_model_id, is_async_callable

from ..pipelines.pipeline_udm import UDMPipeline
from ..reward_values import read_rewards
from ..threads import Worker, call_in_thread
from .udm_grpo_config import UDMGRPOConfig


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
    ):
        self.__name__ = get_callable_name(reward_func)
        self.reward_func = reward_func
        self.timeout = timeout
        self.on_error = on_error
        self.abstains = abstains
        self.logs_samples = getattr(reward_func, "logs_samples", False)
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
        if self.abstains() or num_samples == 0:
            return [None] * num_samples, []
        kwargs = _take(slice(num_samples), prompts=prompts, **kwargs)
        outcomes = [await self._attempt(**kwargs)]
        if self.on_error == "raise" and isinstance(outcomes[0], Exception):
            raise outcomes[0]
        if isinstance(outcomes[0], RuntimeError | ValueError) and num_samples > 1:
            attempts = [self._attempt(**_take(slice(i, i + 1), **kwargs)) for i in range(num_samples)]
            outcomes = await asyncio.gather(*attempts) if self.is_async else [await attempt for attempt in attempts]
        size = num_samples // len(outcomes)
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
        if self.on_error == "none":
            failed = functools.partial(log_metric, f"rewards/{self.__name__}/failed", len(errors) / len(outcomes))
            logs += [failed] * num_samples
        if errors:
            cause = "" if errors[0].__cause__ is None else f" {errors[0].__cause__!r}"
            logger.warning(
                f"{len(errors) * size} of {num_samples} samples have no reward of '{self.__name__}'. The first "
                f"failure: {errors[0]}{cause}",
                main_process_only=False,
            )
        return rewards, logs

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
                return await asyncio.wait_for(_raise_exit_as_error(call()), self.timeout)
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


class RewardsMixin:
    """
    The reward functions of a run as [`RewardRunner`]s, in threads where `args.async_rewards` asks for it.

    Needs `args`, `model`, `state`, `accelerator`, `reward_funcs` and `_count_failure` of [`CheckpointMixin`].
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.reward_weights = torch.tensor(self.args.reward_weights, dtype=torch.float64)
        if not self._has_async_funcs:
            return
        self.async_loop.set_task_factory(_create_task)
        if torch.accelerator.is_available():  # a new thread is on device 0 in every process
            device_index = torch.accelerator.current_device_index()
            self.async_loop.call_soon_threadsafe(torch.accelerator.set_device_index, device_index)

    def _wrap_reward_funcs(
        self, reward_funcs: list[Callable], eval_reward_funcs: list[Callable], args: UDMGRPOConfig
    ) -> list[Callable]:
        """Those of evaluation come last, have weight 0, and abstain in training. Reward models stay as they are."""
        self._num_eval_reward_funcs = len(eval_reward_funcs)
        weights = args.reward_weights or [1.0] * len(reward_funcs)
        args.reward_weights = [*weights, *[0.0] * len(eval_reward_funcs)]

        def wrap(reward_func: Callable, abstains: Callable[[], bool] = lambda: False) -> Callable:
            if isinstance(reward_func, nn.Module | str):
                return reward_func
            runner_class = AsyncRewardRunner if is_async_callable(reward_func) else RewardRunner
            return runner_class(reward_func, args.reward_timeout, args.reward_error, abstains)

        return [*map(wrap, reward_funcs), *(wrap(one, lambda: self.model.training) for one in eval_reward_funcs)]

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

    def _mark_padding(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Marks the rows by which Accelerate fills the last batch of an evaluation up for several processes."""
        state, num_processes = self.accelerator.gradient_state, self.accelerator.num_processes
        if self.model.training or num_processes == 1 or not state.end_of_dataloader or self.args.dataloader_drop_last:
            return inputs
        # `state.remainder` counts prompts, not their generations
        num_rows = len(state.active_dataloader.dataset) * self.num_generations_eval
        num_left = num_rows % (len(inputs) * num_processes) or len(inputs) * num_processes
        first = self.accelerator.process_index * len(inputs)
        return [{**row, "is_padding": first + i >= num_left} for i, row in enumerate(inputs)]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        """Rewards (B, F) of all processes' samples without padding, in float64 on the CPU."""
        # These are rounded to float32, and have the padding. They are right for reward models, which give float32.
        rounded = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        first = self.accelerator.process_index * len(inputs)
        num_samples = len(inputs) - sum(row.get("is_padding", False) for row in inputs)
        columns = [
            func.rewards if isinstance(func, RewardRunner) else rounded[first : first + num_samples, i].tolist()
            for i, func in enumerate(self.reward_funcs)
        ]
        rows = gather_object(list(zip(*columns, strict=True)))
        numbers = [[math.nan if reward is None else reward for reward in row] for row in rows]
        rewards_per_func = torch.tensor(numbers, dtype=torch.float64)
        trained = self.reward_weights.nonzero().flatten().tolist()
        failed = [self.reward_func_names[i] for i in trained if any(row[i] is not None for row in rows)]
        if not failed or not torch.isnan(rewards_per_func[:, trained]).all():
            self._num_failures["rewards"] = 0
            return rewards_per_func
        reason = (
            f"The reward functions {failed} failed, or returned None, for all {len(rows)} samples of a batch, the "
            f"first of which has the prompt {prompts[0]!r}."
        )
        if self.args.reward_error == "raise":  # a reward model that gives NaN
            raise ValueError(reason)
        self._count_failure("rewards", reason)
        return rewards_per_func


class _ExitError(RuntimeError):
    """An exit in a coroutine. The exit itself would end the event loop, and whoever waits for it would never know."""


async def _raise_exit_as_error(coroutine: Coroutine) -> Any:
    try:
        return await coroutine
    except (SystemExit, KeyboardInterrupt) as error:
        raise _ExitError(f"A coroutine raised {error!r}.") from error


def _create_task(loop: asyncio.AbstractEventLoop, coroutine: Coroutine, **kwargs: Any) -> asyncio.Task:
    return asyncio.Task(_raise_exit_as_error(coroutine), loop=loop, **kwargs)


def _run_coroutine(coroutine: Coroutine, event_loop: asyncio.AbstractEventLoop | None = None) -> Any:
    """Runs a coroutine in the loop of another thread. One that never waits needs none, so notebooks may run it too."""
    if event_loop is not None:
        return asyncio.run_coroutine_threadsafe(coroutine, event_loop).result()
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("The coroutine of a synchronous function must not wait.")


def _take(rows: slice, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call, for some of its rows."""
    size = len(kwargs["prompts"])
    return {k: v[rows] if isinstance(v, list) and len(v) == size else v for k, v in kwargs.items()}


def _get_name(reward_func: Callable | nn.Module | str) -> str:
    """The name under which [`~trl.GRPOTrainer`] logs a reward function, reward model or model id."""
    if isinstance(reward_func, nn.Module):
        reward_func = get_config_model_id(reward_func.config)
    return reward_func.split("/")[-1] if isinstance(reward_func, str) else get_callable_name(reward_func)


def check_rewards(
    pipeline: UDMPipeline,
    args: UDMGRPOConfig,
    reward_funcs: Callable | list[Callable],
    eval_reward_funcs: Callable | list[Callable] | None,
) -> tuple[list[Callable], list[Callable]]:
    """The two arguments as lists. Raises a `TypeError` or `ValueError` if they do not fit the pipeline or `args`."""
    reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    if not isinstance(eval_reward_funcs, list):
        eval_reward_funcs = [] if eval_reward_funcs is None else [eval_reward_funcs]
    if not reward_funcs:
        raise ValueError("`reward_funcs` must have at least one function, got none.")
    for argument, functions in (("reward_funcs", reward_funcs), ("eval_reward_funcs", eval_reward_funcs)):
        for function in functions:
            got = f"a `{type(function).__name__}`" if isinstance(function, nn.Module) else repr(function)
            is_model = isinstance(function, nn.Module | str)
            if is_model and pipeline.modality != "text":
                raise TypeError(
                    f"`{argument}` must be functions where samples are {pipeline.modality}s, got {got}: a reward "
                    "model scores text. Give a function that calls it."
                )
            if is_model and argument == "eval_reward_funcs":
                raise TypeError(
                    f"`{argument}` must be functions, got {got}: a reward model would be called in training too. Give "
                    "a function that calls it."
                )
            if not is_model and not callable(function):
                raise TypeError(f"`{argument}` must be a function or a list of functions, got {got}.")
    for name, count in Counter(map(_get_name, reward_funcs + eval_reward_funcs)).items():
        if count > 1:
            raise ValueError(
                f"`reward_funcs` and `eval_reward_funcs` must have names that differ, got {count} of the name "
                f"{name!r}: their metrics would be one. Set `__name__` of one, or wrap a partial in a function."
            )
    weights = args.reward_weights or [1.0] * len(reward_funcs)
    if len(weights) != len(reward_funcs):
        raise ValueError(
            f"`reward_weights` must have one weight for each of the {len(reward_funcs)} `reward_funcs`, got {weights}."
        )
    if not all(map(math.isfinite, weights)) or not any(weights):
        raise ValueError(f"`reward_weights` must be finite, and at least one of them not 0, got {weights}.")
    if args.chat_template_kwargs and pipeline.modality != "text":
        raise ValueError(
            f"`chat_template_kwargs` must be None for `{type(pipeline).__name__}`, got {args.chat_template_kwargs}: "
            "it applies no chat template."
        )
    return reward_funcs, eval_reward_funcs
