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

"""The code of the README, of every page and of every docstring runs from a clean start."""

import ast
import doctest
import re
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pytest

import trl_udm

from ..pages import PAGES, ROOT, check_code, read_blocks, run_page


# Pages with a test of their own, which runs them
RUN_ELSEWHERE = {"add_a_loss.md", "add_a_model_family.md", "checkpoints.md", "resuming.md"}
RUN_ELSEWHERE |= {"image_family.md", "logging.md", "lora.md", "own_reward.md"}
SHORTER = {"README.md": ("max_steps=25", "max_steps=2")}
NEEDS_GPU = {"URSAPipeline", "FUDOKIPipeline", "FUDOKIUnderstandingPipeline", "DiffusionGemmaUDMPipeline"}
EXAMPLE = re.compile(r"Example:\n\n( *)```python\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if read_blocks(page) and page.name not in RUN_ELSEWHERE],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_code_of_a_page_runs(page, folder):
    run_page(page, folder, shorter=SHORTER.get(page.name))


def find_examples():
    for module in walk_packages(trl_udm.__path__, "trl_udm."):
        if (
            module.name.endswith("__main__")
            or module.name.count(".") == 1
            and not module.ispkg
            and module.name != "trl_udm.memory"
        ):
            continue
        tree = ast.parse(Path(import_module(module.name).__file__).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                for _, text in EXAMPLE.findall(ast.get_docstring(node) or ""):
                    yield pytest.param(node.name, text, id=f"{module.name}.{node.name}")


class Checker(doctest.OutputChecker):
    """Ignores what is printed where the docstring shows nothing."""

    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.parametrize(("name", "text"), find_examples())
def test_the_example_of_a_docstring_runs(name, text, folder):
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    if name in NEEDS_GPU:
        check_code("".join(part.source for part in example.examples), {})
    else:
        assert doctest.DocTestRunner(Checker()).run(example, out=sys.stderr.write).failed == 0
