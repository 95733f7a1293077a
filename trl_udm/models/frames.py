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

"""The numbers of frames that a video tokenizer takes."""

import numbers
from typing import Any


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
