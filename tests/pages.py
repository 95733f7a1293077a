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

"""The code of a page of docs/, run as a reader would."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest


DOCS_DIR = Path(__file__).parents[1] / "docs"


def run_page(name: str, folder: Path, num_blocks: int, languages: str = "python", **variables: Any) -> dict[str, Any]:
    """
    Runs the blocks of a page one after the other, in a folder and with variables. Returns what they define.
    `languages` is `"python"` or `"python|bash"`.
    """
    page = DOCS_DIR / name
    pattern = rf"^( *)```({languages})\n(.*?)^\1```"
    blocks = re.findall(pattern, page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == num_blocks
    variables = {"__name__": "page", **variables}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PATH", os.path.dirname(sys.executable), prepend=os.pathsep)
        for _, language, block in blocks:
            if language == "bash":
                subprocess.run(["bash", "-ec", block], check=True)
            else:
                exec(compile(textwrap.dedent(block), str(page), "exec"), variables)
    return variables
