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

"""Rows of files and Hub datasets. Text is read as text: a cell "NA" is not missing, and "007" is no number."""

import csv
import inspect
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from datasets import Dataset, IterableDataset, ReadInstruction, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError
from fsspec.utils import infer_compression


TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv")

# For folders and the Hub, where the names of the columns are not known before: pandas takes their numbers too
_CELLS_ARE_TEXT = {"na_filter": False, "converters": dict.fromkeys(range(1000), str)}


def load_rows(path_or_name: str | Path, split: str = "train", **kwargs: Any) -> Dataset:
    """
    Loads rows with all of their columns, unchecked.

    Args:
        path_or_name, split, kwargs:
            As in [`~trl_udm.data.loading.load_prompts`].

    Returns:
        [`~datasets.Dataset`]: The rows. A row that lacks a column has `None` there.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the source cannot be read, or has no row.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from trl_udm.data.files import load_rows

    >>> _ = Path("rows.csv").write_text("prompt,target_text\\nA sign,007\\n")
    >>> load_rows("rows.csv")[0]
    {'prompt': 'A sign', 'target_text': '007'}
    ```
    """
    rows: Any = read_source(path_or_name, split, **kwargs)
    return to_dataset(rows) if isinstance(rows, list) else rows


def to_dataset(rows: list[dict[str, Any]]) -> Dataset:
    """
    Makes a dataset of rows that may have different columns, and different types in a column.

    Args:
        rows (`list[dict[str, Any]]`):
            The rows.

    Returns:
        [`~datasets.Dataset`]: The rows. A row that lacks a column has `None` there.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names}, on_mixed_types="use_json")


def read_source(
    path_or_name: str | Path,
    split: str = "train",
    streaming: bool = False,
    encoding: str | None = None,
    text_column: str = "prompt",
    **kwargs: Any,
) -> list[dict[str, Any]] | Dataset | IterableDataset:
    """
    Reads rows as [`load_rows`] does.

    Args:
        path_or_name, split, streaming, encoding, kwargs:
            As in [`~trl_udm.data.loading.load_prompts`].
        text_column (`str`, *optional*, defaults to `"prompt"`):
            The column that the lines of a `.txt` file are.

    Returns:
        [`~datasets.IterableDataset`] if `streaming`. Otherwise a `list[dict]` for a text file, whose columns need not
        have types, or a [`~datasets.Dataset`].

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the source cannot be read, or has no row.
    """
    source = str(path_or_name)
    path = Path(source)
    suffix = Path(path.stem if infer_compression(source) else path.name).suffix.lower()
    if suffix in TEXT_SUFFIXES and not path.is_dir():
        options = {name: value for name, value in kwargs.items() if name != "cache_dir"}  # nothing is cached
        arguments = {"source": source, "suffix": suffix, "encoding": encoding, "text_column": text_column, **options}
        if streaming:
            if split != "train":
                raise ValueError(f"`split` must be 'train' for a file with `streaming=True`, got {split!r}.")
            return IterableDataset.from_generator(_read_file, gen_kwargs=arguments)
        rows = list(_read_file(**arguments))
        parts = ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
        return [row for part in parts for row in rows[part.from_ : part.to]]

    if encoding is not None:
        kwargs["encoding"] = encoding
    if path.suffix.lower() == ".parquet" and not path.is_dir():
        builder_name, kwargs = "parquet", {**kwargs, "data_files": source}
    elif path.is_file():
        raise ValueError(_describe(source, "has another suffix"))
    else:
        builder_name = source
        names = inspect.signature(load_dataset_builder).parameters
        builder = load_dataset_builder(source, **{name: kwargs[name] for name in kwargs if name in names})
        if builder.info.builder_name == "csv":
            kwargs = {**_CELLS_ARE_TEXT, **kwargs}
    try:
        return load_dataset(builder_name, split=split, streaming=streaming, **kwargs)
    except (DatasetGenerationError, ValueError) as error:
        raise ValueError(_describe(source, f"cannot be read: {error.__cause__ or error}")) from error


def _read_file(
    source: str, suffix: str, encoding: str | None, text_column: str, **csv_options: Any
) -> Iterator[dict[str, Any]]:
    is_table = suffix in (".csv", ".tsv")
    if csv_options and not is_table:
        raise TypeError(f"{[*csv_options]} are options of other sources, got them for {source!r}. Leave them out.")
    with fsspec.open(source, "rb", compression="infer") as file:
        try:
            content = file.read()
        except (OSError, EOFError) as error:
            raise ValueError(_describe(source, f"cannot be decompressed: {error}")) from error
    encoding = encoding or json.detect_encoding(content)  # UTF-8, or what a byte order mark says
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        reason = f"is not {encoding}: {error}. Name its `encoding`, such as 'latin-1', or save it as UTF-8"
        raise ValueError(_describe(source, reason)) from error

    lines = io.StringIO(text, newline="")  # so that a line end in a quoted cell stays as it is
    if is_table:
        rows = _read_cells(lines, source, **{"delimiter": "," if suffix == ".csv" else "\t", **csv_options})
    elif suffix == ".txt":
        rows = ({text_column: line.rstrip("\r\n")} for line in lines)
    elif suffix == ".json" and text.lstrip().startswith("["):
        rows = iter(_parse_json(text, f"{source!r}: the text"))
    else:
        rows = (_parse_json(line.rstrip("\r\n"), f"Row {index}: the line") for index, line in enumerate(lines))
    index = -1
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"Row {index}: the line must be a JSON object, got {json.dumps(row)!r}.")
        yield row
    if index < 0:
        raise ValueError(_describe(source, "has no row"))


def _read_cells(lines: io.StringIO, source: str, **csv_options: Any) -> Iterator[dict[str, str | None]]:
    reader = csv.DictReader(lines, strict=True, **csv_options)
    try:
        names = reader.fieldnames or []
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(_describe(source, f"has several columns of the names {repeated}"))
        for row in reader:
            if None in row:
                raise csv.Error(f"there are {len(names) + len(row[None])} cells for {len(names)} columns")
            yield row
    except csv.Error as error:
        raise ValueError(_describe(source, f"cannot be read at line {reader.reader.line_num}: {error}")) from error


def _parse_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} must be JSON, got {text[:200]!r}: {error}.") from error


def _describe(source: str, reason: str) -> str:
    return (
        f"`path_or_name` must name rows that can be read, got {source!r}: it {reason}. A file may be "
        f"{', '.join(TEXT_SUFFIXES)} (each also compressed, such as .csv.gz) or .parquet."
    )
