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

"""Add an adapter to the weights of its base model, and write the pipeline that results."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .arguments import ModelArguments, load_pipeline
from .parser import check_output_dir


@dataclass(kw_only=True)
class Arguments(ModelArguments):
    """
    Arguments of `trl-udm merge`.

    Args:
        model (`str`):
            The base model, as in [`ModelArguments`].
        adapter (`str`):
            Folder or Hub repository of a PEFT adapter.
        output_dir (`Path`):
            Folder of the pipeline, new or empty.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype in which the weights are added and saved.
    """

    adapter: str = field(metadata={"help": "Folder or Hub repository of a PEFT adapter."})
    output_dir: Path = field(metadata={"help": "Folder of the pipeline, new or empty."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Dtype in which the weights are added and saved."}
    )


def run(arguments: Arguments) -> None:
    """
    Adds an adapter to the weights of its base model, and writes the pipeline that results.

    Args:
        arguments ([`Arguments`]):
            The model, the adapter and the folder.

    Raises:
        FileExistsError: If there is something in the folder.
        ValueError: If the adapter does not fit the model, or PEFT cannot merge its type.
    """
    output_dir = arguments.output_dir
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"`--output_dir` must be new or empty, and {output_dir} is not. Give another folder.")
    check_output_dir(output_dir)
    pipeline = load_pipeline(arguments, arguments.adapter)
    try:
        pipeline.peft_model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(
            f"PEFT cannot merge the adapter in {arguments.adapter}: {reason}. Use it as it is."
        ) from error
    pipeline.forget_local_paths()
    pipeline.save_pretrained(output_dir)
    print(output_dir)
