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

"""
The server of a reward: on another machine, in another environment, or on a GPU that several training processes share.

[`create_app`] makes the server and [`serve`] runs it. The client is [`~trl_udm.rewards.remote.RemoteReward`]. The
format of the messages is in [`trl_udm.rewards.remote.wire`].
"""

import asyncio
import contextlib
import inspect
import ipaddress
import logging
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from PIL import Image

from ...reward_values import get_reward_flag, get_reward_name, read_rewards
from .wire import MEDIA_TYPE, REWARDS_PATH, RequestError, check_token, pack_response, unpack_request


try:
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise ImportError("The reward server needs FastAPI and uvicorn. Run `pip install trl-udm[server]`.") from error


logger = logging.getLogger(__name__)


class _Refusal(HTTPException):
    """A refusal before the request's body has been read."""


def create_app(
    loading: Future,
    token: str | None = None,
    max_batch_size: int = 64,
    max_body_bytes: int = 64 * 1024 * 1024,
    max_pixels: int = 2048 * 2048,
    max_concurrency: int = 1,
    max_queue: int = 256,
    body_timeout: float = 30.0,
) -> FastAPI:
    """
    Make the server's application.

    `GET /health` answers as long as the process lives, and `GET /ready` once the reward is loaded. Neither needs a
    token. `POST /v1/rewards` rewards a batch. The body of an error is `{"error": text}` in JSON:

    | status | reason |
    |---|---|
    | 400 | the body is not MessagePack |
    | 401 | the bearer token is missing or wrong |
    | 408 | the body did not arrive in time |
    | 413 | the body, the batch or an image is too large |
    | 415 | the content type is not `application/msgpack` |
    | 422 | the request does not have the protocol's fields, or an image is not an RGB PNG |
    | 500 | the reward raised, or did not return a finite number or `None` for each image |
    | 503 | the reward is still being loaded, or too many requests wait. The answer has `Retry-After` |

    A request waits for its turn before its body is read. So at most `max_concurrency + 1` bodies are in memory: those
    that are being rewarded, and the next. If a request is refused before its body is read, up to `max_body_bytes` of
    the body are received and dropped, and then the connection is closed.

    Args:
        loading (`concurrent.futures.Future`):
            Its result is the reward, a synchronous or asynchronous function in TRL's form. It is called with
            `prompts`, `completions` (RGB images), `log_metric`, `log_extra` and the dataset's columns.
        token (`str`, *optional*):
            The token that clients must send as `Authorization: Bearer <token>`.
        max_batch_size (`int`, *optional*, defaults to `64`):
            Largest number of images in a request.
        max_body_bytes (`int`, *optional*, defaults to `67108864`):
            Largest size of a body. Reading stops there.
        max_pixels (`int`, *optional*, defaults to `4194304`):
            Largest number of pixels of an image.
        max_concurrency (`int`, *optional*, defaults to `1`):
            Number of calls of the reward at a time, each in a thread. More than one needs a thread-safe reward.
        max_queue (`int`, *optional*, defaults to `256`):
            Largest number of requests that wait for their turn.
        body_timeout (`float`, *optional*, defaults to `30.0`):
            Seconds for a body to arrive, counted from the request's turn.

    Returns:
        `FastAPI`: The application.

    Raises:
        ValueError: If a limit is not positive, or if the token is empty or not of visible ASCII characters.
    """
    for name, value in (
        ("max_batch_size", max_batch_size),
        ("max_body_bytes", max_body_bytes),
        ("max_pixels", max_pixels),
        ("max_concurrency", max_concurrency),
        ("max_queue", max_queue),
        ("body_timeout", body_timeout),
    ):
        if value <= 0:
            raise ValueError(f"`{name}` must be > 0, got {value}.")
    if token is not None:
        check_token(token)

    app = FastAPI(title="trl-udm reward server", docs_url=None, redoc_url=None, openapi_url=None)
    reading = asyncio.Semaphore(max_concurrency + 1)
    rewarding = asyncio.Semaphore(max_concurrency)
    num_requests = 0

    @app.exception_handler(HTTPException)
    async def answer_error(request: Request, error: HTTPException) -> JSONResponse:
        headers = {**(error.headers or {}), "Connection": "close"}
        return JSONResponse({"error": error.detail}, error.status_code, headers)

    @app.exception_handler(_Refusal)
    async def refuse(request: Request, error: _Refusal) -> JSONResponse:
        # Clients send the whole body before they read the answer. They would lose the answer if the connection were
        # closed earlier, so the body is received and dropped up to a limit
        num_bytes = 0
        # Starlette raises a RuntimeError if the body has already been read to its end
        with contextlib.suppress(TimeoutError, ClientDisconnect, RuntimeError):
            async with asyncio.timeout(body_timeout):
                async for chunk in request.stream():
                    num_bytes += len(chunk)
                    if num_bytes > max_body_bytes:
                        break
        return await answer_error(request, error)

    def check_ready() -> None:
        if not loading.done():
            raise _Refusal(503, "The reward is being loaded.", {"Retry-After": "5"})

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        check_ready()
        return {"status": "ready"}

    @app.post(REWARDS_PATH)
    async def reward_batch(request: Request) -> Response:
        nonlocal num_requests
        authorization = request.headers.get("Authorization", "")
        if token is not None and not secrets.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
            raise _Refusal(401, "The bearer token is missing or wrong.", {"WWW-Authenticate": "Bearer"})
        if request.headers.get("Content-Type") != MEDIA_TYPE:
            raise _Refusal(415, f"The body must be declared as {MEDIA_TYPE}.")
        too_long = _Refusal(413, f"The body must have at most {max_body_bytes} bytes.")
        if int(request.headers.get("Content-Length", 0)) > max_body_bytes:  # the HTTP parser has checked the digits
            raise too_long
        check_ready()
        if num_requests >= max_concurrency + max_queue:
            raise _Refusal(503, f"{num_requests} requests are waiting already.", {"Retry-After": "1"})

        num_requests += 1
        try:
            async with reading:
                chunks, num_bytes = [], 0
                try:
                    async with asyncio.timeout(body_timeout):
                        async for chunk in request.stream():
                            chunks.append(chunk)
                            num_bytes += len(chunk)
                            if num_bytes > max_body_bytes:
                                raise too_long
                    prompts, images, columns = await asyncio.to_thread(
                        unpack_request, b"".join(chunks), max_batch_size, max_pixels
                    )
                except TimeoutError as error:
                    raise HTTPException(408, f"The body must arrive within {body_timeout} seconds.") from error
                except RequestError as error:
                    raise HTTPException(error.status_code, str(error)) from error
                async with rewarding:
                    if await request.is_disconnected():
                        raise ClientDisconnect
                    answer = await asyncio.to_thread(_call, loading.result(), prompts, images, columns)
        except ClientDisconnect as error:  # nobody will read this answer
            raise HTTPException(400, "The client has gone.") from error
        finally:
            num_requests -= 1
        return Response(answer, media_type=MEDIA_TYPE)

    return app


def _call(reward: Callable, prompts: list[str], images: list[Image.Image], columns: dict[str, list[Any]]) -> bytes:
    """Reward a batch and pack the answer."""
    metrics, extras = [], []
    try:
        rewards = reward(
            prompts=prompts,
            completions=images,
            log_metric=lambda name, value: metrics.append((name, float(value))),
            log_extra=lambda column, values: extras.append((column, list(values))),
            **columns,
        )
        if inspect.iscoroutine(rewards):
            rewards = asyncio.run(rewards)
        if len(rewards) != len(prompts):
            raise ValueError(f"A reward must return one number an image, got {len(rewards)} for {len(prompts)}.")
        return pack_response(read_rewards(get_reward_name(reward), rewards, prompts), metrics, extras)
    except Exception as error:  # the reward may be any code, and the client raises this error
        logger.exception("The reward failed on %d images.", len(images))
        raise HTTPException(500, f"The reward failed: {type(error).__name__}: {error}") from error


def serve(
    load: Callable[[], Callable], host: str = "127.0.0.1", port: int = 8765, token: str | None = None, **limits: Any
) -> None:
    """
    Run a reward server until it is stopped. The reward is loaded in a thread. If that fails, the server stops.

    Args:
        load (`Callable[[], Callable]`):
            A function that makes the reward.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen on.
        port (`int`, *optional*, defaults to `8765`):
            Port to listen on. 0 chooses a free port.
        token (`str`, *optional*):
            As in [`create_app`]. It is required if other machines can reach `host`.
        limits (`dict[str, Any]`):
            The other arguments of [`create_app`].

    Raises:
        ValueError: If other machines can reach `host` and there is no token, if the reward is one of whole groups
            (`groupwise`), or as in [`create_app`].
    """
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name may stand for any address
        is_loopback = False
    if token is None and not is_loopback:
        raise ValueError(
            f"`host` must be a loopback address where there is no token, got {host!r}. Set `token`: on the command "
            "line, by the environment variable TRL_UDM_REWARD_TOKEN or by `--token_file`."
        )
    loading: Future[Callable] = Future()
    app = create_app(loading, token, **limits)
    config = uvicorn.Config(app, host, port, http="h11", ws="none", lifespan="off", proxy_headers=False)
    server = uvicorn.Server(config)

    def load_in_background() -> None:
        try:
            reward = load()
            if get_reward_flag(reward, "groupwise"):
                raise ValueError(
                    f"The reward must not be one of whole groups, got '{get_reward_name(reward)}': a request may have "
                    "a part of a group. Compute it in the training process."
                )
            loading.set_result(reward)
        except Exception as error:
            loading.set_exception(error)
            server.should_exit = True

    threading.Thread(target=load_in_background, daemon=True).start()
    server.run()
    if loading.done():
        loading.result()  # raises the error that stopped the server
