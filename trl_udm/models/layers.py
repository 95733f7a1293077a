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

"""What is done to the repeated layers of a transformer: their compilation, and the checkpointing of their activations."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(model: nn.Module, backend: str, mode: str | None = None) -> None:
    """
    Compiles the repeated layers in place, so that rollouts, scoring and updates all run what is compiled, and that
    the weights keep their names. Layers of one class share what is compiled for the first.

    Args:
        model (`nn.Module`):
            A transformer of transformers' layers.
        backend (`str`):
            As in `torch.compile`.
        mode (`str`, *optional*):
            As in `torch.compile`; `"reduce-overhead"` records CUDA graphs.

    Raises:
        ValueError: If the model has no such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"`torch_compile` must be False, got True: {type(model).__name__} has no layers of the class "
            "`GradientCheckpointingLayer` of transformers, which are what is compiled."
        )
    # A layer meets more cases than the 8 that are allowed: with and without gradients, the adapter on, off and merged, and
    # some batch sizes of each. What exceeds the limit runs as if it were not compiled.
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    for layer in layers:
        layer.compile(backend=backend, mode=mode)


@contextlib.contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """
    A context in which no activations are checkpointed, for passes without gradients. TRL's own switches all layers on
    again after, and forgets `every_n_layers` and `offload`.

    Args:
        model (`nn.Module`):
            The transformer, or what is around it.
    """
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True
