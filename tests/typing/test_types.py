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

"""The types of what users call, by mypy with the settings of `pyproject.toml`."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from trl import TrlParser

import trl_udm
from trl_udm.pipelines.pipeline_fudoki import FUDOKICallArguments
from trl_udm.pipelines.pipeline_text import TextCallArguments
from trl_udm.pipelines.pipeline_ursa import URSACallArguments


HERE = Path(__file__).parent


def test_mypy_passes_the_users_script_and_finds_the_mistakes():
    pytest.importorskip("mypy", reason="mypy is not installed: `pip install trl-udm[dev]`")
    command = [sys.executable, "-m", "mypy", "trl_udm", HERE / "user_script.py", HERE / "mistakes.py"]
    run = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True)
    found = re.findall(r"^(\S+?):(\d+): error: .*\[(\S+)\]$", run.stdout, re.MULTILINE)
    lines = (HERE / "mistakes.py").read_text().splitlines()
    marked = [(number, line.rsplit("  # ", 1)[1]) for number, line in enumerate(lines, 1) if "  # " in line]
    assert len(marked) > 20, run.stderr
    expected = [("tests/typing/mistakes.py", str(number), code) for number, code in marked]
    assert sorted(set(found)) == sorted(expected), run.stdout


def test_the_users_script_imports_every_public_name():
    imports = [node for node in ast.walk(ast.parse((HERE / "user_script.py").read_text())) if _is_public(node)]
    assert {alias.name for node in imports for alias in node.names} == set(trl_udm.__all__)


def _is_public(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "trl_udm"


@pytest.mark.parametrize(
    ("pipeline_class", "arguments"),
    [
        (trl_udm.URSAPipeline, URSACallArguments),
        (trl_udm.FUDOKIPipeline, FUDOKICallArguments),
        (trl_udm.TextUDMPipeline, TextCallArguments),
    ],
)
def test_overloads_have_the_arguments_of_the_call(pipeline_class, arguments):
    own = {"self", "prompt", "output_type", "return_dict"}
    assert {*arguments.__annotations__, *own} == {*inspect.signature(pipeline_class.__call__).parameters}


@pytest.mark.parametrize("name", ["action", "trajectory", "importance_sampling_level", "reward_error"])
def test_choices_are_parsed_and_checked(name, tmp_path, capsys):
    parser = TrlParser(trl_udm.UDMGRPOConfig)
    default = trl_udm.UDMGRPOConfig.__dataclass_fields__[name].default
    flags = ["--output_dir", str(tmp_path), "--bf16", "False"]
    assert getattr(parser.parse_args_into_dataclasses([*flags, f"--{name}", default])[0], name) == default
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses([*flags, f"--{name}", "unknown"])
    assert re.search(rf"--{name}.*: invalid choice: 'unknown'", capsys.readouterr().err)
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got 'unknown'"):
        trl_udm.UDMGRPOConfig(str(tmp_path), bf16=False, **{name: "unknown"})
