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

"""The code of the pages, run as a reader would."""

import ast
import builtins
import inspect
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from trl_udm import UDMGRPOConfig


ROOT = Path(__file__).parents[1]
DOCS_DIR = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS_DIR.rglob("*.md"))]
BLOCK = re.compile(r"^( *)(?:<!-- not run: ([^\n]+) -->\n+ *)?```(\w+)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A block of code. `reason` says why it is only checked, in a comment of the page that readers do not see."""

    language: str
    code: str
    reason: str | None


def read_blocks(page: Path, languages: str = "python") -> list[Block]:
    """The blocks of a page in some languages, such as `"python|bash"`."""
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    blocks = [Block(language, textwrap.dedent(code), reason or None) for _, reason, language, code in blocks]
    return [block for block in blocks if block.language in languages.split("|")]


def run_page(
    name: str, folder: Path, num_blocks: int | None = None, languages: str = "python", **variables: Any
) -> dict[str, Any]:
    """
    Runs the blocks of a page one after the other, in a folder and with variables. Returns what they define.
    `languages` is `"python"` or `"python|bash"`.
    """
    page = DOCS_DIR / name
    blocks = read_blocks(page, languages)
    assert num_blocks is None or len(blocks) == num_blocks
    variables = {"__name__": "page", **variables}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PATH", os.path.dirname(sys.executable), prepend=os.pathsep)
        for block in blocks:
            if block.language == "bash":
                subprocess.run(["bash", "-ec", block.code], check=True)
            elif block.reason:
                check_code(block.code, variables)
            else:
                exec(compile(block.code, str(page), "exec"), variables)
    return variables


def check_code(code: str, variables: dict[str, Any]) -> None:
    """
    Checks code without running it: it compiles, its imports and names exist, its calls fit the signatures, and its
    configurations are valid. The names that it imports are added to `variables`.
    """
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(compile(ast.Module([node], []), "<import>", "exec"), variables)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    defined = {node.id for node in names if isinstance(node.ctx, ast.Store)} | {
        name
        for node in ast.walk(tree)
        for name in (getattr(node, "name", None), getattr(node, "arg", None))
        if isinstance(name, str)
    }
    unknown = {node.id for node in names} - defined - set(variables) - set(vars(builtins))
    assert not unknown, f"{unknown} are not defined in:\n{code}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            check_call(node, {name: value for name, value in variables.items() if name not in defined})
    variables |= dict.fromkeys(defined - set(variables))


def check_call(node: ast.Call, variables: dict[str, Any]) -> None:
    """Checks the arguments of a call of something that is in `variables`."""
    path, function = ast.unparse(node.func).split("."), None
    if not all(map(str.isidentifier, path)) or variables.get(path[0]) is None:
        return
    function = variables[path[0]]
    for attribute in path[1:]:
        function = getattr(function, attribute)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    inspect.signature(function).bind_partial(*node.args, **keywords)
    if function is UDMGRPOConfig:
        literals = {name: ast.literal_eval(value) for name, value in keywords.items()}
        UDMGRPOConfig(*map(ast.literal_eval, node.args), **{**literals, "use_cpu": True})
