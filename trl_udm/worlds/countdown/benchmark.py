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

"""What is measured in the world of Countdown: the share of right expressions in 400 evaluation puzzles."""

from typing import Any

from ...data.puzzles import generate_puzzles
from ..sudoku.benchmark import PROMPT_OPTIONS as PROMPT_OPTIONS
from ..sudoku.benchmark import make_reward as make_reward  # one verifier for all puzzles


def load_eval_rows() -> list[dict[str, Any]]:
    """
    Lists the evaluation puzzles.

    Returns:
        `list[dict]`: Rows with `prompt`, `task`, `puzzle` and `solution`.
    """
    return generate_puzzles("countdown", 400, "eval")
