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
Compare two evaluations of the same prompts, and write a page with their images side by side.

Each is a folder of `trl-udm evaluate`, or of a run that has such a folder `after`. The page is one HTML file that
opens without a network.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from .parser import check_range


@dataclass(kw_only=True)
class Arguments:
    """
    Arguments of `trl-udm compare`.

    Args:
        folders (`list[Path]`):
            The two folders: what is compared with, and what is compared.
        titles (`list[str]`, *optional*):
            Names of the two in the tables. By default those of the folders.
        output (`Path`, *optional*, defaults to `"comparison.html"`):
            The page.
        num_shown (`int`, *optional*, defaults to `12`):
            Prompts that are shown of the largest gains, and of the largest losses.
    """

    folders: list[Path] = field(init=False, metadata={"nargs": 2, "type": Path, "help": "The two folders."})
    titles: list[str] | None = field(
        default=None, metadata={"help": "Names of the two in the tables. By default those of the folders."}
    )
    output: Path = field(default=Path("comparison.html"), metadata={"help": "The page."})
    num_shown: int = field(default=12, metadata={"help": "Prompts that are shown of the gains, and of the losses."})


def run(arguments: Arguments) -> None:
    """
    Compares two evaluations with [`~trl_udm.evaluation.paired.compare_evaluations`].

    Args:
        arguments ([`Arguments`]):
            What is compared.

    Raises:
        ValueError: If a folder has no evaluation, or the prompts or rewards differ.
    """
    from ..evaluation.paired import compare_evaluations, format_comparison, load_evaluation, write_comparison

    check_range(arguments, num_shown=(0, math.inf))
    first, second = map(load_evaluation, arguments.folders)
    titles = arguments.titles or [str(folder) for folder in arguments.folders]
    if len(titles) != 2:
        raise ValueError(f"`--titles` must be two, got {titles}.")
    comparison = compare_evaluations(first, second)
    names = (titles[0], titles[1])
    write_comparison(arguments.output, first, second, comparison, names, arguments.num_shown)
    print(format_comparison(comparison, names))
    print(arguments.output)
