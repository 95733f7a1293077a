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
import dataclasses
import math
import weakref
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from diffusers.image_processor import VaeImageProcessor
from peft import PeftConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl.kernels import chunked_logprob
from trl.trainer import utils
from trl.trainer.utils import add_fused_lm_head

from .pipelines.pipeline_udm import UDMPipeline
from .schedulers.scheduling_kinetic_optimal import KineticOptimalScheduler
from .trainer.fused_head import small_tiles
from .trainer.merged_adapter import can_merge, merged_adapter
from .trainer.udm_grpo_config import UDMGRPOConfig
from .trainer.udm_grpo_trainer import UDMGRPOTrainer


@dataclasses.dataclass
class MemoryEstimate:
    """
    Memory of one device in a training step, in bytes.

    Args:
        trained_weights (`int`):
            Weights that are trained: all of the transformer, or an adapter.
        frozen_weights (`int`):
            Other weights: those under an adapter, the decoder, and the scheduler's codebook.
        reference_weights (`int`):
            Frozen copy of the transformer, which full fine-tuning with `beta` other than 0 compares with.
        gradients (`int`):
            Gradients of the trained weights.
        optimizer_states (`int`):
            States of the optimizer after its first step.
        stages (`dict[str, int]`):
            Peak of each of the stages `"rollout"`, `"decode"`, `"scoring"` and `"update"`, all that is held at the time included.
    """

    trained_weights: int
    frozen_weights: int
    reference_weights: int
    gradients: int
    optimizer_states: int
    stages: dict[str, int]

    @property
    def resident(self) -> int:
        """`int`: What is held throughout: the weights and the optimizer's states."""
        return self.trained_weights + self.frozen_weights + self.reference_weights + self.optimizer_states

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

    The stages of a step run with tensors that have shapes and no contents (PyTorch's `FakeTensorMode`), at their real size, and
    every tensor that is made is counted until it is gone. So it is the code of the trainer itself whose memory is counted:
    autocast and its cache of weights, activation checkpointing, the adapter, the tiles of the fused head, the optimizer. No
    weight is read, and no memory of a weight's size allocated: a pipeline on PyTorch's `"meta"` device serves as well.

    The estimate is of what PyTorch's allocator hands out. It leaves out the context of CUDA (about 0.5 GiB) and the
    workspaces of its libraries, the allocator's fragmentation, reward models, what DDP, FSDP or DeepSpeed add or shard, and
    what a kernel allocates inside. Attention with `"sdpa"` is taken to run in a flash kernel. Activations that
    `activation_checkpointing_kwargs={"offload": True}` moves to the host count as if they stayed.

    Args:
        pipeline ([`UDMPipeline`]):
            What is trained, in the dtypes that it is trained in.
        args ([`UDMGRPOConfig`]):
            Configuration of the run.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train, instead of all weights.
        prompt (`str` or `list[dict]`, *optional*, defaults to `""`):
            The longest prompt. URSA pads all of them to one length.
        device (`str`, *optional*, defaults to `"cuda"`):
            `"cuda"`, where the head is computed by Triton kernels, or `"cpu"`.

    Returns:
        [`MemoryEstimate`]: The bytes, by kind and by stage.

    Raises:
        ValueError: If `device` is neither of the two, or the pipeline has a sampler of its own, as
            [`DiffusionGemmaUDMPipeline`] has.

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
            f"`pipeline` must sample as `UDMPipeline` does, got {type(pipeline).__name__}, whose own sampler looks into its "
            "tensors. Here they have nothing in them: measure the memory of such a family in a run."
        )
    latent_shape = pipeline.latent_shape(**(args.pipeline_kwargs or {}))
    num_tokens = math.prod(latent_shape)
    num_prompt_tokens = pipeline.encode_prompt([prompt])[0].size(1)
    model = pipeline.transformer
    if peft_config is not None:
        peft_config = copy.copy(peft_config)
        peft_config.task_type = None
        model = get_peft_model(_copy(model, "meta"), peft_config)

    tracker = _Tracker()
    with FakeTensorMode(), tracker:
        model = _copy(model, "cpu").train()
        reference = model
        if peft_config is None and args.beta != 0.0:
            reference = _copy(pipeline.transformer, "cpu").requires_grad_(False)
        transformer = model if peft_config is None else model.get_base_model()
        add_fused_lm_head(
            transformer, outputs=("log_probs", "entropy"), cast_lm_head_to_fp32=args.cast_lm_head_to_fp32
        )
        if reference is not model:
            add_fused_lm_head(reference, cast_lm_head_to_fp32=args.cast_lm_head_to_fp32)
        fake_pipeline = copy.copy(pipeline)
        for name, component in pipeline.components.items():
            if isinstance(component, nn.Module):
                fake_component = transformer if component is pipeline.transformer else _copy(component, "cpu")
                setattr(fake_pipeline, name, fake_component)
        fake_pipeline.scheduler = scheduler = _Scheduler(pipeline.scheduler)
        all_weights = tracker.live
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        trained_weights = sum(parameter.nbytes for parameter in trained)
        reference_weights = 0
        if reference is not model:
            reference_weights = sum(parameter.nbytes for parameter in reference.parameters())

        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        gradients = tracker.live - all_weights
        optimizer_class, optimizer_kwargs = UDMGRPOTrainer.get_optimizer_cls_and_kwargs(args, model)
        optimizer = optimizer_class(trained, **optimizer_kwargs)
        optimizer.step()
        optimizer_states = tracker.live - all_weights - gradients
        if args.gradient_accumulation_steps <= args.steps_per_generation:
            optimizer.zero_grad()
        stages = {}

        # Rollout
        num_samples = args.per_device_train_batch_size * args.steps_per_generation // args.num_train_timesteps
        num_samples = min(num_samples, args.rollout_batch_size or num_samples)
        prompt_ids = torch.zeros(num_samples, num_prompt_tokens, dtype=torch.long)
        is_merged = args.merge_adapter
        if is_merged is None:
            is_merged = peft_config is not None and not (args.bf16 or args.fp16) and can_merge(model)
        with torch.no_grad(), _autocast(args), merged_adapter(model) if is_merged else contextlib.nullcontext():
            tracker.begin()
            clean_samples = fake_pipeline.sample_tokens(
                prompt_ids,
                torch.ones_like(prompt_ids),
                latent_shape,
                num_inference_steps=1,
                guidance_scale=args.guidance_scale,
                guidance_trunc=args.guidance_trunc,
                negative_prompt_ids=prompt_ids,
                negative_prompt_mask=torch.ones_like(prompt_ids),
            ).clean_samples
            stages["rollout"] = tracker.peak
            tracker.begin()
            if pipeline.modality == "image":
                with (
                    mock.patch.object(VaeImageProcessor, "pt_to_numpy", _in_place),
                    mock.patch.object(VaeImageProcessor, "numpy_to_pil", _in_place),
                ):
                    fake_pipeline.decode(clean_samples[: args.decode_batch_size], latent_shape)
            stages["decode"] = tracker.peak

        # Scoring
        num_rows = args.per_device_train_batch_size
        prompt_ids = torch.zeros(num_rows, num_prompt_tokens, dtype=torch.long)
        samples = torch.zeros(num_rows, num_tokens, dtype=torch.long)
        tracker.num_selected = samples.numel()

        def score(model: nn.Module) -> torch.Tensor:
            with _autocast(args):
                logps, _ = fake_pipeline.score(
                    model,
                    prompt_ids,
                    torch.ones_like(prompt_ids),
                    samples,
                    latent_shape,
                    samples,
                    t=torch.zeros(num_rows),
                )
            return logps.mean()

        tracker.begin()
        with torch.no_grad(), _head(device, scheduler):
            if args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) != 0:
                score(model)
            if args.beta != 0.0:
                score(reference)
        stages["scoring"] = tracker.peak

        # Update
        if args.activation_checkpointing:
            kwargs = dict(args.activation_checkpointing_kwargs or {})
            kwargs.pop("offload", None)
            every_n_layers = kwargs.pop("every_n_layers", 1)
            model.activation_checkpointing_enable(kwargs or None, every_n_layers=every_n_layers)
        if args.gradient_accumulation_steps > 1:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        tracker.begin()
        with _head(device, scheduler):
            score(model).backward()
        optimizer.step()
        stages["update"] = tracker.peak

    codebook_dim = scheduler.config.get("codebook_dim") or 0
    codebook = 4 * scheduler.config.codebook_size * codebook_dim
    return MemoryEstimate(
        trained_weights=trained_weights,
        frozen_weights=all_weights - trained_weights - reference_weights + codebook,
        reference_weights=reference_weights,
        gradients=gradients,
        optimizer_states=optimizer_states,
        stages={name: peak + codebook for name, peak in stages.items()},
    )


class _Tracker(TorchDispatchMode):
    """Counts the bytes of all storages that are made within it, until they are gone."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.num_selected = 0  # elements that a mask of tokens selects, which shapes alone do not tell
        self._seen = set()

    def begin(self) -> None:
        self.peak = self.live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            args = (args[0], [torch.zeros(self.num_selected, dtype=torch.long) for _ in range(args[1][0].ndim)])
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # the question whether merged weights are finite
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._track(tensor.untyped_storage())
        return output

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._seen.remove(key)
        self.live -= num_bytes


class _Scheduler:
    """What the sampler takes from a scheduler: a step of the memory that the scheduler's own step needs."""

    def __init__(self, scheduler: Any):
        self.config = scheduler.config
        self.timesteps = SimpleNamespace(tolist=lambda: [0])
        self._scheduler = scheduler

    def set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
        pass

    def timestep_to_t(self, timestep: int) -> float:
        return 0.0

    def step(self, logits: torch.Tensor, timestep: int, sample: torch.Tensor, generator: None) -> SimpleNamespace:
        if isinstance(self._scheduler, KineticOptimalScheduler):
            # Its steps look into their tensors, which have nothing in them here. Of a chunk's size there are three at a time
            torch.empty(3, min(logits.numel(), self._scheduler.max_chunk_elements))
            return SimpleNamespace(prev_sample=sample, pred_original_sample=sample)
        return self._scheduler.step(logits, timestep, sample, generator=generator)


def _copy(module: nn.Module, device: str) -> nn.Module:
    """A copy on another device, whose weights are not initialised."""
    memo = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        memo[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(memo[id(tensor)], requires_grad=tensor.requires_grad)
    return copy.deepcopy(module, memo)


def _autocast(args: UDMGRPOConfig) -> torch.autocast:
    return torch.autocast("cpu", torch.float16 if args.fp16 else torch.bfloat16, enabled=args.bf16 or args.fp16)


def _in_place(*args: Any, **kwargs: Any) -> None:
    """Stands for a function that makes no tensor on the device."""


@contextlib.contextmanager
def _head(device: str, scheduler: Any):
    """The fused head as it is on a device: on a GPU, a Triton kernel changes a tile in place, and only labels are scored."""
    if device == "cpu":
        with small_tiles(scheduler, torch.device("cpu")):
            yield
        return
    with (
        mock.patch.object(utils, "_use_triton", return_value=True),
        mock.patch.object(chunked_logprob, "_forward_tile", _in_place),
        mock.patch.object(chunked_logprob, "_backward_tile", _in_place),
        mock.patch.object(chunked_logprob, "_addmm_fp32", _in_place),
    ):
        yield
