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

"""What is measured in the world of sums: the share of right sums in 400 evaluation problems."""

from collections.abc import Callable
from typing import Any

from .problems import split_problems, sum_reward


PROMPT_OPTIONS: dict[str, Any] = {}


def make_reward() -> Callable[..., list[float]]:
    """
    Makes the reward of the world.

    Returns:
        `Callable`: [`sum_reward`].
    """
    return sum_reward


def load_eval_rows() -> list[dict[str, Any]]:
    """
    Lists the evaluation problems.

    Returns:
        `list[dict]`: Rows with `prompt` and `answer`.
    """
    return split_problems()[1]
