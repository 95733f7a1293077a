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

"""Runs that are killed for the tests of resuming, each in a process forked from one that has everything imported."""

import multiprocessing
import os
import signal
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig

from trl_udm import UDMGRPOConfig, UDMGRPOTrainer

from .toy_text_family import build_toy_text_pipeline


PROMPTS = Dataset.from_dict({"prompt": ["ab", "abc", "b", "dcba", "c", "da"]})
LORA = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", exclude_modules=["lm_head"])
OF_THE_CALL = ("step_time", "runtime", "per_second", "profiling", "train_loss")  # timings, and the summary's mean


class KilledTrainer(UDMGRPOTrainer):
    """Is killed, or terminated, at one moment of one step."""

    moment, step, signal = None, None, signal.SIGKILL

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rollouts, self.rows = [], []

    def reach(self, moment):
        if self.moment == moment and self.state.global_step == self.step:
            os.kill(os.getpid(), self.signal)

    def _rollout(self, prompts, mode, *args, **kwargs):
        self.rollouts.append((self.state.global_step, self._step, prompts))
        outputs = super()._rollout(prompts, mode, *args, **kwargs)
        self.reach("rollout")
        return outputs

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        clipped = self._metrics["train"]["clip_ratio/region_mean"][-1]
        self.rows.append((self.state.global_step, len(self.rollouts), clipped))
        self.reach("backward")
        return loss

    def _save_rng_state(self, output_dir):
        self.reach("save")
        super()._save_rng_state(output_dir)
        self.reach("saved but for its state")


def build_trainer(output_dir, lora=False, ema=False, num_iterations=1, max_steps=4, pipeline=None, **kwargs):
    def count_a(prompts, completions, **kwargs):
        trainer.reach("reward")
        return [completion.count("a") / len(completion) for completion in completions]

    args = {
        "num_generations": 4,
        "per_device_train_batch_size": 24,
        "num_inference_steps": 5,
        "num_inference_steps_eval": 5,
        "learning_rate": 1e-2,
        "num_iterations": num_iterations,
        "max_steps": max_steps,
        "save_steps": 1,
        "logging_steps": 3,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "ema_decay": 0.9 if ema else None,
    }
    trainer = KilledTrainer(
        build_toy_text_pipeline() if pipeline is None else pipeline,
        count_a,
        UDMGRPOConfig(str(output_dir), **{**args, **kwargs}),
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS if "eval_strategy" in kwargs else None,
        peft_config=LORA if lora else None,
    )
    return trainer


def train(output_dir, resume=False, moment=None, step=None, signal_number=signal.SIGKILL, **kwargs):
    """Train, and save what the run is compared by."""
    torch.set_num_threads(1)
    trainer = build_trainer(output_dir, **kwargs)
    trainer.moment, trainer.step, trainer.signal = moment, step, signal_number
    trainer.train(resume_from_checkpoint=resume)
    history = [
        {name: value for name, value in log.items() if not any(part in name for part in OF_THE_CALL)}
        for log in trainer.state.log_history
    ]
    outcome = {
        "weights": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "history": history,
        "ema": [] if trainer.ema is None else trainer.ema.shadow_params,
        "next samples": trainer._rollout(["ab", "c"], "train").output.clean_samples,
    }
    torch.save(outcome, Path(output_dir) / "outcome.pth")


def run(output_dir, target=train, **kwargs):
    """`target` in a process of its own. Returns its exit code, negative for a signal."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=target, args=(str(output_dir),), kwargs=kwargs)
    process.start()
    process.join(120)
    return process.exitcode
