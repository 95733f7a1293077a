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


"""A bonus for samples that differ from the others of their group."""

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from torch.nn import functional


class DiversityReward:
    """
    The mean distance of a sample to the others of its group, as a reward function for [`UDMGRPOTrainer`].

    The distance of two samples is the share of tokens in which they differ, up to the end of the longer one. With
    `embed`, it is 1 minus the cosine of their features. A sample without others has no reward.

    Its weight must be small. Alone, it is the greatest for noise.

    Args:
        embed (`Callable[[list], torch.Tensor]`, *optional*):
            Features `(B, D)` of B completions, such as those of CLIP.
        name (`str`, *optional*, defaults to `"diversity_reward"`):
            Name in the logs.

    Example:

    ```python
    >>> from trl_udm.rewards.diversity import DiversityReward

    >>> reward = DiversityReward()
    >>> reward(["a"] * 3, ["x", "x", "y"], completion_ids=[[1, 2], [1, 2], [1, 3]])
    [0.25, 0.25, 0.5]
    ```
    """

    groupwise = True

    def __init__(self, embed: Callable[[list[Any]], torch.Tensor] | None = None, name: str = "diversity_reward"):
        self.embed = embed
        self.__name__ = name

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """
        Reward the samples of a group.

        Args:
            prompts (`list`):
                The prompt, once for each sample.
            completions (`list`):
                The samples.
            completion_ids (`list[list[int]]`, *optional*):
                Their tokens. Needed without `embed`.
            kwargs (`dict[str, Any]`):
                Not used.

        Returns:
            `list[float | None]`: The mean distance to the others, or `None` for a sample without others.

        Raises:
            ValueError: If there are neither tokens nor `embed`.
        """
        num_samples = len(completions)
        if num_samples < 2:
            return [None] * num_samples
        if self.embed is not None:
            features = functional.normalize(self.embed(completions).cpu().double(), dim=-1)  # (G, D)
            distances = 1 - features @ features.T  # (G, G)
        elif completion_ids is not None:
            columns = torch.tensor([*zip_longest(*completion_ids, fillvalue=-1)])  # (N, G), no token is -1
            first, second = columns.unsqueeze(1), columns.unsqueeze(2)
            num_tokens = ((first >= 0) | (second >= 0)).sum(dim=0).clamp(min=1)  # (G, G)
            distances = (first != second).sum(dim=0) / num_tokens.double()
        else:
            raise ValueError("`completion_ids` must be given without `embed`, got None. The trainer gives them.")
        return ((distances.sum(dim=1) - distances.diagonal()) / (num_samples - 1)).tolist()
