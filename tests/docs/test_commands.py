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

"""The command lines of the pages are accepted by the programs that they call."""

import re
import shlex
import shutil
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from trl import ModelConfig

from trl_udm import UDMGRPOConfig
from trl_udm.cli import VERBS
from trl_udm.cli.parser import parse_arguments

from ..examples import load_example
from ..pages import PAGES, ROOT, read_blocks


MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
OTHER_PROGRAMS = {"benchmarks/gpu_kit/run.sh", "cd", "cp", "export", "git", "hf", "source", "tensorboard", "trackio"}


def find_commands():
    for page in PAGES:
        for block in read_blocks(page, "bash"):
            for line in block.code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.match(r"\w+=", words[0]):  # variables of the environment
                    words = words[1:]
                if words:
                    yield pytest.param(words, id=f"{page.relative_to(ROOT)}: {' '.join(words)[:80]}")


def check_example(script, arguments):
    example = load_example(script.stem)
    default_config = re.search(r'parse_arguments\(.*?"(\w+\.yaml)"', script.read_text(encoding="utf-8"), re.DOTALL)
    example.parse_arguments(
        example.ScriptArguments, [*arguments, "--use_cpu", "True"], default_config and default_config[1]
    )


def check_accelerate(arguments):
    parsed = launch_command_parser().parse_args(arguments)
    assert parsed.config_file is None or Path(parsed.config_file).exists()
    if parsed.module:
        assert parsed.training_script == "trl_udm.cli"
        check_verb(*parsed.training_script_args)
    elif parsed.training_script.startswith("examples/"):
        check_example(Path(parsed.training_script), parsed.training_script_args)


def check_verb(verb, *arguments):
    if arguments != ("--help",) and verb != "--version":
        parse_arguments(verb, import_module(f"trl_udm.cli.{verb.replace('-', '_')}").Arguments, arguments)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of the repository, with the file that docs/quickstart.md copies."""
    for name in ("benchmarks", "examples", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "examples" / "configs" / "shapes.yaml", tmp_path / "my.yaml")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("words", find_commands())
def test_a_command_is_accepted(words, checkout):
    program, *arguments = [word for word in words if word not in ("...", "&")]
    if program == "trl-udm":
        assert arguments[0] in (*VERBS, "--version", "VERB")
        check_verb(*arguments)
    elif program == "accelerate" and arguments[0] == "launch":
        check_accelerate(arguments[1:])
    elif program == "make":
        variables = dict(word.split("=", 1) for word in arguments if "=" in word)
        targets = [word for word in arguments if "=" not in word]
        assert all(f"\n{target}:" in MAKEFILE for target in targets)
        assert all(f"\n{name} ?=" in MAKEFILE for name in variables)
        if "geneval" in targets:
            check_example(Path("examples/train_geneval.py"), shlex.split(variables.get("ARGS", "")))
    elif program == "python" and arguments[0].endswith(".py"):
        script = Path(arguments[0])
        assert script.exists()
        code = "\n".join(path.read_text(encoding="utf-8") for path in script.parent.glob("*.py"))
        flags = [word for word in arguments if word.startswith("--")]
        options = {**UDMGRPOConfig.__dataclass_fields__, **ModelConfig.__dataclass_fields__}  # passed on by some
        assert all(flag in code or f"{flag[2:]}:" in code or flag[2:] in options for flag in flags)
    elif program == "pip":
        names = ",".join(re.findall(r"\[(.+?)\]", " ".join(arguments)))
        assert set(filter(None, names.split(","))) <= set(EXTRAS)
    else:
        assert program in OTHER_PROGRAMS
