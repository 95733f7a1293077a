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
Nothing that is loaded can run code, and nothing is fetched by way of torchvision.

In the package, the examples, the scripts and the benchmarks nothing is unpickled: `pickle` is imported for its error
only, and `torch.load` has `weights_only=True`. No code of a repository is trusted, no text is evaluated, no shell is
called.
"""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ["trl_udm", "examples", "scripts", "benchmarks"]
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torchvision"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}


def find_unsafe(source: str) -> list[tuple[int, str]]:
    """Line and reason of each unsafe use in `source`, in the order of the lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = {alias.name.partition(".")[0] for alias in node.names} & UNSAFE_MODULES
            found += [(node.lineno, f"{module} is imported") for module in sorted(modules)]
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            module, names = node.module.partition(".")[0], {alias.name for alias in node.names}
            if module in UNSAFE_MODULES and names != {"UnpicklingError"}:
                found.append((node.lineno, f"{module} is imported"))
        if isinstance(node, ast.arg | ast.keyword) and node.arg == "trust_remote_code":
            found.append((node.lineno, "trust_remote_code"))
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name == "torch.load" and keywords.get("weights_only") != "True":
                found.append((node.lineno, "torch.load without weights_only=True"))
            if name in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
                found.append((node.lineno, f"{name} with allow_pickle"))
            if name in UNSAFE_CALLS or keywords.get("shell", "False") != "False":
                found.append((node.lineno, f"{name} is called"))
    return sorted(found)


def test_nothing_that_is_loaded_can_run_code():
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 40
    unsafe = [
        f"{path.relative_to(ROOT)}:{line}: {reason}"
        for path in paths
        for line, reason in find_unsafe(path.read_text(encoding="utf-8"))
    ]
    assert unsafe == []


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import pickle", "pickle is imported"),
        ("import os, torchvision.transforms as T", "torchvision is imported"),
        ("from pickle import UnpicklingError, loads", "pickle is imported"),
        ("from torchvision import io", "torchvision is imported"),
        ("x = torch.load(path)", "torch.load without weights_only=True"),
        ("x = torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("x = torch.load(path, weights_only=safe)", "torch.load without weights_only=True"),
        ("x = np.load(path, allow_pickle=True)", "np.load with allow_pickle"),
        ("x = AutoModel.from_pretrained(path, trust_remote_code=True)", "trust_remote_code"),
        ("def f(trust_remote_code=True): ...", "trust_remote_code"),
        ("x = eval(text)", "eval is called"),
        ("subprocess.run(command, shell=True)", "subprocess.run is called"),
    ],
)
def test_an_unsafe_use_is_found(source, reason):
    assert find_unsafe(source) == [(1, reason)]


@pytest.mark.parametrize(
    "source",
    [
        "from pickle import UnpicklingError",
        "x = torch.load(path, weights_only=True)",
        "x = np.load(path)",
        "model.eval()",
        "x = re.compile(text)",
        "subprocess.run(command)",
    ],
)
def test_safe_code_is_accepted(source):
    assert find_unsafe(source) == []
