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

import functools
import json
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
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model, send_to_device, set_seed
from peft import get_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn
from transformers.trainer import PREFIX_CHECKPOINT_DIR, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput
from trl.trainer.utils import RepeatSampler


logger = get_logger(__name__)

DISK_ERRORS = r"No space left|quota exceeded|iostream error|inline_container"  # the last two are PyTorch's


class CheckpointMixin:
    """
    Checkpoints that are whole, and runs that resume as if nothing had happened.

    Needs `pipeline`, `args`, `model`, `ref_model`, `accelerator`, `state`, `control`, and of [`~trl.GRPOTrainer`]
    `_metrics`, `_step`, `_buffered_inputs` and the entropy's coefficient.

    * A full run saves the whole pipeline, which `from_pretrained` loads. An adapter is saved as PEFT saves it.
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

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._resumed_checkpoint = None
        self._is_terminated = False
        self._num_failures = Counter()  # in a row, by kind

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
            ValueError: If there is no whole checkpoint, or its reference policy is not that of this trainer.
        """
        if str(resume_from_checkpoint).lower() == "true":  # a string from the command line
            checkpoints = find_checkpoints(self.args.output_dir)
            whole = [checkpoint for checkpoint in checkpoints if is_whole(checkpoint)]
            if not whole:
                raise ValueError(
                    f"`resume_from_checkpoint` is True, but `output_dir` {self.args.output_dir!r} has no whole "
                    f"checkpoint ({len(checkpoints)} torn ones). Start anew without it, or name a checkpoint."
                )
            resume_from_checkpoint = whole[-1]
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                for torn in set(checkpoints) - set(whole):
                    logger.warning(f"{torn} was not finished and is deleted.")
                    shutil.rmtree(torn)
        elif resume_from_checkpoint and not is_whole(resume_from_checkpoint):
            raise ValueError(
                f"`resume_from_checkpoint` must be a whole checkpoint, got {resume_from_checkpoint!r}, which is "
                "missing or was not finished. `True` takes the last whole one in `output_dir`."
            )

        self._resumed_checkpoint = resume_from_checkpoint or None
        self._is_terminated = False

        def on_sigterm(signum: int, frame: FrameType | None) -> None:
            self._is_terminated = True

        if threading.current_thread() is not threading.main_thread():  # where no handler can be set
            return super().train(resume_from_checkpoint, *args, **kwargs)
        previous_handler = signal.signal(signal.SIGTERM, on_sigterm)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            signal.signal(signal.SIGTERM, previous_handler)

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

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:  # evaluation has random numbers of its own
            super()._save_rng_state(folder)
            set_seed(self.args.seed, device_specific=True)
            try:
                return super().evaluate(*args, **kwargs)
            finally:
                super()._load_rng_state(folder)

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
            gigabytes = shutil.disk_usage(checkpoint.parent).free / 1e9
            raise RuntimeError(
                f"{checkpoint} could not be written ({error}). The disk has {gigabytes:.1f} GB left. Older "
                "checkpoints are untouched: free space, and continue with `resume_from_checkpoint=True`."
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        model = self.accelerator.unwrap_model(self.model)
        if state_dict == {}:  # ZeRO-3 keeps the weights in shards, and `Trainer` would save a file of none
            logger.warning(f"{output_dir} has shards only: `stage3_gather_16bit_weights_on_model_save` is not set.")
        elif is_peft_model(self.model):
            super()._save(output_dir, state_dict)
            self.pipeline.save_base_sample(output_dir)
        else:
            self.pipeline.save_config(output_dir)
            for name, component in self.pipeline.components.items():
                if component is not self.pipeline.transformer:
                    component.save_pretrained(os.path.join(output_dir, name))
            model.save_pretrained(os.path.join(output_dir, self.pipeline.transformer_name), state_dict=state_dict)
            torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:  # whose checkpoint lies in the root
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif is_peft_model(self.model):
            self._load_weights(resume_from_checkpoint)
        else:
            self._load_weights(os.path.join(resume_from_checkpoint, self.pipeline.transformer_name))

    def _load_weights(self, folder: str) -> None:
        """Loads the network, or its adapter, from a folder that holds nothing else."""
        if is_peft_model(self.model):  # `Trainer` would load each of the folder's subfolders as a further adapter
            name = self.model.active_adapter
            needed = set(get_peft_model_state_dict(self.model, adapter_name=name))
            saved = set(load_peft_weights(folder, "cpu"))
            self._issue_warnings_after_load(
                SimpleNamespace(missing_keys=needed - saved, unexpected_keys=saved - needed)
            )
            self.model.load_adapter(folder, name, is_trainable=True)
        else:
            super()._load_from_checkpoint(folder)

    # `Trainer` would only warn
    def _issue_warnings_after_load(self, load_result: Any) -> None:
        missing = set(load_result.missing_keys) - set(self.model.all_tied_weights_keys)
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"A checkpoint must have the weights of the model, but this one lacks {sorted(missing)}, and has "
                f"{sorted(load_result.unexpected_keys)} besides. Take another one, or the model it was saved from."
            )

    # `Trainer` would look for the weights in the checkpoint's root, and keep the last ones if it found none
    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

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
        name = f"rollout_state_{self.accelerator.process_index}.pth"
        is_own = os.path.exists(os.path.join(checkpoint, name))
        path = os.path.join(checkpoint, name if is_own else "rollout_state_0.pth")
        state = torch.load(path, map_location="cpu", weights_only=True) if os.path.exists(path) else None
        num_states = len(list(Path(checkpoint).glob("rollout_state_*.pth")))  # earlier versions saved no geometry
        geometry = {**self._geometry, "num_processes": num_states, **((state or {}).get("geometry") or {})}
        # Decided together: processes that drew rollouts at different steps would wait for each other forever
        findings = [state is not None, is_own and geometry == self._geometry]
        findings = torch.tensor([findings], dtype=torch.int, device=self.accelerator.device)
        has_state, is_same = self.accelerator.gather(findings).amin(dim=0).tolist()
        if not has_state:
            logger.warning(
                f"{checkpoint} has no {name}: it was saved with `save_only_model`, or by another trainer. Training "
                "continues from its weights, but not exactly as an unbroken run would."
            )
            return
        if state["reference_checksum"] != self._reference_checksum:
            raise ValueError(
                "The reference policy must be the one that the run began with: the model given to the trainer has "
                f"other weights, or another dtype, than the one that {checkpoint} was trained from. Load the initial "
                "model, as before; its trained weights are taken from the checkpoint."
            )
        if is_same:
            self._step = state["step"]
            self._buffered_inputs = send_to_device(state["buffered_inputs"], self.accelerator.device)
        else:
            sides = (self._geometry, geometry)
            now, before = (dict(one.items() - other.items()) for one, other in (sides, sides[::-1]))
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
    def _geometry(self) -> dict[str, int]:
        """What the number of rows in an update and in a generation batch follows from."""
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
        names += ("num_iterations", "num_generations", "num_train_timesteps")
        return {"num_processes": self.args.world_size} | {name: getattr(self.args, name) for name in names}

    @functools.cached_property
    def _reference_checksum(self) -> int | None:
        """A checksum of the reference policy's weights: of its copy, or those under the adapter and of its start."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # each process has only a part of them
            return None
        model = self.model if self.ref_model is None else self.ref_model
        integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        frozen = [parameter.detach() for parameter in model.parameters() if not parameter.requires_grad]
        frozen += (self.initial_weights or {}).values()
        sums = [weights.view(integers[weights.element_size()]).sum(dtype=torch.int64).item() for weights in frozen]
        return sum(place * total for place, total in enumerate(sums, start=1))


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


def is_whole(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint has a complete `trainer_state.json`, which is written last."""
    try:
        json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True


def find_checkpoints(output_dir: str | os.PathLike) -> list[str]:
    """The checkpoint folders of a run, whole or not, in the order of their steps."""
    names = [path.name.rpartition("-") for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    steps = sorted(int(step) for prefix, _, step in names if prefix == PREFIX_CHECKPOINT_DIR and step.isdecimal())
    return [str(Path(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")) for step in steps]
