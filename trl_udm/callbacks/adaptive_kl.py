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

"""A weight of the KL divergence that follows the divergence."""

import math
import statistics
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..trainer.udm_grpo_trainer import UDMGRPOTrainer


class AdaptiveKLCallback(TrainerCallback, ExportableState):
    r"""
    Raises or lowers `beta`, the weight of the KL divergence, so that the logged `kl` comes near a target: the
    proportional controller of "Fine-Tuning Language Models from Human Preferences"
    (https://huggingface.co/papers/1909.08593), section 2.2, after each optimization step,

        β ← β · (1 + rate · clip(kl / target − 1, −0.2, 0.2)).

    The run begins with `args.beta`. The weight is logged as `beta`, and a resumed run continues with it.

    Args:
        trainer ([`UDMGRPOTrainer`]):
            Trainer to which the callback is added.
        target (`float`):
            Wanted `kl`, in nats per token at the default sequence level, in `(0, ∞)`. What it means depends on
            `kl_estimator`.
        rate (`float`, *optional*, defaults to `0.1`):
            Speed of the change, in `(0, 1]`. At 0.1 a step changes `beta` by at most 2 %.

    Raises:
        ValueError: If a number is out of its range, or `args.beta` is 0.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from trl_udm import AdaptiveKLCallback, TextUDMPipeline, UDMGRPOConfig, UDMGRPOTrainer
    >>> from trl_udm.worlds.sums import CHECKPOINT_PATH
    >>> from trl_udm.worlds.sums.problems import split_problems, sum_reward

    >>> trainer = UDMGRPOTrainer(
    ...     TextUDMPipeline.from_pretrained(CHECKPOINT_PATH),
    ...     sum_reward,
    ...     UDMGRPOConfig("sums", max_steps=1, bf16=False, kl_estimator="full"),
    ...     train_dataset=Dataset.from_list(split_problems()[0]),
    ... )
    >>> trainer.add_callback(AdaptiveKLCallback(trainer, target=0.05))
    ```
    """

    def __init__(self, trainer: UDMGRPOTrainer, target: float, rate: float = 0.1):
        if not 0 < target < math.inf:
            raise ValueError(f"`target` must be > 0, got {target}.")
        if not 0 < rate <= 1:
            raise ValueError(f"`rate` must be in (0, 1], got {rate}.")
        if trainer.beta == 0.0:
            raise ValueError("`args.beta` must be > 0, got 0.0: the divergence is not computed then.")
        self.trainer = trainer
        self.target = target
        self.rate = rate
        self._num_values = 0  # of the divergence, of the steps before since the last log

    def state(self) -> dict[str, Any]:
        args = {"target": self.target, "rate": self.rate}
        return {"args": args, "attributes": {"beta": self.trainer.beta}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step > 0 and saved is not None:  # a resumed run
            self.trainer.beta = saved["attributes"]["beta"]

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._num_values = len(self.trainer._metrics["train"]["kl"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        metrics = self.trainer._metrics["train"]
        values = metrics["kl"][self._num_values :]
        if values:  # a step without a finite gradient may have none
            error = min(max(statistics.fmean(values) / self.target - 1, -0.2), 0.2)
            self.trainer.beta *= 1 + self.rate * error
        metrics["beta"].append(self.trainer.beta)
