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
Embedded worlds: small tasks with prompts, a reward that measures the model's output, and a trained checkpoint.

A world is a folder here and a line in `WORLDS`. The folder's `__init__.py` has `CHECKPOINT_PATH`. Its `benchmark.py`
has `PROMPT_OPTIONS`, `make_reward` and `load_eval_rows`. Nothing of a world is imported before it is used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class World:
    """
    A registered world.

    Args:
        name (`str`):
            The name of its folder, and of its model and its benchmark on the command line.
        modality (`str`):
            What its model generates: `"image"`, `"video"` or `"text"`.

    Example:

    ```python
    >>> from trl_udm.worlds import WORLDS

    >>> reward = WORLDS["shapes"].make_reward(mode="dense")
    >>> reward.__name__
    'geneval_reward'
    ```
    """

    name: str
    modality: Literal["image", "video", "text"]

    @property
    def checkpoint_path(self) -> Path:
        """`Path`: Folder of the shipped pipeline."""
        return import_module(f"{__name__}.{self.name}").CHECKPOINT_PATH

    @property
    def prompt_options(self) -> dict[str, Any]:
        """`dict[str, Any]`: Options of [`~trl_udm.data.loading.load_prompts`] for a file of prompts of this world."""
        return self._import_benchmark().PROMPT_OPTIONS

    def make_reward(self, **options: Any) -> Callable[..., list[float | None]]:
        """
        Makes the reward.

        Args:
            options (`dict[str, Any]`):
                Options of the reward's constructor.

        Returns:
            `Callable`: A reward function in TRL's contract.
        """
        return self._import_benchmark().make_reward(**options)

    def load_eval_rows(self) -> list[dict[str, Any]]:
        """
        Lists the evaluation prompts, which are never trained on.

        Returns:
            `list[dict]`: Rows with `prompt` and the columns that the reward needs.
        """
        return self._import_benchmark().load_eval_rows()

    def _import_benchmark(self) -> Any:
        return import_module(f"{__name__}.{self.name}.benchmark")


WORLDS = {
    world.name: world
    for world in (
        World("countdown", modality="text"),
        World("moving", modality="video"),
        World("shapes", modality="image"),
        World("sudoku", modality="text"),
        World("sums", modality="text"),
        World("words", modality="image"),
    )
}
"""All worlds by name."""

VISUAL_WORLDS = {name: world for name, world in WORLDS.items() if world.modality != "text"}
"""The worlds whose models draw images or videos."""
