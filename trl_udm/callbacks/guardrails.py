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

"""Guardrails: alarms for a run that goes wrong while its reward looks good."""

import math
import statistics

from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


logger = get_logger(__name__)


class GuardrailCallback(TrainerCallback):
    r"""
    Raises an alarm when the policy runs away, collapses, or hacks its reward.

    It reads the logs of training. A bound is compared with the mean of the last `num_smoothed` logged values. The
    reward counts as hacked if it rises from one window of logs to the next while the watched metric falls, each by
    more than twice the standard error of the difference. Logs in which a metric has no value are skipped. Each kind of
    alarm is raised once.

    Args:
        max_kl (`float`, *optional*):
            Upper bound on `kl`, in nats per token at the default sequence level.
        min_entropy (`float`, *optional*):
            Lower bound on `entropy`, in nats per token.
        min_diversity (`float`, *optional*):
            Lower bound on `diversity`, the share of tokens in which two samples of a group differ, in `[0, 1]`.
        watched (`str`, *optional*):
            Logged metric that should rise with the reward, such as `"rewards/pickscore/mean"` of a reward function of
            weight 0.
        window (`int`, *optional*, defaults to `20`):
            Number of logs in a window, > 1.
        num_smoothed (`int`, *optional*, defaults to `5`):
            Number of logs that are averaged for the bounds, > 0.
        stop (`bool`, *optional*, defaults to `False`):
            Whether an alarm also stops the training. By default it is only a warning.

    Raises:
        ValueError: If a number is out of its range, or `watched` is not logged.

    Example:

    ```python
    >>> from trl_udm import GuardrailCallback

    >>> callback = GuardrailCallback(max_kl=1.0, watched="rewards/pickscore/mean", stop=True)
    >>> # UDMGRPOTrainer(..., callbacks=[callback])
    ```
    """

    def __init__(
        self,
        max_kl: float | None = None,
        min_entropy: float | None = None,
        min_diversity: float | None = None,
        watched: str | None = None,
        window: int = 20,
        num_smoothed: int = 5,
        stop: bool = False,
    ):
        if window < 2:
            raise ValueError(f"`window` must be > 1, got {window}.")
        if num_smoothed < 1:
            raise ValueError(f"`num_smoothed` must be > 0, got {num_smoothed}.")
        self.bounds = {"kl": (max_kl, 1), "entropy": (min_entropy, -1), "diversity": (min_diversity, -1)}
        self.watched = watched
        self.window = window
        self.num_smoothed = num_smoothed
        self.stop = stop
        self.alarms: dict[str, int] = {}
        """Global step of each alarm by its kind: `"kl"`, `"entropy"`, `"diversity"` or `"hacking"`."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs,
    ) -> None:
        if not logs or "reward" not in logs:  # an evaluation, or the summary at the end
            return
        history = [log for log in state.log_history if "reward" in log]
        for name, (bound, sign) in self.bounds.items():
            values = [log[name] for log in history if log.get(name) is not None][-self.num_smoothed :]
            if bound is None or len(values) < self.num_smoothed:
                continue
            mean = statistics.fmean(values)
            if sign * mean > sign * bound:
                self._raise(name, f"`{name}` is {mean:.3g}, beyond its bound {bound:.3g}", state, control)

        if self.watched is None:
            return
        if not any(self.watched in log for log in [logs, *history]):
            raise ValueError(f"`watched` must be one of {sorted(logs)}, got {self.watched!r}.")
        # A log has None where no reward function gave a reward, and a metric of a function may not be in all logs
        history = [log for log in history if log["reward"] is not None and log.get(self.watched) is not None]
        earlier, later = history[-2 * self.window : -self.window], history[-self.window :]
        if len(earlier) < self.window:
            return
        reward = _change([log["reward"] for log in earlier], [log["reward"] for log in later])
        watched = _change([log[self.watched] for log in earlier], [log[self.watched] for log in later])
        if reward > 2 and watched < -2:
            reason = f"`reward` rises and `{self.watched}` falls, by {reward:.1f} and {-watched:.1f} standard errors"
            self._raise("hacking", reason, state, control)

    def _raise(self, kind: str, reason: str, state: TrainerState, control: TrainerControl) -> None:
        if kind in self.alarms:
            return
        self.alarms[kind] = state.global_step
        logger.warning(f"Alarm at step {state.global_step}: {reason}.")
        if self.stop:
            control.should_training_stop = True


def _change(earlier: list[float], later: list[float]) -> float:
    """The difference of two means, in standard errors."""
    error = math.sqrt((statistics.variance(earlier) + statistics.variance(later)) / len(earlier))
    difference = statistics.fmean(later) - statistics.fmean(earlier)
    return difference / error if error > 0 else math.copysign(math.inf, difference) if difference else 0.0
