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

"""Draw images or videos of prompts."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .arguments import SamplingArguments, load_pipeline
from .parser import check_output_dir, check_range


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

        > Parameters that control videos

        image (`Path`, *optional*):
            First frame of the videos, of their size.
        video_format (`str`, *optional*, defaults to `"gif"`):
            `"gif"`, or `"mp4"`, which needs imageio and ffmpeg.
        fps (`int`, *optional*, defaults to `12`):
            Frames per second in the files.

        > Parameters that control the model and how images are drawn

        As in [`SamplingArguments`].
    """

    prompts: list[str] = field(init=False, metadata={"nargs": "+", "help": "What to draw."})
    output_dir: Path = field(default=Path("images"), metadata={"help": "Folder of the images."})
    image: Path | None = field(default=None, metadata={"help": "First frame of the videos, of their size."})
    video_format: Literal["gif", "mp4"] = field(
        default="gif", metadata={"help": "Format of videos. mp4 needs `pip install imageio[ffmpeg]`."}
    )
    fps: int = field(default=12, metadata={"help": "Frames of a video per second in the files."})


def run(arguments: Arguments) -> None:
    """
    Draws images of prompts into a folder, as `00000.png` and so on, prompt by prompt. Videos are `00000.gif` or
    `00000.mp4`.

    Args:
        arguments ([`Arguments`]):
            What to draw, and with what.

    Raises:
        FileExistsError: If an image would be overwritten.
        ImportError: If videos are to be mp4, and there is no imageio with ffmpeg.
        OSError: If the folder cannot be written to.
        ValueError: If a number is out of its range.
    """
    import torch
    from diffusers.utils import export_to_gif, export_to_video

    from ..cut_prompts import expect_prompts
    from ..image_grid import load_picture

    prompts, batch_size = arguments.prompts, arguments.batch_size
    arguments.check()
    check_range(arguments, fps=(1, 100))
    check_output_dir(arguments.output_dir)
    is_video = (arguments.num_frames or 1) > 1
    suffix = arguments.video_format if is_video else "png"
    if suffix == "mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ImportError("`--video_format mp4` needs imageio with ffmpeg: `pip install imageio[ffmpeg]`.")
    condition: dict[str, Any] = {}
    if arguments.image is not None:
        if not is_video:
            raise ValueError("`--image` needs `--num_frames`: it is the first frame of videos.")
        condition["image"] = load_picture(arguments.image)
    num_images = len(prompts) * arguments.num_images_per_prompt
    paths = [arguments.output_dir / f"{index:05}.{suffix}" for index in range(num_images)]
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
            **condition,
        ).images
        for image in images:
            path = next(remaining_paths)
            if not is_video:
                image.save(path)
            elif suffix == "gif":
                export_to_gif(image, str(path), fps=arguments.fps)
            else:
                export_to_video(image, str(path), fps=arguments.fps)
            print(path)
