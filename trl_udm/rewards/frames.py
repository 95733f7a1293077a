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

"""Rewards of videos: any reward of images on their frames, and measures of their motion that need no weights."""

import inspect
import itertools
import math
import reprlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from ..cut_prompts import PromptCutter, expect_prompts
from ..image_grid import Picture, pick_frames
from ..reward_values import get_reward_flag, get_reward_name, read_rewards, unwrap_reward


class FrameReward(PromptCutter):
    r"""
    A reward of images on the frames of videos.

    The reward is called once for all frames of a batch. Each frame comes with the prompt and the columns of its video.
    If the reward abstains from a frame, the others count. If it abstains from all frames of a video, so does this
    one. It is asynchronous if the reward is, and it has the reward's name.

    Args:
        reward (`Callable`):
            Reward function `f(prompts, completions, **columns) -> list[float | None]` of PIL images.
        frames (`str` or `int`, *optional*, defaults to `"middle"`):
            The frames that are scored: `"first"`, `"middle"`, `"last"`, `"all"`, or a number of frames at equal
            distances. An image is a video of one frame.
        reduce (`str`, *optional*, defaults to `"mean"`):
            What the reward of a video is of those of its frames: `"mean"` or `"min"`.

    Raises:
        TypeError: If `reward` is no function.
        ValueError: If `frames` or `reduce` is none of these, or the reward is one of whole groups (`groupwise`) and
            `frames` may be more than one of a video.

    Example:

    ```python
    >>> import numpy as np
    >>> from PIL import Image
    >>> from trl_udm import FrameReward

    >>> def brightness(completions, **kwargs):
    ...     return [float(np.asarray(image).mean()) / 255 for image in completions]

    >>> video = [Image.new("RGB", (8, 8), color) for color in ("black", "white", "white")]
    >>> FrameReward(brightness, frames="all", reduce="min")(prompts=["a lamp"], completions=[video])
    [0.0]
    ```
    """

    def __init__(
        self,
        reward: Callable,
        frames: Literal["first", "middle", "last", "all"] | int = "middle",
        reduce: Literal["mean", "min"] = "mean",
    ):
        if not callable(reward):
            raise TypeError(f"`reward` must be a function of PIL images, got {reward!r}.")
        is_number = isinstance(frames, int) and not isinstance(frames, bool) and frames > 0
        if not is_number and frames not in ("first", "middle", "last", "all"):
            raise ValueError(f"`frames` must be 'first', 'middle', 'last', 'all' or a number > 0, got {frames!r}.")
        if reduce not in ("mean", "min"):
            raise ValueError(f"`reduce` must be 'mean' or 'min', got {reduce!r}.")
        self.__name__ = get_reward_name(reward)
        self.logs_samples = get_reward_flag(reward, "logs_samples")
        self.groupwise = get_reward_flag(reward, "groupwise")
        if self.groupwise and frames not in ("first", "middle", "last", 1):
            raise ValueError(
                f"`frames` must be 'first', 'middle', 'last' or 1 for a reward of whole groups, got {frames!r}: "
                f"'{self.__name__}' would take the frames of a video for samples."
            )
        self.reward = reward
        self.frames = frames
        self.reduce = reduce

    # `GRPOTrainer` awaits what has an asynchronous `__call__`
    def __new__(cls, reward: Any = None, *args: Any, **kwargs: Any):
        function = unwrap_reward(reward)
        is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
        return super().__new__(_AsyncFrameReward if is_async else cls)

    def expect_prompts(self, prompts: Sequence[str]) -> None:
        expect_prompts(prompts, [self.reward])

    def __call__(self, prompts: list[Any], completions: list[Picture], **kwargs: Any) -> Any:
        """
        Rewards videos.

        Args:
            prompts (`list`):
                B prompts.
            completions (`list[list[PIL.Image.Image]]`):
                Their videos, which may differ in length, or images.
            kwargs:
                Columns of the dataset, and what else the trainer passes.

        Returns:
            `list[float | None]`: The rewards, or a coroutine that gives them.

        Raises:
            TypeError: If a completion is neither an image nor frames.
        """
        arguments, sizes = self._split(prompts, completions, kwargs)
        return self._join(self.reward(**arguments), arguments["prompts"], sizes)

    def _split(
        self, prompts: list[Any], completions: list[Picture], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], list[int]]:
        """The arguments of the reward, and how many frames each video has among them."""
        videos = [self._pick(read_video(completion)) for completion in completions]
        sizes = list(map(len, videos))

        def repeat(value: Any) -> Any:
            if not isinstance(value, list) or len(value) != len(sizes):
                return value
            return [entry for entry, size in zip(value, sizes, strict=True) for _ in range(size)]

        arguments = {name: repeat(value) for name, value in {**kwargs, "prompts": prompts}.items()}
        if "log_extra" in kwargs:
            arguments["log_extra"] = lambda column, values: kwargs["log_extra"](
                column, [frames[0] if len(frames) == 1 else frames for frames in _group(values, sizes)]
            )
        return {**arguments, "completions": [frame for frames in videos for frame in frames]}, sizes

    def _pick(self, frames: list[Image.Image]) -> list[Image.Image]:
        if self.frames in ("first", "last"):
            return frames[:1] if self.frames == "first" else frames[-1:]
        if self.frames == "all":
            return frames
        return pick_frames(frames, 1 if self.frames == "middle" else int(self.frames))

    def _join(self, returned: Any, prompts: list[Any], sizes: list[int]) -> list[float | None]:
        rewards: list[float | None] = []
        for values in _group(read_rewards(self.__name__, returned, prompts), sizes):
            known = [value for value in values if value is not None]
            is_mean = self.reduce == "mean" or any(map(math.isnan, known))  # which is then NaN
            rewards.append(None if not known else statistics.fmean(known) if is_mean else min(known))
        return rewards


class _AsyncFrameReward(FrameReward):
    async def __call__(self, prompts: list[Any], completions: list[Picture], **kwargs: Any) -> list[float | None]:
        arguments, sizes = self._split(prompts, completions, kwargs)
        return self._join(await self.reward(**arguments), arguments["prompts"], sizes)


def _group(values: Sequence[Any], sizes: list[int]) -> list[list[Any]]:
    remaining = iter(values)
    return [list(itertools.islice(remaining, size)) for size in sizes]


def read_video(completion: Any) -> list[Image.Image]:
    """
    The frames of a completion.

    Args:
        completion (`list[PIL.Image.Image]` or `PIL.Image.Image`):
            A video, or an image, which is a video of one frame.

    Returns:
        `list[PIL.Image.Image]`: The frames.

    Raises:
        TypeError: If it is neither.
    """
    frames = [completion] if isinstance(completion, Image.Image) else completion
    if isinstance(frames, list | tuple) and frames and all(isinstance(frame, Image.Image) for frame in frames):
        return list(frames)
    raise TypeError(f"`completions` must be lists of PIL images, or PIL images, got {reprlib.repr(completion)}.")


def motion_amount(completions: list[Picture], **kwargs: Any) -> list[float | None]:
    """
    How much videos move: the mean absolute difference of a channel from one frame to the next. A model that learns to
    please a reward of single frames often stands still.

    Args:
        completions (`list[list[PIL.Image.Image]]`):
            Videos.

    Returns:
        `list[float | None]`: A number in `[0, 1]` for each video, 0 if it stands still, and `None` for an image.

    Example:

    ```python
    >>> from PIL import Image
    >>> from trl_udm.rewards.frames import motion_amount

    >>> motion_amount([[Image.new("RGB", (8, 8), color) for color in ("black", "white", "white")]])
    [0.5]
    ```
    """
    changes = [_subtract_frames(read_video(completion)) for completion in completions]
    return [float(np.abs(change).mean()) / 255 if len(change) > 0 else None for change in changes]


def flicker(completions: list[Picture], **kwargs: Any) -> list[float | None]:
    """
    How much videos flicker: the mean part of a channel's change that the next frame takes back. What fades, and edges
    that move on, do not count.

    Args:
        completions (`list[list[PIL.Image.Image]]`):
            Videos.

    Returns:
        `list[float | None]`: A number in `[0, 1]` for each video, 1 if black and white frames alternate, and `None`
        for fewer than three frames.

    Example:

    ```python
    >>> from PIL import Image
    >>> from trl_udm.rewards.frames import flicker

    >>> flicker([[Image.new("RGB", (8, 8), color) for color in ("black", "white", "black")]])
    [1.0]
    ```
    """
    rewards: list[float | None] = []
    for completion in completions:
        change = _subtract_frames(read_video(completion))
        taken_back = np.minimum(np.abs(change[:-1]), np.abs(change[1:])) * (
            np.sign(change[:-1]) == -np.sign(change[1:])
        )
        rewards.append(float(taken_back.mean()) / 255 if len(change) > 1 else None)
    return rewards


def _subtract_frames(frames: list[Image.Image]) -> np.ndarray:
    """The change from each frame to the next, (T - 1, H, W, 3)."""
    return np.diff([np.asarray(frame.convert("RGB"), dtype=np.int16) for frame in frames], axis=0)
