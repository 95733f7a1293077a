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

"""Reward functions that run beside the rollout."""

import asyncio
import functools
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from trl.trainer.utils import get_callable_name, is_async_callable


class BackgroundReward:
    """
    A reward function that a thread of its own calls for parts of a batch, one part at a time and in order, while the caller
    does something else.

    Until the function has given a first reward, `start` waits for it: rewards load their models in the first call, and
    loading one changes settings of the whole process, such as the default dtype.

    Args:
        reward_func (`Callable`):
            The reward function, synchronous or not.
        device (`torch.device`):
            Device of this process. The thread gets the same current one.
        event_loop (`asyncio.AbstractEventLoop`, *optional*):
            The loop, in another thread, that runs the coroutines of asynchronous functions.
    """

    def __init__(
        self, reward_func: Callable, device: torch.device, event_loop: asyncio.AbstractEventLoop | None = None
    ):
        self.__name__ = get_callable_name(reward_func)
        self.reward_func = reward_func
        self.event_loop = event_loop
        self._has_given_rewards = False
        self._parts = []  # of the batch: rewards to come, and what the calls have logged
        self._calls = SimpleQueue()
        device_index = None if device.type == "cpu" else torch.accelerator.current_device_index()
        # The interpreter does not wait for a daemon when it exits. The thread holds the queue alone, and ends with this object.
        threading.Thread(target=_work, args=(self._calls, device_index), name=self.__name__, daemon=True).start()
        weakref.finalize(self, self._calls.put, None)

    def start(self, log_metric: Callable, log_extra: Callable, **kwargs: Any) -> None:
        """
        Have the thread call the function for the next part of the batch.

        Args:
            log_metric (`Callable`), log_extra (`Callable`):
                What the function logs is handed on to these when the rewards are taken, by who takes them.
            kwargs (`Any`):
                The other arguments of the function.
        """
        logs = []

        def keep_metric(name: str, value: float) -> None:
            logs.append(functools.partial(log_metric, name, value))

        def keep_extra(column: str, values: list) -> None:
            logs.append(functools.partial(log_extra, column, list(values)))

        rewards = Future()
        call = functools.partial(self._call, log_metric=keep_metric, log_extra=keep_extra, **kwargs)
        self._parts.append((rewards, logs))
        self._calls.put((rewards, call))
        if not self._has_given_rewards:
            self._has_given_rewards = any(reward is not None for reward in rewards.result())

    def _call(self, **kwargs: Any) -> list[float | None]:
        if is_async_callable(self.reward_func):
            return asyncio.run_coroutine_threadsafe(self.reward_func(**kwargs), self.event_loop).result()
        return self.reward_func(**kwargs)

    def __call__(self, **kwargs: Any) -> list[float | None]:
        """
        Wait for the rewards of all parts that were started.

        Args:
            kwargs (`Any`):
                The arguments of the function for the whole batch. They are used only where no part was started.

        Returns:
            `list[float | None]`: The rewards of the whole batch. What the function raises is raised here.
        """
        if not self._parts:
            self.start(**kwargs)
        all_rewards = [reward for rewards, _ in self._parts for reward in rewards.result()]
        for _, logs in self._parts:
            for log in logs:
                log()
        self._parts = []
        return all_rewards

    def drop(self) -> None:
        """Forget the parts whose rewards were not taken, as after an error. Calls that have not begun never do."""
        for rewards, _ in self._parts:
            rewards.cancel()
        self._parts = []


def _work(calls: SimpleQueue, device_index: int | None) -> None:
    if device_index is not None:
        torch.accelerator.set_device_index(device_index)
    while (item := calls.get()) is not None:
        rewards, call = item
        if rewards.set_running_or_notify_cancel():
            try:
                rewards.set_result(call())
            except BaseException as error:  # an exit too is the caller's to make
                rewards.set_exception(error)
        del item, rewards, call


def in_background(
    reward_funcs: list[Callable], device: torch.device, event_loop: asyncio.AbstractEventLoop | None
) -> list[Callable]:
    """
    Make reward functions [`BackgroundReward`]s. Reward models stay what they are.

    Args:
        reward_funcs (`list[Callable]`):
            Functions and models.
        device (`torch.device`), event_loop (`asyncio.AbstractEventLoop`, *optional*):
            As in [`BackgroundReward`].

    Returns:
        `list[Callable]`: They, in the same order.
    """
    return [
        reward_func if isinstance(reward_func, nn.Module) else BackgroundReward(reward_func, device, event_loop)
        for reward_func in reward_funcs
    ]


def start_rewards(
    trainer: Trainer,
    is_first: bool,
    inputs: list[dict[str, Any]],
    prompts: list[Any],
    completions: list[Any],
    completion_ids_list: list[list[int]],
) -> None:
    """
    Start the reward functions of a trainer that are [`BackgroundReward`]s on a part of a batch, with the arguments that
    [`~trl.GRPOTrainer`] would give them.

    Args:
        trainer ([`UDMGRPOTrainer`]):
            The trainer.
        is_first (`bool`):
            Whether the part is the first of its batch. Parts of an older one are dropped then.
        inputs, prompts, completions, completion_ids_list (`list`):
            What `_calculate_rewards` takes, of this part.
    """
    columns = [key for key in inputs[0] if key not in ("prompt", "completion", "completion_ids")]
    background_rewards = [one for one in trainer.reward_funcs if isinstance(one, BackgroundReward)]
    if is_first:
        for reward_func in background_rewards:
            reward_func.drop()
    for reward_func in background_rewards:
        reward_func.start(
            prompts=prompts,
            completions=completions,
            completion_ids=completion_ids_list,
            trainer_state=trainer.state,
            log_extra=trainer._log_completion_extra,
            log_metric=trainer._log_metric,
            **{column: [example[column] for example in inputs] for column in columns},
        )
