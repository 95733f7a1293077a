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

"""Throughput: samples per second, and how much of the device's peak a run uses."""

import time
from typing import TYPE_CHECKING

from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.utils import get_peak_flops_per_device


if TYPE_CHECKING:
    from .trainer.udm_grpo_trainer import UDMGRPOTrainer


class ThroughputCallback(TrainerCallback):
    r"""
    Logs `samples_per_second`, the number of samples that all processes draw, score and train in a second, and `mfu`,
    the model FLOPs utilization in `[0, 1]`: the FLOPs of a step by its time, relative to the peak of the devices.

    FLOPs are counted by a formula. A forward pass over a row of L tokens, N of which are image or text tokens, has

        F = 2 P L + 4 D W L² + 2 H N,

    where P are the weights of the D layers, W is the width of their attention (heads × head dimension), and H are the
    weights of the head. A step draws S samples in I forward passes each (twice as many with guidance), one for each
    inference step except a first one that moves no token. It scores their R rows once for the reference and once for
    the old policy where these are needed, and trains the R rows, whose backward pass counts as two forward passes, or
    as one with an adapter, since frozen weights have no gradient:

        FLOPs = F (S I + R / num_iterations · (number of scorings) + R (1 + 2)).

    What activation checkpointing computes again, the decoder, and the rewards are not counted. `mfu` is left out where
    TRL does not know the peak of the device in this precision, as on CPUs, and for networks with experts. With dynamic
    sampling, both are those of a batch whose groups are all drawn once and trained.

    Args:
        trainer ([`UDMGRPOTrainer`]):
            Trainer that the callback is added to. Each adds one by itself.
    """

    def __init__(self, trainer: "UDMGRPOTrainer"):
        self.trainer = trainer
        self.model = trainer.pipeline.transformer
        self.num_weights = count_weights(self.model)  # before FSDP splits them
        self.peak_flops = None
        if trainer.accelerator.device.type == "cuda" and self.num_weights is not None:
            dtype = "bfloat16" if trainer.args.bf16 else "float16" if trainer.args.fp16 else str(self.model.dtype)[6:]
            self.peak_flops = get_peak_flops_per_device(trainer.accelerator, dtype)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.log_step(time.perf_counter() - self._started)

    def log_step(self, seconds: float) -> None:
        """
        Adds the metrics of a step.

        Args:
            seconds (`float`):
                What it took.
        """
        args, metrics = self.trainer.args, self.trainer._metrics["train"]
        metrics["samples_per_second"].append(self.num_rows / args.num_train_timesteps / args.num_iterations / seconds)
        if self.peak_flops is not None:
            metrics["mfu"].append(self.count_flops() / seconds / (self.peak_flops * args.world_size))

    @property
    def num_rows(self) -> int:
        """Rows of an optimization step, of all processes."""
        args = self.trainer.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

    def count_flops(self) -> float:
        """
        FLOPs of an optimization step, of all processes, by the formula above. Where several steps share a rollout,
        each has its share of it.

        Returns:
            `float`: The FLOPs.
        """
        args, rows = self.trainer.args, self.trainer._buffered_inputs[0]
        length, num_tokens = rows["prompt_ids"].size(1), rows["completion_ids"].size(1)
        forward = count_forward_flops(self.model, self.num_weights, length, num_tokens)
        num_scorings = ("old_per_token_logps" in rows) + ("ref_per_token_logps" in rows)
        num_steps, scheduler = args.num_inference_steps, self.trainer.pipeline.scheduler
        if args.action == "clean" and args.trajectory == "forward" and hasattr(scheduler, "needs_model_output"):
            num_steps -= not scheduler.needs_model_output(0)
        num_passes = num_steps * (1 if args.guidance_scale == 1.0 else 2) / args.num_train_timesteps
        backward = 1 if is_peft_model(self.trainer.model) else 2
        is_kl_full = self.trainer.beta != 0.0 and args.kl_estimator == "full"  # the reference's pass is in the update
        return (
            forward * self.num_rows * ((num_passes + num_scorings) / args.num_iterations + is_kl_full + 1 + backward)
        )


def count_weights(model: PreTrainedModel) -> tuple[int, int] | None:
    """
    Counts the weights that multiply each token in a network.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The network.

    Returns:
        `tuple[int, int]` or `None`: Those of the layers, and those of the head. `None` for networks with experts, of
        which a token uses a few only, and for those that do not say what their head is.
    """
    if getattr(model.config.get_text_config(), "num_experts", None) or model.get_output_embeddings() is None:
        return None
    head = model.get_output_embeddings().weight
    others = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)} | {head}
    layers = sum(weight.numel() for weight in model.parameters() if weight.ndim > 1 and weight not in others)
    return layers, head.numel()


def count_forward_flops(model: PreTrainedModel, num_weights: tuple[int, int], length: int, num_tokens: int) -> int:
    """
    FLOPs of a forward pass over one row, by the formula of [`ThroughputCallback`].

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The network.
        num_weights (`tuple[int, int]`):
            What [`count_weights`] gives for it.
        length (`int`):
            Tokens that the layers see.
        num_tokens (`int`):
            Tokens whose logits are computed.

    Returns:
        `int`: The FLOPs.
    """
    config = model.config.get_text_config()
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    layers, head = num_weights
    attention = 4 * config.num_hidden_layers * num_heads * head_dim * length**2
    return 2 * layers * length + attention + 2 * head * num_tokens
