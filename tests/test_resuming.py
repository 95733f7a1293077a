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

"""The code of docs/resuming.md, run as a reader would."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch

from .pages import DOCS_DIR, run_page


@pytest.fixture(scope="module")
def namespace(tmp_path_factory):
    return run_page("resuming.md", tmp_path_factory.mktemp("page"), num_blocks=5)


def test_the_run_of_the_page_is_resumed(namespace):
    trainer = namespace["trainer"]
    assert (trainer.state.global_step, trainer._initial_global_step, trainer.ema.optimization_step) == (4, 2, 4)


def test_the_averages_of_the_page_are_loaded(namespace):
    trainer, pipe = namespace["trainer"], namespace["pipe"]
    for parameter, average in zip(namespace["transformer"].parameters(), trainer.ema.shadow_params, strict=True):
        assert torch.equal(parameter, average)
    assert pipe.get_active_adapters() == ["default"] and len(namespace["images"]) == 1


def test_the_benchmark_of_the_page_survives_a_kill(tmp_path):
    (command,) = re.findall("^```bash\n(.*)\n```", (DOCS_DIR / "resuming.md").read_text(), re.MULTILINE)
    program, script, *options = shlex.split(command.replace("outputs/survival", str(tmp_path)))
    assert program == "python"
    options += ["--num_kills", "1", "--num_steps", "3", "--kinds", "lora"]
    subprocess.run([sys.executable, DOCS_DIR.parent / script, *options], check=True, timeout=120)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["lora"]["equal"] and len(results["lora"]["kills"]) == 1
