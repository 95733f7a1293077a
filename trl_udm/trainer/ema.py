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

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from diffusers.training_utils import EMAModel
from torch import nn
from transformers import TrainerCallback


logger = get_logger(__name__)

EMA_FOLDER = "transformer_ema"
"""Folder of the averaged network or adapter in a checkpoint or a saved run, as in diffusers' training scripts."""

EMA_STATE_NAME = "ema_state.json"
"""File in a checkpoint that has the average's decay and its number of steps."""


class EMAMixin:
    """
    An exponential moving average of the trained weights, where `args.ema_decay` asks for one.

    Needs `args`, `model`, `state`, and of [`WeightsMixin`] `_save_weights` and `_load_weights`.

    The average is diffusers' [`~diffusers.training_utils.EMAModel`]. Evaluation uses it, `save_model` and checkpoints
    hold it beside the raw weights, and a resumed run continues it. It follows the weights closely at first: the decay
    of step n > 1 is at most n / (9 + n). It is updated in every step, or in those that `args.ema_steps` divides.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.ema: EMAModel | None = None
        self._ema_parameters: list[nn.Parameter] = []
        self._ema_hook = None
        self._evaluates_ema = True

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EMACallback):
                self.args.ema_decay, self._evaluates_ema = callback.decay, callback.evaluate
        if self.args.ema_decay is None:
            return optimizer
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                f"`ema_decay` must be None with DeepSpeed and FSDP, got {self.args.ema_decay}: they do not keep whole "
                "weights in each process. Use DDP, or leave the average out."
            )
        self._ema_parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.ema = EMAModel(self._ema_parameters, decay=self.args.ema_decay, foreach=True)
        if self._ema_hook is None:  # else an earlier call of `train` has hooked this optimizer
            self._ema_hook = optimizer.register_step_post_hook(lambda *_: self._update_average())
        return optimizer

    def _update_average(self) -> None:
        if (self.ema.optimization_step + 1) % self.args.ema_steps == 0:
            self.ema.step(self._ema_parameters)
        else:
            self.ema.optimization_step += 1  # which the decay follows

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """A context in which the model's weights are the average, if there is one yet."""
        if self.ema is None or self.ema.temp_stored_params is not None:  # none yet, or within this context already
            yield
            return
        self.ema.store(self._ema_parameters)
        self.ema.copy_to(self._ema_parameters)
        try:
            yield
        finally:
            self.ema.restore(self._ema_parameters)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.ema_weights() if self._evaluates_ema else nullcontext():
            return super().evaluate(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.ema is not None:
            with self.ema_weights():
                self._save_weights(folder / EMA_FOLDER)
            state = {"decay": self.args.ema_decay, "optimization_step": self.ema.optimization_step}
            (folder / EMA_STATE_NAME).write_text(json.dumps(state))
        elif (folder / EMA_FOLDER).is_dir():  # an earlier run's, which is no average of these weights
            shutil.rmtree(folder / EMA_FOLDER)
            (folder / EMA_STATE_NAME).unlink(missing_ok=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_average(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_average(self.state.best_model_checkpoint)

    def _load_average(self, checkpoint: str) -> None:
        folder, path, decay = Path(checkpoint, EMA_FOLDER), Path(checkpoint, EMA_STATE_NAME), self.args.ema_decay
        if path.exists():
            state = json.loads(path.read_text())
        else:  # version 0.1 saved only the average
            state = {"decay": decay if folder.is_dir() else None, "optimization_step": self.state.global_step}
        if state["decay"] != decay:
            logger.warning(f"{checkpoint} was saved with `ema_decay={state['decay']}`, and this run has {decay}.")
        if self.ema is None or state["decay"] is None:
            return
        self.ema.optimization_step = state["optimization_step"]
        self.ema.store(self._ema_parameters)
        try:
            self._load_weights(folder)
            self.ema.shadow_params = [parameter.detach().clone() for parameter in self._ema_parameters]
        finally:
            self.ema.restore(self._ema_parameters)


class EMACallback(TrainerCallback):
    """
    The former name of `ema_decay` of [`UDMGRPOConfig`], until version 0.3. `decay` is in `[0, 1)`. `evaluate` says
    whether [`UDMGRPOTrainer.evaluate`] uses the average.
    """

    def __init__(self, decay: float = 0.99, evaluate: bool = True):
        warnings.warn("`EMACallback` is deprecated: set `UDMGRPOConfig(ema_decay=...)`.", FutureWarning, stacklevel=2)
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be in [0, 1), got {decay}.")
        self.decay = decay
        self.evaluate = evaluate
