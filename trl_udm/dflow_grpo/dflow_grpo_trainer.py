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
import textwrap
from typing import Any

import torch
from torch import nn
from trl.extras.profiling import profiling_decorator

from ..models.layers import without_checkpointing
from ..pipelines.pipeline_output import UDMSamplerOutput
from ..trainer.udm_grpo_trainer import Rollout, UDMGRPOTrainer
from .dflow_grpo_config import DFlowGRPOConfig, check_scheduler
from .old_policy import OldPolicyMixin


class DFlowGRPOTrainer(OldPolicyMixin, UDMGRPOTrainer):
    r"""
    Trainer for dFlowGRPO (https://huggingface.co/papers/2605.09291): [`UDMGRPOTrainer`] with steps of the sampler as
    actions, in place of clean samples.

    A step moves each token from its state x_t to the next one, x_s, given a clean token x₁ ~ p_θ(· | x_t, c). It does
    so with a probability b(x₁) that the scheduler knows. From n draws x₁ʲ of the policy p_old that drew the sample,
    the ratio of the probabilities of the step is estimated token by token:

        r = Σ_j b(x₁ʲ) · p_θ(x₁ʲ) / p_old(x₁ʲ) / Σ_j b(x₁ʲ).

    The sampler uses the first draw, and the others only make the ratio less noisy. Since the draws are exchangeable,
    this is the same as to jump with the mean of all b. So the expectation of r is exactly 1, and its gradient at p_θ =
    p_old is the policy gradient. The ratio ρ of a row, which is one *(sample, step)* pair, is the geometric mean of
    its tokens' ratios. With δ the mean of log(Σ_j b p_θ / p_old / Σ_j b p_ref / p_old), the loss is

        −min(ρ Â, clip(ρ, 1 − ε, 1 + ε_high) Â) + β · (exp(δ) − 1 − δ).

    Advantages are divided by the sample standard deviation plus 1e-8. All else, and the arguments, are those of
    [`UDMGRPOTrainer`].

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from trl_udm import DFlowGRPOConfig, DFlowGRPOTrainer, TextUDMPipeline
    >>> from trl_udm.worlds.sums import CHECKPOINT_PATH
    >>> from trl_udm.worlds.sums.problems import split_problems, sum_reward

    >>> trainer = DFlowGRPOTrainer(
    ...     TextUDMPipeline.from_pretrained(CHECKPOINT_PATH),
    ...     sum_reward,
    ...     DFlowGRPOConfig("sums-dflow", max_steps=1, bf16=False),
    ...     train_dataset=Dataset.from_list(split_problems()[0]),
    ... )
    >>> trainer.train()
    ```
    """

    args: DFlowGRPOConfig
    _config_class = DFlowGRPOConfig
    _std_correction, _std_epsilon = 1, 1e-8
    _tag_names = ["trl", "trl-udm", "dflow-grpo"]
    _name = "dFlowGRPO"
    _paper = {
        "title": "dFlowGRPO: Rate-Aware Policy Optimization for Discrete Flow Models",
        "id": "2605.09291",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{wan2026dflowgrpo,
                title        = {{dFlowGRPO: Rate-Aware Policy Optimization for Discrete Flow Models}},
                author       = {Zhengyan Wan and Yidong Ouyang and Panwen Hu and Qiang Sun},
                year         = 2026,
                eprint       = {arXiv:2605.09291},
            }"""),
    }

    def __init__(self, pipeline: Any, reward_funcs: Any, args: DFlowGRPOConfig | None = None, **kwargs: Any):
        super().__init__(pipeline, reward_funcs, args, **kwargs)
        check_scheduler(self.args, pipeline.scheduler)
        average_rates = {"average_rates": True} if self.args.average_rates else {}
        self._sampler_kwargs = {"step_kwargs": {"num_draws": self.args.num_draws, **average_rates}}

    @torch.no_grad()
    def _score_rows(self, rollout: Rollout, mode: str) -> dict[str, torch.Tensor]:
        """The rows (B * K) of B samples: their steps, and what the ratios and the KL divergence are computed from."""
        clean_samples = rollout.output.clean_samples
        num_samples, device = len(clean_samples), clean_samples.device
        group_size = self.num_generations if mode == "train" and self.args.shared_noise else 1
        timesteps = self._draw_timesteps(num_samples, group_size, device).squeeze(1)  # (B * K,)
        rows = torch.arange(num_samples, device=device).repeat_interleave(self.args.num_train_timesteps)  # (B * K,)
        states, steps = find_steps(self.pipeline.scheduler, rollout.output, rows, timesteps)
        batch = {
            "prompt_ids": torch.cat([rollout.prompt_ids[rows], states], dim=1),
            "prompt_mask": rollout.prompt_mask[rows],
            "completion_mask": self._mask_actions(rollout.output, clean_samples[rows]),
            **steps,
        }
        generate_every = self.args.steps_per_generation * self.num_iterations  # generation frequency
        with without_checkpointing(self.model):
            # As in `UDMGRPOTrainer`: with one update of the policy that drew the samples, the current one is the old
            is_old = self.args.old_policy_steps is not None
            if is_old or self.args.gradient_accumulation_steps % generate_every != 0:
                batch["old_per_token_logps"] = self._score_draws(self.model, batch, mode)[0]
            if self.beta != 0.0 and self.args.kl_reference == "initial":
                with self._reference_weights() as reference:
                    batch["ref_per_token_logps"] = self._score_draws(reference, batch, mode)[0]
        return batch

    @profiling_decorator
    def _score_draws(self, model: nn.Module, batch: dict[str, torch.Tensor], mode: str) -> tuple[torch.Tensor, ...]:
        """Log-probabilities of the draws (B, N, n), and entropies (B, N)."""
        args = self.args
        batch_size = args.per_device_train_batch_size if mode == "train" else args.per_device_eval_batch_size
        names, scores = ("prompt_ids", "prompt_mask", "draws", "t"), []
        for ids, prompt_mask, draws, t in zip(*(batch[name].split(batch_size) for name in names), strict=True):
            prompt_ids, states = ids.split([prompt_mask.size(1), draws.size(1)], dim=1)
            with self.accelerator.autocast():
                inputs = (prompt_ids, prompt_mask, states, self.latent_shape, draws, t)
                scores.append(self.pipeline.score(model, *inputs))
        logps, entropies = zip(*scores, strict=True)
        return torch.cat(logps), torch.cat(entropies)

    def _compute_log_ratios(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], mode: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logarithms of the tokens' ratios to the old policy and, with `beta`, to the reference, each (B, N)."""
        logps, entropies = self._score_draws(model, inputs, mode)  # (B, N, n), (B, N)
        transition_logps = inputs["transition_logps"]
        old_logps = inputs.get("old_per_token_logps", logps.detach())
        numerator = log_mean_exp(transition_logps + logps - old_logps)  # (B, N)
        log_ratio = numerator - log_mean_exp(transition_logps)
        log_ratio_to_reference = None
        if self.beta != 0.0:
            log_ratio_to_reference = log_ratio
            if self.args.kl_reference == "initial":
                ref_logps = inputs["ref_per_token_logps"]
                log_ratio_to_reference = numerator - log_mean_exp(transition_logps + ref_logps - old_logps)
        self._log_mean(mode, "entropy", entropies)
        return log_ratio, log_ratio_to_reference

    def _log_mean(self, mode: str, name: str, values: torch.Tensor, weights: float | torch.Tensor = 1.0) -> None:
        weights = torch.as_tensor(weights, device=values.device).expand_as(values)
        mean = (values.detach() * weights).sum() / weights.sum().clamp(min=1e-8)
        self._metrics[mode][name].append(self.accelerator.gather(mean).mean().item())

    def _compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        args, mode = self.args, "train" if self.model.training else "eval"
        log_ratio, log_ratio_to_reference = self._compute_log_ratios(model, inputs, mode)
        mask = inputs["completion_mask"].float()  # (B, N)
        num_tokens = mask.sum(dim=1, keepdim=True)  # (B, 1)
        if args.changed_only:
            mask = mask * (inputs["completion_ids"] != inputs["prompt_ids"][:, -mask.size(1) :])

        def mean(values: torch.Tensor) -> torch.Tensor:  # over the tokens that count: (B, N) to (B, 1)
            return (values * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)

        if args.clip_token_ratios:
            log_ratio = log_ratio.clamp(math.log(1 - self.epsilon_low), math.log(1 + self.epsilon_high))
        is_token_level = self.importance_sampling_level == "token"
        ratio = (log_ratio if is_token_level else mean(log_ratio)).exp()  # (B, N) or (B, 1)
        weights = mask / num_tokens if is_token_level else torch.ones_like(ratio)
        advantages = (inputs["advantages"] * args.step_discount ** inputs["timesteps"]).unsqueeze(1)  # (B, 1)
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        losses = -torch.min(ratio * advantages, clipped * advantages) * weights
        loss = losses.sum(dim=1).mean()  # over B rows
        if log_ratio_to_reference is not None:
            delta = mean(log_ratio_to_reference)
            kl = (delta.exp() - 1 - delta).mean()  # over B rows
            loss = loss + self.beta * kl
            self._log_mean(mode, "kl", kl)
        self._log_mean(mode, "ratio", ratio, weights)
        self._log_mean(mode, "clip_ratio/low_mean", (ratio < clipped) & (advantages < 0), weights)
        self._log_mean(mode, "clip_ratio/high_mean", (ratio > clipped) & (advantages > 0), weights)
        return loss / (self.current_gradient_accumulation_steps if mode == "train" else 1.0)


def find_steps(
    scheduler: Any, output: UDMSamplerOutput, rows: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    Steps of a sampler, each of one sample.

    Args:
        scheduler (`SchedulerMixin`):
            The scheduler, with the grid of the sampler.
        output ([`UDMSamplerOutput`]):
            The samples, with their trajectory.
        rows (`torch.LongTensor` of shape `(R,)`):
            The sample of each step.
        timesteps (`torch.LongTensor` of shape `(R,)`):
            The index of each step.

    Returns:
        `tuple`: The states before the steps `(R, N)`, and a dictionary of the states after them, their indices and
        times, their draws `(R, N, n)`, and the logarithms of their probabilities given each draw `(R, N, n)`.
    """
    states = torch.cat([output.trajectory.noised_samples, output.clean_samples.unsqueeze(0)])  # (S + 1, B, N)
    states, next_states = states[timesteps, rows], states[timesteps + 1, rows]
    draws = output.trajectory.pred_original_samples[timesteps, rows]
    probabilities = torch.empty(draws.shape, device=draws.device)
    for timestep in timesteps.unique():
        is_in_step = timesteps == timestep
        step = (states[is_in_step], next_states[is_in_step], draws[is_in_step])
        probabilities[is_in_step] = scheduler.transition_probabilities(*step, timestep)
    grid = torch.tensor([scheduler.timestep_to_t(timestep) for timestep in scheduler.timesteps.tolist()])
    return states, {
        "completion_ids": next_states,
        "timesteps": timesteps,
        "t": grid.to(draws.device)[timesteps],
        "draws": draws,
        # A draw that cannot have led to the next state must not have an infinite logarithm
        "transition_logps": probabilities.clamp(min=torch.finfo(torch.float32).tiny).log(),
    }


def log_mean_exp(logits: torch.Tensor) -> torch.Tensor:
    """Logarithm of the mean over the last dimension, of at least 1e-30 as in the authors' code."""
    return (logits.logsumexp(dim=-1) - math.log(logits.size(-1))).clamp(min=math.log(1e-30))
