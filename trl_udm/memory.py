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

"""The memory of a training step, computed before there is a GPU to run it on."""

import contextlib
import copy
import functools
import math
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from diffusers.training_utils import EMAModel
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers.utils import ModelOutput
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head, disable_dropout_in_model

from .pipelines.pipeline_udm import UDMPipeline
from .trainer.adapters import can_merge, merged_adapter, prepare_model, starts_at_zero
from .trainer.udm_grpo_config import UDMGRPOConfig
from .trainer.udm_grpo_trainer import UDMGRPOTrainer


CODE_CHUNK_SIZE = 32_768  # of TRL's fused head, beside its `TOKEN_CHUNK_SIZE`


@dataclass
class MemoryEstimate:
    """
    Memory of one device in a training step, in bytes.

    Args:
        trained_weights (`int`):
            Weights that are trained: all of the transformer, or an adapter.
        frozen_weights (`int`):
            Other weights: those under an adapter, the decoder, and the scheduler's codebook.
        reference_weights (`int`):
            What the reference policy needs with a `beta` other than 0: a frozen copy of the transformer, or of an
            adapter's first weights where the policy without the adapter is another one.
        ema_weights (`int`):
            Average of the trained weights, with an `ema_decay`.
        gradients (`int`):
            Gradients of the trained weights.
        optimizer_states (`int`):
            States of the optimizer after its first step.
        stages (`dict[str, int]`):
            Peak of each of the stages `"rollout"`, `"decode"`, `"scoring"` and `"update"`, with all that is held then.
    """

    trained_weights: int
    frozen_weights: int
    reference_weights: int
    ema_weights: int
    gradients: int
    optimizer_states: int
    stages: dict[str, int]

    @property
    def resident(self) -> int:
        """`int`: What is held throughout: the weights and the optimizer's states."""
        weights = self.trained_weights + self.frozen_weights + self.reference_weights + self.ema_weights
        return weights + self.optimizer_states

    @property
    def peak(self) -> int:
        """`int`: Peak of the whole step."""
        return max(self.stages.values())


def estimate_memory(
    pipeline: UDMPipeline,
    args: UDMGRPOConfig,
    peft_config: PeftConfig | None = None,
    prompt: Any = "",
    device: str = "cuda",
) -> MemoryEstimate:
    """
    Computes the memory that one device needs to train a pipeline with [`UDMGRPOTrainer`].

    The stages of a step run at their real size, with tensors that have shapes and no contents (PyTorch's
    `FakeTensorMode`). Every tensor is counted while it exists. No weight is read, and no memory of its size is
    allocated, so the pipeline may be on PyTorch's `"meta"` device.

    - Rollout: `pipeline.sample_tokens`, with steps of the scheduler in which every token jumps.
    - Decode: `pipeline.decode` to tensors, unless the modality is text.
    - Scoring: `pipeline.score` on a CPU. On a GPU the network runs, and the tensors of TRL's fused head follow from
      the size of its tiles (4,096 tokens by 32,768 codes). Its Triton kernels do not run on such tensors.
    - Update: scoring, its backward pass, and the steps of the optimizer and of the average of the weights.

    The estimate is of what PyTorch's allocator hands out. It leaves out CUDA's context (about 0.5 GiB), the workspaces
    of its libraries, fragmentation, reward models, and what DDP, FSDP or DeepSpeed add or shard. It assumes that
    attention with `"sdpa"` runs in a flash kernel. Activations count in full even where
    `activation_checkpointing_kwargs={"offload": True}` moves them to the host.

    Args:
        pipeline ([`UDMPipeline`]):
            What is trained, in the dtypes that it is trained in.
        args ([`UDMGRPOConfig`]):
            Configuration of the run.
        peft_config ([`~peft.PeftConfig`], *optional*):
            New adapter to train, instead of all weights. `args.adapter`, or an adapter of the pipeline, is trained
            further instead.
        prompt (`str` or `list[dict]`, *optional*, defaults to `""`):
            The longest prompt. URSA pads all of them to one length.
        device (`str`, *optional*, defaults to `"cuda"`):
            `"cuda"`, where Triton kernels compute the head, or `"cpu"`.

    Returns:
        [`MemoryEstimate`]: The bytes, by kind and by stage.

    Raises:
        ValueError: If `device` is neither of the two, if the adapter cannot be trained, or if the pipeline has a
            sampler of its own, as [`DiffusionGemmaUDMPipeline`] has.

    Example:

    ```python
    >>> from trl_udm import UDMGRPOConfig, URSAPipeline, estimate_memory
    >>> from trl_udm.worlds.shapes import CHECKPOINT_PATH

    >>> args = UDMGRPOConfig("outputs", bf16=True, use_cpu=True)  # which lets a machine without a GPU take `bf16`
    >>> estimate = estimate_memory(URSAPipeline.from_configs(CHECKPOINT_PATH), args)
    >>> f"{estimate.peak / 2**20:.0f} MiB"
    '120 MiB'
    ```
    """
    if device not in ("cuda", "cpu"):
        raise ValueError(f"`device` must be 'cuda' or 'cpu', got {device!r}.")
    if type(pipeline).sample_tokens is not UDMPipeline.sample_tokens:
        raise ValueError(
            f"`pipeline` must sample as `UDMPipeline` does, got {type(pipeline).__name__}, whose own sampler looks "
            "into its tensors. Here they have no contents: measure the memory of such a family in a run."
        )
    latent_shape = pipeline.latent_shape(**(args.pipeline_kwargs or {}))
    num_prompt_tokens = pipeline.encode_prompt([prompt])[0].size(1)
    num_rows = args.per_device_train_batch_size
    num_samples = num_rows * args.steps_per_generation // args.num_train_timesteps
    num_samples = min(num_samples, args.rollout_batch_size or num_samples)  # drawn at a time
    is_float32 = not (args.bf16 or args.fp16)
    autocast = torch.autocast("cpu", torch.float16 if args.fp16 else torch.bfloat16, enabled=not is_float32)
    planned = copy.copy(pipeline)  # which gets the adapter, and has no weights
    setattr(planned, pipeline.transformer_name, _copy_module(pipeline.peft_model or pipeline.transformer, "meta"))
    model, peft_config = prepare_model(planned, peft_config, args.adapter)
    if peft_config is not None:
        model = get_peft_model(model, peft_config)

    with FakeTensorMode(), _Tracker(num_labels=num_rows * math.prod(latent_shape)) as tracker:
        # Networks
        model = _copy_module(model).train()
        is_peft = isinstance(model, PeftModel)
        transformer = reference = model.get_base_model() if is_peft else model
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        initial_weights = []
        if args.beta != 0.0 and not is_peft:
            reference = _copy_module(transformer).requires_grad_(False)
            initial_weights = list(reference.parameters())
        elif args.beta != 0.0 and not (peft_config is not None and starts_at_zero(model, trained)):
            initial_weights = [parameter.detach().clone() for parameter in trained.values()]
        for network in {transformer, reference}:
            add_fused_lm_head(network, outputs=("entropy",), cast_lm_head_to_fp32=args.cast_lm_head_to_fp32)
        if not is_peft and not is_float32:  # as Accelerate does; under an adapter, rollouts call the network inside
            transformer.forward = convert_outputs_to_fp32(transformer.forward)
        if args.disable_dropout:
            disable_dropout_in_model(model)
        pipeline = _copy_pipeline(pipeline, transformer)
        if device == "cuda":
            pipeline.scheduler.max_chunk_elements_on_cpu = sys.maxsize  # fake tensors are on a CPU
        trained = list(trained.values())
        ema = None if args.ema_decay is None else EMAModel(trained, decay=args.ema_decay, foreach=True)
        all_weights = tracker.live

        # Gradients, and the optimizer's states
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        gradients = tracker.live - all_weights
        optimizer_class, optimizer_kwargs = UDMGRPOTrainer.get_optimizer_cls_and_kwargs(args, model)
        optimizer = optimizer_class(trained, **optimizer_kwargs)
        optimizer.step()
        optimizer_states = tracker.live - all_weights - gradients
        if args.gradient_accumulation_steps <= args.steps_per_generation:
            optimizer.zero_grad()  # else rollouts come between the micro-batches of an update

        # Rollout and decoding, in one context as the trainer's: autocast keeps its copies of the weights
        is_merged = args.merge_adapter
        if is_merged is None:
            is_merged = is_peft and is_float32 and can_merge(model)
        with torch.no_grad(), autocast, merged_adapter(model) if is_merged else contextlib.nullcontext():
            prompt_ids = torch.zeros(num_samples, num_prompt_tokens, dtype=torch.long)
            tracker.begin("rollout")
            clean_samples = pipeline.sample_tokens(
                prompt_ids,
                torch.ones_like(prompt_ids),
                latent_shape,
                num_inference_steps=3,  # all are taken for the second one, in which tokens jump
                guidance_scale=args.guidance_scale,
                guidance_trunc=args.guidance_trunc,
                negative_prompt_ids=prompt_ids,
                negative_prompt_mask=torch.ones_like(prompt_ids),
            ).clean_samples
            tracker.begin("decode")
            if pipeline.modality != "text":
                pipeline.decode(clean_samples[: args.decode_batch_size], latent_shape, output_type="pt")

        has_full_kl = args.beta != 0.0 and args.kl_estimator == "full"

        def score(network: nn.Module, is_update: bool = False) -> torch.Tensor:
            prompt_ids = torch.zeros(num_rows, num_prompt_tokens, dtype=torch.long)
            tokens = torch.zeros(num_rows, math.prod(latent_shape), dtype=torch.long)
            inputs = (prompt_ids, torch.ones_like(prompt_ids), tokens, latent_shape, tokens, torch.zeros(num_rows))
            score_model = network
            if device == "cuda" and not isinstance(network.get_output_embeddings(), BaseTunerLayer):
                score_model = functools.partial(_forward_on_gpu, network, args.cast_lm_head_to_fp32)
            with autocast:
                if args.kl_estimator == "k3":
                    return pipeline.score(score_model, *inputs)[0].mean()
                tokens_of_reference = None
                if is_update and has_full_kl:
                    with torch.no_grad():
                        tokens_of_reference = pipeline.predict_tokens(reference, *inputs)
                logps, _, kl = pipeline.score_with_kl(network, tokens_of_reference, *inputs)
                return logps.mean() if kl is None else logps.mean() + kl.mean()

        tracker.begin("scoring")
        with torch.no_grad():
            if args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) != 0:
                score(transformer)
            if args.beta != 0.0 and not has_full_kl:
                score(reference)

        tracker.begin("update")
        if args.activation_checkpointing:
            kwargs = dict(args.activation_checkpointing_kwargs or {})
            kwargs.pop("offload", None)
            every_n_layers = kwargs.pop("every_n_layers", 1)
            transformer.activation_checkpointing_enable(kwargs or None, every_n_layers=every_n_layers)
        if args.gradient_accumulation_steps > 1:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)  # of the micro-batches before
        score(transformer, is_update=True).backward()
        optimizer.step()
        if ema is not None:
            ema.step(trained)

    trained_weights = sum(parameter.nbytes for parameter in trained)
    reference_weights = sum(weight.nbytes for weight in initial_weights)
    ema_weights = 0 if ema is None else trained_weights
    return MemoryEstimate(
        trained_weights=trained_weights,
        frozen_weights=all_weights - trained_weights - reference_weights - ema_weights,
        reference_weights=reference_weights,
        ema_weights=ema_weights,
        gradients=gradients,
        optimizer_states=optimizer_states,
        stages=tracker.peaks,
    )


def _copy_module(module: nn.Module, device: str = "cpu") -> nn.Module:
    """A copy with weights of its own, which nothing is written into."""
    memo = {id(x): torch.empty(x.shape, dtype=x.dtype, device=device) for x in module.buffers()}
    for x in module.parameters():
        empty = torch.empty(x.shape, dtype=x.dtype, device=device)
        memo[id(x)] = nn.Parameter(empty, requires_grad=x.requires_grad)
    return copy.deepcopy(module, memo)


def _copy_pipeline(pipeline: UDMPipeline, transformer: nn.Module) -> UDMPipeline:
    """A copy with the given transformer, and with weights of its own elsewhere."""
    copied = copy.copy(pipeline)
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            is_transformer = component is pipeline.transformer
            setattr(copied, name, transformer if is_transformer else _copy_module(component))
    copied.scheduler = copy.copy(pipeline.scheduler)
    config = pipeline.scheduler.config
    if config.get("codebook_dim"):
        copied.scheduler.set_codebook(torch.empty(config.codebook_size, config.codebook_dim))
    return copied


def _forward_on_gpu(
    network: nn.Module,
    is_float32: bool,
    shift_labels: torch.Tensor | None = None,
    fused_lm_head: bool = False,
    **kwargs,
) -> ModelOutput:
    """The network as it is on a GPU, where TRL's fused head scores labels."""
    if shift_labels is None:
        return network(**kwargs)
    is_label = shift_labels != -100
    hidden_states = network.base_model(**kwargs, use_cache=False).last_hidden_state
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_states.dtype
    if is_float32:
        hidden_states, dtype = hidden_states.float(), torch.float32
    log_probs = _FusedHead.apply(hidden_states[is_label], network.get_output_embeddings().weight, dtype)
    return FusedCausalLMOutput(log_probs=log_probs.new_zeros(is_label.shape).masked_scatter(is_label, log_probs))


class _FusedHead(torch.autograd.Function):
    """The tensors that TRL's fused head makes on a GPU. Its kernels change a tile of logits in place."""

    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(hidden_states, weight)
        ctx.dtype = dtype
        tile, *_ = _make_tile(hidden_states, weight, dtype, num_chunks=1)
        return tile.new_empty(len(hidden_states), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad_logps: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # A chunk of the weights is cast while the one before is still there
        tile, *_ = _make_tile(*ctx.saved_tensors, ctx.dtype, num_chunks=2)
        gradients = []
        for tensor, is_needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True):
            gradients.append(tile.new_empty(tensor.shape, dtype=torch.float32) if is_needed else None)
        return *(x if x is None else x.to(y.dtype) for x, y in zip(gradients, ctx.saved_tensors, strict=True)), None


def _make_tile(
    hidden_states: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, num_chunks: int
) -> list[torch.Tensor]:
    """A tile of logits and its factors, which are copies where they have another dtype."""
    tokens = hidden_states[:TOKEN_CHUNK_SIZE].to(dtype)
    codes = [chunk.to(dtype) for chunk in weight.split(CODE_CHUNK_SIZE)[:num_chunks]]
    return [tokens.new_empty(len(tokens), CODE_CHUNK_SIZE), tokens, *codes]


class _Tracker(TorchDispatchMode):
    """
    Counts the bytes of all tensors made within it, until they are gone. (PyTorch's `MemTracker` fails on modules with
    frozen weights.) It also answers what depends on contents, which fake tensors do not have.

    Args:
        num_labels (`int`):
            Number of tokens that a mask selects.
    """

    def __init__(self, num_labels: int):
        super().__init__()
        self.live = 0
        self.peaks: dict[str, int] = {}
        self._num_labels, self._stage = num_labels, None
        self._sizes: dict[int, int] = {}
        self._is_all = WeakIdKeyDictionary()

    def begin(self, stage: str) -> None:
        self._stage = stage
        self.peaks[stage] = self.live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        try:
            output = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            # Checks find nothing wrong: `all` holds, and `any` does not. Numbers are 1, such as that of a step
            return self._is_all.get(args[0], int(args[0].dtype != torch.bool))
        except DynamicOutputShapeException:
            if func is torch.ops.aten.nonzero.default:  # tokens that jump: all
                output = torch.empty(args[0].numel(), args[0].ndim, dtype=torch.long)
            else:  # a mask of labels as the index
                index = torch.empty(self._num_labels, dtype=torch.long)
                output = func(args[0], [index] * args[1][0].ndim)
        if func is torch.ops.aten.all.default:
            self._is_all[output] = True
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._track(tensor.untyped_storage())
        return output

    def _track(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            if self._stage is not None:
                self.peaks[self._stage] = max(self.peaks[self._stage], self.live)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
