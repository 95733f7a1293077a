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

import asyncio
import concurrent.futures
import importlib
import io
import os
import pickle
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import httpx2
import msgpack
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from trl.trainer.utils import get_callable_name, is_async_callable

from trl_udm import DiversityReward
from trl_udm.rewards.loading import load_reward
from trl_udm.rewards.remote import RemoteReward, wire
from trl_udm.rewards.remote.server import create_app, serve
from trl_udm.rewards.remote.wire import RequestError, pack_request, unpack_request
from trl_udm.worlds import WORLDS
from trl_udm.worlds.shapes.prompts import corrupt, sample_scene, split_metadata
from trl_udm.worlds.shapes.world import render


ROOT = Path(__file__).parents[2]
TOKEN = "a-secret-of-the-tests"
MAX_BODY_BYTES = 200_000
RED = Image.new("RGB", (8, 8), "red")
CLIENT = httpx2.Client(timeout=10, limits=httpx2.Limits(max_keepalive_connections=0))


class Server:
    """A process of `trl-udm serve-reward`, and its log."""

    def __init__(self, folder, name, *arguments, token=None):
        self.log_path = folder / f"{name}.log"
        environment = {key: value for key, value in os.environ.items() if key != wire.TOKEN_VARIABLE}
        if token is not None:
            environment[wire.TOKEN_VARIABLE] = token
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trl_udm.cli", "serve-reward", "--port", "0", *arguments],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
            )

    @property
    def log(self):
        return self.log_path.read_text()

    def wait_until_ready(self):
        while (match := re.search(r"running on (http://127\.0\.0\.1:\d+)", self.log)) is None:
            assert self.process.poll() is None, self.log
            time.sleep(0.05)
        self.url = match[1]
        while CLIENT.get(f"{self.url}/ready").status_code != 200:
            assert self.process.poll() is None, self.log
            time.sleep(0.05)

    def post(self, body, token=None, content_type=wire.MEDIA_TYPE):
        headers = {"Content-Type": content_type}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}".encode()
        return CLIENT.post(f"{self.url}/v1/rewards", content=body, headers=headers)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    folder, module = tmp_path_factory.mktemp("servers"), "tests.rewards.served_rewards"
    (folder / "token").write_text(f"{TOKEN}\n")
    slow = ["--options", '{"value": 0.25, "delay": 2}', "--token_file", str(folder / "token")]
    limits = ["--max_batch_size", "8", "--max_body_bytes", str(MAX_BODY_BYTES), "--max_pixels", "4096"]
    servers = {
        "shapes": Server(folder, "shapes", "shapes", *limits, token=TOKEN),
        "moody": Server(folder, "moody", f"{module}:make_reward", "--max_queue", "4", "--body_timeout", "1"),
        "slow": Server(folder, "slow", f"{module}:Constant", *slow),
        "victim": Server(folder, "victim", f"{module}:Constant", "--options", '{"delay": 0.05}'),
    }
    try:
        for server in servers.values():
            server.wait_until_ready()
        yield servers
    finally:
        for server in servers.values():
            server.process.kill()
            server.process.wait()


@pytest.fixture
def shapes(servers):
    """A server of the GenEval reward of the embedded world, with a token and low limits. Alive after the test, too."""
    yield servers["shapes"]
    assert reward_shapes(servers["shapes"], num_images=2) == reward_shapes(None, num_images=2)


@pytest.fixture
def moody(servers):
    """A server of `make_reward`, without a token. Alive after the test, too."""
    yield servers["moody"]
    assert call(servers["moody"], ["a"], [RED], weight=[3.0]) == [255.0]


def call(server, prompts, images, token=None, **columns):
    return asyncio.run(RemoteReward(server.url, token=token, max_retries=0)(prompts, images, **columns))


def shapes_batch(num_images):
    rng = random.Random(0)
    rows = rng.choices(split_metadata()[0], k=num_images)
    scenes = [sample_scene(rng.choice([row, corrupt(row, rng)]), rng) for row in rows]
    columns = {key: [row[key] for row in rows] for key in ("tag", "include", "exclude")}
    return [row["prompt"] for row in rows], [render(scene) for scene in scenes], columns


def reward_shapes(server, num_images, log=None, **options):
    """By the server or, where it is None, here."""
    prompts, images, columns = shapes_batch(num_images)
    log_metric = None if log is None else lambda name, value: log.append((name, value))
    if server is None:
        return WORLDS["shapes"].make_reward()(prompts, images, log_metric=log_metric, **columns)
    return asyncio.run(RemoteReward(server.url, TOKEN, **options)(prompts, images, log_metric=log_metric, **columns))


def request_body(prompts=("a",), files=None, **fields):
    png = io.BytesIO()
    RED.save(png, format="PNG")
    message = {"version": 1, "prompts": list(prompts), "images": files or [png.getvalue()] * len(prompts)}
    return msgpack.packb({**message, "columns": {"weight": [1.0] * len(prompts)}, **fields})


def png_file(width, height, *chunks):
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


# What goes right


def test_200_requests_at_once_are_rewarded_as_they_are_here(shapes):
    here, there = [], []
    rewards = reward_shapes(shapes, 200, there, max_batch_size=1, max_connections=200)
    assert rewards == reward_shapes(None, 200, here)
    assert 0 < sum(rewards) < 200
    assert there == here


def test_a_batch_is_split_among_servers_and_comes_back_in_order(servers, moody):
    images = [Image.new("RGB", (2, 2), (value, value, value)) for value in range(40)]
    weights = [None if index % 7 == 0 else 0.5 for index in range(40)]
    expected = [None if weight is None else weight * index for index, weight in enumerate(weights)]
    logged, seen = [], []
    reward = RemoteReward([moody.url, moody.url + "/"], max_batch_size=16)
    rewards = asyncio.run(
        reward(
            prompts=[f"prompt {index}" for index in range(40)],
            completions=images,
            completion_ids=[[0]] * 40,
            trainer_state=object(),
            log_metric=lambda name, value: logged.append((name, value)),
            log_extra=lambda column, values: seen.extend(values),
            weight=weights,
        )
    )
    assert rewards == expected
    assert logged == [("brightness", 7.5), ("brightness", 23.5), ("brightness", 35.5)]
    assert seen == [f"prompt {index} {weight}" for index, weight in enumerate(weights)]


def test_pixels_arrive_as_they_are():
    pixels = torch.randint(0, 256, (3, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    columns = {"include": [[{"class": "cow", "color": None}], [], None], "weight": [1, 2.5, None]}
    prompts, arrived, arrived_columns = unpack_request(pack_request(["a", "ü", ""], images, columns), 3, 35)
    assert prompts == ["a", "ü", ""]
    assert arrived_columns == columns
    for image, other in zip(images, arrived, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(other))


def test_tensors_are_rewarded_as_images(moody):
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert call(moody, ["a", "b"], pixels, weight=[1.0, 1.0]) == [image.numpy().mean() for image in pixels]


def test_only_the_named_columns_are_sent(moody):
    with pytest.raises(ValueError, match="Column 'image' must hold numbers, .*, got Image. Name the columns that the"):
        call(moody, ["a"], [RED], weight=[3.0], image=[RED])
    reward = RemoteReward(moody.url, columns=["weight"])
    assert asyncio.run(reward(["a"], [RED], weight=[3.0], image=[RED])) == [255.0]


def test_the_token_may_come_from_the_environment(shapes, monkeypatch):
    monkeypatch.setenv(wire.TOKEN_VARIABLE, TOKEN)
    prompts, images, columns = shapes_batch(2)
    assert asyncio.run(RemoteReward(shapes.url)(prompts, images, **columns)) == reward_shapes(None, 2)


def test_the_trainer_takes_the_client_for_an_asynchronous_reward():
    reward = RemoteReward("http://127.0.0.1:1", name="geneval_reward")
    assert is_async_callable(reward)
    assert get_callable_name(reward) == "geneval_reward"
    assert not isinstance(reward, nn.Module)


def test_choosing_servers_leaves_the_global_random_state_alone():
    random.seed(0)
    state = random.getstate()
    RemoteReward(["http://a", "http://b"])
    assert random.getstate() == state


# Servers that fail


def test_another_server_takes_over_from_a_killed_one(servers, moody):
    victim = servers["victim"]
    reward = RemoteReward([victim.url, moody.url], max_batch_size=1, max_connections=4)

    def kill():
        while victim.log.count('"POST /v1/rewards HTTP/1.1" 200') < 3:
            time.sleep(0.01)
        victim.process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    rewards = asyncio.run(reward(["a"] * 60, [RED] * 60, weight=[3.0] * 60))
    killer.join()
    assert victim.process.wait() != 0
    assert set(rewards) == {0.5, 255.0}  # the victim's and the other's
    assert asyncio.run(reward(["a"] * 4, [RED] * 4, weight=[3.0] * 4)) == [255.0] * 4


def test_another_server_takes_over_from_a_slow_one(servers, moody):
    reward = RemoteReward([servers["slow"].url, moody.url], TOKEN, max_batch_size=1, timeout=0.5)
    start = time.monotonic()
    assert asyncio.run(reward(["a"] * 4, [RED] * 4, weight=[3.0] * 4)) == [255.0] * 4
    assert time.monotonic() - start < 2


def test_the_last_error_names_every_server_and_what_it_answered(servers):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}"
    reward = RemoteReward([closed, servers["slow"].url], TOKEN, timeout=0.1, max_retries=1)
    message = (
        r"No reward server rewarded 1 images \(\d+ bytes\) within `timeout` = 0.1 s and `max_retries` = 1: .*"
        rf"({closed} answered last ConnectError[^;]*(; |$)|{servers['slow'].url} answered last ReadTimeout(; |$)){{2}}"
    )
    with pytest.raises(RuntimeError, match=message):
        asyncio.run(reward(["a"], [RED]))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("raise no such word", "500 .*The reward failed: LookupError: no such word"),
        ("return nan", "500 .*ValueError: A reward must be a finite number or `None`, got nan for row 0"),
        ("return -inf", "500 .*ValueError: A reward must be a finite number or `None`, got -inf for row 0"),
        ("drop", "500 .*ValueError: A reward must return one number an image, got 0 for 1"),
    ],
)
def test_a_failed_reward_is_an_error_of_the_client(moody, prompt, message):
    with pytest.raises(RuntimeError, match=f"The reward server {moody.url} answered {message}"):
        call(moody, [prompt], [RED], weight=[1.0])


def test_others_are_rewarded_while_one_fails(moody):
    prompts = ["a", "raise an error", "b", "return nan"]

    async def call_all():
        reward = RemoteReward(moody.url)
        return await asyncio.gather(
            *[reward([prompt], [RED], weight=[3.0]) for prompt in prompts], return_exceptions=True
        )

    first, error, second, other_error = asyncio.run(call_all())
    assert first == second == [255.0]
    assert "LookupError: an error" in str(error) and "got nan" in str(other_error)


def test_a_full_queue_is_refused_until_there_is_room(moody):
    body = request_body(["sleep 0.3"])
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: moody.post(body), range(8)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [200] * 5 + [503] * 3  # one is rewarded, four wait
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert refused.headers["Retry-After"] == "1"
    assert refused.json() == {"error": "5 requests are waiting already."}
    rewards = asyncio.run(RemoteReward(moody.url, max_batch_size=1)(["sleep 0.05"] * 8, [RED] * 8, weight=[3.0] * 8))
    assert rewards == [255.0] * 8


def test_another_service_is_not_taken_for_a_reward_server():
    class Other:
        def __init__(self, connection):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\n<html>")
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=lambda: Other(listener.accept()[0]))
        thread.start()
        with pytest.raises(RuntimeError, match=f"{url} does not answer as a reward server. .* got b'<html>'"):
            asyncio.run(RemoteReward(url)(["a"], [RED]))
        thread.join()


# Requests that are refused


class EndlessBody:
    """A body without a length, which counts what the client could send of it."""

    def __init__(self):
        self.num_bytes = 0

    def __iter__(self):
        while self.num_bytes < 500_000_000:
            self.num_bytes += 65536
            yield bytes(65536)


@pytest.mark.parametrize("token", [None, "wrong", TOKEN[:-1], TOKEN + "x", "é"])
def test_a_wrong_token_is_refused_before_the_body_is_read(shapes, token):
    body = EndlessBody()
    answer = shapes.post(body, token)
    assert (answer.status_code, answer.json()) == (401, {"error": "The bearer token is missing or wrong."})
    assert body.num_bytes < 50_000_000


@pytest.mark.parametrize(
    ("options", "num_images", "status_code"), [({"token": "x"}, 1, 401), ({"max_batch_size": 9}, 9, 413)]
)
def test_what_is_wrong_with_the_request_is_not_tried_again(shapes, options, num_images, status_code):
    prompts, images, columns = shapes_batch(num_images)
    num_before = shapes.log.count(f" {status_code} ")
    with pytest.raises(RuntimeError, match=f"The reward server {shapes.url} answered {status_code} "):
        asyncio.run(RemoteReward(shapes.url, **{"token": TOKEN, **options})(prompts, images, **columns))
    assert shapes.log.count(f" {status_code} ") == num_before + 1


@pytest.mark.parametrize(("content_type", "status_code"), [(wire.MEDIA_TYPE, 400), ("application/octet-stream", 415)])
def test_a_pickle_is_not_executed(moody, tmp_path, content_type, status_code):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    assert moody.post(pickle.dumps(Bomb()), content_type=content_type).status_code == status_code
    assert list(tmp_path.iterdir()) == []


def test_a_client_that_sends_before_it_listens_reads_why_it_is_refused(moody):
    async def post():
        async with httpx2.AsyncClient() as client:
            return await client.post(f"{moody.url}/v1/rewards", content=bytes(5_000_000))

    assert asyncio.run(post()).status_code == 415


def test_an_oversized_body_is_refused(shapes):
    answer = shapes.post(bytes(MAX_BODY_BYTES + 1), TOKEN)
    assert (answer.status_code, answer.json()) == (413, {"error": "The body must have at most 200000 bytes."})


def test_a_body_without_a_length_is_read_up_to_the_limit(shapes):
    body = EndlessBody()
    assert shapes.post(body, TOKEN).status_code == 413
    assert body.num_bytes < 50_000_000


def test_a_body_without_a_length_that_ends_just_beyond_the_limit_is_refused(shapes):
    assert shapes.post(iter([bytes(MAX_BODY_BYTES), b"1"]), TOKEN).status_code == 413


def test_a_body_that_does_not_arrive_is_given_up(moody):
    port = int(moody.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        head = f"POST /v1/rewards HTTP/1.1\r\nHost: a\r\nContent-Type: {wire.MEDIA_TYPE}\r\nContent-Length: 9\r\n\r\n"
        connection.sendall(head.encode() + b"half")
        assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")


def bomb_of_pixels():
    return png_file(9_000, 9_000, (b"IDAT", zlib.compress(bytes(10_000_000))))


def bomb_beyond_pillow():
    return png_file(2_000_000, 2_000_000, (b"IDAT", zlib.compress(bytes(10_000_000))))


def bomb_of_text():
    return png_file(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000))))


def bomb_of_a_profile():
    return png_file(8, 8, (b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000))))


def jpeg_file():
    file = io.BytesIO()
    RED.save(file, format="JPEG")
    return file.getvalue()


def transparent_file():
    file = io.BytesIO()
    RED.convert("RGBA").save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("make_file", "status_code", "message"),
    [
        (bomb_of_pixels, 413, "`images[0]` must have at most 4096 pixels"),
        (bomb_beyond_pillow, 413, "`images[0]` must have at most 4096 pixels"),
        (bomb_of_text, 422, "`images[0]` must be a readable PNG file"),
        (bomb_of_a_profile, 422, "`images[0]` must be a readable PNG file"),
        (jpeg_file, 422, r"`images[0]` must be a readable PNG file, got one that begins with b'\xff\xd8"),
        (transparent_file, 422, "`images[0]` must be an RGB image, got mode 'RGBA'."),
        (lambda: png_file(8, 8), 422, "`images[0]` must be a readable PNG file"),
        (lambda: png_file(8, 8)[:20], 422, "`images[0]` must be a readable PNG file"),
        (lambda: b"", 422, "`images[0]` must be a readable PNG file"),
    ],
)
def test_an_image_that_is_no_small_png_is_refused(shapes, make_file, status_code, message):
    answer = shapes.post(request_body(files=[make_file()]), TOKEN)
    assert answer.status_code == status_code
    assert answer.json()["error"].startswith(message)


def nest(depth):
    value = None
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("body", "status_code", "message"),
    [
        (b"", 400, "The body must be a map in MessagePack"),
        (request_body()[:-1], 400, "The body must be a map in MessagePack"),
        (request_body() + b"\xc0", 400, "The body must be a map in MessagePack"),
        (msgpack.packb([1, 2, 3, 4]), 400, "The body must be a map in MessagePack"),
        (msgpack.packb({}), 400, "The body must be a map in MessagePack"),
        (b"\x84" + b"\x91" * 100_000, 400, "The body must be a map in MessagePack"),
        (request_body(columns={1: [1]}), 400, "The body must be a map in MessagePack"),
        (request_body(columns={"a": [msgpack.ExtType(5, b"a")]}), 400, "The body must be a map in MessagePack"),
        (request_body(columns={"a": [msgpack.Timestamp(0)]}), 400, "The body must be a map in MessagePack"),
        (request_body(columns=[0] * 16_385), 400, "The body must be a map in MessagePack"),
        (
            b"\x84" + b"\xa1a\xc0" * 4,
            422,
            "A request must have the fields ['columns', 'images', 'prompts', 'version']",
        ),
        (request_body(version=2), 422, "`version` must be 1. Install the same trl-udm on both sides."),
        (request_body(prompts=[], images=[]), 422, "`images` must be a list of at least one PNG file."),
        (request_body(images=["text"]), 422, "`images` must be PNG files as binaries."),
        (request_body(prompts=["a"], images=[b"", b""]), 422, "`prompts` must be a list, one for each image."),
        (request_body(images=[b""] * 9), 413, "A request must have at most 8 images, got 9."),
        (request_body(prompts=[1]), 422, "`prompts` must be strings."),
        (request_body(columns=[]), 422, "`columns` must be a map of JSON-like values."),
        (request_body(columns={"a": [b"bytes"]}), 422, "`columns` must be a map of JSON-like values."),
        (request_body(columns={b"a": [1]}), 422, "`columns` must be a map of JSON-like values."),
        (request_body(columns={"a": [nest(40)]}), 422, "`columns` must be a map of JSON-like values."),
        (request_body(columns={"a": 1}), 422, "Column 'a' must be a list with a value for each of 1 images."),
        (request_body(columns={"a": [1, 2]}), 422, "Column 'a' must be a list with a value for each of 1 images."),
        (request_body(columns={"log_metric": [1]}), 422, "A column must not be named 'log_metric'"),
        (request_body(columns={"a": [{}] * 16_000}) + bytes(5_000_000), 413, "Prompts and columns must have at most"),
        (request_body(images=[["x" * 5_000_000]]), 413, "Prompts and columns must have at most 4194304 bytes, got "),
    ],
)
def test_a_malformed_request_is_refused(body, status_code, message):
    with pytest.raises(RequestError, match=f"^{re.escape(message)}") as refused:
        unpack_request(body, max_batch_size=8, max_pixels=4096)
    assert refused.value.status_code == status_code


def test_a_damaged_request_is_refused_or_read_but_never_breaks():
    rng = random.Random(0)
    body = request_body(["a", "b"], columns={"include": [[{"class": "cow", "count": 1}], None]})
    num_refused = 0
    for _ in range(2000):
        damaged = bytearray(body)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            unpack_request(bytes(damaged), 8, 4096)
        except RequestError:
            num_refused += 1
    assert num_refused > 1000


def test_an_unknown_address_is_an_error_like_others(moody):
    answer = CLIENT.get(f"{moody.url}/docs")
    assert (answer.status_code, answer.json()) == (404, {"error": "Not Found"})


# Starting


def test_the_server_says_when_the_reward_is_loaded():
    loading = concurrent.futures.Future()
    transport = httpx2.ASGITransport(create_app(loading))
    headers = {"Content-Type": wire.MEDIA_TYPE}

    async def ask():
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            answers = [await client.get("/health"), await client.get("/ready")]
            answers.append(await client.post("/v1/rewards", content=request_body(), headers=headers))
        return [answer.status_code for answer in answers]

    assert asyncio.run(ask()) == [200, 503, 503]
    loading.set_result(lambda prompts, **columns: [1.0])
    assert asyncio.run(ask()) == [200, 200, 200]


def test_a_reward_that_cannot_be_loaded_stops_the_server():
    with pytest.raises(ValueError, match="cannot be imported: No module named 'no_such_module'"):
        serve(lambda: load_reward("no_such_module:reward"), port=0)
    with pytest.raises(ValueError, match="must not be one of whole groups, got 'diversity_reward': a request may"):
        serve(DiversityReward, port=0)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "gpu-1"])
def test_other_machines_are_not_served_without_a_token(host):
    message = f"`host` must be a loopback address where there is no token, got '{host}'. Set `token`"
    with pytest.raises(ValueError, match=re.escape(message)):
        serve(WORLDS["shapes"].make_reward, host=host)


@pytest.mark.parametrize("token", ["", "two words", "line\n", "é"])
def test_a_token_that_is_no_token_is_refused(token):
    with pytest.raises(ValueError, match="`token` must be of visible ASCII characters, at least one"):
        create_app(concurrent.futures.Future(), token)
    with pytest.raises(ValueError, match="`token` must be of visible ASCII characters, at least one"):
        RemoteReward("http://127.0.0.1:1", token)


@pytest.mark.parametrize(
    "name", ["max_batch_size", "max_body_bytes", "max_pixels", "max_concurrency", "max_queue", "body_timeout"]
)
def test_a_limit_that_is_not_positive_is_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be > 0, got 0."):
        create_app(concurrent.futures.Future(), **{name: 0})


def test_rewards_are_made_with_their_options():
    assert load_reward("ocr", {"partial": True}).__name__ == "ocr_partial_reward"
    assert load_reward("tests.rewards.served_rewards:Constant", {"value": 0.1}).value == 0.1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("geneva", "`name` must be one of ('geneval', 'ocr', "),
        (
            "tests.rewards.served_rewards:make_reward",
            "`options` must be empty for tests.rewards.served_rewards:make_reward, which is not a class, got {'a': 1}",
        ),
    ],
)
def test_an_unknown_reward_or_option_is_refused(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_reward(name, {"a": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"urls": []}, "`urls` must have at least one server, got none."),
        ({"urls": "127.0.0.1:8765"}, "`urls` must begin with 'http://' or 'https://', got '127.0.0.1:8765'."),
        ({"max_batch_size": 0}, "`max_batch_size` must be > 0, got 0."),
        ({"max_connections": 0}, "`max_connections` must be > 0, got 0."),
        ({"timeout": 0}, "`timeout` must be > 0, got 0."),
        ({"connect_timeout": -1}, "`connect_timeout` must be > 0, got -1."),
        ({"max_retries": -1}, "`max_retries` must be >= 0, got -1."),
    ],
)
def test_impossible_clients_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RemoteReward(**{"urls": "http://a", **arguments})


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        (
            torch.zeros(1, 3, 8, 8),
            "`completions` must be PIL images or a torch.uint8 tensor of shape (B, 3, H, W), got a torch.f",
        ),
        ([RED.convert("L")], "`completions[0]` must be an RGB image, got mode 'L'. Convert it first."),
    ],
)
def test_completions_that_are_no_rgb_images_are_refused(completions, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        asyncio.run(RemoteReward("http://127.0.0.1:1")(["a"], completions))


@pytest.mark.parametrize(
    ("missing", "module"),
    [("msgpack", "wire"), ("fastapi", "server"), ("uvicorn", "server")],
)
def test_a_missing_extra_is_named(monkeypatch, missing, module):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"trl_udm.rewards.remote.{module}")
    with pytest.raises(ImportError, match=r"Run `pip install trl-udm\[server\]`."):
        importlib.import_module(f"trl_udm.rewards.remote.{module}")
