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

"""The reward functions of a run: what is accepted, how they are called, and their weights."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from trl.data_utils import is_conversational
from trl.trainer.utils import get_callable_name, get_config_model_id, is_async_callable

from ..pipelines.pipeline_udm import UDMPipeline
from ..reward_calls import AsyncRewardRunner, RewardRunner, raise_exit_as_error
from .udm_grpo_config import UDMGRPOConfig


class RewardsMixin:
    """
    The reward functions of a run as [`RewardRunner`]s, in threads where `args.async_rewards` asks for it.

    It also makes advantages of the rewards.

    Needs `pipeline`, `args`, `model`, `state`, `accelerator`, `reward_funcs`, `scale_rewards` and
    `multi_objective_aggregation` of [`~trl.GRPOTrainer`], and `_count_failure` of [`CheckpointMixin`].
    """

    # Of the standard deviation of rewards: what is subtracted from their number, and what is added to it
    _std_correction = 0
    _std_epsilon = 1e-4

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.reward_weights = torch.tensor(self.args.reward_weights, dtype=torch.float64)  # in the first step
        final_weights = self.args.final_reward_weights or self.args.reward_weights
        self.final_reward_weights = torch.tensor(final_weights, dtype=torch.float64)
        if not self._has_async_funcs:
            return
        self.async_loop.set_task_factory(
            lambda loop, coroutine, **kwargs: asyncio.Task(raise_exit_as_error(coroutine), loop=loop, **kwargs)
        )
        if torch.accelerator.is_available():  # a new thread is on device 0 in every process
            device_index = torch.accelerator.current_device_index()
            self.async_loop.call_soon_threadsafe(torch.accelerator.set_device_index, device_index)

    def _wrap_reward_funcs(
        self, reward_funcs: list[Callable], eval_reward_funcs: list[Callable], args: UDMGRPOConfig
    ) -> list[Callable]:
        """Those of evaluation come last, have weight 0, and abstain in training. Reward models stay as they are."""
        self._num_eval_reward_funcs = len(eval_reward_funcs)
        zeros = [0.0] * len(eval_reward_funcs)
        args.reward_weights = [*args.reward_weights, *zeros]
        if args.final_reward_weights is not None:
            args.final_reward_weights = [*args.final_reward_weights, *zeros]
        if args.tag_reward_weights is not None:
            args.tag_reward_weights = {tag: [*factors, *zeros] for tag, factors in args.tag_reward_weights.items()}

        def wrap(reward_func: Callable, abstains: Callable[[], bool] = lambda: False) -> Callable:
            if isinstance(reward_func, nn.Module | str):
                return reward_func
            runner_class = AsyncRewardRunner if is_async_callable(reward_func) else RewardRunner
            return runner_class(reward_func, args.reward_timeout, args.reward_error, abstains, get_group_size)

        def get_group_size() -> int:
            return self.num_generations if self.model.training else self.num_generations_eval

        return [*map(wrap, reward_funcs), *(wrap(one, lambda: self.model.training) for one in eval_reward_funcs)]

    @property
    def _reward_runners(self) -> list[RewardRunner]:
        return [reward_func for reward_func in self.reward_funcs if isinstance(reward_func, RewardRunner)]

    def _submit_rewards(self, inputs, prompts, completions, completion_ids_list) -> None:
        """Submits a micro-batch with the arguments that `_calculate_rewards` of [`~trl.GRPOTrainer`] would give."""
        columns = [key for key in inputs[0] if key not in ("prompt", "completion", "completion_ids")]
        for runner in self._reward_runners:
            if runner.is_groupwise:
                continue
            runner.submit(
                prompts=prompts,
                completions=completions,
                completion_ids=completion_ids_list,
                trainer_state=self.state,
                log_extra=self._log_completion_extra,
                log_metric=self._log_metric,
                **{column: [example[column] for example in inputs] for column in columns},
            )

    def _mark_padding(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Marks the rows by which Accelerate fills the last batch of an evaluation up for several processes."""
        state, num_processes = self.accelerator.gradient_state, self.accelerator.num_processes
        if self.model.training or num_processes == 1 or not state.end_of_dataloader or self.args.dataloader_drop_last:
            return inputs
        # `state.remainder` counts prompts, not their generations
        num_rows = len(state.active_dataloader.dataset) * self.num_generations_eval
        num_left = num_rows % (len(inputs) * num_processes) or len(inputs) * num_processes
        first = self.accelerator.process_index * len(inputs)
        return [{**row, "is_padding": first + i >= num_left} for i, row in enumerate(inputs)]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        """Rewards (B, F) of all processes' samples without padding, in float64 on the CPU."""
        # These are rounded to float32, and have the padding. They are right for reward models, which give float32.
        rounded = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        first = self.accelerator.process_index * len(inputs)
        num_samples = len(inputs) - sum(row.get("is_padding", False) for row in inputs)
        columns = [
            func.rewards if isinstance(func, RewardRunner) else rounded[first : first + num_samples, i].tolist()
            for i, func in enumerate(self.reward_funcs)
        ]
        rows = gather_object(list(zip(*columns, strict=True)))
        numbers = [[math.nan if reward is None else reward for reward in row] for row in rows]
        rewards_per_func = torch.tensor(numbers, dtype=torch.float64)
        trained = (self.reward_weights.abs() + self.final_reward_weights.abs()).nonzero().flatten().tolist()
        failed = [self.reward_func_names[i] for i in trained if any(row[i] is not None for row in rows)]
        if not failed or not torch.isnan(rewards_per_func[:, trained]).all():
            self._num_failures["rewards"] = 0
            return rewards_per_func
        reason = (
            f"The reward functions {failed} failed, or returned None, for all {len(rows)} samples of a batch, the "
            f"first of which has the prompt {prompts[0]!r}."
        )
        if self.args.reward_error == "raise":  # a reward model that gives NaN
            raise ValueError(reason)
        self._count_failure("rewards", reason)
        return rewards_per_func

    def _reward_arguments(
        self, inputs: list[dict[str, Any]], clean_samples: torch.Tensor, completions: list[Any]
    ) -> tuple[list[dict[str, Any]], list[Any], list[Any], list[list[int]]]:
        """What `_calculate_rewards` takes for B rows of the dataset, their samples (B, N), and their completions."""
        prompts = [x["prompt"] for x in inputs]
        samples, mask = clean_samples.cpu(), self.pipeline.completion_mask(clean_samples).cpu()  # (B, N)
        completion_ids = [ids[counts].tolist() for ids, counts in zip(samples, mask.bool(), strict=True)]
        if is_conversational({"prompt": prompts[0]}):
            completions = [[{"role": "assistant", "content": completion}] for completion in completions]
        return inputs, prompts, completions, completion_ids

    def _find_reward_weights(self, inputs: list[dict[str, Any]], num_samples: int) -> torch.Tensor:
        """Weights (B, F) for all processes' B samples without padding: those of the step and of the samples' tags."""
        args, progress = self.args, 1.0  # evaluations are compared with each other, so they have the last weights
        if self.model.training:
            progress = min(self.state.global_step / (args.reward_weights_steps or max(self.state.max_steps, 1)), 1.0)
        weights = self.reward_weights.lerp(self.final_reward_weights, progress).expand(num_samples, -1)
        if args.tag_reward_weights is None:
            return weights
        tags = gather_object([row[args.tag_column] for row in inputs if not row.get("is_padding", False)])
        factors = [args.tag_reward_weights.get(tag, [1.0] * weights.size(1)) for tag in tags]
        return weights * torch.tensor(factors, dtype=torch.float64)

    def _compute_advantages(
        self, rewards_per_func: torch.Tensor, num_generations: int, reward_weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Advantages Â = (R − mean) / (std + 1e-4) with the group's mean and, unlike in `GRPOTrainer`, the population's
        standard deviation, clamped to ±`advantage_clip`.

        Rewards (B, F) have NaN where a function abstained. Their weights (B, F) are by default those of the beginning.
        A sample that no function of a weight other than 0 scored is left out of its group's statistics and gets no
        advantage. Where the rewards of a group are equal, apart from the rounding of float64, advantages and standard
        deviation are exactly 0. Returns advantages, weighted rewards, and standard deviations of the groups, each
        (B,).
        """

        def center(values: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
            # Values (P, G, ...) minus their group's mean. They are sums of numbers of these sizes.
            centered = values - torch.nanmean(values, dim=1, keepdim=True)
            rounding = 1e-12 * sizes.nan_to_num().amax(dim=1, keepdim=True)
            is_equal = centered.abs().nan_to_num().amax(dim=1, keepdim=True) <= rounding
            return torch.where(is_equal & ~torch.isnan(values), 0.0, centered)

        def std(centered: torch.Tensor, dim: int | None = None) -> torch.Tensor:
            count = (~torch.isnan(centered)).sum(dim=dim, keepdim=True)
            variance = torch.nanmean(centered.square(), dim=dim, keepdim=True)
            return (variance * (count / (count - self._std_correction).clamp(min=1))).sqrt()

        weights = self.reward_weights if reward_weights is None else reward_weights
        weights = weights.expand_as(rewards_per_func).unflatten(0, (-1, num_generations))  # (P, G, F)
        grouped = rewards_per_func.double().unflatten(0, (-1, num_generations))  # (P, G, F)
        weighted = grouped * weights
        too_large = ((grouped.abs() > 1e150) | (weighted.abs() > 1e150)).nonzero().tolist()
        if too_large:
            group, sample, function = too_large[0]
            raise ValueError(
                f"Rewards, and rewards times their weight, must be at most 1e150, which has a finite square, got "
                f"{grouped[group, sample, function]:.3g} of '{self.reward_func_names[function]}' with the weight "
                f"{weights[group, sample, function]:.3g} for the sample {group * num_generations + sample} of a batch."
            )
        unscorable = (torch.isnan(grouped) | (weights == 0)).all(dim=-1)  # (P, G)
        rewards = weighted.nansum(dim=-1).masked_fill(unscorable, torch.nan)  # (P, G)
        if self.multi_objective_aggregation == "sum_then_normalize":
            centered = center(rewards, weighted.abs().nansum(dim=-1))
            batch_std = std(rewards - torch.nanmean(rewards))
            divisors = {
                "group": std(centered, dim=1) + self._std_epsilon,
                "batch": batch_std + self._std_epsilon,
                "none": 1.0,
            }
            advantages = centered / divisors[self.scale_rewards]
        else:
            centered = center(grouped, grouped.abs())
            weighted = centered / (std(centered, dim=1) + self._std_epsilon) * weights
            total = weighted.nansum(dim=-1).masked_fill(unscorable, torch.nan)
            centered = center(total, weighted.abs().nansum(dim=-1))  # the batch's mean is the group's: 0
            advantages = centered / (std(centered) + self._std_epsilon)
        std_rewards = std(centered, dim=1).expand_as(centered)
        advantages = advantages.nan_to_num(nan=0.0)
        advantages = torch.where(advantages < 0, self.args.negative_advantage_scale * advantages, advantages)
        if self.args.advantage_clip is not None:
            advantages = advantages.clamp(-self.args.advantage_clip, self.args.advantage_clip)
        advantages, rewards, std_rewards = (
            values.flatten().to(rewards_per_func.dtype) for values in (advantages, rewards, std_rewards)
        )
        return advantages, rewards, std_rewards

    def _spread_advantages(
        self, advantages: torch.Tensor, num_samples: int, batch: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """
        The advantages of the rows (B * K,) of this process, from those of all samples.

        With `negative_bound_power` β, a row k of a sample of negative advantage has the weight K · softmax_k(β · log
        π_k) by the old policy. The gradient of the rows' mean is then that of the bound (1 / β) · log (1 / K) Σ_k
        π_k^β. Here log π is a sum over tokens, and gradients are of its mean, as those of all rows.
        """
        num_processes, num_timesteps = self.accelerator.num_processes, self.args.num_train_timesteps
        advantages = nn.functional.pad(advantages, (0, num_samples * num_processes - len(advantages)))
        advantages = advantages.chunk(num_processes)[self.accelerator.process_index].float()  # (B,)
        advantages = advantages.to(self.accelerator.device).repeat_interleave(num_timesteps)  # (B * K,)
        if self.args.negative_bound_power is None:
            return advantages
        logps = (batch["old_per_token_logps"] * batch["completion_mask"]).sum(dim=1)  # of the whole action, (B * K,)
        weights = (self.args.negative_bound_power * logps.unflatten(0, (-1, num_timesteps))).softmax(dim=1)  # (B, K)
        return torch.where(advantages < 0, advantages * num_timesteps * weights.flatten(), advantages)


def _get_name(reward_func: Callable | nn.Module | str) -> str:
    """The name under which [`~trl.GRPOTrainer`] logs a reward function, reward model or model id."""
    if isinstance(reward_func, nn.Module):
        reward_func = get_config_model_id(reward_func.config)
    return reward_func.split("/")[-1] if isinstance(reward_func, str) else get_callable_name(reward_func)


def check_rewards(
    pipeline: UDMPipeline,
    args: UDMGRPOConfig,
    reward_funcs: Callable | str | Sequence[Callable | str],
    eval_reward_funcs: Callable | Sequence[Callable] | None,
) -> tuple[list[Callable], list[Callable]]:
    """The two arguments as lists, with a weight for each of the first. Raises a `TypeError` or `ValueError`."""
    reward_funcs = [*reward_funcs] if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if not isinstance(eval_reward_funcs, list | tuple):
        eval_reward_funcs = [] if eval_reward_funcs is None else [eval_reward_funcs]
    if not reward_funcs:
        raise ValueError("`reward_funcs` must have at least one function, got none.")
    for argument, functions in (("reward_funcs", reward_funcs), ("eval_reward_funcs", eval_reward_funcs)):
        for function in functions:
            got = f"a `{type(function).__name__}`" if isinstance(function, nn.Module) else repr(function)
            where = "" if pipeline.modality == "text" else f" where samples are {pipeline.modality}s"
            if not isinstance(function, nn.Module | str):
                if not callable(function):
                    raise TypeError(f"`{argument}` must be a function or a list of functions, got {got}.")
            elif where or argument == "eval_reward_funcs":
                reason = "scores text" if where else "would be called in training too"
                raise TypeError(
                    f"`{argument}` must be functions{where}, got {got}: a reward model {reason}. Give a function that "
                    "calls it."
                )
    names = Counter(map(_get_name, [*reward_funcs, *eval_reward_funcs]))
    for name, count in names.items():
        if count > 1:
            raise ValueError(
                f"`reward_funcs` and `eval_reward_funcs` must have names that differ, got {count} of the name "
                f"{name!r}: their metrics would be one. Set `__name__` of one, or wrap a partial in a function."
            )
    args.reward_weights = args.reward_weights or [1.0] * len(reward_funcs)
    weights_of = {"reward_weights": args.reward_weights}
    if args.final_reward_weights is not None:
        weights_of["final_reward_weights"] = args.final_reward_weights
    weights_of |= {f"tag_reward_weights[{tag!r}]": one for tag, one in (args.tag_reward_weights or {}).items()}
    for name, weights in weights_of.items():
        if len(weights) != len(reward_funcs):
            raise ValueError(
                f"`{name}` must have one weight for each of the {len(reward_funcs)} `reward_funcs`, got {weights}."
            )
        if not all(map(math.isfinite, weights)) or not any(weights):
            raise ValueError(f"`{name}` must be finite, and at least one of them not 0, got {weights}.")
    if args.chat_template_kwargs and pipeline.modality != "text":
        raise ValueError(
            f"`chat_template_kwargs` must be None for `{type(pipeline).__name__}`, got {args.chat_template_kwargs}: "
            "it applies no chat template."
        )
    return reward_funcs, eval_reward_funcs
