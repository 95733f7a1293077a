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
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, Features, IterableDataset, Value, load_dataset

from ..rewards.geneval import CLASS_NAMES
from ..rewards.ocr import extract_target
from .geneval import GENEVAL_FEATURES, check_row
from .ocr import OCR_FEATURES


def load_prompts(
    path_or_name: str | Path,
    task: Literal["geneval", "ocr"] | None = None,
    *,
    split: str = "train",
    streaming: bool = False,
    prompt_column: str = "prompt",
    class_names: Sequence[str] = CLASS_NAMES,
    **kwargs: Any,
) -> Dataset | IterableDataset:
    """
    Loads prompts, checks every row, and keeps the columns of the task.

    | `task` | columns | checked |
    |---|---|---|
    | `None` | `prompt` | a string that is not blank |
    | `"geneval"` | `prompt`, `tag`, `include`, `exclude` | by [`~trl_udm.rewards.geneval.check_metadata`] |
    | `"ocr"` | `prompt`, `target_text` | a string that is not blank; if absent or `None`, the prompt's quoted part |

    The columns have the same types for every source, so that `datasets.concatenate_datasets` can join datasets of
    several tasks. In the joined dataset, a column that a row's task does not have is `None`.

    Args:
        path_or_name (`str` or `Path`):
            A file: `.txt` (a prompt a line), `.jsonl` (a row a line), `.json`, `.csv` or `.parquet`. Otherwise a
            dataset on the Hub, or a folder.
        task (`str`, *optional*):
            `"geneval"`, `"ocr"` or `None`.
        split (`str`, *optional*, defaults to `"train"`):
            The split. A file has only `"train"`, and slices of it such as `"train[:100]"`.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read and check each row only when it is needed.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            The column of the prompts.
        class_names (`Sequence[str]`, *optional*, defaults to `CLASS_NAMES`):
            The classes that the detector knows, for `task="geneval"`.
        kwargs (`dict[str, Any]`, *optional*):
            Further arguments of [`~datasets.load_dataset`], such as `name` or `revision`.

    Returns:
        [`~datasets.Dataset`] or, if `streaming`, [`~datasets.IterableDataset`].

    Raises:
        ValueError: If there is no such task, or a row is malformed. The message names the row (counted from 0, as in
        `dataset[index]`), the field and the reason. With `streaming`, it is raised when the row is read.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from trl_udm.data.loading import load_prompts

    >>> _ = Path("prompts.txt").write_text('A neon sign that says "Open late"\\n')
    >>> load_prompts("prompts.txt", task="ocr")[0]
    {'prompt': 'A neon sign that says "Open late"', 'target_text': 'Open late'}
    ```
    """
    if task not in (None, "geneval", "ocr"):
        raise ValueError(f"`task` must be 'geneval', 'ocr' or `None`, got {task!r}.")

    source = str(path_or_name)
    suffix = Path(source).suffix
    if suffix in (".txt", ".jsonl"):
        # JSON lines are parsed below, because the JSON builder guesses the types, and its errors do not name the row
        column = prompt_column if suffix == ".txt" else "line"
        text_options = {"features": Features({column: Value("string")}), "encoding": "utf-8-sig"}
        dataset = load_dataset("text", data_files=source, split=split, streaming=streaming, **text_options, **kwargs)
    elif suffix in (".json", ".csv", ".parquet"):
        dataset = load_dataset(suffix[1:], data_files=source, split=split, streaming=streaming, **kwargs)
    else:
        dataset = load_dataset(source, split=split, streaming=streaming, **kwargs)

    if task == "geneval":
        features = GENEVAL_FEATURES
    elif task == "ocr":
        features = OCR_FEATURES
    else:
        features = Features({"prompt": Value("string")})
    read = functools.partial(
        _read_row,
        is_json_line=suffix == ".jsonl",
        task=task,
        prompt_column=prompt_column,
        class_names=class_names,
    )
    if streaming:
        return dataset.map(read, with_indices=True, features=features).select_columns(list(features))
    return Dataset.from_list([read(row, index) for index, row in enumerate(dataset)], features=features)


def _read_row(
    row: Mapping[str, Any],
    index: int,
    is_json_line: bool,
    task: str | None,
    prompt_column: str,
    class_names: Sequence[str],
) -> dict[str, Any]:
    if is_json_line:
        line = row["line"]
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Row {index}: the line must be JSON, got {line!r}: {error}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"Row {index}: the line must be a JSON object, got {line!r}.")

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
        if target is None:
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
