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

"""Print the versions that a bug report needs."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from .. import __version__


@dataclass
class Arguments:
    """Arguments of `trl-udm env`: none."""


def run(arguments: Arguments) -> None:
    """
    Prints the versions that a bug report needs.

    Args:
        arguments ([`Arguments`]):
            Nothing.
    """
    import torch

    print(f"platform: {platform.platform()}")
    print(f"python: {platform.python_version()}")
    print(f"trl-udm: {__version__}")  # also of a checkout that is not installed
    for name in ("torch", "transformers", "trl", "diffusers", "peft", "accelerate", "datasets"):
        print(f"{name}: {version(name)}")
    for name in ("deepspeed", "rapidocr", "onnxruntime", "scipy", "fastapi"):
        try:
            print(f"{name}: {version(name)}")
        except PackageNotFoundError:
            print(f"{name}: not installed")
    print(f"CUDA: {torch.version.cuda}")
    for index in range(torch.cuda.device_count()):
        print(f"GPU {index}: {torch.cuda.get_device_name(index)}")
