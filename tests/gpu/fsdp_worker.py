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

"""A run under FSDP2: `accelerate launch -m tests.gpu.fsdp_worker FOLDER DEVICE SETTINGS`."""

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from tests.distributed.worker import start_fsdp_on_cpu

from .models import train


if __name__ == "__main__":
    folder, device, settings = Path(sys.argv[1]), torch.device(sys.argv[2]), json.loads(sys.argv[3])
    if device.type == "cpu":
        start_fsdp_on_cpu()
        settings["accelerator_config"] = {"use_configured_state": True}
    run = train(folder, device, **settings)
    assert AcceleratorState().distributed_type == DistributedType.FSDP
    torch.save(run, folder / "fsdp2.pt")
