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

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..pipelines.pipeline_udm import UDMPipeline
from ..schedulers.forward_process import predicts_leave_one_out
from ..trainer.adapters import prepare_model
from ..trainer.checkpoint import WeightsMixin


@dataclass
class UDMSFTConfig(TrainingArguments):
    r"""
    Configuration of [`UDMSFTTrainer`]. It has the arguments of [`~transformers.TrainingArguments`] and those below.

    Args:
        pipeline_kwargs (`dict`, *optional*):
            Size options of the pipeline family, such as `{"height": 512, "width": 512}`, for `pipeline.latent_shape`.
            By default the model's native size.
        chat_template_kwargs (`dict`, *optional*):
            Arguments of the chat template, for prompts that are messages.
    """

    pipeline_kwargs: dict | None = field(
        default=None, metadata={"help": "Size options of the pipeline family. By default the model's native size."}
    )
    chat_template_kwargs: dict | None = field(default=None, metadata={"help": "Arguments of the chat template."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be False: the pipeline reads rows."})

    def __post_init__(self):
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be False, got True: the network has no such columns.")
        if self.dataloader_num_workers > 0:
            raise ValueError(
                f"`dataloader_num_workers` must be 0, got {self.dataloader_num_workers}: the pipeline encodes rows on "
                "its own device."
            )


class UDMSFTTrainer(WeightsMixin, Trainer):
    r"""
    Trainer for supervised fine-tuning of uniform discrete diffusion models, such as before reinforcement learning.

    The loss is the one that these models are pretrained with. For clean samples x₁ of N tokens, at times t that the
    scheduler draws,

        x_t ~ p_t(· | x₁),    loss = −(1/N) Σ_n log p_θ(x₁ⁿ | x_t, c).

    All tokens count, also those after the end of a text, which the sampler meets too. With a [`MaskedDDIMScheduler`]
    the logarithm is 0 at visible tokens. With a scheduler whose `prediction_type` is `"leave_one_out"`, p_θ(x₁ⁿ | x_t,
    c) is computed from the network's prediction that does not see token n.

    Args:
        pipeline ([`UDMPipeline`]):
            Pipeline whose `transformer` is trained, in place or by an adapter.
        args ([`UDMSFTConfig`], *optional*):
            Configuration.
        train_dataset ([`~datasets.Dataset`]):
            Dataset with the columns `prompt` and `completion`, which is what `pipeline.encode_completions` takes: a
            text, a PIL image, or the frames of a video.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Dataset of evaluation. `eval_loss` is the loss there, with the same times and noise in each evaluation.
        callbacks (`list[TrainerCallback]`, *optional*):
            As in [`~transformers.Trainer`].
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            As in [`~transformers.Trainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            New adapter to train, instead of all weights. An adapter of the pipeline is trained further instead.

    Raises:
        TypeError: If `pipeline` or `args` has the wrong type.
        ValueError: If a dataset lacks a column, or the pipeline has an adapter and a `peft_config` is given.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from trl_udm import TextUDMPipeline, UDMSFTConfig, UDMSFTTrainer
    >>> from trl_udm.worlds.sums import CHECKPOINT_PATH

    >>> trainer = UDMSFTTrainer(
    ...     TextUDMPipeline.from_pretrained(CHECKPOINT_PATH),
    ...     UDMSFTConfig("sums-sft", max_steps=1, report_to="none"),
    ...     Dataset.from_dict({"prompt": ["17+45="], "completion": ["50+12=62"]}),
    ... )
    >>> trainer.train()
    ```
    """

    args: UDMSFTConfig
    model: Any  # not `None`, as transformers says

    def __init__(
        self,
        pipeline: UDMPipeline,
        args: UDMSFTConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        if not isinstance(pipeline, UDMPipeline):
            raise TypeError(f"`pipeline` must be a `UDMPipeline`, got {type(pipeline).__name__}.")
        args = UDMSFTConfig(f"{type(pipeline).__name__}-SFT") if args is None else copy.copy(args)
        if not isinstance(args, UDMSFTConfig):
            raise TypeError(f"`args` must be a `UDMSFTConfig`, got {type(args).__name__}.")
        datasets = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        for name, dataset in {"train_dataset": train_dataset, **datasets}.items():
            if dataset is not None and not {"prompt", "completion"} <= set(dataset.column_names):
                raise ValueError(
                    f"`{name}` must have the columns 'prompt' and 'completion', got {dataset.column_names}."
                )
        args.label_names = ["clean_samples"]  # by which `Trainer` knows that evaluation has a loss
        pipeline.check_components()
        pipeline.forget_local_paths()
        self.pipeline, self.latent_shape = pipeline, pipeline.latent_shape(**(args.pipeline_kwargs or {}))
        with pipeline.keep_base_weights(peft_config) as base_weights:
            model, peft_config = prepare_model(pipeline, peft_config, None)
            if peft_config is not None:
                model = get_peft_model(model, peft_config)
                pipeline.attach_adapters(model, base_weights)
            super().__init__(
                model=model,
                args=args,
                data_collator=self.encode_rows,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=pipeline.tokenizer,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch

    def encode_rows(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Encodes rows of a dataset.

        Args:
            rows (`list[dict]`):
                B rows.

        Returns:
            `dict[str, torch.Tensor]`: `prompt_ids` and `prompt_mask` (B, T), and `clean_samples` (B, N), on the CPU.
        """
        chat_template_kwargs = self.args.chat_template_kwargs or {}
        prompt_ids, prompt_mask = self.pipeline.encode_prompt([row["prompt"] for row in rows], **chat_template_kwargs)
        completions = [row["completion"] for row in rows]
        clean_samples = self.pipeline.encode_completions(completions, self.latent_shape)
        tensors = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "clean_samples": clean_samples}
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        prompt_ids, prompt_mask, clean_samples = inputs.values()
        scheduler = self.pipeline.scheduler
        t = scheduler.sample_timesteps((len(clean_samples),), device=clean_samples.device)  # (B,)
        noised_samples = scheduler.add_noise(clean_samples, t)  # (B, N)
        if self.pipeline.takes_token_times:
            t = t.unsqueeze(1).expand_as(clean_samples)
        prompt_ids, prompt_mask = self.pipeline.extend_prompt(prompt_ids, prompt_mask, clean_samples)
        labels, is_loo = clean_samples, predicts_leave_one_out(scheduler)
        if is_loo:
            labels = torch.stack([clean_samples, noised_samples], dim=-1)  # (B, N, 2)
        rows = (prompt_ids, prompt_mask, noised_samples, self.latent_shape, labels, t)
        with self.accelerator.autocast():
            logps, _, _ = self.pipeline.score_with_kl(model, None, *rows)
        if is_loo:
            logps = scheduler.undo_leave_one_out(logps, clean_samples, noised_samples, t)  # (B, N)
        loss = -logps.mean()
        return (loss, {}) if return_outputs else loss
