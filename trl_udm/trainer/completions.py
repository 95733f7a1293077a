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

"""Logging of completions: metrics of a generation batch, the table of completions, and a grid of images."""

import os

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers.integrations import TensorBoardCallback
from trl.trainer.utils import nanstd

from ..image_grid import image_statistics, make_image_grid


class CompletionsMixin:
    """
    Logging of a generation batch, under the names of [`~trl.GRPOTrainer`].

    Needs `args`, `accelerator`, `state`, `reward_funcs`, `_num_eval_reward_funcs`, and of [`~trl.GRPOTrainer`]
    `_metrics`, `_logs` and the pending logs of reward functions.
    """

    def _log_rollout(self, mode, prompts, completions, rewards_per_func, rewards, std_rewards, advantages) -> None:
        num_reward_funcs = len(self.reward_funcs) - (self._num_eval_reward_funcs if mode == "train" else 0)
        reward_func_names = self.reward_func_names[:num_reward_funcs]
        for i, name in enumerate(reward_func_names):
            self._metrics[mode][f"rewards/{name}/mean"].append(torch.nanmean(rewards_per_func[:, i]).item())
            self._metrics[mode][f"rewards/{name}/std"].append(nanstd(rewards_per_func[:, i]).item())
        self._metrics[mode]["reward"].append(torch.nanmean(rewards).item())
        self._metrics[mode]["reward_std"].append(nanstd(rewards).item())
        if mode == "train" or self.num_generations_eval > 1:
            is_std_zero = torch.isclose(std_rewards, torch.zeros_like(std_rewards))
            self._metrics[mode]["frac_reward_zero_std"].append(is_std_zero.float().mean().item())

        is_image = not isinstance(completions[0], str)
        if is_image:
            for name, values in image_statistics(completions).items():
                self._pending_metrics[f"images/{name}"].extend(values)

        # Metrics that reward functions logged. The names are sorted, so that all processes gather in one order
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = self._pending_metrics.get(name, [])
            local_stats = torch.tensor([sum(values), len(values)], dtype=torch.float32, device=rewards.device)
            total, count = self.accelerator.gather(local_stats).view(-1, 2).sum(dim=0).tolist()
            self._metrics[mode][name].append(total / count)
        self._pending_metrics.clear()

        if not self.log_completions:
            self._pending_extra_logs.clear()
            return
        # Only the latest generation batch is kept. The buffers of `GRPOTrainer` would hold several: they count rows
        for buffer in self._logs.values():
            buffer.clear()
        self._logs["prompt"].extend(gather_object(prompts))
        self._logs["completion"].extend(gather_object(["<image>"] * len(completions) if is_image else completions))
        if is_image:
            self._logs["images"].extend(gather_object([[image] for image in completions]))
        for i, name in enumerate(reward_func_names):
            self._logs["rewards"][name].extend(rewards_per_func[:, i].tolist())
        self._logs["advantages"].extend(advantages.tolist())
        for column in sorted(set(gather_object(list(self._pending_extra_logs)))):
            values = self._pending_extra_logs.get(column, [])
            if len(values) != len(prompts):  # a reward function failed
                values = [None] * len(prompts)
            self._logs["extra"][column].extend(gather_object(values))
        self._pending_extra_logs.clear()

    def _log_diversity(self, mode: str, clean_samples: torch.Tensor, num_generations: int) -> None:
        """Logs the share of tokens in which two samples (B, N) of a group differ."""
        if num_generations == 1:
            return
        groups = self.accelerator.gather(clean_samples).unflatten(0, (-1, num_generations))  # (P, G, N)
        num_pairs = groups.size(0) * num_generations * (num_generations - 1) * groups.size(2)
        num_different = (groups.unsqueeze(1) != groups.unsqueeze(2)).sum()
        self._metrics[mode]["diversity"].append(num_different.item() / num_pairs)

    # `GRPOTrainer.log` writes the table of completions and sends it, with the images, to wandb and trackio
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self.accelerator.is_main_process and self.log_completions and self._logs["images"]:
            rewards = list(zip(*self._logs["rewards"].values(), strict=True))
            images = [image for (image,) in self._logs["images"]]
            grid = make_image_grid(images, list(self._logs["prompt"]), rewards)
            grid.save(
                os.path.join(self.args.output_dir, "completions", f"completions_{self.state.global_step:05d}.png")
            )
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                    callback.tb_writer.add_image(
                        "completions", np.asarray(grid), self.state.global_step, dataformats="HWC"
                    )
