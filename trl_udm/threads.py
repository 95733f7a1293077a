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

"""Daemon threads, for which the interpreter does not wait. They are on the device of the thread that starts them."""

import functools
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import torch


class Worker:
    """
    A daemon thread that computes calls one at a time and in order. It ends with this object.

    Args:
        name (`str`):
            Name of the thread.
    """

    def __init__(self, name: str):
        self._calls: SimpleQueue = SimpleQueue()
        _start_daemon(functools.partial(_work, self._calls), name)  # holds the queue only, so that it can end
        weakref.finalize(self, self._calls.put, None)

    def submit(self, call: Callable[[], Any]) -> Future:
        """
        Submits a call.

        Args:
            call (`Callable[[], Any]`):
                What the thread calls after the calls before it.

        Returns:
            `Future`: What it returns or raises, exits among them. Once cancelled, the call is never made.
        """
        future: Future = Future()
        self._calls.put((future, call))
        return future


def call_in_thread(call: Callable[[], Any], timeout: float) -> Any:
    """
    Makes a call in a daemon thread. If it takes too long, it is left behind there.

    Args:
        call (`Callable[[], Any]`):
            What is called.
        timeout (`float`):
            Seconds that it may take.

    Returns:
        `Any`: What it returned.

    Raises:
        TimeoutError: If it takes too long.
    """
    future: Future = Future()
    _start_daemon(functools.partial(_fulfill, future, call))
    return future.result(timeout)


def _start_daemon(target: Callable[[], None], name: str | None = None) -> None:
    device_index = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None

    def run() -> None:
        if device_index is not None:  # a new thread is on device 0
            torch.accelerator.set_device_index(device_index)
        target()

    threading.Thread(target=run, name=name, daemon=True).start()


def _work(calls: SimpleQueue) -> None:
    while (item := calls.get()) is not None:
        future, call = item
        if future.set_running_or_notify_cancel():
            _fulfill(future, call)
        del item, future, call  # else they would live until the next


def _fulfill(future: Future, call: Callable[[], Any]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:  # an exit too is raised by whoever waits
        future.set_exception(error)
