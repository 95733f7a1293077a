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

"""A grid of images with their prompts and rewards."""

import math
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageOps


def make_image_grid(
    images: list[Image.Image],
    prompts: list[str],
    rewards: list[tuple[float, ...]] | None = None,
    num_columns: int | None = None,
    tile_size: int = 160,
    max_images: int = 64,
) -> Image.Image:
    """
    Arranges images in a grid. The rewards and the prompt of an image stand under it.

    Args:
        images (`list[PIL.Image.Image]`):
            Images.
        prompts (`list[str]`):
            Their prompts.
        rewards (`list[tuple[float, ...]]`, *optional*):
            For each image, its rewards: one for each reward function.
        num_columns (`int`, *optional*):
            Number of columns. By default the grid is about square.
        tile_size (`int`, *optional*, defaults to `160`):
            Width of an image in the grid, and its maximum height, in pixels. Images keep their aspect ratio.
        max_images (`int`, *optional*, defaults to `64`):
            Maximum number of images. Further images are left out.

    Returns:
        `PIL.Image.Image`: The grid.
    """
    images = images[:max_images]
    num_columns = num_columns or math.ceil(math.sqrt(len(images)))
    num_rows = math.ceil(len(images) / num_columns)
    line_height, num_characters = 12, tile_size // 6
    num_lines = 4
    image_height = max(min(tile_size, round(tile_size * image.height / image.width)) for image in images)
    tile_height = image_height + line_height * num_lines
    grid = Image.new("RGB", (num_columns * (tile_size + 4), num_rows * (tile_height + 4)), "white")
    draw = ImageDraw.Draw(grid)
    for i, image in enumerate(images):
        left, top = i % num_columns * (tile_size + 4), i // num_columns * (tile_height + 4)
        resample = Image.Resampling.NEAREST if image.width < tile_size else Image.Resampling.LANCZOS
        tile = ImageOps.pad(image.convert("RGB"), (tile_size, image_height), method=resample, color="white")
        grid.paste(tile, (left, top))
        text = "" if rewards is None else ", ".join(f"{reward:.2f}" for reward in rewards[i]) + " "
        text += str(prompts[i])
        for number, line in enumerate(textwrap.wrap(text, num_characters)[:num_lines]):
            draw.text((left + 2, top + image_height + number * line_height), line, fill="black")
    return grid


def image_statistics(images: list[Image.Image]) -> dict[str, list[float]]:
    """
    Measures what a hacked reward tends to do to images: darken them, or flood them with color.

    Args:
        images (`list[PIL.Image.Image]`):
            Images.

    Returns:
        `dict[str, list[float]]`: For each image a value in `[0, 1]`: `dark_fraction`, the share of pixels with less
        than a tenth of full luma, and `saturation`, the mean saturation in HSV.
    """
    return {
        "dark_fraction": [float((np.asarray(image.convert("L")) < 25.5).mean()) for image in images],
        "saturation": [float(np.asarray(image.convert("HSV"))[..., 1].mean() / 255) for image in images],
    }
