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
What `mkdocs.yml` adds to MkDocs, so that the pages of docs/ are good both on GitHub and on the site:

* links to files outside docs/ lead to the repository, and the changelog and the guide for contributors are pages;
* formulas are MathML, which browsers show without a script;
* the page of the command line has the `--help` text of each verb;
* docstrings in the form of TRL and diffusers become Markdown.
"""

import contextlib
import html
import io
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import griffe
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parents[1]
DOCS_DIR = ROOT / "docs"
ROOT_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
HELP = re.compile(r"^<!-- trl-udm (\S+) --help -->$", re.MULTILINE)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files, config):
    """Adds the pages that lie in the root of the repository."""
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Redirects links that leave docs/, and inserts the texts of `--help`."""
    uri = page.file.src_uri
    source = {page: ROOT / name for name, page in ROOT_PAGES.items()}.get(uri, DOCS_DIR / uri)

    def redirect(match):
        link = urlsplit(match[1])
        if link.scheme or not link.path:
            return match[1]
        target = (source.parent / link.path).resolve()
        if not target.exists():
            raise PluginError(f"{source}: the link {match[1]} leads nowhere.")
        if target.is_relative_to(DOCS_DIR):
            path = os.path.relpath(target, (DOCS_DIR / uri).parent)
        elif target.parent == ROOT and target.name in ROOT_PAGES:
            path = os.path.relpath(DOCS_DIR / ROOT_PAGES[target.name], (DOCS_DIR / uri).parent)
        else:
            path = f"{config.repo_url}/{'tree' if target.is_dir() else 'blob'}/main/{target.relative_to(ROOT)}"
        return link._replace(path=path).geturl()

    return HELP.sub(lambda match: f"```text\n{read_help(match[1])}```", LINK.sub(redirect, markdown))


def on_page_content(content, page, config, files):
    """Turns formulas into MathML."""

    def render(match):
        return convert(html.unescape(match[2]), display="inline" if match[1] == "span" else "block")

    return FORMULA.sub(render, content)


def read_help(verb):
    """The text of `trl-udm <verb> --help`."""
    from trl_udm.cli import main

    os.environ["COLUMNS"] = "100"
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([verb, "--help"])
    return text.getvalue()


class Docstrings(griffe.Extension):
    """Writes docstrings in the form of TRL and diffusers as Markdown."""

    def on_package(self, *, pkg, **kwargs):
        pages = (DOCS_DIR / "reference").glob("*.md")
        self.documented = re.findall(r"^::: (\S+)", "\n".join(page.read_text() for page in pages), re.MULTILINE)
        self.documented = {pkg[name.split(".")[1:]].canonical_path for name in self.documented}
        self.package = pkg
        self.paths = {}
        objects = list(self.walk(pkg))
        for item in objects:
            self.paths.setdefault(item.name, []).append(item.canonical_path)
        for item in objects:
            if item.docstring:
                item.docstring.value = self.to_markdown(item.docstring.value, item)

    def walk(self, item):
        yield item
        for member in item.members.values():
            if not member.is_alias:
                yield from self.walk(member)

    def to_markdown(self, text, item):
        lines, section = [], None
        for line in text.splitlines():
            if match := re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields|Example|Examples):", line):
                section = match[1]
                lines += [f"**{section}**", ""]
            elif section and line.startswith("    ") and not section.startswith("Example"):
                line = line[4:]
                if line.startswith("> "):
                    line = f"\n*{line[2:]}*\n"
                elif section not in ("Returns", "Yields"):
                    line = re.sub(r"^(\**\w+(?:, \**\w+)*)( \(.*\))?: *", r"* **`\1`**\2: ", line)
                lines.append(line)
            else:
                section = section if not line else None
                lines.append(re.sub("^```python$", "```pycon", line))
        return re.sub(r"\[`(~?)([\w.]+)`\]", lambda match: self.link(match, item), "\n".join(lines))

    def link(self, match, item):
        name = match[2]
        shown = name.rpartition(".")[2] if match[1] else name
        path = self.find(name, item)
        is_documented = path and any(f"{path}.".startswith(f"{known}.") for known in self.documented)
        return f"[`{shown}`][{path}]" if is_documented else f"`{shown}`"

    def find(self, name, item):
        first, *rest = name.split(".")
        paths = self.paths.get(first, [])
        with contextlib.suppress(KeyError):
            if first == "trl_udm":
                return self.package[rest].canonical_path
            if first in item.module.members:
                return item.module[name].canonical_path
            if len(paths) == 1:
                return self.package[[*paths[0].split(".")[1:], *rest]].canonical_path
        return None
