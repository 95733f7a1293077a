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

import dataclasses
from typing import Any

import torch

from ..pipelines.pipeline_output import UDMSamplerOutput


@dataclasses.dataclass
class Rollout:
    """
    Samples that the policy drew for B prompts.

    Args:
        prompt_ids (`torch.LongTensor` of shape `(B, T)`):
            Conditioning to score the samples with.
        prompt_mask (`torch.Tensor` of shape `(B, T)`):
            Its mask.
        output ([`UDMSamplerOutput`]):
            The samples (B, N) and, where asked for, the sampler's trajectory.
        completions (`list`):
            The decoded samples: B PIL images, videos or strings.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    output: UDMSamplerOutput
    completions: list[Any]
