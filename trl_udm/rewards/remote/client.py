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

"""The client of `trl-udm serve-reward`: a reward that [`trl_udm.rewards.remote.server`] computes."""

import asyncio
import functools
import itertools
import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import httpx2
import torch
from PIL import Image

from ..images import as_pil_images
from .wire import MEDIA_TYPE, REWARDS_PATH, TOKEN_VARIABLE, check_token, pack_request, unpack_response


# The server is busy, restarting or still loading, or the connection is slow
RETRIED_STATUS_CODES = (408, 502, 503, 504)
MAX_DELAY = 30.0

# Creating it takes 30 ms, so calls share it
_ssl_context = functools.cache(httpx2.create_ssl_context)


class RemoteReward:
    """
    A reward server, or several of them, as a reward function for [`UDMGRPOTrainer`].

    A batch is split into requests, which are sent to the servers in turn and at the same time. If a server does not
    answer in time, or is busy, the request goes to the next one. After all servers, the client waits and starts over.
    It waits 0.5 s, then twice as long each time up to 30 s, each time a random share of up to a half more or less, and
    at least as long as the servers ask for. An error of the request, or of the reward, is raised at once.

    The dataset's columns are sent, but not `completion_ids` and `trainer_state`. What the served reward logs is logged
    here.

    Args:
        urls (`str` or `list[str]`):
            The servers, such as `"http://127.0.0.1:8765"`.
        token (`str`, *optional*):
            The servers' token. By default the environment variable `TRL_UDM_REWARD_TOKEN`, if it is set. It is sent
            without encryption: use `https` or a tunnel where others can listen.
        columns (`list[str]`, *optional*):
            Dataset columns to send. By default all.
        max_batch_size (`int`, *optional*, defaults to `16`):
            Largest number of images in a request.
        max_connections (`int`, *optional*, defaults to `8`):
            Number of requests at a time.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds to wait for an answer, including the time in the server's queue.
        connect_timeout (`float`, *optional*, defaults to `5.0`):
            Seconds to wait for a connection.
        max_retries (`int`, *optional*, defaults to `6`):
            Number of times that all servers are tried again.
        name (`str`, *optional*, defaults to `"remote_reward"`):
            Name in the logs.

    Raises:
        ValueError: If a URL or the token is malformed, or a number is out of its range.

    Example:

    ```python
    >>> from trl_udm.rewards.remote import RemoteReward

    >>> reward = RemoteReward(["http://gpu-1:8765", "http://gpu-2:8765"], name="geneval_reward")
    >>> # UDMGRPOTrainer(..., reward_funcs=reward)
    ```
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        token: str | None = None,
        columns: Sequence[str] | None = None,
        max_batch_size: int = 16,
        max_connections: int = 8,
        timeout: float = 120.0,
        connect_timeout: float = 5.0,
        max_retries: int = 6,
        name: str = "remote_reward",
    ):
        self.urls = [urls] if isinstance(urls, str) else list(urls)
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"`urls` must begin with 'http://' or 'https://', got {url!r}.")
        if not self.urls:
            raise ValueError("`urls` must have at least one server, got none.")
        for argument, value in (
            ("max_batch_size", max_batch_size),
            ("max_connections", max_connections),
            ("timeout", timeout),
            ("connect_timeout", connect_timeout),
        ):
            if value <= 0:
                raise ValueError(f"`{argument}` must be > 0, got {value}.")
        if max_retries < 0:
            raise ValueError(f"`max_retries` must be >= 0, got {max_retries}.")
        self.token = token if token is not None else os.environ.get(TOKEN_VARIABLE)
        if self.token is not None:
            check_token(self.token)
        self.columns = columns
        self.max_batch_size = max_batch_size
        self.max_connections = max_connections
        self.timeout = timeout
        self.connect_timeout = connect_timeout
        self.max_retries = max_retries
        self.__name__ = name
        # A generator of its own, without a seed: processes with the same seed would all ask the same server, and
        # drawing from the global generator would change the training
        self._random = random.Random()
        self._turns = itertools.count(self._random.randrange(len(self.urls)))

    async def __call__(
        self,
        prompts: list[str],
        completions: list[Image.Image] | torch.Tensor,
        completion_ids: list[list[int]] | None = None,
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """
        Reward images.

        Args:
            prompts (`list[str]`):
                The prompts.
            completions (`list[Image.Image]` or `torch.Tensor` of shape `(B, 3, H, W)` and dtype `torch.uint8`):
                The generated images, in RGB.
            completion_ids (`list[list[int]]`, *optional*):
                Not sent.
            trainer_state ([`~transformers.TrainerState`], *optional*):
                Not sent.
            log_metric (`Callable[[str, float], None]`, *optional*):
                The trainer's logging function.
            log_extra (`Callable[[str, list[Any]], None]`, *optional*):
                The trainer's logging function of columns.
            columns (`dict[str, Any]`):
                The dataset's columns.

        Returns:
            `list[float | None]`: A reward for each image.

        Raises:
            ValueError: If the completions are not RGB images, or if a column is missing or cannot be sent.
            RuntimeError: If no server answered, or if one refused the request or failed. The message has each answer.
        """
        completions = as_pil_images(completions, len(prompts))
        if self.columns is not None:
            for name in self.columns:
                if name not in columns:
                    raise ValueError(f"`columns` must name columns of the dataset, {sorted(columns)}, got {name!r}.")
            columns = {name: columns[name] for name in self.columns}

        headers = {"Content-Type": MEDIA_TYPE}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        async with httpx2.AsyncClient(
            headers=headers,
            verify=_ssl_context(),
            timeout=httpx2.Timeout(self.timeout, connect=self.connect_timeout, pool=None),
            limits=httpx2.Limits(max_connections=self.max_connections),
        ) as client:
            batches = [slice(i, i + self.max_batch_size) for i in range(0, len(prompts), self.max_batch_size)]
            tasks = [
                asyncio.create_task(
                    self._reward_batch(
                        client,
                        prompts[batch],
                        completions[batch],
                        {name: values[batch] for name, values in columns.items()},
                    )
                )
                for batch in batches
            ]
            try:
                answers = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

        rewards = []
        for batch_rewards, metrics, extras in answers:
            rewards += batch_rewards
            if log_metric is not None:
                for name, value in metrics:
                    log_metric(name, value)
            if log_extra is not None:
                for name, values in extras:
                    log_extra(name, values)
        return rewards

    async def _reward_batch(
        self,
        client: httpx2.AsyncClient,
        prompts: list[str],
        images: list[Image.Image],
        columns: dict[str, list[Any]],
    ) -> tuple[list[float | None], list[tuple[str, float]], list[tuple[str, list[Any]]]]:
        body = await asyncio.to_thread(pack_request, prompts, images, columns)
        first = next(self._turns)
        urls = [self.urls[(first + i) % len(self.urls)] for i in range(len(self.urls))]
        answers = {}
        for num_retries in range(self.max_retries + 1):
            delay = min(0.5 * 2**num_retries, MAX_DELAY) * self._random.uniform(0.5, 1.5)
            for url in urls:
                try:
                    response = await client.post(url.rstrip("/") + REWARDS_PATH, content=body)
                except (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
                    answers[url] = f"{type(error).__name__} {error}".strip()
                    continue
                if response.status_code == 200:
                    try:
                        return unpack_response(response.content, len(prompts))
                    except ValueError as error:
                        raise RuntimeError(f"{url} does not answer as a reward server. {error}") from error
                answers[url] = f"{response.status_code} {response.text[:500]}"
                if response.status_code not in RETRIED_STATUS_CODES:
                    raise RuntimeError(f"The reward server {url} answered {answers[url]}")
                retry_after = response.headers.get("Retry-After", "")
                if retry_after.isdecimal():
                    delay = max(delay, min(float(retry_after), MAX_DELAY))
            if num_retries < self.max_retries:
                await asyncio.sleep(delay)
        raise RuntimeError(
            f"No reward server rewarded {len(prompts)} images ({len(body)} bytes) within `timeout` = {self.timeout} s "
            f"and `max_retries` = {self.max_retries}: "
            + "; ".join(f"{url} answered last {answer}" for url, answer in answers.items())
        )
