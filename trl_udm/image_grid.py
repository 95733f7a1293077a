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

"""A grid of images with their prompts, rewards and verdicts."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from .drawing import GREEN, RED, draw_text, make_drawable, text_width, wrap_text


def make_image_grid(
    images: list[Image.Image],
    prompts: list[str],
    rewards: list[tuple[float, ...]] | None = None,
    num_columns: int | None = None,
    tile_size: int = 160,
    max_images: int = 64,
    font_size: int = 13,
    verdicts: list[bool] | None = None,
    column_titles: list[str] | None = None,
    row_titles: list[str] | None = None,
) -> Image.Image:
    """
    Arranges images in a grid. The rewards and the prompt of an image stand under it.

    Args:
        images (`list[PIL.Image.Image]`):
            Images.
        prompts (`list[str]`):
            Their prompts. A prompt of more than six lines ends in an ellipsis.
        rewards (`list[tuple[float, ...]]`, *optional*):
            For each image, its rewards: one for each reward function.
        num_columns (`int`, *optional*):
            Number of columns. By default the grid is about square.
        tile_size (`int`, *optional*, defaults to `160`):
            Width of an image in the grid, and its maximum height, in pixels. Images keep their aspect ratio.
        max_images (`int`, *optional*, defaults to `64`):
            Maximum number of images. Further images are left out.
        font_size (`int`, *optional*, defaults to `13`):
            Size of the font, in pixels.
        verdicts (`list[bool]`, *optional*):
            For each image, whether it is right. Right images have a green frame with ✓, wrong ones a red one with ✗.
        column_titles (`list[str]`, *optional*):
            A title for each column.
        row_titles (`list[str]`, *optional*):
            A title for each row, on its left.

    Returns:
        `PIL.Image.Image`: The grid.
    """
    images = images[:max_images]
    num_columns = num_columns or math.ceil(math.sqrt(len(images)))
    image_height = max(min(tile_size, round(tile_size * image.height / image.width)) for image in images)
    gap, line_height = tile_size // 20, round(1.3 * font_size)
    frame, mark_height = (tile_size // 32, line_height) if verdicts is not None else (0, 0)
    cell_width = tile_size + 2 * frame + gap

    def wrap(text: str) -> list[str]:
        return [line for line in wrap_text(text, font_size, tile_size + 2 * frame, max_lines=6) if line]

    captions = []
    for i in range(len(images)):
        numbers = "" if rewards is None else ", ".join(f"{reward:.2f}" for reward in rewards[i]) + " "
        captions.append(wrap(numbers + str(prompts[i])))
    titles = [wrap(title) for title in column_titles or []]
    row_titles = [make_drawable(" ".join(title.split())) for title in row_titles or []]
    margin_left = round(max((text_width(title, font_size) for title in row_titles), default=-gap)) + gap
    margin_top = line_height * max(map(len, titles), default=0)
    starts = range(0, len(images), num_columns)
    num_lines = [max(map(len, captions[start : start + num_columns])) for start in starts]
    tile_height = image_height + 2 * frame + mark_height
    heights = [tile_height + gap + (number * line_height + gap if number > 0 else 0) for number in num_lines]

    grid = Image.new("RGB", (margin_left + num_columns * cell_width, margin_top + sum(heights)), "white")
    draw = ImageDraw.Draw(grid)

    def write(lines: list[str], left: float, top: float) -> None:
        for number, line in enumerate(lines):
            draw_text(draw, (left, top + number * line_height + font_size), line, font_size, "black")

    for column, lines in enumerate(titles):
        write(lines, margin_left + column * cell_width, 0)
    for row, start in enumerate(starts):
        top = margin_top + sum(heights[:row])
        if row_titles:
            write([row_titles[row]], 0, top + (tile_height - line_height) // 2)
        for column, image in enumerate(images[start : start + num_columns]):
            i, left = start + column, margin_left + column * cell_width
            if verdicts is not None:
                color, mark = (GREEN, "✓") if verdicts[i] else (RED, "✗")
                draw.rectangle((left, top, left + tile_size + 2 * frame - 1, top + tile_height - 1), fill=color)
                middle = left + frame + (tile_size - text_width(mark, font_size)) / 2
                draw_text(draw, (middle, top + tile_height - frame), mark, font_size, "white")
            resample = Image.Resampling.NEAREST if image.width < tile_size else Image.Resampling.LANCZOS
            tile = ImageOps.pad(image.convert("RGB"), (tile_size, image_height), method=resample, color="white")
            grid.paste(tile, (left + frame, top + frame))
            write(captions[i], left, top + tile_height + gap // 3)
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
