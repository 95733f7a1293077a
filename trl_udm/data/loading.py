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

"""Prompt files and Hub datasets as datasets of checked rows."""

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets

from ..rewards.geneval import CLASS_NAMES
from ..rewards.ocr import extract_target
from .files import read_source, to_dataset
from .geneval import GENEVAL_FEATURES, check_row
from .ocr import OCR_FEATURES


logger = logging.getLogger(__name__)

TASK_FEATURES = {None: Features({"prompt": Value("string")}), "geneval": GENEVAL_FEATURES, "ocr": OCR_FEATURES}
"""The columns of each task."""


@overload
def load_prompts(
    path_or_name: str | Path,
    task: Literal["geneval", "ocr"] | None = None,
    *,
    split: str = "train",
    streaming: Literal[False] = False,
    prompt_column: str = "prompt",
    class_names: Sequence[str] = CLASS_NAMES,
    encoding: str | None = None,
    **kwargs: Any,
) -> Dataset: ...


@overload
def load_prompts(
    path_or_name: str | Path,
    task: Literal["geneval", "ocr"] | None = None,
    *,
    streaming: Literal[True],
    **kwargs: Any,
) -> IterableDataset: ...


def load_prompts(
    path_or_name: str | Path,
    task: Literal["geneval", "ocr"] | None = None,
    *,
    split: str = "train",
    streaming: bool = False,
    prompt_column: str = "prompt",
    class_names: Sequence[str] = CLASS_NAMES,
    encoding: str | None = None,
    **kwargs: Any,
) -> Dataset | IterableDataset:
    """
    Loads prompts and checks every row.

    | `task` | columns | checked |
    |---|---|---|
    | `None` | `prompt` | a string that is not blank |
    | `"geneval"` | `prompt`, `tag`, `include`, `exclude` | by [`~trl_udm.rewards.geneval.check_metadata`] |
    | `"ocr"` | `prompt`, `target_text` | not blank; if absent, `None` or empty, the prompt's quoted part |

    These columns come first and have the same types for every source, so that `datasets.concatenate_datasets` can join
    datasets of several tasks. In the joined dataset, a column that a row's task does not have is `None`. All other
    columns of the source follow unchanged, and reach the reward functions.

    Text is read as text: the cell `NA` or `007` of a table, or a date in JSON, is that string.

    Args:
        path_or_name (`str` or `Path`):
            A file: `.txt` (a prompt a line), `.jsonl` (a row a line), `.json` (a list of rows, or a row a line),
            `.csv`, `.tsv` or `.parquet`. All but `.parquet` may be compressed, such as `.csv.gz`. Otherwise a dataset
            on the Hub, or a folder.
        task (`str`, *optional*):
            `"geneval"`, `"ocr"` or `None`.
        split (`str`, *optional*, defaults to `"train"`):
            The split. A file has only `"train"`, and slices of it such as `"train[:100]"`.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read and check each row only when it is needed.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            The column of the prompts, which becomes `prompt`.
        class_names (`Sequence[str]`, *optional*, defaults to `CLASS_NAMES`):
            The classes that the detector knows, for `task="geneval"`.
        encoding (`str`, *optional*):
            The encoding of a text file, such as `"latin-1"`. By default what its byte order mark says, else UTF-8.
        kwargs (`dict[str, Any]`, *optional*):
            Further arguments of [`~datasets.load_dataset`], such as `name` or `revision`. For a `.csv` or `.tsv` file
            those of `csv.reader`, such as `delimiter`.

    Returns:
        [`~datasets.Dataset`] or, if `streaming`, [`~datasets.IterableDataset`].

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such task, the source cannot be read or has no row, or a row is malformed. The
        message names the row (counted from 0), the field and the reason. With `streaming`, it is raised when the row
        is read.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from trl_udm.data.loading import load_prompts

    >>> _ = Path("prompts.txt").write_text('A neon sign that says "Open late"\\n')
    >>> load_prompts("prompts.txt", task="ocr")[0]
    {'prompt': 'A neon sign that says "Open late"', 'target_text': 'Open late'}
    ```
    """
    if task not in TASK_FEATURES:
        raise ValueError(f"`task` must be 'geneval', 'ocr' or `None`, got {task!r}.")

    features = TASK_FEATURES[task]
    rows = read_source(path_or_name, split, streaming, encoding, prompt_column, **kwargs)
    check = functools.partial(_check_row, task=task, prompt_column=prompt_column, class_names=class_names)
    if isinstance(rows, IterableDataset):
        replaced = None if prompt_column == "prompt" else [prompt_column]
        return rows.map(check, with_indices=True, features=features, remove_columns=replaced)
    checked = Dataset.from_list([check(row, index) for index, row in enumerate(rows)], features=features)
    others = to_dataset(rows) if isinstance(rows, list) else rows
    others = others.remove_columns([name for name in others.column_names if name in {*features, prompt_column}])
    return concatenate_datasets([checked, others], axis=1)


def _check_row(
    row: Mapping[str, Any], index: int, task: str | None, prompt_column: str, class_names: Sequence[str]
) -> dict[str, Any]:
    """The columns of the task."""
    if index == 0 and prompt_column != "prompt" and "prompt" in row:
        logger.warning(f"The column `prompt` is left out, because `prompt_column` is {prompt_column!r}.")
    prompt = row.get(prompt_column)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(
            f"Row {index}: `{prompt_column}` must be a string that is not blank, got {prompt!r}. The row has "
            f"{sorted(row)}: choose one by `prompt_column`."
        )
    if task == "geneval":
        return check_row({**row, "prompt": prompt}, class_names, index)
    if task == "ocr":
        target = row.get("target_text")
        if target is None or target == "":  # a table has no `None`
            try:
                target = extract_target(prompt)
            except ValueError as error:
                raise ValueError(f"Row {index}: {error}") from error
        if not isinstance(target, str) or not target.strip():
            raise ValueError(
                f"Row {index} ({prompt!r}): `target_text` must be a string that is not blank, got {target!r}."
            )
        return {"prompt": prompt, "target_text": target}
    return {"prompt": prompt}
