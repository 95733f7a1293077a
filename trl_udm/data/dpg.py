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

"""The prompts of DPG-Bench, each with its questions."""

from pathlib import Path
from typing import Any

from .files import load_rows


_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "question_natural_language")


def load_dpg(path_or_name: str | Path, **kwargs: Any) -> list[dict[str, Any]]:
    """
    Loads the prompts of DPG-Bench (https://huggingface.co/papers/2403.05135) from its table, `dpg_bench.csv`.

    The table has a row for each question, with the columns `item_id`, `text` (the prompt), `proposition_id` (the
    number of the question), `dependency` (the numbers of the questions that it depends on, with commas, or 0) and
    `question_natural_language`. Further columns are not read.

    Args:
        path_or_name (`str` or `Path`):
            The table, or a dataset on the Hub, as in [`~trl_udm.data.loading.load_prompts`].
        kwargs (`dict[str, Any]`):
            Further arguments of [`~trl_udm.data.files.load_rows`].

    Returns:
        `list[dict]`: For each prompt `prompt` and `questions`, a list of dictionaries with `id`, `question` and
        `dependency`, a list of ids.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a column is missing, or a row is malformed.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from trl_udm.data.dpg import load_dpg

    >>> _ = Path("dpg.csv").write_text(
    ...     "item_id,text,proposition_id,dependency,question_natural_language\\n"
    ...     "a,A red hat,1,0,Is there a hat?\\n"
    ...     "a,A red hat,2,1,Is the hat red?\\n"
    ... )
    >>> load_dpg("dpg.csv")[0]["questions"][1]
    {'id': 2, 'question': 'Is the hat red?', 'dependency': [1]}
    ```
    """
    table = load_rows(path_or_name, **kwargs)
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing:
        raise ValueError(f"`path_or_name` must have the columns of DPG-Bench, got a table without {missing}.")
    prompts: dict[str, dict[str, Any]] = {}
    for index, row in enumerate(table):
        entry = prompts.setdefault(row["item_id"], {"prompt": row["text"], "questions": []})
        try:
            number = int(row["proposition_id"])
            parents = [int(parent) for parent in str(row["dependency"]).split(",")]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Row {index}: `proposition_id` and `dependency` must be numbers, got {row['proposition_id']!r} and "
                f"{row['dependency']!r}."
            ) from error
        question = row["question_natural_language"]
        if entry["prompt"] != row["text"] or not row["text"] or not question:
            raise ValueError(
                f"Row {index}: `text` must be that of the other rows of {row['item_id']!r}, and `text` and "
                f"`question_natural_language` not be empty, got {row['text']!r} and {question!r}."
            )
        parents = [parent for parent in parents if parent != 0]
        entry["questions"].append({"id": number, "question": question, "dependency": parents})
    for item_id, entry in prompts.items():
        numbers = [question["id"] for question in entry["questions"]]
        unknown = {parent for question in entry["questions"] for parent in question["dependency"]}.difference(numbers)
        if unknown or len(set(numbers)) != len(numbers):
            raise ValueError(
                f"The questions of {item_id!r} must have numbers that differ, and depend on each other only, got "
                f"{numbers} and dependencies on {sorted(unknown)}."
            )
    return list(prompts.values())
