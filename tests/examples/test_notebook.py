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

import nbformat
import pytest
from nbclient import NotebookClient

from . import EXAMPLES_DIR


@pytest.fixture
def notebook():
    return nbformat.read(EXAMPLES_DIR / "udm_grpo_shapes.ipynb", as_version=4)


def find_outputs(notebook, kind):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def test_the_notebook_is_saved_without_outputs(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def test_the_notebook_teaches_redness_and_saves_a_model(notebook, tmp_path):
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    results = {}
    for text in find_outputs(notebook, "text/plain"):
        if text.startswith("{"):
            results |= ast.literal_eval(text)
    assert abs(results["before"]) < 0.02 and results["after"] > results["before"] + 0.03
    assert results["the loaded model draws the same images"] is True
    assert len(find_outputs(notebook, "image/png")) == 6  # states, before, curve, after, curve, loaded
    assert (tmp_path / "outputs" / "geneval-shapes" / "model_index.json").is_file()
