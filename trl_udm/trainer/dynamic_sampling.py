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

"""Dynamic sampling: groups whose rewards are all equal are replaced, or left out of the update."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from ..pipelines.pipeline_output import UDMSamplerOutput, UDMTrajectory
from .rollout import Rollout


class DynamicSamplingMixin:
    """
    Dynamic sampling of DAPO (https://huggingface.co/papers/2503.14476).

    A group whose rewards are all equal has no advantages. With `args.resample_zero_variance`, groups for other prompts
    take its place. With `args.drop_zero_variance`, the update has fewer rows: those of groups with spread.

    Needs `args`, `model`, `accelerator`, `train_dataset`, `_step`, `_metrics` and the pending logs of
    [`~trl.GRPOTrainer`], `pipeline`, `_draw`, and of [`RewardsMixin`] weights and advantages.
    """

    @property
    def _is_sampling_dynamic(self) -> bool:
        return self.model.training and bool(self.args.drop_zero_variance or self.args.resample_zero_variance)

    def _select_groups(
        self,
        inputs: list[dict[str, Any]],
        rollout: Rollout,
        rewards_per_func: torch.Tensor,
        reward_weights: torch.Tensor,
    ) -> tuple[Rollout, torch.Tensor]:
        """
        The samples that this process trains on, and the advantages of those of all processes.

        What was drawn for `inputs`, and has the rewards and weights (B, F) of all processes, is drawn further if need
        be. Selected groups are dealt out anew, so that all processes have equally many samples.
        """
        args, accelerator, group_size = self.args, self.accelerator, self.num_generations
        num_processes, process_index = accelerator.num_processes, accelerator.process_index

        def has_spread(rewards_per_func: torch.Tensor, reward_weights: torch.Tensor) -> torch.Tensor:
            std_rewards = self._compute_advantages(rewards_per_func, group_size, reward_weights)[2]
            return std_rewards[::group_size] > 0  # nor has a group without any reward, where it is NaN

        num_groups = len(rewards_per_func) // group_size
        prompts, outputs = [x["prompt"] for x in inputs], [rollout.output]
        is_useful = has_spread(rewards_per_func, reward_weights)  # (P,)
        # The place of each sample of this process among those of all, draw by draw
        places = [process_index * len(inputs) + torch.arange(len(inputs))]
        # The same prompts after a resume, which restores `_step`
        order = np.random.default_rng((args.seed, self._step)).permutation(len(self.train_dataset))
        for _ in range(args.resample_zero_variance):
            num_missing = num_groups - int(is_useful.sum())
            if num_missing <= 0 or torch.isnan(rewards_per_func).all():
                break
            num_missing += -num_missing % (num_processes // math.gcd(group_size, num_processes))
            rows = [self.train_dataset[int(i)] for i in np.resize(order, num_missing)]
            order = np.roll(order, -num_missing)
            num_samples = num_missing * group_size // num_processes
            own = torch.arange(num_samples) + process_index * num_samples
            further_inputs = [rows[i // group_size] for i in own.tolist()]
            further, _, further_rewards = self._draw(further_inputs, "train")
            places.append(own + len(rewards_per_func))
            prompts += [x["prompt"] for x in further_inputs]
            outputs.append(further.output)
            further_weights = self._find_reward_weights(further_inputs, len(further_rewards))
            is_useful = torch.cat([is_useful, has_spread(further_rewards, further_weights)])
            rewards_per_func = torch.cat([rewards_per_func, further_rewards])
            reward_weights = torch.cat([reward_weights, further_weights])
        # The metrics are those of the first draw, which is the one without dynamic sampling
        self._pending_metrics.clear()
        self._pending_extra_logs.clear()

        size = num_groups
        num_useful = min(int(is_useful.sum()), num_groups)
        if args.drop_zero_variance:
            num_parts = num_processes * args.steps_per_generation
            unit = math.lcm(  # for whole samples a process, and equally many rows in each part of the batch
                num_processes // math.gcd(1 if args.shared_noise else group_size, num_processes),
                num_parts // math.gcd(group_size * args.num_train_timesteps, num_parts),
            )
            size = max(math.ceil(num_useful / unit), 1) * unit
        groups = (~is_useful).int().argsort(stable=True)[:size].sort().values  # (P,)
        selected = (groups.unsqueeze(1) * group_size + torch.arange(group_size)).flatten()  # (P * G,)
        self._metrics["train"]["samples_drawn"].append(float(len(rewards_per_func)))
        self._metrics["train"]["frac_resampled"].append((groups >= num_groups).double().mean().item())
        advantages = self._compute_advantages(rewards_per_func[selected], group_size, reward_weights[selected])[0]
        if args.drop_zero_variance:  # groups that only fill the update up do not count in the mean of the loss
            advantages = advantages * (size / max(num_useful, 1))
        output, places = UDMSamplerOutput.cat(outputs), torch.cat(places)
        output, prompts = self._deal_out(output, prompts, places, selected.chunk(num_processes)[process_index])
        encoded = self.pipeline.encode_prompt(prompts, **self.chat_template_kwargs)
        prompt_ids, prompt_mask = (tensor.to(accelerator.device) for tensor in encoded)
        prompt_ids, prompt_mask = self.pipeline.extend_prompt(prompt_ids, prompt_mask, output.clean_samples)
        return dataclasses.replace(rollout, prompt_ids=prompt_ids, prompt_mask=prompt_mask, output=output), advantages

    def _deal_out(
        self, output: UDMSamplerOutput, prompts: list[Any], places: torch.Tensor, own: torch.Tensor
    ) -> tuple[UDMSamplerOutput, list[Any]]:
        """The samples with the places `own` (b,), and their prompts. This process drew those with `places` (B,)."""
        gather, device = self.accelerator.gather, output.clean_samples.device
        own = gather(places.to(device)).argsort()[own.to(device)]
        all_prompts = gather_object(prompts)
        output = map_samples(output, lambda samples: gather(samples)[own])
        return output, [all_prompts[i] for i in own.tolist()]


def map_samples(output: UDMSamplerOutput, function: Callable[[torch.Tensor], torch.Tensor]) -> UDMSamplerOutput:
    """An output whose tensors a function has replaced. It gets each with the samples first: (B, ...)."""
    trajectory = output.trajectory
    if trajectory is not None:
        states, draws = (
            function(tensor.transpose(0, 1).contiguous()).transpose(0, 1)
            for tensor in (trajectory.noised_samples, trajectory.pred_original_samples)
        )
        trajectory = UDMTrajectory(timesteps=trajectory.timesteps, noised_samples=states, pred_original_samples=draws)
    condition = None if output.condition is None else function(output.condition)
    return UDMSamplerOutput(function(output.clean_samples), trajectory, condition)
