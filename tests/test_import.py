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
from importlib.metadata import requires
from importlib.util import resolve_name
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import trl_udm


PACKAGE = Path(trl_udm.__file__).parent

IMPORT_AND_LIST = """
import sys
import trl_udm
dir(trl_udm)
heavy = {"torch", "trl", "transformers", "diffusers", "peft", "accelerate", "datasets", "numpy", "PIL", "matplotlib"}
print(*sorted(heavy & set(sys.modules)))
"""

# What the classes that trl_udm extends import themselves is no choice of its own
IMPORT_EXAMPLE = """
import sys
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from transformers.models.qwen3 import modeling_qwen3
from trl import GRPOTrainer

theirs = set(sys.modules)
sys.path.append("examples")
import train_geneval

new = set(sys.modules) - theirs
packages = {name.partition(".")[0] for name in new} - theirs - sys.stdlib_module_names
models = {name for name in new if name.startswith("transformers.models.")}
unused = {"memory", "rewards.clip", "rewards.mask2former", "rewards.remote", "worlds.words", "worlds.sums"}
unused |= {"pipelines.pipeline_diffusion_gemma", "pipelines.pipeline_text", "callbacks.guardrails"}
print(*sorted(packages | models | {name for name in new if name.removeprefix("trl_udm.") in unused}))
"""


def test_import_loads_no_heavy_package():
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_AND_LIST], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == []


def test_an_example_loads_no_package_that_it_does_not_use():
    """Neither Matplotlib before a picture is drawn, nor reward models and clients, nor other families and worlds."""
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_EXAMPLE], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["common", "train_geneval", "trl_udm"]


IMPORT_PROBE = """
import gc
import sys
import trl_udm

if sys.argv[1] == "False":
    gc.disable()
trl_udm._MODULES |= {"was_enabled": "probe", "missing": "probe"}
print(trl_udm.was_enabled, gc.isenabled(), hasattr(trl_udm, "missing"), gc.isenabled())
"""


@pytest.mark.parametrize("is_enabled", ["True", "False"])
def test_no_garbage_is_looked_for_during_an_import(is_enabled, tmp_path):
    """The collector is then as it was, also after an import that fails."""
    (tmp_path / "probe.py").write_text("import gc\nwas_enabled = gc.isenabled()")
    command = [sys.executable, "-c", f"import sys\nsys.path.append({str(tmp_path)!r})\n{IMPORT_PROBE}", is_enabled]
    run = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", is_enabled, "False", is_enabled]


def test_neither_the_package_nor_an_extra_brings_torchvision():
    seen, waiting = set(), [Requirement("trl-udm[geneval,ocr,server]")]
    while waiting:
        requirement = waiting.pop()
        for extra in ("", *requirement.extras):
            if (requirement.name, extra) in seen:
                continue
            seen.add((requirement.name, extra))
            for text in requires(requirement.name) or ():
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    names = {name.lower() for name, _ in seen}
    assert {"torch", "trl", "diffusers", "rapidocr", "onnxruntime", "scipy", "fastapi"} <= names
    assert "torchvision" not in names


def test_everything_is_imported_and_text_is_read_without_torchvision():
    code = """
import sys
sys.modules["torchvision"] = None
import trl_udm, trl_udm.cli, trl_udm.evaluation, trl_udm.rewards.remote.server, trl_udm.worlds.shapes.detector
for name in trl_udm.__all__:
    getattr(trl_udm, name)
from PIL import Image, ImageDraw
image = Image.new("RGB", (256, 64), "white")
ImageDraw.Draw(image).text((20, 10), "HELLO", fill="black", font_size=40)
print(trl_udm.OCRReward()(prompts=['"HELLO"'], completions=[image]))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[1.0]"


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


OLD_NAMES = {
    "shapes": ("shapes", ("detector", "prompts", "world")),
    "words": ("words", ("prompts", "world")),
    "arithmetic": ("sums", ("problems",)),
}

IMPORT_OLD_NAMES = """
import importlib, sys, warnings

old, new, parts = sys.argv[1], sys.argv[2], sys.argv[3:]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    importlib.import_module(f"trl_udm.{old}.{parts[-1]}")  # a part first, as in `from trl_udm.shapes.world import`
    exec(f"from trl_udm import {old} as package")
    exec(f"import trl_udm.{old}")
own = [warning for warning in caught if "trl_udm" in str(warning.message)]
assert [warning.category for warning in own] == [FutureWarning], own
assert f"`trl_udm.{old}` is now `trl_udm.worlds.{new}`" in str(own[0].message)
assert own[0].filename != importlib.import_module("trl_udm").__file__
assert package is sys.modules["trl_udm"].__dict__[old] is importlib.import_module(f"trl_udm.worlds.{new}")
for part in parts:
    module = importlib.import_module(f"trl_udm.worlds.{new}.{part}")
    assert importlib.import_module(f"trl_udm.{old}.{part}") is module
    assert getattr(package, part) is module
"""


@pytest.mark.parametrize("old", OLD_NAMES)
def test_an_old_name_warns_and_is_the_new_module(old):
    new, parts = OLD_NAMES[old]
    subprocess.run([sys.executable, "-c", IMPORT_OLD_NAMES, old, new, *parts], cwd=PACKAGE.parent, check=True)


def imported_names(path):
    package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_the_library_imports_no_old_name():
    old_names = tuple(f"trl_udm.{old}" for old in OLD_NAMES)
    old_paths = {PACKAGE / f"{old}.py" for old in OLD_NAMES}
    found = [
        (str(path), name)
        for path in {*PACKAGE.rglob("*.py")} - old_paths
        for name in imported_names(path)
        if name.startswith(old_names)
    ]
    assert found == []


def test_every_folder_says_what_it_is_for():
    for path in PACKAGE.glob("*/**/__init__.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring is not None, path


def test_every_folder_of_code_is_a_package():
    # The wheel holds only the folders that have an `__init__.py`.
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []
