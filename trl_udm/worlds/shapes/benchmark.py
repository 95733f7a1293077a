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

"""What is measured in the world of shapes: GenEval's rule on 120 evaluation prompts."""

from typing import Any

from ...rewards.geneval import GenEvalReward
from .detector import ShapesColorClassifier, ShapesDetector
from .prompts import EVAL_NUM_PROMPTS, balance_metadata, split_metadata
from .world import CLASS_NAMES


PROMPT_OPTIONS = {"task": "geneval", "class_names": CLASS_NAMES}


def make_reward(**options: Any) -> GenEvalReward:
    """
    Makes the reward of the world: GenEval with the world's own detector and color classifier.

    Args:
        options (`dict[str, Any]`):
            Other arguments of [`GenEvalReward`].

    Returns:
        [`GenEvalReward`]: The reward.
    """
    return GenEvalReward(ShapesDetector(), ShapesColorClassifier(), **options)


def load_eval_rows() -> list[dict[str, Any]]:
    """
    Lists the evaluation prompts, the same number of each kind.

    Returns:
        `list[dict]`: Rows with `prompt`, `tag`, `include` and `exclude`.
    """
    return balance_metadata(split_metadata()[1], EVAL_NUM_PROMPTS)
