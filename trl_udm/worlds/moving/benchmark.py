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

"""What is measured in the world that moves: the share of right videos of 120 evaluation prompts."""

from typing import Any

from ..shapes.prompts import balance_metadata
from .prompts import EVAL_NUM_PROMPTS, split_metadata
from .reward import MovingReward


PROMPT_OPTIONS: dict[str, Any] = {}


def make_reward(**options: Any) -> MovingReward:
    """
    Makes the reward of the world.

    Args:
        options (`dict[str, Any]`):
            Arguments of [`MovingReward`].

    Returns:
        [`MovingReward`]: The reward.
    """
    return MovingReward(**options)


def load_eval_rows() -> list[dict[str, Any]]:
    """
    Lists the evaluation prompts, the same number of each kind.

    Returns:
        `list[dict]`: Rows with `prompt`, `tag` and `include`.
    """
    return balance_metadata(split_metadata()[1], EVAL_NUM_PROMPTS)
