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

"""An exponential moving average of the trained weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate import PartialState
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


EMA_FOLDER = "transformer_ema"


class EMACallback(TrainerCallback):
    """
    Keeps an exponential moving average of the trained weights, by diffusers' [`~diffusers.training_utils.EMAModel`].

    [`UDMGRPOTrainer`] evaluates with the average, saves it beside the raw weights in the folder `transformer_ema`, as
    diffusers' training scripts do, and restores it on resume. The average follows the weights closely at first: the decay
    of step n is at most n / (9 + n).

    Args:
        decay (`float`, *optional*, defaults to `0.99`):
            Decay a step, in `[0, 1)`. 0.99 averages over about the last 100 steps.
        evaluate (`bool`, *optional*, defaults to `True`):
            Whether [`UDMGRPOTrainer.evaluate`] uses the average.

    Raises:
        ValueError: If `decay` is out of its range, or weights are sharded over processes (DeepSpeed ZeRO-3, FSDP).

    Example:

    ```python
    >>> from trl_udm import EMACallback

    >>> ema = EMACallback(decay=0.99)
    >>> trainer = UDMGRPOTrainer(..., callbacks=[ema])
    >>> trainer.train()
    >>> with ema.applied():
    ...     images = pipeline("a photo of a circle").images
    ```
    """

    def __init__(self, decay: float = 0.99, evaluate: bool = True):
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be in [0, 1), got {decay}.")
        self.decay = decay
        self.evaluate = evaluate
        self.ema: EMAModel | None = None
        self.parameters: list[nn.Parameter] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        if PartialState().distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise ValueError(
                "`EMACallback` needs whole weights in each process, which DeepSpeed and FSDP do not keep. Use DDP, or "
                "leave the average out."
            )
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.ema = EMAModel(self.parameters, decay=self.decay, foreach=True)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        self.ema.step(self.parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context, the model's weights are the average. Before the first training there is none: it does nothing."""
        if self.ema is None or self.ema.temp_stored_params is not None:  # none yet, or applied already
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def load(self, load_weights: Callable[[], None], num_steps: int) -> None:
        """
        Take the average from a checkpoint.

        Args:
            load_weights (`Callable[[], None]`):
                Loads the saved average into the model, whose weights are put back after it.
            num_steps (`int`):
                Optimizer steps that it has seen.
        """
        self.ema.store(self.parameters)
        try:
            load_weights()
            self.ema.shadow_params = [parameter.detach().clone() for parameter in self.parameters]
        finally:
            self.ema.restore(self.parameters)
        self.ema.optimization_step = num_steps
