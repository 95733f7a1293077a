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

"""Prompts with GenEval metadata, as datasets."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..rewards.geneval import check_metadata


def geneval_dataset(rows: list[dict[str, Any]], class_names: Sequence[str]) -> Dataset:
    """
    Checks rows of GenEval metadata and makes them a dataset for [`UDMGRPOTrainer`].

    Args:
        rows (`list[dict]`):
            Each with `prompt`, `tag`, `include` and, where objects are forbidden, `exclude`.
        class_names (`Sequence[str]`):
            The classes that the detector knows.

    Returns:
        [`~datasets.Dataset`]: With the columns `prompt`, `tag`, `include` and `exclude`.

    Raises:
        ValueError: If a row is malformed; the message names the row and the field.
    """
    for index, row in enumerate(rows):
        check_metadata(row, class_names, index)
        if not isinstance(row.get("prompt"), str):
            raise ValueError(f"Row {index}: `prompt` must be a string, got {row.get('prompt')!r}.")
    columns = [
        {
            "prompt": row["prompt"],
            "tag": row["tag"],
            "include": row["include"],
            "exclude": row.get("exclude") or [],
        }
        for row in rows
    ]
    # A position is a pair of a relation and an index, which Arrow has no plain type for
    return Dataset.from_list(columns, on_mixed_types="use_json")


def load_geneval_metadata(path: str | Path) -> list[dict[str, Any]]:
    """
    Reads GenEval's `evaluation_metadata.jsonl`, one row a line (https://github.com/djghosh13/geneval).

    Args:
        path (`str` or `Path`):
            The file.

    Returns:
        `list[dict]`: Its rows.

    Raises:
        ValueError: If a line is not JSON.
    """
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {path} is not JSON: {error}.") from error
    return rows
