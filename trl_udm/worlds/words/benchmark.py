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

"""What is measured in the world of words: the OCR reward on 60 evaluation words."""

from typing import Any

from ...rewards.ocr import OCRReward
from .prompts import split_words


PROMPT_OPTIONS = {"task": "ocr"}


def make_reward(**options: Any) -> OCRReward:
    """
    Makes the reward of the world: OCR that takes the whole image for one line of text.

    Args:
        options (`dict[str, Any]`):
            Arguments of [`OCRReward`].

    Returns:
        [`OCRReward`]: The reward.
    """
    return OCRReward(**{"detect_text": False, **options})


def load_eval_rows() -> list[dict[str, Any]]:
    """
    Lists the evaluation prompts.

    Returns:
        `list[dict]`: Rows with `prompt` and `target_text`.
    """
    return split_words()[1]
