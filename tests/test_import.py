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

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trl_udm


PACKAGE = Path(trl_udm.__file__).parent

IMPORT_AND_LIST = """
import sys
import trl_udm
dir(trl_udm)
print(*sorted({"torch", "trl", "transformers", "diffusers"} & set(sys.modules)))
"""


def test_import_loads_no_heavy_package():
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_AND_LIST], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == []


@pytest.mark.parametrize("name", trl_udm.__all__)
def test_public_name_resolves(name):
    assert getattr(trl_udm, name).__name__ == name
    assert name in vars(trl_udm)  # kept, so that the next access is an ordinary one


def test_dir_lists_public_names():
    assert {*trl_udm.__all__, "__version__"} <= set(dir(trl_udm))


def test_unknown_attribute_raises():
    unknown = "UDMUnknownTrainer"
    with pytest.raises(AttributeError, match="module 'trl_udm' has no attribute 'UDMUnknownTrainer'"):
        getattr(trl_udm, unknown)


def test_type_checkers_see_the_public_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {
        alias.asname: f".{statement.module}"
        for block in blocks
        for statement in block.body
        for alias in statement.names
    }
    assert seen == trl_udm._MODULES


def test_every_folder_of_code_is_a_package():
    # The wheel holds only the folders that have an `__init__.py`.
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []
