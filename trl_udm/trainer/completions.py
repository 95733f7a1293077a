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

import functools
import math
import os
import random
import statistics
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm
from transformers.integrations import TensorBoardCallback

from ..image_grid import image_statistics, make_contact_sheet, make_image_grid, save_animation


class CompletionsMixin:
    """
    Logging of a generation batch, under the names of [`~trl.GRPOTrainer`].

    Needs `args`, `accelerator`, `state`, `reward_funcs`, `_num_eval_reward_funcs`, and of [`~trl.GRPOTrainer`]
    `_metrics`, `_logs` and the pending logs of reward functions.
    """

    def _log_rollout(
        self, mode, prompts, completions, num_samples, rewards_per_func, rewards, std_rewards, advantages
    ) -> None:
        num_reward_funcs = len(self.reward_funcs) - (self._num_eval_reward_funcs if mode == "train" else 0)
        reward_func_names = self.reward_func_names[:num_reward_funcs]
        for i, name in enumerate(reward_func_names):
            self._add_metric(mode, f"rewards/{name}/mean", rewards_per_func[:, i].tolist(), f"rewards/{name}/std")
        self._add_metric(mode, "reward", rewards.tolist(), "reward_std")
        if mode == "train" or self.num_generations_eval > 1:
            self._add_metric(mode, "frac_reward_zero_std", (std_rewards == 0).double().tolist())

        is_image = not isinstance(completions[0], str)
        prompts, completions = prompts[:num_samples], completions[:num_samples]  # without padding
        if is_image:
            for name, values in image_statistics(completions).items():
                self._pending_metrics[f"images/{name}"].extend(values)
        pending_metrics = gather_object([dict(self._pending_metrics)])  # of each process
        for name in dict.fromkeys(name for pending in pending_metrics for name in pending):
            self._add_metric(mode, name, [value for pending in pending_metrics for value in pending.get(name, [])])
        self._pending_metrics.clear()

        if not self.log_completions:
            self._pending_extra_logs.clear()
            return
        # Only the latest generation batch is kept. The buffers of `GRPOTrainer` would hold several: they count rows
        for buffer in self._logs.values():
            buffer.clear()
        self._logs["prompt"].extend(gather_object(prompts))
        if is_image:
            self._logs["images"].extend(gather_object([[make_contact_sheet(one)] for one in completions]))
            self._logs["animated"] = completions[:16]  # those of the main process are the first ones
            completions = ["<video>" if isinstance(one, list) else "<image>" for one in completions]
        self._logs["completion"].extend(gather_object(completions))
        for i, name in enumerate(reward_func_names):
            self._logs["rewards"][name].extend(rewards_per_func[:, i].tolist())
        self._logs["advantages"].extend(advantages.tolist())
        for column in sorted(set(gather_object(list(self._pending_extra_logs)))):
            values = self._pending_extra_logs.get(column, [])
            if len(values) != len(prompts):  # a reward function failed
                values = [None] * len(prompts)
            self._logs["extra"][column].extend(gather_object(values))
        self._pending_extra_logs.clear()

    def _add_metric(self, mode: str, name: str, values: list[float], std_name: str | None = None) -> None:
        """Adds the values of a batch to a metric. `GRPOTrainer.log` takes the mean of a metric's numbers."""
        metrics = self._metrics[mode]
        if mode == "eval":  # batches differ in size, so the mean is over samples
            metrics[name] += values
            stds = [_std(metrics[name])]
        else:
            metrics[name].append(statistics.fmean([v for v in values if not math.isnan(v)] or [math.nan]))
            stds = [*metrics.get(std_name, []), _std(values)]
        if std_name is not None:
            metrics[std_name] = stds

    def _log_diversity(self, mode: str, clean_samples: torch.Tensor, num_generations: int, num_samples: int) -> None:
        """Logs the share of tokens in which two samples of a group differ, of the first `num_samples` (B, N)."""
        if num_generations == 1:
            return
        clean_samples = mask_after_end(clean_samples, self.pipeline.completion_mask(clean_samples))
        groups = self.accelerator.gather(clean_samples)[:num_samples].unflatten(0, (-1, num_generations))  # (P, G, N)
        first, second = groups.unsqueeze(1), groups.unsqueeze(2)
        num_different = (first != second).sum(dim=(1, 2, 3))  # (P,)
        num_tokens = ((first >= 0) | (second >= 0)).sum(dim=(1, 2, 3)) - (groups >= 0).sum(dim=(1, 2))
        self._add_metric(mode, "diversity", (num_different / num_tokens).tolist())

    def _compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.model.training:
            return super()._compute_loss(model, inputs)
        # What `GRPOTrainer` logs of a batch of evaluation counts as often as the batch has samples
        metrics, self._metrics["eval"] = self._metrics["eval"], defaultdict(list)
        loss = super()._compute_loss(model, inputs)
        for name, values in self._metrics["eval"].items():
            metrics[name] += values * inputs["num_samples"]
        self._metrics["eval"] = metrics
        return loss

    # `GRPOTrainer` logs None for an evaluation without any reward, which `Trainer` cannot compare
    def _determine_best_metric(self, metrics: dict[str, float | None], trial: Any) -> bool:
        name = f"eval_{(self.args.metric_for_best_model or '').removeprefix('eval_')}"
        return metrics.get(name, 0.0) is not None and super()._determine_best_metric(metrics, trial)

    # `GRPOTrainer.log` writes the table of completions and sends it, with the images, to wandb and trackio
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Of several evaluation datasets each has a prefix, `eval_<dataset>_`. `GRPOTrainer` would add `eval_` only.
        prefix = next((name.removesuffix("runtime") for name in logs if name.endswith("_runtime")), "")
        if not self.model.training and prefix.startswith("eval_"):
            metrics = {prefix.removeprefix("eval_") + name: values for name, values in self._metrics["eval"].items()}
            self._metrics["eval"] = defaultdict(list, metrics)
        random_state = random.getstate()  # `GRPOTrainer.log` picks the completions to print with it
        super().log(logs, start_time)
        random.setstate(random_state)
        if not (self.accelerator.is_main_process and self.log_completions):
            return
        name = os.path.join(self.args.output_dir, "completions", f"completions_{self.state.global_step:05d}")
        if self._logs["images"]:
            rewards = list(zip(*self._logs["rewards"].values(), strict=True))
            make_grid = functools.partial(make_image_grid, prompts=list(self._logs["prompt"]), rewards=rewards)
            grid = make_grid([image for (image,) in self._logs["images"]])
            grid.save(f"{name}.png")
            save_animation(f"{name}.gif", self._logs["animated"], make_grid)
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                    callback.tb_writer.add_image(
                        "completions", np.asarray(grid), self.state.global_step, dataformats="HWC"
                    )
        images = f", with images in {name}.png" if self._logs["images"] else ""
        tqdm.write(f"All {len(self._logs['prompt'])} completions are in {name}.parquet{images}")


def mask_after_end(samples: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Samples with -1 for the tokens after the end of a text, where the mask is 0. No token is -1."""
    return samples.masked_fill(mask == 0, -1)


def _std(values: list[float]) -> float:
    """The sample's standard deviation of what is not NaN: exactly 0 for equal numbers, NaN for fewer than two."""
    values = np.array([value for value in values if not math.isnan(value)])
    return float(np.std(values - values[0], ddof=1)) if len(values) > 1 else math.nan
