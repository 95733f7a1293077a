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

"""A policy that draws the samples of several updates."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..trainer.adapters import replaced_weights
from ..weights import load_tensors, save_tensors


OLD_POLICY_NAME = "old_policy.safetensors"
"""File in a checkpoint that has the trained weights of the policy that draws the samples."""


class OldPolicyMixin:
    """
    A copy of the trained weights that draws the samples, where `args.old_policy_steps` asks for one. It becomes the
    current policy again in the first rollout that is that many steps later.

    Needs `args`, `model`, `state` and `accelerator` of [`~transformers.Trainer`].
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._old_weights: dict[nn.Parameter, torch.Tensor] = {}
        self._old_step = 0
        if self.args.old_policy_steps is not None and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                f"`old_policy_steps` must be None with DeepSpeed and FSDP, got {self.args.old_policy_steps}: they do "
                "not keep whole weights in each process. Use DDP, or draw samples from the current policy."
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if self.args.old_policy_steps is None or not self.model.training:
            return super()._generate_and_score_completions(inputs)
        if not self._old_weights or self.state.global_step - self._old_step >= self.args.old_policy_steps:
            self._old_weights = {weight: weight.detach().clone() for _, weight in self._trained_weights()}
            self._old_step = self.state.global_step
        with replaced_weights(self._old_weights):
            return super()._generate_and_score_completions(inputs)

    def _trained_weights(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]

    def _save_rng_state(self, output_dir: str) -> None:
        if self._old_weights and self.args.should_save:
            weights = {name: self._old_weights[weight] for name, weight in self._trained_weights()}
            save_tensors({**weights, "step": torch.tensor(self._old_step)}, Path(output_dir, OLD_POLICY_NAME))
        super()._save_rng_state(output_dir)

    def _load_rng_state(self, checkpoint: str) -> None:
        super()._load_rng_state(checkpoint)
        path = Path(checkpoint, OLD_POLICY_NAME)
        if path.exists():  # unless that run had no old policy
            weights = load_tensors(path)
            self._old_step = int(weights["step"])
            self._old_weights = {weight: weights[name].to(weight.device) for name, weight in self._trained_weights()}
