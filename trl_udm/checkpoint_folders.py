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

"""The checkpoint folders of a run: which there are, which are whole, and which one is asked for."""

import json
import os
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def is_whole(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint has a complete `trainer_state.json`, which is written last."""
    try:
        json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True


def is_last(resume_from_checkpoint: str | bool | None) -> bool:
    """Whether the last checkpoint is asked for, with `True` or, from the command line, with a string."""
    return str(resume_from_checkpoint).lower() == "true"


def find_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str | os.PathLike) -> str | None:
    """The whole checkpoint that is asked for, or `None` if none is. Raises a `ValueError` if there is no such one."""
    if is_last(resume_from_checkpoint):
        checkpoints = find_checkpoints(output_dir)
        whole = [checkpoint for checkpoint in checkpoints if is_whole(checkpoint)]
        if not whole:
            raise ValueError(
                f"`resume_from_checkpoint` is True, but `output_dir` {output_dir!r} has no whole checkpoint "
                f"({len(checkpoints)} torn ones). Start anew without it, or name a checkpoint."
            )
        return whole[-1]
    if not resume_from_checkpoint:
        return None
    if not is_whole(str(resume_from_checkpoint)):
        raise ValueError(
            f"`resume_from_checkpoint` must be a whole checkpoint, got {resume_from_checkpoint!r}, which is missing "
            "or was not finished. `True` takes the last whole one in `output_dir`."
        )
    return str(resume_from_checkpoint)


def find_checkpoints(output_dir: str | os.PathLike) -> list[str]:
    """The checkpoint folders of a run, whole or not, in the order of their steps."""
    names = [path.name.rpartition("-") for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    steps = sorted(int(step) for prefix, _, step in names if prefix == PREFIX_CHECKPOINT_DIR and step.isdecimal())
    return [str(Path(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")) for step in steps]
