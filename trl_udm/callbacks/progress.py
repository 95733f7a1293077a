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

"""Progress: metrics of a log in a few short lines, with the time that is left."""

import textwrap
import time
from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments


# How far the run is says more than these
_HIDDEN = ("epoch", "total_flos", "steps_per_second", "_samples_per_second")
# Zero in a run that goes well, or by design
_HIDDEN_AT_ZERO = ("clip_ratio/", "frac_skipped_steps", "frac_reward_zero_std", "kl", "rewards/")
_GROUPS = dict.fromkeys(("loss", "grad_norm", "learning_rate"), "update")
_GROUPS |= dict.fromkeys(("step_time", "samples_per_second", "mfu"), "speed")


class CompactProgressCallback(ProgressCallback):
    """
    A [`~transformers.ProgressCallback`] that prints the metrics of a log grouped and short.

    The first line has the metrics of the samples and the time that is left. Below it are those of the update, of the
    speed, and of each group `<group>/<name>`. A deviation stands behind its mean. Metrics that are zero by design,
    such as `clip_ratio/low_mean` and `frac_skipped_steps`, are shown only when they are not zero. A reward is shown
    only if it is not the whole reward.
    What loggers and `trainer_state.json` get is unchanged.

    Example:

    ```python
    >>> from transformers import ProgressCallback
    >>> from trl_udm import CompactProgressCallback

    >>> trainer.remove_callback(ProgressCallback)
    >>> trainer.add_callback(CompactProgressCallback)
    ```
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._started, self._first_step = time.perf_counter(), state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None:
            return
        left = None
        if "step_time" in logs and state.global_step > self._first_step:
            seconds = (time.perf_counter() - self._started) / (state.global_step - self._first_step)
            left = seconds * (state.max_steps - state.global_step)
        self.training_bar.write(format_logs(logs, state.global_step, state.max_steps, left))


def format_logs(logs: dict[str, Any], step: int, max_steps: int, seconds_left: float | None = None) -> str:
    """
    Formats the metrics of a log as [`CompactProgressCallback`] prints them.

    Args:
        logs (`dict[str, Any]`):
            Metrics by their names, of training, of an evaluation, or of the summary at the end.
        step (`int`):
            Number of steps so far.
        max_steps (`int`):
            Number of steps of the run.
        seconds_left (`float`, *optional*):
            Seconds until the end.

    Returns:
        `str`: A line, and below it, indented, what belongs to groups.
    """
    prefix = next((name.removesuffix("runtime") for name in logs if name.endswith("_runtime")), "")
    metrics = {name.removeprefix(prefix): value for name, value in logs.items() if not name.endswith(_HIDDEN)}
    if prefix == "train_":
        return f"{step} steps in {_format_time(metrics['runtime'])}"
    head = f"{prefix[:-1]} at step {step}, in {_format_time(metrics.pop('runtime'))}" if prefix else None
    groups: dict[str, list[str]] = {"": [head or f"step {step}/{max_steps}"]}
    rewards = (metrics.get("reward"), metrics.get("reward_std"))
    for name, value in metrics.items():
        # A single reward is the reward itself
        is_known = name.startswith("rewards/") and value in rewards
        is_deviation = name.endswith("_std") and name.removesuffix("_std") in metrics
        is_deviation |= name.endswith("/std") and f"{name.removesuffix('std')}mean" in metrics
        if is_known or is_deviation or (value == 0 and name.startswith(_HIDDEN_AT_ZERO)):
            continue
        deviation = metrics.get(f"{name}_std", metrics.get(f"{name.removesuffix('mean')}std"))
        group, _, short_name = name.removesuffix("/mean").rpartition("/")
        text = f"{short_name} {_format(value)}" + ("" if deviation is None else f" ± {_format(deviation)}")
        groups.setdefault(_GROUPS.get(name, group), []).append(text)
    if seconds_left is not None:
        groups[""].append(f"{_format_time(seconds_left)} left")
    first = " | ".join(groups.pop(""))
    others = " | ".join(f"{group}: {', '.join(texts)}" for group, texts in groups.items())
    indent = " " * 4
    return "\n".join([first, *textwrap.wrap(others, 119, initial_indent=indent, subsequent_indent=indent)])


def _format(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _format_time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
