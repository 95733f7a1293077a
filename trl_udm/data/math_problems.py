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

"""Problems of GSM8K and MATH, for TRL's `accuracy_reward`."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from .files import load_rows


INSTRUCTION = "Put the final answer within \\boxed{}."
"""What follows each problem."""


def load_math_problems(path_or_name: str | Path, split: str = "train", **kwargs: Any) -> Dataset:
    r"""
    Loads problems whose answers [`~trl.rewards.accuracy_reward`] checks.

    Args:
        path_or_name, split, kwargs:
            As in [`~trl_udm.data.loading.load_prompts`]. The rows have the columns of GSM8K, `question` and `answer`,
            whose number follows `####`, or those of MATH, `problem` and `solution`, which has `\boxed{...}`.

    Returns:
        [`~datasets.Dataset`]: Rows with `prompt`, the messages to a language model, and `solution`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the source cannot be read, or a row has no answer.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from trl_udm.data.math_problems import load_math_problems

    >>> _ = Path("gsm8k.jsonl").write_text('{"question": "What is 7 times 9?", "answer": "7 * 9 = 63 #### 63"}')
    >>> load_math_problems("gsm8k.jsonl")[0]["solution"]
    '\\boxed{63}'
    ```
    """
    rows = load_rows(path_or_name, split, **kwargs)
    problem_column = "question" if "question" in rows.column_names else "problem"

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        problem, solution = row.get(problem_column), row.get("solution")
        if problem_column == "question":
            _, mark, number = (row.get("answer") or "").rpartition("####")
            number = number.strip().replace(",", "")
            solution = f"\\boxed{{{number}}}" if mark and number else None
        if not problem or not solution or "\\boxed" not in solution:
            raise ValueError(
                f"Row {index} must have a `question` and an `answer` with '#### number', or a `problem` and a "
                f"`solution` with '\\boxed{{...}}', got {row!r}."
            )
        return {"prompt": [{"role": "user", "content": f"{problem}\n{INSTRUCTION}"}], "solution": solution}

    return Dataset.from_list([convert(row, index) for index, row in enumerate(rows)])
