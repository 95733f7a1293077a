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

"""The reference of docs/reference has every public name, and every verb of the command line."""

import re
from importlib import import_module
from inspect import isclass, isfunction
from pkgutil import resolve_name, walk_packages

import pytest

import trl_udm
from trl_udm.cli import VERBS

from ..pages import DOCS_DIR


PUBLIC = ("callbacks", "data", "evaluation", "memory", "models", "pipelines", "rewards", "schedulers", "worlds")
# Helpers that other modules of the package share. Their docstrings are for those who read the code.
INTERNAL = {
    "trl_udm.models.frames",
    "trl_udm.models.layers",
    "trl_udm.models.token_scores",
    "trl_udm.pipelines.bidirectional",
    "trl_udm.pipelines.conditions",
    "trl_udm.pipelines.image_families",
    "trl_udm.pipelines.images",
    "trl_udm.pipelines.lora",
    "trl_udm.pipelines.original_checkpoint",
    "trl_udm.pipelines.original_fudoki",
    "trl_udm.pipelines.original_text",
    "trl_udm.rewards.images",
    "trl_udm.rewards.model_reward",
    "trl_udm.rewards.remote.wire",
    "trl_udm.schedulers.draws",
    "trl_udm.worlds.countdown.benchmark",
    "trl_udm.worlds.moving.benchmark",
    "trl_udm.worlds.shapes.benchmark",
    "trl_udm.worlds.sudoku.benchmark",
    "trl_udm.worlds.sums.benchmark",
    "trl_udm.worlds.words.benchmark",
}


def read_reference() -> list[str]:
    """The names that the pages of the reference show."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS_DIR / "reference").glob("*.md")))
    return re.findall(r"^::: (\S+)", pages, re.MULTILINE)


def find_public_names() -> set[str]:
    """Classes and functions that the public modules define, by their full names."""
    names = set()
    for module in walk_packages(trl_udm.__path__, "trl_udm."):
        if module.name.split(".")[1] in PUBLIC and module.name not in INTERNAL:
            members = vars(import_module(module.name))
            names |= {
                f"{module.name}.{name}"
                for name, value in members.items()
                if (isclass(value) or isfunction(value)) and value.__module__ == module.name and name[0] != "_"
            }
    return names


def full_name(name: str) -> str:
    """`trl_udm.models.autoencoder_vq.AutoencoderVQ` for `trl_udm.AutoencoderVQ`."""
    value = resolve_name(name)
    return f"{value.__module__}.{value.__qualname__}"


def test_every_public_name_has_its_place_in_the_reference():
    reference = read_reference()
    assert {f"trl_udm.{name}" for name in trl_udm.__all__} <= set(reference)
    assert find_public_names() <= set(map(full_name, reference))
    assert len(reference) == len(set(map(full_name, reference)))


def test_every_verb_has_its_help_in_the_reference():
    page = (DOCS_DIR / "reference" / "cli.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)\n\n<!-- trl-udm (\S+) --help -->$", page, re.MULTILINE) == [(v, v) for v in VERBS]


def test_docstrings_become_markdown():
    griffe, site = pytest.importorskip("griffe"), pytest.importorskip("scripts.docs_site")
    package = griffe.load("trl_udm", extensions=griffe.Extensions(site.Docstrings()))
    text = package["trainer.udm_grpo_config.UDMGRPOConfig"].docstring.value
    assert text.startswith("Configuration of [`UDMGRPOTrainer`][trl_udm.trainer.udm_grpo_trainer.UDMGRPOTrainer].")
    assert "\n*Parameters that control the rollout*\n" in text
    assert "\n* **`num_inference_steps`** (`int`, *optional*, defaults to `10`): \n    Denoising steps" in text
    assert "`GRPOConfig` and those below" in text
