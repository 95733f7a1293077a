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

"""
Rules of the code that no linter has, and tables of the documentation that must not go stale.

* Statements only for effects. A statement that is an expression is a call, an `await` or a `yield` (or a docstring, or
  `...`): no conditional expression, tuple or comprehension is evaluated for its side effect. A tuple literal is never
  unpacked into `_`, and `_` is never read.
* The package has no mocks, and assigns to no attribute of what it imports.
* Every folder of the package says in one line what it is for.
* Every dependency has a lower bound and a tested version.
* CONTRIBUTING.md lists the private names of TRL and transformers that the trainer overrides or uses.
"""

import ast
import inspect
import re
import runpy
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from trl_udm import UDMGRPOConfig, UDMGRPOTrainer


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "trl_udm"
FOLDERS = ["trl_udm", "examples", "scripts", "benchmarks", "docs", "tests"]


def has_effect(value: ast.expr) -> bool:
    is_text = isinstance(value, ast.Constant) and (isinstance(value.value, str) or value.value is Ellipsis)
    return is_text or isinstance(value, (ast.Call, ast.Await, ast.Yield, ast.YieldFrom))


def is_underscore(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "_"


def find_violations(source: str) -> list[tuple[int, str]]:
    """Line and reason of each violation in `source`, in the order of the lines."""
    violations = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and not has_effect(node.value):
            violations.append((node.lineno, "an expression is evaluated and its value dropped"))
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if is_underscore(target) and not has_effect(node.value):
                    violations.append((node.lineno, "an expression is evaluated and its value dropped into `_`"))
                if isinstance(target, (ast.Tuple, ast.List)) and isinstance(node.value, (ast.Tuple, ast.List)):
                    if any(is_underscore(part) for part in ast.walk(target)):
                        violations.append((node.lineno, "a tuple literal is unpacked into `_`"))
        if is_underscore(node) and isinstance(node.ctx, ast.Load):
            violations.append((node.lineno, "`_` is read"))
    return sorted(violations)


def test_statements_are_only_for_effects():
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert Path(__file__).resolve() in paths
    violations = [
        f"{path.relative_to(ROOT)}:{line}: {reason}"
        for path in paths
        for line, reason in find_violations(path.read_text(encoding="utf-8"))
    ]
    assert violations == []


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("f() if x else g()", "its value dropped"),
        ("x and f()", "its value dropped"),
        ("f(), g()", "its value dropped"),
        ("[f(y) for y in x]", "its value dropped"),
        ("{f(y) for y in x}", "its value dropped"),
        ("{y: f(y) for y in x}", "its value dropped"),
        ("(f(y) for y in x)", "its value dropped"),
        ("x.y", "its value dropped"),
        ("x[0]", "its value dropped"),
        ("x == 1", "its value dropped"),
        ("(x := f())", "its value dropped"),
        ("1", "its value dropped"),
        ("_ = [f(y) for y in x]", "dropped into `_`"),
        ("_ = x and f()", "dropped into `_`"),
        ("x, _ = a, f()", "unpacked into `_`"),
        ("_, x = (f(), a)", "unpacked into `_`"),
        ("[x, _] = [a, f()]", "unpacked into `_`"),
        ("x, *_ = a, f(), g()", "unpacked into `_`"),
        ("x, (y, _) = a, f()", "unpacked into `_`"),
        ("y = x, _ = a, f()", "unpacked into `_`"),
        ("x = [_ + 1 for _ in y]", "`_` is read"),
        ("x = lambda _: _", "`_` is read"),
        ("def f():\n    if x:\n        y if z else g()", "its value dropped"),
    ],
)
def test_violation_is_found(source, reason):
    ((line, found),) = find_violations(source)
    assert line == source.count("\n") + 1
    assert reason in found


@pytest.mark.parametrize(
    "source",
    [
        '"""docstring"""',
        "def f(): ...",
        "f()",
        "x.append(f(y) for y in z)",
        "async def f():\n    await g()",
        "def f():\n    yield x\n    yield from y",
        "x = f() if y else g()",
        "x, y = a, f()",
        "x, _ = f()",
        "_ = f()",
        "for _ in range(3):\n    f()",
        "x = lambda _: 1",
        "match x:\n    case _:\n        f()",
    ],
)
def test_ordinary_code_is_accepted(source):
    assert find_violations(source) == []


def find_root(node: ast.expr) -> ast.expr:
    """The object from which a chain of attributes starts: `a` of `a.b.c`."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node


def find_patches(source: str) -> list[tuple[int, str]]:
    """Line and reason of each mock, and of each assignment to an attribute of an imported name, in `source`."""
    nodes = list(ast.walk(ast.parse(source)))
    imported, patches = set(), []
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            origin = getattr(node, "module", None) or ""
            if any(f"{origin}.{alias.name}.".lstrip(".").startswith("unittest.mock.") for alias in node.names):
                patches.append((node.lineno, "`unittest.mock` is imported"))

    def is_imported(value: ast.expr) -> bool:
        root = find_root(value)
        return isinstance(root, ast.Name) and root.id in imported

    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)) and is_imported(node.value):
            patches.append((node.lineno, "an attribute of an imported name is assigned"))
        is_setter = isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("setattr", "delattr")
        if is_setter and is_imported(node.args[0]):
            patches.append((node.lineno, "an attribute of an imported name is set"))
    return sorted(patches)


def test_nothing_patches_what_it_imports():
    patches = [
        f"{path.relative_to(ROOT)}:{line}: {reason}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, reason in find_patches(path.read_text(encoding="utf-8"))
    ]
    assert patches == []


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import unittest.mock", "`unittest.mock` is imported"),
        ("from unittest import mock", "`unittest.mock` is imported"),
        ("from unittest.mock import patch", "`unittest.mock` is imported"),
        ("import a\na.b = 1", "is assigned"),
        ("import a.b\na.b.c = 1", "is assigned"),
        ("import a as x\nx.b: int = 1", "is assigned"),
        ("from a import b\nb.c += 1", "is assigned"),
        ("from .a import b\nb.c, d = e", "is assigned"),
        ("from a import b\ndel b.c", "is assigned"),
        ("from a import b\nfor b.c in d: ...", "is assigned"),
        ("from a import b\nwith d as b.c: ...", "is assigned"),
        ("def f():\n    import a\n    a.b = 1", "is assigned"),
        ("import a\nsetattr(a.b, 'c', 1)", "is set"),
        ("from a import b\ndelattr(b, 'c')", "is set"),
    ],
)
def test_patch_is_found(source, reason):
    ((line, found),) = find_patches(source)
    assert line == source.count("\n") + 1
    assert reason in found


@pytest.mark.parametrize(
    "source",
    [
        "import a\nself.a = a",
        "import a\nx = a.b\nx = a.c()",
        "import os\nos.environ['x'] = 'y'",
        "import a\nx.a.b = 1",
        "import a\nsetattr(self, 'a', a.b)",
        "import unittest",
    ],
)
def test_ordinary_assignment_is_accepted(source):
    assert find_patches(source) == []


def test_every_folder_says_what_it_is_for():
    silent = []
    for path in sorted(PACKAGE.rglob("__init__.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if not re.match(r"[^\n]+\.(\n\n|$)", docstring):
            silent.append(str(path.relative_to(ROOT)))
    assert silent == []


def read_requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = sum(project["optional-dependencies"].values(), project["dependencies"])
    return {line.name: line for line in map(Requirement, lines) if line.name != project["name"]}


def read_tested_versions() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_every_dependency_has_a_tested_version():
    tested = read_tested_versions()
    for name, requirement in read_requirements().items():
        if name != "deepspeed":  # its tests run where it is installed
            assert requirement.specifier.contains(tested[name]), requirement


def test_lowest_versions_are_those_of_every_dependency(capsys):
    runpy.run_path(str(ROOT / "scripts" / "lowest_versions.py"), run_name="__main__")
    lowest = dict(line.split("==") for line in capsys.readouterr().out.splitlines())
    requirements = read_requirements()
    assert set(lowest) == set(requirements) - {"torch"}
    assert all(requirements[name].specifier.contains(version) for name, version in lowest.items())


def test_the_page_of_versions_has_the_bounds_and_the_tested_versions():
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z_]+) \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE)
    requirements, tested = read_requirements(), read_tested_versions()
    assert {"trl", "transformers", "diffusers", "peft", "accelerate"} <= {name for name, _, _ in rows}
    for name, lowest, pinned in rows:
        bounds = [Version(bound.version) for bound in requirements[name].specifier if bound.operator == ">="]
        assert bounds == [Version(lowest)]
        assert pinned == tested[name]


def read_table(heading: str) -> list[list[set[str]]]:
    """The names in backticks in each cell of the table under `heading` in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split(f"\n### {heading}\n")[1].split("\n#")[0]
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    return [[set(re.findall(r"`([^`]+)`", cell)) for cell in row.strip("| ").split("|")] for row in rows]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def locate(cls: type) -> str:
    """`trl_udm/trainer/hub.py` for a class of `trl_udm.trainer.hub`."""
    return cls.__module__.replace(".", "/") + ".py"


OURS = [cls for cls in UDMGRPOTrainer.__mro__ if locate(cls).startswith("trl_udm/")]
THEIRS = [cls for cls in UDMGRPOTrainer.__mro__ if locate(cls).startswith(("trl/", "transformers/"))]


def find_overridden_names() -> dict[str, tuple[set[str], set[str]]]:
    """For each private name of the trainer's bases that the trainer overrides: the files of theirs and of ours."""
    overridden = {}
    for cls in OURS:
        for name in filter(is_private, vars(cls)):
            theirs = {locate(base) for base in THEIRS if name in vars(base)}
            if theirs:
                overridden.setdefault(name, (theirs, set()))[1].add(locate(cls))
    return overridden


def find_used_names() -> dict[str, set[str]]:
    """For each further private name of the bases of the trainer and its arguments: the files of ours that use it."""
    theirs = set()
    for cls in (*THEIRS, *UDMGRPOConfig.__mro__[1:-1]):
        theirs |= set(vars(cls))
        tree = ast.parse(inspect.getsource(cls))
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        theirs |= {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "self"}
    theirs = set(filter(is_private, theirs)) - set(find_overridden_names())
    used = {}
    for path in sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("trainer/*.py"), *PACKAGE.glob("callbacks/*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in theirs:
                used.setdefault(node.attr, set()).add(str(path.relative_to(ROOT)))
    return used


def test_private_names_that_the_trainer_overrides_are_listed():
    rows = read_table("Overridden")
    assert {name: (theirs, ours) for (name,), theirs, _, ours in rows} == find_overridden_names()


def test_private_names_that_the_trainer_uses_are_listed():
    rows = read_table("Used")
    assert {name: ours for (name,), _, ours in rows} == find_used_names()
