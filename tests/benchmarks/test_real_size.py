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

import runpy
import sys
from pathlib import Path


REAL_SIZE = Path(__file__).parents[2] / "benchmarks" / "real_size.py"


def test_the_measured_memory_is_that_of_the_command_alone(tmp_path):
    """This process has imported PyTorch and is larger."""
    measure = runpy.run_path(str(REAL_SIZE))["measure"]
    program = "import time; held = b'x' * 2**26; time.sleep(0.2); raise SystemExit(3)"
    result = measure([sys.executable, "-c", program], tmp_path / "log")
    assert 2**26 < result["private"] <= result["peak"] < 2**27
    assert result["exit_code"] == 3 and 0.2 < result["seconds"]
