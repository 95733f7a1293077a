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

"""A warning of prompts that are cut, once for each object that reads them."""

import logging


logger = logging.getLogger(__name__)


class CutPromptWarning:
    """
    Warns of prompts that are longer than a network reads, the first time that there are some.

    Args:
        reader (`str`):
            What reads the prompts, for the message.
    """

    def __init__(self, reader: str):
        self.reader = reader
        self.is_told = False

    def check(self, prompts: list[str], num_tokens: list[int], max_num_tokens: int) -> None:
        """
        Args:
            prompts (`list[str]`):
                Prompts.
            num_tokens (`list[int]`):
                The number of tokens of each.
            max_num_tokens (`int`):
                The number of tokens that are read.
        """
        cut = [prompt for prompt, count in zip(prompts, num_tokens, strict=True) if count > max_num_tokens]
        if cut and not self.is_told:
            self.is_told = True
            logger.warning(
                f"{len(set(cut))} of {len(set(prompts))} prompts are longer than the {max_num_tokens} tokens that "
                f"{self.reader} reads, and are cut. The first is {cut[0]!r}. Further ones are not told."
            )
