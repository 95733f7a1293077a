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

"""Checks of what a trainer is built from."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..pipelines.pipeline_udm import UDMPipeline
from .udm_grpo_config import UDMGRPOConfig


def check_modality(pipeline: UDMPipeline, args: UDMGRPOConfig, reward_funcs: Callable | list[Callable]) -> None:
    """Raises a `TypeError` or `ValueError` if a reward or an option is for text, and the samples are not."""
    if pipeline.modality == "text":
        return
    for reward_func in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if isinstance(reward_func, nn.Module | str):
            got = repr(reward_func) if isinstance(reward_func, str) else f"a `{type(reward_func).__name__}`"
            raise TypeError(
                f"`reward_funcs` must be functions where samples are {pipeline.modality}s, got {got}: a reward model "
                "scores text. Give a function that calls it."
            )
    if args.chat_template_kwargs:
        raise ValueError(
            f"`chat_template_kwargs` must be None for `{type(pipeline).__name__}`, got {args.chat_template_kwargs}: "
            "it applies no chat template."
        )


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

    def denoise(noised_samples: torch.LongTensor) -> torch.Tensor:
        prompt_ids, prompt_mask = pipeline.extend_prompt(*encoded, noised_samples)
        return pipeline.denoise(prompt_ids, prompt_mask, noised_samples, latent_shape, t=t)[0, [first, last]]  # (2, V)

    def change(changed: slice) -> torch.LongTensor:
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
