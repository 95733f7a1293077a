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

"""A check that the network of a pipeline reads the whole sample."""

import math
from typing import Any

import torch

from .pipeline_udm import UDMPipeline


@torch.no_grad()
def check_bidirectional(
    pipeline: UDMPipeline, prompt: Any, latent_shape: tuple[int, ...], **chat_template_kwargs: Any
) -> None:
    """
    Raises a `ValueError` if the network is causal: its output at the last token of a sample depends on the first one,
    but its output at the first token on none of the others. Only the last axis of the sample is probed, because a
    family may draw a sample part by part along the others.
    """
    num_tokens, codebook_size = math.prod(latent_shape), pipeline.scheduler.config.codebook_size
    first, last = num_tokens - latent_shape[-1], num_tokens - 1
    if first == last:
        return
    encoded = pipeline.encode_prompt([prompt], **chat_template_kwargs)
    samples = torch.arange(num_tokens, device=encoded[0].device).unsqueeze(0) % codebook_size  # (1, N)
    t = torch.full((1,), 0.5, device=samples.device)

    def denoise(noised_samples: torch.Tensor) -> torch.Tensor:
        prompt_ids, prompt_mask = pipeline.extend_prompt(*encoded, noised_samples)
        return pipeline.denoise(prompt_ids, prompt_mask, noised_samples, latent_shape, t=t)[0, [first, last]]  # (2, V)

    def change(changed: slice) -> torch.Tensor:
        others = samples.clone()
        others[:, changed] = (others[:, changed] + 1) % codebook_size
        return others

    at_first, at_last = denoise(samples)
    if not torch.equal(at_first, denoise(change(slice(first + 1, None)))[0]):
        return
    if not torch.equal(at_last, denoise(change(slice(first, first + 1)))[1]):
        raise ValueError(
            f"`pipeline.transformer` must be bidirectional, got a causal `{type(pipeline.transformer).__name__}`: its "
            "output at a token depends on earlier tokens of the sample and on no later one. Use a network such as "
            "`AutoModelForMaskedLM` loads."
        )
