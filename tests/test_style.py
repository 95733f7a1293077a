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
Statements only for effects.

A statement that is an expression is a call, an `await` or a `yield` (or a docstring, or `...`): no conditional expression,
tuple or comprehension is evaluated for its side effect. A tuple literal is never unpacked into `_`, and `_` is never read.
"""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
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
