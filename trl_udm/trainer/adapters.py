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

"""The policy: what is trained, what is the reference, and how samples are drawn from either weights or an adapter."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DynamoBackend, is_peft_model
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models import prepare_deepspeed, prepare_fsdp, unwrap_model_for_generation
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from ..models.layers import compile_layers, without_checkpointing
from ..pipelines.lora import (
    can_merge,
    check_peft_config,
    has_adapters,
    is_quantized,
    merged_adapter,
    starts_at_zero,
    try_merging,
    unfreeze_adapter,
)
from ..pipelines.pipeline_udm import UDMPipeline


logger = get_logger(__name__)


class PolicyMixin:
    """
    Arrangements for the model that is trained and for its reference, and the context in which samples are drawn.

    Needs `pipeline`, `args`, `model`, `model_wrapped`, `ref_model`, `accelerator`, `beta`, `_metrics` and `_dist` of
    [`~trl.GRPOTrainer`].
    """

    _kl: list[torch.Tensor] | None = None
    """Divergences of rows, while a loss is computed with `kl_estimator="full"`."""

    def _prepare_policy(self, is_new_adapter: bool, adapter_weights: dict[nn.Parameter, torch.Tensor]) -> None:
        if any(is_quantized(parameter) for parameter in self.model.parameters()):
            # TRL has rounded the adapter to bfloat16, in which small steps are lost
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = adapter_weights.get(parameter, parameter.data.float())
        self.initial_weights = self._copy_initial_weights(is_new_adapter)
        # TRL writes what ZeRO-3 needs under the name that transformers had for it before
        self.args.activation_checkpointing_kwargs = self.args.gradient_checkpointing_kwargs
        self._forget_input_gradients()
        self.merge_adapter = self._resolve_merge_adapter()
        if self._dist.fsdp_version == 2 and self.accelerator.state.fsdp_plugin.mixed_precision_policy is not None:
            # Accelerate has FSDP2 return everything in half precision, log-probabilities too
            plugin = self.accelerator.state.fsdp_plugin
            plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)
        if self.args.torch_compile:
            # Not by Accelerate, which compiles the whole of `self.model_wrapped`: rollouts do not call that
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
            compile_layers(self.model, self.args.torch_compile_backend, self.args.torch_compile_mode)

    def _forget_input_gradients(self) -> None:
        """
        Undoes `enable_input_require_grads`, which TRL and transformers call for reentrant checkpointing. Otherwise
        what lies before the first trained weight, such as a whole encoder, would keep its activations.
        """
        kwargs = self.args.activation_checkpointing_kwargs or {}
        if kwargs.get("use_reentrant") is False or not kwargs.keys() - {"every_n_layers", "offload"}:
            self.model.disable_input_require_grads()

    def _copy_initial_weights(self, is_new_adapter: bool) -> dict[nn.Parameter, torch.Tensor] | None:
        """The trained weights as they are before the first step, where the policy is not that without the adapter."""
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        if not trained:
            raise ValueError(
                "Nothing is trained: no weight of the model has `requires_grad`. Call `requires_grad_(True)` on the "
                "transformer, or give a `peft_config` without `inference_mode`."
            )
        starts_at_base = is_new_adapter and starts_at_zero(self.model, trained)
        if self.beta == 0.0 or not is_peft_model(self.model) or starts_at_base:
            return None
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                "With FSDP and DeepSpeed ZeRO-3 the reference policy is the model without the adapter, and this one "
                "does not start at that. Use a new LoRA that starts at zero, DDP, or `beta=0`."
            )
        return {weight: weight.detach().clone() for weight in trained.values()}

    @contextlib.contextmanager
    def _reference_weights(self) -> Iterator[nn.Module]:
        """The reference: a copy, or the model without its adapter or with the weights from before the first step."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        if self.initial_weights is None:
            with self.accelerator.unwrap_model(self.model).disable_adapter():
                yield self.model
            return
        with replaced_weights(self.initial_weights):
            yield self.model

    def _compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.beta == 0.0 or self.args.kl_estimator == "k3":
            return super()._compute_loss(model, inputs)
        # TRL's loss has k3 only. The divergences are computed along with the log-probabilities that it asks for.
        beta, self.beta, self._kl = self.beta, 0.0, []
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
            kl, self._kl = self._kl, None
        kl = torch.cat(kl).mean()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["kl"].append(self.accelerator.gather(kl.detach()).mean().item())
        return loss + beta * kl / (self.current_gradient_accumulation_steps if mode == "train" else 1.0)

    @torch.no_grad()
    def _predict_reference(self, *rows: Any) -> tuple[torch.Tensor, nn.Module]:
        """What `pipeline.predict_tokens` returns for the reference."""
        with without_checkpointing(self.model), self._reference_weights() as reference:
            return self.pipeline.predict_tokens(reference, *rows)

    def _resolve_merge_adapter(self) -> bool:
        is_sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        is_exact = is_peft_model(self.model) and not is_sharded and self.accelerator.mixed_precision == "no"
        if not (self.args.merge_adapter or (self.args.merge_adapter is None and is_exact and can_merge(self.model))):
            return False
        reason = "DeepSpeed and FSDP shard the weights" if is_sharded else "there is no adapter"
        if is_peft_model(self.model) and not is_sharded:
            reason = try_merging(self.model)
        if self.args.merge_adapter and reason is not None:
            raise ValueError(f"`merge_adapter` must be False or None, got True: {reason}.")
        return reason is None

    def _prepare_reference(self, reference: PreTrainedModel) -> nn.Module:
        """Does for the reference model what `GRPOTrainer.__init__` does for one that it loads."""
        if self.args.torch_compile:
            compile_layers(reference, self.args.torch_compile_backend, self.args.torch_compile_mode)
        if self.args.disable_dropout:
            disable_dropout_in_model(reference)
        add_fused_lm_head(reference, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(reference, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(reference, self.accelerator)
        return self.accelerator.prepare_model(reference, evaluation_mode=True)

    @contextlib.contextmanager
    def _sampling(self) -> Iterator[None]:
        """
        A context in which `self.pipeline` draws samples of the policy: with whole weights, the adapter merged where
        that is exact, the run's precision, and no activation checkpointing. All is as it was before after it.
        """
        pipeline, name = self.pipeline, self.pipeline.transformer_name
        transformer = pipeline.transformer
        is_wrapped = self.is_fsdp_enabled and is_peft_model(self.model)
        if is_wrapped:
            # FSDP gathers weights once its root is called, which is the model that PEFT has put around the transformer
            setattr(pipeline, name, self.model)
        try:
            with (
                without_checkpointing(self.model),
                unwrap_model_for_generation(
                    self.model_wrapped,
                    self.accelerator,
                    gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                ),
                self._dist.summon_full_params(self.model_wrapped, recurse=False),
                self.accelerator.autocast(),
                merged_adapter(self.accelerator.unwrap_model(self.model))
                if self.merge_adapter
                else contextlib.nullcontext(),
            ):
                yield
        finally:
            if is_wrapped:
                setattr(pipeline, name, transformer)


@contextlib.contextmanager
def replaced_weights(weights: dict[nn.Parameter, torch.Tensor]) -> Iterator[None]:
    """A context in which parameters have other values."""
    own = {weight: weight.data for weight in weights}
    try:
        for weight, value in weights.items():
            weight.data = value.to(weight.device, weight.dtype)
        yield
    finally:
        for weight, value in own.items():
            weight.data = value


def prepare_model(
    pipeline: UDMPipeline, peft_config: PeftConfig | None, adapter: str | None
) -> tuple[nn.Module, PeftConfig | None]:
    """The model to train, a transformer or the adapter that it has, and the configuration of a new adapter."""
    if adapter is not None:
        if peft_config is not None or has_adapters(pipeline.transformer):
            raise ValueError(
                f"`adapter` must be None with a `peft_config` (`use_peft` in a script), and where the pipeline has an "
                f"adapter already, got {adapter!r}. One adapter is trained: leave out the other."
            )
        pipeline.load_lora_weights(adapter)
    transformer = pipeline.transformer
    check_quantized_weights(transformer, has_adapter=peft_config is not None or has_adapters(transformer))
    if peft_config is None and has_adapters(transformer):
        return unfreeze_adapter(pipeline.peft_model), None
    if has_adapters(transformer):
        raise ValueError(
            f"The pipeline has adapters already ({sorted(transformer.peft_config)}): training would overwrite them. "
            "Merge them into the weights first, as docs/checkpoints.md shows, or unload them."
        )
    if peft_config is not None or isinstance(transformer, PeftModel):
        check_peft_config(peft_config or transformer.active_peft_config, is_trained=True)
    if peft_config is not None:
        peft_config = copy.copy(peft_config)
        peft_config.task_type = None  # PEFT's task classes wrap `generate`, which a denoiser does not have
    elif any(parameter.dtype != torch.float32 for parameter in transformer.parameters()):
        logger.warning(
            f"All weights are trained, in {transformer.dtype}, which rounds small steps to nothing. Load the pipeline "
            "with `dtype=torch.float32`; `bf16=True` still computes in bfloat16."
        )
    return transformer, peft_config


def check_quantized_weights(transformer: nn.Module, has_adapter: bool) -> None:
    """Raises a `ValueError` where a transformer has quantized weights that cannot be trained, or not on its device."""
    quantized = [parameter for parameter in transformer.parameters() if is_quantized(parameter)]
    if quantized and not has_adapter:
        raise ValueError(
            "The transformer has quantized weights, which are not trained. Give a `peft_config`, in a script "
            "`--use_peft`, or load the pipeline without `quantization_config` to train all weights."
        )
    packed = [module for module in transformer.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    if packed and any(parameter.device.type == "cpu" for parameter in quantized):
        raise ValueError(
            "On this CPU bitsandbytes packs 4-bit weights in the first rollout, and no gradient passes them "
            "afterwards. Train on a GPU, or set `support_avx512bf16_for_cpu = False` on each `Linear4bit` of the "
            "transformer."
        )


def copy_reference(transformer: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy with whole weights, also where ZeRO-3's `zero3_init_flag` has split those of `transformer`."""
    gathered = contextlib.nullcontext()
    if is_deepspeed_zero3_enabled():
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(transformer.parameters()))
    with gathered:
        return copy.deepcopy(transformer).requires_grad_(False).eval()
