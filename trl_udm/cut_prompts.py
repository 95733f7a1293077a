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
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


class PromptCutter:
    """What reads the first tokens of a prompt only. It warns of longer prompts, the first time that there are some."""

    _expected_prompts: tuple[str, ...] = ()
    _is_cut_told = False

    def expect_prompts(self, prompts: Sequence[str]) -> None:
        """
        Announces prompts, so that the warning counts all that will be cut.

        Args:
            prompts (`Sequence[str]`):
                The prompts of a run, before the first of them is read.
        """
        self._expected_prompts = (*self._expected_prompts, *prompts)

    def _warn_of_cut_prompts(
        self,
        prompts: list[str],
        tokenizer: PreTrainedTokenizerBase,
        max_num_tokens: int,
        reader: str,
        prefix: str = "",
    ) -> None:
        """
        Args:
            prompts (`list[str]`):
                Prompts that are read now. Those that are expected are counted with them, once.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Counts their tokens.
            max_num_tokens (`int`):
                The number of tokens that are read.
            reader (`str`):
                What reads the prompts, for the message.
            prefix (`str`, *optional*, defaults to `""`):
                What is read before each prompt.
        """
        if self._is_cut_told:
            return
        # Without the empty prompt, which guidance adds
        unique = [prompt for prompt in dict.fromkeys((*self._expected_prompts, *prompts)) if prompt]
        self._expected_prompts = ()
        cut = []
        for start in range(0, len(unique), 1024):
            part = unique[start : start + 1024]
            ids = tokenizer([prefix + prompt for prompt in part], verbose=False)["input_ids"]
            cut += [prompt for prompt, tokens in zip(part, ids, strict=True) if len(tokens) > max_num_tokens]
        if cut:
            self._is_cut_told = True
            logger.warning(
                f"{len(cut)} of {len(unique)} prompts are longer than the {max_num_tokens} tokens that {reader} "
                f"reads, and are cut. The first is {cut[0]!r}. Further ones are not told."
            )


def expect_prompts(prompts: Sequence[str], readers: Iterable[object]) -> None:
    """
    Announces the prompts of a run to the pipelines and rewards that will read them. Each [`PromptCutter`] among them
    then counts the tokens of all prompts when it reads the first, which takes a second or two for 50,000.

    Args:
        prompts (`Sequence[str]`):
            The prompts.
        readers (`Iterable[object]`):
            The pipelines and rewards.
    """
    for reader in readers:
        if isinstance(reader, PromptCutter):
            reader.expect_prompts(prompts)
