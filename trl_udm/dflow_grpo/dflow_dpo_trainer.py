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

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .dflow_grpo_config import DFlowGRPOConfig
from .dflow_grpo_trainer import DFlowGRPOTrainer


MAX_LOG_RATIO = 5.0
"""Logarithms of the ratios of tokens are clamped to plus or minus this value, as in the authors' code."""


@dataclass
class DFlowDPOConfig(DFlowGRPOConfig):
    r"""
    Configuration of [`DFlowDPOTrainer`].

    It has the arguments of [`DFlowGRPOConfig`] and those below. Those for clipping and for the KL divergence have no
    effect.

    Args:
        dpo_beta (`float`, *optional*, defaults to `100.0`):
            Factor β of the difference of log-ratios, in `(0, inf)`.
        num_pairs (`int`, *optional*, defaults to `1`):
            Number of pairs of a group: the best with the worst sample, the second best with the second worst, and so
            on, in `[1, num_generations / 2]`.

    Raises:
        ValueError: If a value is out of its range, or the pairs of a batch cannot be split into its parts.
    """

    dpo_beta: float = field(default=100.0, metadata={"help": "Factor of the difference of log-ratios."})
    num_pairs: int = field(default=1, metadata={"help": "Pairs of best and worst samples of a group."})

    def __post_init__(self):
        super().__post_init__()
        steps, num_rows = self.steps_per_generation, self.num_generations * self.num_train_timesteps
        num_groups, rest = divmod(self.per_device_train_batch_size * steps, num_rows)
        num_pair_rows = num_groups * self.num_pairs * self.num_train_timesteps
        for name, is_valid, rule in (
            ("dpo_beta", 0 < self.dpo_beta < math.inf, "> 0"),
            ("num_pairs", 1 <= self.num_pairs <= self.num_generations // 2, "in [1, `num_generations` / 2]"),
            ("beta", self.beta == 0.0, "0: pairs are compared with the policy that drew them"),
            ("drop_zero_variance", not self.drop_zero_variance, "False: pairs of equal reward are left out anyway"),
            ("negative_advantage_scale", self.negative_advantage_scale > 0, "> 0: it orders the samples of a group"),
        ):
            if not is_valid:
                raise ValueError(f"`{name}` must be {rule}, got {getattr(self, name)!r}.")
        if rest or num_pair_rows % steps:
            raise ValueError(
                f"A process must draw whole groups of {num_rows} rows, whose {self.num_pairs} * "
                f"{self.num_train_timesteps} rows of pairs fill its {steps} steps equally, got "
                f"{num_groups + rest / num_rows:g} groups. Change `per_device_train_batch_size`, or lower "
                "`steps_per_generation`."
            )


class DFlowDPOTrainer(DFlowGRPOTrainer):
    r"""
    Direct preference optimization (https://huggingface.co/papers/2305.18290) on the best and the worst samples of a
    group, as the baseline of dFlowGRPO: [`DFlowGRPOTrainer`] with the loss

        softplus(−β · (δ⁺ − δ⁻)),    δ = mean of the tokens' log r,

    where δ⁺ and δ⁻ are those of the two samples in the same step, and r is the ratio to the policy that drew them. A
    row is a pair and a step. The tensors of the worse sample have `rejected_` before their names. Pairs of equal
    reward are left out. In evaluation, the loss is that of dFlowGRPO.
    """

    args: DFlowDPOConfig
    _config_class = DFlowDPOConfig

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super()._generate_and_score_completions(inputs)
        return self._pair_rows(batch) if self.model.training else batch

    def _pair_rows(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rows of pairs, from the rows of whole groups in order."""
        num_timesteps, num_pairs = self.args.num_train_timesteps, self.args.num_pairs
        advantages = batch["advantages"][::num_timesteps].unflatten(0, (-1, self.num_generations))  # (P, G)
        order = advantages.argsort(dim=1, descending=True, stable=True)
        first = torch.arange(len(order), device=order.device).unsqueeze(1) * self.num_generations
        winners, losers = order[:, :num_pairs], order.flip(1)[:, :num_pairs]  # (P, p)
        is_pair = advantages.gather(1, winners) > advantages.gather(1, losers)

        def find_rows(samples: torch.Tensor) -> torch.Tensor:  # (P, p) to (P * p * K,)
            steps = torch.arange(num_timesteps, device=samples.device)
            return ((first + samples).unsqueeze(-1) * num_timesteps + steps).flatten()

        rows = {name: tensor for name, tensor in batch.items() if tensor.ndim > 0}
        pairs = {name: tensor[find_rows(winners)] for name, tensor in rows.items()}
        pairs |= {f"rejected_{name}": tensor[find_rows(losers)] for name, tensor in rows.items()}
        weights = is_pair / is_pair.float().mean().clamp(min=1 / is_pair.numel())  # whose mean is 1
        return {**pairs, "pair_weights": weights.flatten().repeat_interleave(num_timesteps)}

    def _compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        names = [name for name in inputs if f"rejected_{name}" in inputs]
        both = {name: torch.cat([inputs[name], inputs[f"rejected_{name}"]]) for name in names}
        log_ratio = self._compute_log_ratios(model, both, "train")[0].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # (2B, N)
        mask = both["completion_mask"].float()
        better, worse = ((log_ratio * mask).sum(dim=1) / mask.sum(dim=1)).chunk(2)  # (B,)
        losses = nn.functional.softplus(-self.args.dpo_beta * (better - worse))
        is_right = (better > worse).float()
        self._log_mean("train", "dpo/accuracy", is_right * inputs["pair_weights"])
        return (losses * inputs["pair_weights"]).mean() / self.current_gradient_accumulation_steps
