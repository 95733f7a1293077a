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

"""
Comparisons of a CUDA device with the CPU. Each is skipped where there is none.

    python -m pytest -m gpu tests/gpu
    GPU_DEVICE=cpu python -m pytest -m gpu tests/gpu

The second runs the same tests with the CPU in the place of the GPU, which shows that the tests themselves run.
Nothing heavy is imported before a test needs it.
"""

import os

import pytest


# Read by cuBLAS when it starts: products then add in a fixed order.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session")
def device():
    """`torch.device`: What is compared with the CPU."""
    import torch

    name = os.environ.get("GPU_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(name)


@pytest.fixture(autouse=True)
def float32_products():
    """Products in the precision that they had before a test: transformers sets TF32 for a compiled run, for good."""
    import torch

    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def both(device):
    """Calls a function of a device on the CPU and on the other device. Returns both results, on the CPU."""
    import torch
    from torch.utils._pytree import tree_map_only

    def run(function):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # convolutions are rounded to TF32 by default
            results = [function(torch.device("cpu")), function(device)]
        return [tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), result) for result in results]

    return run


@pytest.fixture
def deterministic():
    """Kernels that add in a fixed order, except `cumsum`, which has none on a GPU: its last digits rarely matter."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.use_deterministic_algorithms(True, warn_only=True)
    with sdpa_kernel(SDPBackend.MATH):  # the others are deterministic only where nothing may warn
        yield
    torch.use_deterministic_algorithms(False)
