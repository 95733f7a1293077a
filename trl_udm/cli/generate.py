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

"""Draw images of prompts."""

from dataclasses import dataclass, field
from pathlib import Path

from .arguments import SamplingArguments, load_pipeline
from .parser import check_output_dir


@dataclass(kw_only=True)
class Arguments(SamplingArguments):
    """
    Arguments of `trl-udm generate`.

    Args:
        > Parameters that control the images

        prompts (`list[str]`):
            What to draw.
        output_dir (`Path`, *optional*, defaults to `images`):
            Folder of the images.

        > Parameters that control the model and how images are drawn

        As in [`SamplingArguments`].
    """

    prompts: list[str] = field(init=False, metadata={"nargs": "+", "help": "What to draw."})
    output_dir: Path = field(default=Path("images"), metadata={"help": "Folder of the images."})


def run(arguments: Arguments) -> None:
    """
    Draws images of prompts into a folder, as `00000.png` and so on, prompt by prompt.

    Args:
        arguments ([`Arguments`]):
            What to draw, and with what.

    Raises:
        FileExistsError: If an image would be overwritten.
        OSError: If the folder cannot be written to.
        ValueError: If a number is out of its range.
    """
    import torch

    from ..cut_prompts import expect_prompts

    prompts, batch_size = arguments.prompts, arguments.batch_size
    arguments.check()
    check_output_dir(arguments.output_dir)
    num_images = len(prompts) * arguments.num_images_per_prompt
    paths = [arguments.output_dir / f"{index:05}.png" for index in range(num_images)]
    for path in paths:
        if path.exists():
            raise FileExistsError(f"`--output_dir` has {path.name} already. Give another folder, or move it.")
    pipeline = load_pipeline(arguments, arguments.adapter)
    expect_prompts(prompts, [pipeline])
    generator = torch.Generator().manual_seed(arguments.seed)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    remaining_paths = iter(paths)
    for start in range(0, len(prompts), batch_size):
        images = pipeline(
            prompts[start : start + batch_size],
            num_images_per_prompt=arguments.num_images_per_prompt,
            generator=generator,
            **arguments.pipeline_kwargs,
        ).images
        for image in images:
            path = next(remaining_paths)
            image.save(path)
            print(path)
