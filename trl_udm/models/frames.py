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

"""Frames of videos: how many a tokenizer takes, and those that users hand in as a tensor."""

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image


def check_num_frames(name: str, num_frames: Any, temporal_stride: int, limit: int | None = None) -> None:
    """
    Checks that a video tokenizer takes a number of frames, and gives it back.

    Args:
        name (`str`):
            What has the frames, for the error message.
        num_frames (`int`):
            The number.
        temporal_stride (`int`):
            Number of frames that a token covers.
        limit (`int`, *optional*):
            Largest number. By default there is none.

    Raises:
        ValueError: If it is not 1 more than a multiple of the stride, or above the limit.
    """
    is_integer = isinstance(num_frames, numbers.Integral) and not isinstance(num_frames, bool)
    if is_integer and 1 <= num_frames <= (limit or num_frames) and (num_frames - 1) % temporal_stride == 0:
        return
    number = float(num_frames) if isinstance(num_frames, numbers.Real) else 1.0
    num_steps = max(0, round((number - 1) / temporal_stride))
    if limit is not None:
        num_steps = min(num_steps, (limit - 1) // temporal_stride)
    rule = f"1 more than a multiple of {temporal_stride}" if temporal_stride > 1 else "a number > 0"
    at_most = "" if limit is None else f", and at most {limit}"
    raise ValueError(
        f"{name} must be {rule}{at_most}, got {num_frames!r}: the video tokenizer does not give other numbers of "
        f"frames back. Try {1 + num_steps * temporal_stride}."
    )


def read_frames(name: str, videos: Sequence[Sequence[Any]], height: int, width: int) -> torch.Tensor:
    """
    Makes one tensor of videos.

    Args:
        name (`str`):
            Name of the argument, for the error message.
        videos (`list` of lists):
            Frames of each video: RGB images of PIL, arrays or tensors of shape `(height, width, 3)` or `(3, height,
            width)`, of `uint8` or of floats in `[0, 1]`.
        height (`int`):
            Height that they must have.
        width (`int`):
            Width that they must have.

    Returns:
        `torch.FloatTensor` of shape `(num_videos, 3, num_frames, height, width)`: Frames in `[-1, 1]`.

    Raises:
        TypeError: If a frame is none of these.
        ValueError: If a frame has another size, another mode or values out of range, or the videos differ in length.
    """
    lengths = sorted({len(frames) for frames in videos})
    if len(lengths) != 1 or lengths[0] == 0:
        raise ValueError(
            f"`{name}` must have one number of frames for all samples, got {lengths}. Cut the videos to the shortest "
            "one, or call the pipeline once for each number."
        )
    return torch.stack(
        [torch.stack([_read_frame(name, frame, height, width) for frame in frames], dim=1) for frames in videos]
    )


def _read_frame(name: str, frame: Any, height: int, width: int) -> torch.Tensor:
    if isinstance(frame, Image.Image):
        if frame.mode != "RGB":
            raise ValueError(f"`{name}` must be RGB, got mode {frame.mode!r}. Pass `image.convert('RGB')`.")
        frame = np.array(frame)
    if isinstance(frame, np.ndarray):
        frame = torch.from_numpy(frame)
    if not isinstance(frame, torch.Tensor):
        raise TypeError(f"`{name}` must be made of PIL images, arrays or tensors, got {type(frame).__name__}.")
    if frame.shape == (height, width, 3):
        frame = frame.permute(2, 0, 1)
    if frame.shape != (3, height, width):
        raise ValueError(
            f"`{name}` must have the size of the output, {height} pixels high and {width} wide, and 3 channels, got "
            f"shape {tuple(frame.shape)}. Resize it, or pass its `height` and `width`."
        )
    if frame.dtype == torch.uint8:
        return (frame.float() - 127.5) / 127.5
    if not frame.is_floating_point() or not ((frame >= 0) & (frame <= 1)).all():
        raise ValueError(f"`{name}` must be `uint8`, or floats in [0, 1], got {frame.dtype} in another range.")
    return frame.float() * 2 - 1
