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

"""Checkpoints and resume: whole checkpoints, exact resume, SIGTERM, and steps that fail."""

import copy
import functools
import math
import os
import re
import shutil
import signal
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model, send_to_device, set_seed
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from torch import nn
from transformers.trainer import PREFIX_CHECKPOINT_DIR, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from trl.trainer.utils import RepeatSampler

from ..checkpoint_folders import find_checkpoint, find_checkpoints, is_last, is_whole
from ..weights import check_state_dict, compute_checksum, load_state_dict
from .udm_grpo_config import UDMGRPOConfig


logger = get_logger(__name__)

# The last two are how PyTorch says it
DISK_ERRORS = r"No space left|[Qq]uota exceeded|File too large|iostream error|inline_container"


class WeightsMixin:
    """
    Weights that are saved as the whole pipeline, which `from_pretrained` loads, or as an adapter, as PEFT saves it.
    Evaluation and prediction have random numbers of their own, and so leave training as it is without them.

    Needs `pipeline`, and of [`~transformers.Trainer`] `args`, `model`, `accelerator` and `processing_class`.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        if state_dict == {}:  # ZeRO-3 keeps the weights in shards, and `Trainer` would save a file of none
            logger.warning(f"{output_dir} has shards only: `stage3_gather_16bit_weights_on_model_save` is not set.")
            return
        if is_peft_model(self.model):
            self.processing_class.save_pretrained(output_dir)
        else:
            self.pipeline.save_config(output_dir)
            for name, component in self.pipeline.components.items():
                if component is not self.pipeline.transformer:
                    component.save_pretrained(os.path.join(output_dir, name))
        self._save_weights(self._weights_folder(output_dir), state_dict)
        args = copy.copy(self.args)
        args.hub_token = None
        torch.save(args, os.path.join(output_dir, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:  # whose checkpoint lies in the root
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_weights(self._weights_folder(resume_from_checkpoint))

    def _weights_folder(self, folder: str | os.PathLike) -> Path:
        return Path(folder, "" if is_peft_model(self.model) else self.pipeline.transformer_name)

    def _save_weights(self, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        # Under the model's own names, also where it was loaded under others, for `_load_weights` to find them
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)
        self.pipeline.save_base_sample(folder)

    # `Trainer` would only warn of missing weights, and load each of an adapter's subfolders as a further adapter
    def _load_weights(self, folder: Path) -> None:
        weights = self._read_weights(folder)
        if is_peft_model(self.model):
            set_peft_model_state_dict(self.model, weights, adapter_name=self.model.active_adapter)
        else:
            self.model.load_state_dict(weights, strict=False)

    def _read_weights(self, folder: Path) -> dict[str, torch.Tensor]:
        if is_peft_model(self.model):
            weights = load_state_dict(folder, "adapter_model")
            own = get_peft_model_state_dict(self.model, adapter_name=self.model.active_adapter)
        else:
            weights = load_state_dict(folder, "model")
            tied = self.model.all_tied_weights_keys.keys() - weights.keys()
            own = {name: weight for name, weight in self.model.state_dict().items() if name not in tied}
        check_state_dict(weights, own, folder)
        return weights

    # `Trainer` would look for the weights in the checkpoint's root, and keep the last ones if it found none
    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        with tempfile.TemporaryDirectory() as folder:
            super()._save_rng_state(folder)
            set_seed(self.args.seed, device_specific=True)
            try:
                return super().evaluation_loop(*args, **kwargs)
            finally:
                super()._load_rng_state(folder)


class CheckpointMixin:
    """
    Checkpoints that are whole, and runs that resume as if nothing had happened.

    Needs `args`, `model`, `ref_model`, `accelerator`, `state`, `control`, the methods of [`WeightsMixin`], and of
    [`~trl.GRPOTrainer`] `_metrics`, `_step`, `_buffered_inputs` and the entropy's coefficient.

    * A checkpoint is *whole* once its `trainer_state.json` is complete. All processes write that file last. A run
      never resumes from a checkpoint that is not whole, and deletes an older checkpoint only after the new one is
      whole.
    * A resumed run equals an unbroken one bit by bit. Beside what [`~transformers.Trainer`] restores, it restores the
      rollouts between two of their updates, the metrics between two logs, and the order of the prompts in later
      epochs. With another batch geometry, all processes draw new rollouts and begin them with an update. Resuming is
      refused where the reference policy is not the one that the run began with, or where weights are missing.
    * On SIGTERM, which clusters send, the step is finished, a checkpoint is saved, and the process exits with 143.
    * A step whose gradient is not finite is skipped. More than `args.max_failed_steps` in a row stop the run.
    """

    def __init__(self, *, args: UDMGRPOConfig, **kwargs: Any):
        # What a script will hand to `train`: a mistake is told before `Trainer` makes a folder, and anything computes
        checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
        super().__init__(args=args, **kwargs)
        self._num_failures = Counter()  # in a row, by kind
        if checkpoint is not None:
            self._check_files(checkpoint)
            if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # which have formats of their own
                self._read_weights(self._weights_folder(checkpoint))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        Train, as [`~transformers.Trainer.train`] does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint folder, or `True` for the last whole one in `args.output_dir`. `True` also deletes the
                torn ones there.
            args (`Any`), kwargs (`Any`):
                As in [`~transformers.Trainer.train`].

        Raises:
            ValueError: If there is no whole checkpoint, weights or files are missing in it, or its reference policy is
                not that of this trainer.
        """
        checkpoint = self._resumed_checkpoint = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None:
            self._check_files(checkpoint)
        if is_last(resume_from_checkpoint):
            self.accelerator.wait_for_everyone()
            for torn in find_checkpoints(self.args.output_dir) if self.args.should_save else ():
                if not is_whole(torn):
                    logger.warning(f"{torn} was not finished and is deleted.")
                    shutil.rmtree(torn)

        self._is_terminated = False

        def on_sigterm(signum: int, frame: FrameType | None) -> None:
            self._is_terminated = True

        if threading.current_thread() is not threading.main_thread():  # where no handler can be set
            return super().train(checkpoint, *args, **kwargs)
        previous_handler = signal.signal(signal.SIGTERM, on_sigterm)
        try:
            return super().train(checkpoint, *args, **kwargs)
        finally:
            signal.signal(signal.SIGTERM, previous_handler)

    # `Trainer` would begin with what it does not find, without a word
    def _check_files(self, checkpoint: str) -> None:
        names = ("optimizer*", SCHEDULER_NAME, "rng_state*.pth")
        missing = [name for name in names if not any(Path(checkpoint).glob(name))]
        is_own = any(Path(checkpoint).glob("rollout_state_*.pth"))
        if missing and is_own and not self.is_deepspeed_enabled:  # which keeps them in files of its own
            raise ValueError(f"A checkpoint must have all of its files, but {checkpoint} lacks {missing}.")
        has_adapter = Path(checkpoint, ADAPTER_CONFIG_NAME).is_file()
        if has_adapter != is_peft_model(self.model) and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            rule, held = ("be given", "an adapter") if has_adapter else ("be None", "all weights")
            raise ValueError(f"`peft_config` must {rule} to resume from {checkpoint}, which holds {held}.")

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # `Trainer` would train one step more where the checkpoint has had the last one
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if kwargs["epoch"] == kwargs["epochs_trained"]:  # counted in this run's geometry, not in the checkpoint's
            self.state.epoch = kwargs["epoch"]
            self._step, self._buffered_inputs = kwargs["steps_trained_in_current_epoch"], None
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if self._resumed_checkpoint is not None and self.state.global_step == self._initial_global_step:
            self._load_rng_state(self._resumed_checkpoint)
        return super()._finalize_training(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        is_terminated = self._is_terminated
        if self.accelerator.num_processes > 1:  # the signal reaches them at different times, and all must save now
            signals = torch.tensor(float(is_terminated), device=self.accelerator.device)
            is_terminated = self.accelerator.reduce(signals, reduction="sum").item() > 0
        if is_terminated:
            self.control.should_save = True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if is_terminated:
            logger.warning(f"Terminated at step {self.state.global_step}, after saving a checkpoint.")
            raise SystemExit(128 + signal.SIGTERM)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> torch.Tensor | float:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # DeepSpeed has already taken its step, and the gradient scaler of fp16 skips steps by itself
        if self.is_deepspeed_enabled or self.accelerator.scaler is not None:
            return grad_norm
        is_finite = math.isfinite(grad_norm)
        self._metrics["train"]["frac_skipped_steps"].append(float(not is_finite))
        if is_finite:
            self._num_failures["gradient"] = 0
        else:
            model.zero_grad(set_to_none=True)  # the optimizer leaves a parameter without a gradient as it is
            self._count_failure("gradient", f"The gradient norm is {grad_norm}, so the step is skipped.")
        return grad_norm

    def _count_failure(self, kind: str, reason: str) -> None:
        self._num_failures[kind] += 1
        if self._num_failures[kind] > self.args.max_failed_steps:
            raise RuntimeError(
                f"{reason} This happened {self._num_failures[kind]} times in a row, and `max_failed_steps` is "
                f"{self.args.max_failed_steps}. Look at the reward functions, or lower `learning_rate`, and continue "
                "from the last checkpoint with `resume_from_checkpoint=True`."
            )
        logger.warning(reason)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save and checkpoint.exists():  # of an earlier attempt at this step
            (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
            shutil.rmtree(checkpoint)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if self.args.should_save and not is_whole(checkpoint):
                shutil.rmtree(checkpoint, ignore_errors=True)
            if not re.search(DISK_ERRORS, str(error)):
                raise
            free = shutil.disk_usage(next(folder for folder in checkpoint.parents if folder.exists())).free
            raise RuntimeError(
                f"{checkpoint} could not be written ({error}). The disk has {free / 1e9:.1f} GB left. Older "
                "checkpoints are untouched: free space, and continue with `resume_from_checkpoint=True`."
            ) from error

    # `Trainer` writes `trainer_state.json` after this
    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        is_between_updates = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        state = {
            "geometry": self._geometry,
            "step": self._step,
            "buffered_inputs": self._buffered_inputs if is_between_updates else None,
            "metrics": {mode: dict(metrics) for mode, metrics in self._metrics.items()},
            "unlogged_loss": (self._tr_loss, self._globalstep_last_logged),
            "entropy_control": (self.entropy_coef, self._last_world_entropy),
            "reference_checksum": self._reference_checksum,
        }
        torch.save(state, os.path.join(output_dir, f"rollout_state_{self.accelerator.process_index}.pth"))
        self.accelerator.wait_for_everyone()

    # `Trainer` calls this just before the first batch that is not skipped
    def _load_rng_state(self, checkpoint: str) -> None:
        super()._load_rng_state(checkpoint)
        own = Path(checkpoint, f"rollout_state_{self.accelerator.process_index}.pth")
        paths = sorted(Path(checkpoint).glob("rollout_state_*.pth"))
        state, geometry = None, self._geometry
        if paths:
            state = torch.load(own if own in paths else paths[0], map_location="cpu", weights_only=True)
            geometry = state.get("geometry") or self._infer_geometry(state, len(paths))
        is_usable = own in paths or geometry["num_processes"] != self.args.world_size
        # Decided together: processes that drew rollouts at different steps would wait for each other forever
        findings = [[is_usable, own in paths and geometry == self._geometry]]
        findings = torch.tensor(findings, dtype=torch.int, device=self.accelerator.device)
        is_usable, is_same = self.accelerator.gather(findings).amin(dim=0).tolist()
        if not is_usable:
            logger.warning(
                f"{checkpoint} has no {own.name}, or lacks that of another process: it was saved with "
                "`save_only_model`, or by another trainer. Training continues from its weights, but not exactly as an "
                "unbroken run would."
            )
            return
        checksums = {state["reference_checksum"], self._reference_checksum} - {0, None}  # without one, and in shards
        if len(checksums) > 1:
            raise ValueError(
                "The reference policy must be the one that the run began with: the model given to the trainer has "
                f"other weights, or another dtype, than the one that {checkpoint} was trained from. Load the initial "
                "model, as before; its trained weights are taken from the checkpoint."
            )
        if is_same:
            self._step = state["step"]
            self._buffered_inputs = send_to_device(state["buffered_inputs"], self.accelerator.device)
        else:
            names = [name for name, value in self._geometry.items() if geometry[name] != value]
            before, now = ({name: values[name] for name in names} for values in (geometry, self._geometry))
            logger.warning(
                f"{checkpoint} was saved with {before}, and this run has {now}. Its unfinished rollouts are dropped, "
                "and the next update begins with new ones. An exact resume needs the checkpoint's values."
            )
        for mode, metrics in state["metrics"].items():
            self._metrics[mode] = defaultdict(list, metrics)
        unlogged_loss, self._globalstep_last_logged = state["unlogged_loss"]
        self._tr_loss = unlogged_loss.to(self.accelerator.device)
        self._total_loss_scalar = -unlogged_loss.item()  # the summary at the end is of the steps of this call
        self.entropy_coef, self._last_world_entropy = state["entropy_control"]

    @property
    def _geometry(self) -> dict[str, Any]:
        """What the rows of a rollout follow from, and how many of them an update takes."""
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
        names += ("num_iterations", "num_generations", "num_train_timesteps", "importance_sampling_level")
        names += ("beta", "pipeline_kwargs")
        return {"num_processes": self.args.world_size} | {name: getattr(self.args, name) for name in names}

    def _infer_geometry(self, state: dict[str, Any], num_processes: int) -> dict[str, Any]:
        """The geometry of a checkpoint of version 0.1, as far as it shows."""
        steps = math.ceil(state["step"] / self.state.global_step)
        geometry = {**self._geometry, "num_processes": num_processes, "gradient_accumulation_steps": steps}
        if rows := state["buffered_inputs"]:
            geometry["steps_per_generation"] = len(rows)
            geometry["per_device_train_batch_size"] = len(rows[0]["prompt_ids"])
        return geometry

    @functools.cached_property
    def _reference_checksum(self) -> int | None:
        """A checksum of the reference policy's weights: of its copy, or those under the adapter and of its start."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # each process has only a part of them
            return None
        model = self.model if self.ref_model is None else self.ref_model
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        return compute_checksum([*frozen, *(self.initial_weights or {}).values()])


class EpochRepeatSampler(RepeatSampler):
    """
    A [`~trl.trainer.utils.RepeatSampler`] whose order in an epoch is the same whether or not this process drew the
    epochs before it. Not needed once TRL's sampler has `set_epoch` (docs/upstream.md).

    `get_epoch` tells the number of the epoch that begins. The other arguments are those of the base class.
    """

    def __init__(self, get_epoch: Callable[[], int], **kwargs: Any):
        super().__init__(**kwargs)
        self.get_epoch = get_epoch

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(self.get_epoch()):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()
