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

"""Rollouts without the cost of an adapter's small products."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer


@contextmanager
def merged_adapter(model: PeftModel) -> Iterator[None]:
    """
    Within this context, the adapter is added to the weights that it is on. They are then the very tensors that they were,
    which subtracting the adapter again would not give: meanwhile there is a second copy of them.

    Args:
        model ([`~peft.PeftModel`]):
            The model, of weights for which [`can_merge`] holds.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    parameters = [parameter for layer in layers for parameter in layer.get_base_layer().parameters(recurse=False)]
    originals = [parameter.data for parameter in parameters]
    try:
        model.merge_adapter(safe_merge=True)  # into copies
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data = original
        for layer in layers:
            layer.merged_adapters.clear()


def can_merge(model: PeftModel) -> bool:
    """
    Whether merging leaves the policy what it is, but for float32 rounding.

    Args:
        model ([`~peft.PeftModel`]):
            The model.

    Returns:
        `bool`: Whether the weights under the adapter are float32, since narrower ones would round a small adapter away, and
        none of them is shared by two modules, of which only one has the adapter.
    """
    uses = Counter(parameter for module in model.modules() for parameter in module.parameters(recurse=False))
    bases = [module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)]
    parameters = [parameter for base in bases for parameter in base.parameters(recurse=False)]
    return all(parameter.dtype == torch.float32 and uses[parameter] == 1 for parameter in parameters)
