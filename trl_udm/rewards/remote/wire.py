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
The messages between the reward server and its client.

A request is `POST /v1/rewards` with a MessagePack map of four fields:

    {"version": 1, "prompts": [str, ...], "images": [PNG file, ...], "columns": {str: [value, ...], ...}}

All lists have the length of the batch. The answer is

    {"rewards": [float or nil, ...], "metrics": [[str, float], ...], "extras": [[str, [value, ...]], ...]}

with the arguments of the reward's calls of `log_metric` and `log_extra`. Values have the types of JSON: nothing in a
message can name a class or be executed. Images are RGB, and PNG is lossless.
"""

import io
import math
from typing import Any

from PIL import Image


try:
    import msgpack
except ImportError as error:
    raise ImportError("Remote rewards need MessagePack. Run `pip install trl-udm[server]`.") from error


VERSION = 1
REWARDS_PATH = "/v1/rewards"
MEDIA_TYPE = "application/msgpack"
TOKEN_VARIABLE = "TRL_UDM_REWARD_TOKEN"
"""Environment variable from which the command `trl-udm serve-reward` and the client read the token."""

# The part of a request that is not the content of images. One byte of it can become an object of 64 bytes or more, so
# it has a limit of its own, lower than that of the body.
MAX_METADATA_BYTES = 4 * 1024 * 1024
# MessagePack allocates a list as soon as it has read the length.
MAX_LIST_LENGTH = 16_384
MAX_DEPTH = 32

# The first byte of a MessagePack binary whose length has 8, 16 or 32 bits
_BINARY = (0xC4, 0xC5, 0xC6)
_RESERVED_COLUMNS = {"prompts", "completions", "log_metric", "log_extra"}


class RequestError(Exception):
    """
    Raised for a request that the server refuses.

    Args:
        status_code (`int`):
            The HTTP status of the answer.
        message (`str`):
            The text of the answer.
    """

    def __init__(self, status_code: int, message: str):
        super().__init__(message)
        self.status_code = status_code


def check_token(token: str) -> None:
    """
    Refuse a token that an HTTP header cannot carry. The message does not show it.

    Args:
        token (`str`):
            The token.

    Raises:
        ValueError: If it is empty or has other characters than visible ASCII.
    """
    if not token or not all("!" <= character <= "~" for character in token):
        raise ValueError("`token` must be of visible ASCII characters, at least one, got something else.")


def pack_request(prompts: list[str], images: list[Image.Image], columns: dict[str, list[Any]]) -> bytes:
    """
    Write a request.

    Args:
        prompts (`list[str]`):
            The prompts.
        images (`list[Image.Image]`):
            An RGB image for each prompt.
        columns (`dict[str, list[Any]]`):
            The dataset's columns, with a JSON-like value for each prompt.

    Returns:
        `bytes`: The body.

    Raises:
        ValueError: If an image is not RGB, or if a value of a column has no type of JSON.
    """
    for name, values in columns.items():
        if not _is_json_like(values):
            raise ValueError(
                f"Column {name!r} must hold numbers, strings, `None`, and lists and dicts of these, got "
                f"{type(values[0]).__name__}. Name the columns that the reward needs in `columns`."
            )
    files = []
    for index, image in enumerate(images):
        if image.mode != "RGB":
            raise ValueError(
                f"`completions[{index}]` must be an RGB image, got mode {image.mode!r}. Convert it first."
            )
        file = io.BytesIO()
        image.save(file, format="PNG", compress_level=1)  # as lossless as the default 6, in a quarter of its time
        files.append(file.getvalue())
    return msgpack.packb({"version": VERSION, "prompts": prompts, "images": files, "columns": columns})


def unpack_request(
    body: bytes, max_batch_size: int, max_pixels: int
) -> tuple[list[str], list[Image.Image], dict[str, list[Any]]]:
    """
    Read a request, which may be malicious.

    Args:
        body (`bytes`):
            The body.
        max_batch_size (`int`):
            Largest number of images in a request.
        max_pixels (`int`):
            Largest number of pixels of an image. It is checked before the image is decoded.

    Returns:
        `tuple[list[str], list[Image.Image], dict[str, list[Any]]]`: Prompts, images and columns.

    Raises:
        RequestError: If the request is refused. The status is 400 if the body is not MessagePack, 413 if there are too
        many images, pixels or other data, and 422 if anything else breaks the protocol.
    """
    try:
        num_metadata_bytes = _count_metadata_bytes(body, max_batch_size)
        if num_metadata_bytes > MAX_METADATA_BYTES:
            raise RequestError(
                413, f"Prompts and columns must have at most {MAX_METADATA_BYTES} bytes, got {num_metadata_bytes}."
            )
        message = msgpack.unpackb(body, max_array_len=MAX_LIST_LENGTH, max_map_len=MAX_LIST_LENGTH, max_ext_len=0)
    except (ValueError, msgpack.UnpackException) as error:
        raise RequestError(400, f"The body must be a map in MessagePack: {type(error).__name__} {error}") from error

    def require(holds: bool, rule: str) -> None:
        if not holds:
            raise RequestError(422, rule)

    fields = {"version", "prompts", "images", "columns"}
    require(set(message) == fields, f"A request must have the fields {sorted(fields)} and no others.")
    version, prompts, files, columns = (message[field] for field in ("version", "prompts", "images", "columns"))
    require(version == VERSION, f"`version` must be {VERSION}. Install the same trl-udm on both sides.")
    require(isinstance(files, list) and len(files) > 0, "`images` must be a list of at least one PNG file.")
    require(all(isinstance(file, bytes) for file in files), "`images` must be PNG files as binaries.")
    require(isinstance(prompts, list) and len(prompts) == len(files), "`prompts` must be a list, one for each image.")
    require(all(isinstance(prompt, str) for prompt in prompts), "`prompts` must be strings.")
    require(isinstance(columns, dict) and _is_json_like(columns), "`columns` must be a map of JSON-like values.")
    for name, values in columns.items():
        require(name not in _RESERVED_COLUMNS, f"A column must not be named {name!r}: every reward has that argument.")
        is_column = isinstance(values, list) and len(values) == len(files)
        require(is_column, f"Column {name!r} must be a list with a value for each of {len(files)} images.")
    return prompts, [_decode_image(file, index, max_pixels) for index, file in enumerate(files)], columns


def pack_response(
    rewards: list[float | None], metrics: list[tuple[str, float]], extras: list[tuple[str, list[Any]]]
) -> bytes:
    """
    Write an answer.

    Args:
        rewards (`list[float | None]`):
            The rewards.
        metrics (`list[tuple[str, float]]`):
            Arguments of the reward's calls of `log_metric`.
        extras (`list[tuple[str, list[Any]]]`):
            Arguments of its calls of `log_extra`.

    Returns:
        `bytes`: The body.

    Raises:
        ValueError: If a reward is infinite or NaN.
    """
    for index, reward in enumerate(rewards):
        if reward is not None and not math.isfinite(reward):
            raise ValueError(f"A reward must be a finite number or `None`, got {reward} for row {index}.")
    return msgpack.packb({"rewards": rewards, "metrics": metrics, "extras": extras})


def unpack_response(
    body: bytes, num_images: int
) -> tuple[list[float | None], list[tuple[str, float]], list[tuple[str, list[Any]]]]:
    """
    Read an answer.

    Args:
        body (`bytes`):
            The body.
        num_images (`int`):
            Number of rewards that are expected.

    Returns:
        `tuple`: The arguments of [`pack_response`].

    Raises:
        ValueError: If the body is not an answer for this number of images.
    """
    try:
        message = msgpack.unpackb(body)
        rewards, metrics, extras = (message[field] for field in ("rewards", "metrics", "extras"))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"The answer must be a reward server's, got {body[:64]!r}.") from error
    if len(rewards) != num_images:
        raise ValueError(f"The answer must have {num_images} rewards, got {len(rewards)}.")
    return rewards, metrics, extras


def _count_metadata_bytes(body: bytes, max_batch_size: int) -> int:
    """Count the bytes that are not the content of images, without unpacking them."""
    unpacker = msgpack.Unpacker(max_buffer_size=len(body))
    unpacker.feed(body)
    if unpacker.read_map_header() != 4:
        raise ValueError("four fields are expected")
    num_bytes = len(body)
    for _ in range(4):
        start = unpacker.tell()
        unpacker.skip()
        if body[start : unpacker.tell()] != msgpack.packb("images"):
            unpacker.skip()
            continue
        num_images = unpacker.read_array_header()
        if num_images > max_batch_size:
            raise RequestError(413, f"A request must have at most {max_batch_size} images, got {num_images}.")
        for _ in range(num_images):
            start = unpacker.tell()
            unpacker.skip()
            if body[start] in _BINARY:
                num_bytes -= unpacker.tell() - start
    return num_bytes


def _is_json_like(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (list, tuple)):
        return depth < MAX_DEPTH and all(_is_json_like(item, depth + 1) for item in value)
    if isinstance(value, dict):
        return depth < MAX_DEPTH and all(
            isinstance(key, str) and _is_json_like(item, depth + 1) for key, item in value.items()
        )
    return value is None or isinstance(value, (bool, int, float, str))


def _decode_image(file: bytes, index: int, max_pixels: int) -> Image.Image:
    too_large = f"`images[{index}]` must have at most {max_pixels} pixels"
    try:
        image = Image.open(io.BytesIO(file), formats=("PNG",))  # reads the header
        if image.width * image.height > max_pixels:
            raise RequestError(413, f"{too_large}, got {image.width} x {image.height}.")
        pixels = image.tobytes()
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        raise RequestError(413, f"{too_large}. {error}") from error
    except Exception as error:  # Pillow raises many classes for a broken file
        message = f"`images[{index}]` must be a readable PNG file, got one that begins with {file[:8]!r}"
        raise RequestError(422, f"{message} ({type(error).__name__}).") from error
    if image.mode != "RGB":
        raise RequestError(422, f"`images[{index}]` must be an RGB image, got mode {image.mode!r}.")
    # A new image, without the text chunks of up to 64 MiB that Pillow has unpacked into the old one
    return Image.frombytes("RGB", image.size, pixels)
