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

"""Links, images, formulas, tables and quoted errors of the pages, and the site that is built from them."""

import ast
import os
import re
import subprocess
import sys
from fractions import Fraction

import pytest

import trl_udm
from trl_udm import UDMGRPOConfig

from ..pages import DOCS_DIR, PAGES, ROOT, run_page


TEXT_PAGES = [*PAGES, ROOT / "CHANGELOG.md"]


def read_prose(page):
    """A page without its code."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", lambda match: match[0].strip("`"), text)


def find_anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    anchors = []
    for heading in re.findall(r"^#+ (.+)$", read_prose(page), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        anchors.append(f"{slug}-{anchors.count(slug)}" if slug in anchors else slug)
    return anchors


@pytest.mark.parametrize("page", TEXT_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_and_formulas_are_those_that_github_renders(page):
    prose = read_prose(page)
    broken = []
    for link in re.findall(r"\]\(\s*([^)\s]+)\s*\)", prose):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not re.match(r"https?:|mailto:", link):
            exists = target.exists() and (not anchor or anchor in find_anchors(target))
            broken += [] if exists and target.is_relative_to(ROOT) else [link]
    assert broken == []
    assert not re.search(r"\]\(\s*\n", prose), "a link is broken over two lines"
    for formula in re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", prose, re.DOTALL):
        assert "operatorname" not in formula and not re.search(r"\\[^a-zA-Z]", formula), formula


def test_the_table_of_batch_geometries_is_computed(tmp_path):
    page = DOCS_DIR / "concepts" / "batch_geometry.md"
    compute = run_page("concepts/batch_geometry.md", tmp_path)["batch_geometry"]
    names = (
        "num_processes",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "steps_per_generation",
        "num_generations",
        "num_train_timesteps",
    )
    rows = re.findall(r"^\| (\d.*) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 5
    for row in rows:
        cells = [None if cell == "–" else int(cell) for cell in row.split(" | ")]
        settings = dict(zip(names, cells, strict=False))
        result = compute(**settings)
        assert cells[6:] == [result[name] for name in ("rows", "samples", "prompts", "updates")]
        if settings.pop("num_processes") == 1:  # one with more is only known where as many were launched
            args = UDMGRPOConfig("outputs", bf16=False, **settings)
            assert args.generation_batch_size == result["rows"]
    with pytest.raises(ValueError, match="whole groups of 24 rows"):
        UDMGRPOConfig("outputs", bf16=False, per_device_train_batch_size=20)
    assert compute(per_device_train_batch_size=20)["prompts"] == Fraction(5, 6)


def test_quoted_errors_are_those_of_the_code():
    page = (DOCS_DIR / "troubleshooting.md").read_text(encoding="utf-8")
    quotes = re.findall(r'^(?:\| |## )"(.+?)"', page, re.MULTILINE) + re.findall(r"```text\nValueError: (.+)", page)
    assert len(quotes) == 8
    files = [*(ROOT / "trl_udm").glob("*.py"), *(ROOT / "trl_udm" / "trainer").glob("*.py")]
    files.append(sys.modules[UDMGRPOConfig.__mro__[3].__module__].__file__)
    texts = []
    for file in files:
        for node in ast.walk(ast.parse(open(file, encoding="utf-8").read())):
            if isinstance(node, (ast.Constant, ast.JoinedStr)):
                texts.append(node.value if isinstance(node, ast.Constant) else ast.unparse(node))
    for quote in quotes:
        parts = [part.strip() for part in quote.split("...") if part.strip()]
        assert any(all(part in str(text) for part in parts) for text in texts), quote


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("latex2mathml")
    pytest.importorskip("material")
    process = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.returncode == 0, process.stdout
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (tmp_path / "reference").rglob("*.html"))
    assert all(f'id="trl_udm.{name}"' in pages for name in trl_udm.__all__)
    assert "--num_images_per_prompt" in pages
    formulas = (tmp_path / "udm_grpo_trainer" / "index.html").read_text(encoding="utf-8")
    assert "<math" in formulas and "arithmatex" not in formulas
