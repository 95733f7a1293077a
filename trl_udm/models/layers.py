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

"""The repeated layers of a transformer: compilation, and a context without activation checkpointing."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


RECOMPILE_LIMIT = 32
"""Cases that a compiled layer is compiled for."""

CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Modes of `torch.compile` that record CUDA graphs."""


def compile_layers(model: nn.Module, backend: str, mode: str | None = None) -> None:
    """
    Compiles the repeated layers in place. Rollouts, scoring and updates all run the compiled layers, and the weights
    keep their names. Layers of one class share the compiled code.

    Each case that a layer meets, such as a batch size, is compiled once, up to `RECOMPILE_LIMIT` of them. Further
    cases run as if they were not compiled. Versions of PyTorch whose `torch.compile` has no argument `recompile_limit`
    compile 8 cases, or as many as `torch._dynamo.config.recompile_limit` says.

    Args:
        model (`nn.Module`):
            A transformer of transformers' layers.
        backend (`str`):
            As in `torch.compile`, except `"cudagraphs"`.
        mode (`str`, *optional*):
            As in `torch.compile`, except the modes that record CUDA graphs.

    Raises:
        ValueError: If the model has no such layers, or where CUDA graphs would be recorded: the graph of a layer
            keeps its output in memory that the next layer's graph overwrites.
    """
    if mode in CUDA_GRAPH_MODES or backend == "cudagraphs":
        name, value = ("backend", backend) if backend == "cudagraphs" else ("mode", mode)
        raise ValueError(
            f"`torch_compile_{name}` must not record CUDA graphs, got {value!r}: layers are compiled one by one, and "
            "a graph would overwrite the output of the layer before. Leave it out, or set `torch_compile_mode` to "
            "'max-autotune-no-cudagraphs'."
        )
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"`torch_compile` must be False, got True: {type(model).__name__} has no layers of the class "
            "`GradientCheckpointingLayer` of transformers, which are compiled."
        )
    settings: dict[str, Any] = {"backend": backend, "mode": mode}
    # A layer meets more cases than the 8 that PyTorch allows by default: with and without gradients, the adapter on,
    # off and merged, and some batch sizes of each. Older versions of `torch.compile` do not take the limit.
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        settings["recompile_limit"] = RECOMPILE_LIMIT
    for layer in layers:
        layer.compile(**settings)


@contextlib.contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """
    A context without activation checkpointing, for passes without gradients. It restores each layer, also after an
    exception. TRL's own context would switch on all layers afterwards, and forget `every_n_layers` and `offload`.

    Args:
        model (`nn.Module`):
            The transformer, or a module that contains it.
    """
    checkpointed: list[Any] = [
        module for module in model.modules() if getattr(module, "gradient_checkpointing", False)
    ]
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True
