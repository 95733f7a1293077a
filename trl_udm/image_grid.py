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

"""Images and videos as files, and grids of them with their prompts, rewards and verdicts."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import diffusers.utils
import numpy as np
from PIL import Image, ImageDraw, ImageOps, ImageSequence

from .drawing import GREEN, RED, draw_text, make_drawable, text_width, wrap_text


FPS = 12
"""Frames of a video per second in files, as in URSA's training."""

Picture: TypeAlias = Image.Image | list[Image.Image]
"""An image, or the frames of a video."""


def pick_frames(frames: list[Image.Image], num_frames: int) -> list[Image.Image]:
    """
    Frames at equal distances, with the first and the last.

    Args:
        frames (`list[PIL.Image.Image]`):
            The frames of a video.
        num_frames (`int`):
            How many, > 0. The only one is in the middle. A video of fewer frames gives all of them.

    Returns:
        `list[PIL.Image.Image]`: The frames, in their order.
    """
    if num_frames >= len(frames):
        return frames
    last = len(frames) - 1
    if num_frames == 1:
        return [frames[last // 2]]
    return [frames[round(i * last / (num_frames - 1))] for i in range(num_frames)]


def make_contact_sheet(picture: Picture) -> Image.Image:
    """Shows four frames of a video, line by line. An image, and that of a video of one frame, stays as it is."""
    if isinstance(picture, Image.Image):
        return picture
    frames = pick_frames(picture, 4)
    frames += [Image.new("RGB", frames[0].size, "white")] * (-len(frames) % 2)
    return diffusers.utils.make_image_grid(frames, rows=math.ceil(len(frames) / 2), cols=2)


def save_picture(path: str | Path, picture: Picture) -> None:
    """
    Writes an image, or a video, as PNG: a video as an animation that loses nothing, with each frame.

    Args:
        path (`str` or `Path`):
            The file.
        picture (`PIL.Image.Image` or `list[PIL.Image.Image]`):
            What [`load_picture`] gives back.
    """
    if isinstance(picture, Image.Image):
        picture.save(path, format="PNG")
        return
    # Pillow would drop a frame that equals the one before it, if they were drawn in the same way. An opaque frame
    # looks the same in both ways.
    ways = [i % 2 for i in range(len(picture))]
    picture[0].save(
        path, format="PNG", save_all=True, append_images=picture[1:], duration=1000 / FPS, loop=0, blend=ways
    )


def load_picture(path: str | Path) -> Picture:
    """
    Reads an image, or the frames of an animated one.

    Args:
        path (`str` or `Path`):
            The file.

    Returns:
        `PIL.Image.Image` or `list[PIL.Image.Image]`: In RGB.
    """
    with Image.open(path) as file:
        if not getattr(file, "is_animated", False):
            return file.convert("RGB")
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(file)]


def save_animation(
    path: str | Path, pictures: list[Picture], make_grid: Callable[[list[Picture]], Image.Image]
) -> None:
    """
    Writes a grid in which videos play as GIF. Without a video it writes nothing.

    Args:
        path (`str` or `Path`):
            The file.
        pictures (`list`):
            Images and videos. Images, and videos that are at their end, stand still.
        make_grid (`Callable`):
            Makes a grid of as many images, such as [`make_image_grid`].
    """
    if all(isinstance(picture, Image.Image) for picture in pictures):
        return
    videos = [[picture] if isinstance(picture, Image.Image) else picture for picture in pictures]
    grids = [make_grid([frames[min(i, len(frames) - 1)] for frames in videos]) for i in range(max(map(len, videos)))]
    diffusers.utils.export_to_gif(grids, str(path), fps=FPS)


def make_image_grid(
    images: Sequence[Picture],
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
        images (`list`):
            Images, or lists of the frames of videos, of which four are shown.
        prompts (`list[str]`):
            Their prompts. A prompt of more than six lines ends in an ellipsis.
        rewards (`list[tuple[float, ...]]`, *optional*):
            For each image, its rewards: one for each reward function. NaN is none.
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
    sheets = list(map(make_contact_sheet, images[:max_images]))
    num_columns = num_columns or math.ceil(math.sqrt(len(sheets)))
    image_height = max(min(tile_size, round(tile_size * image.height / image.width)) for image in sheets)
    gap, line_height = tile_size // 20, round(1.3 * font_size)
    frame, mark_height = (tile_size // 32, line_height) if verdicts is not None else (0, 0)
    cell_width = tile_size + 2 * frame + gap

    def wrap(text: str) -> list[str]:
        return [line for line in wrap_text(text, font_size, tile_size + 2 * frame, max_lines=6) if line]

    captions = []
    for i in range(len(sheets)):
        numbers = "" if rewards is None else ", ".join(map(_format_reward, rewards[i])) + " "
        captions.append(wrap(numbers + str(prompts[i])))
    titles = [wrap(title) for title in column_titles or []]
    row_titles = [make_drawable(" ".join(title.split())) for title in row_titles or []]
    margin_left = round(max((text_width(title, font_size) for title in row_titles), default=-gap)) + gap
    margin_top = line_height * max(map(len, titles), default=0)
    starts = range(0, len(sheets), num_columns)
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
        for column, image in enumerate(sheets[start : start + num_columns]):
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


def _format_reward(reward: float) -> str:
    return "–" if math.isnan(reward) else f"{reward:.2f}"


def image_statistics(images: Sequence[Picture]) -> dict[str, list[float]]:
    """
    Measures what a hacked reward tends to do to images: darken them, or flood them with color.

    Args:
        images (`list`):
            Images, or lists of the frames of videos.

    Returns:
        `dict[str, list[float]]`: For each image, or as the mean over the frames of each video, a value in `[0, 1]`:
        `dark_fraction`, the share of pixels with less than a tenth of full luma, and `saturation`, the mean saturation
        in HSV.
    """

    def measure(measure_image: Callable[[Image.Image], Any]) -> list[float]:
        videos = [[image] if isinstance(image, Image.Image) else image for image in images]
        return [statistics.fmean(float(measure_image(frame)) for frame in frames) for frames in videos]

    return {
        "dark_fraction": measure(lambda image: (np.asarray(image.convert("L")) < 25.5).mean()),
        "saturation": measure(lambda image: np.asarray(image.convert("HSV"))[..., 1].mean() / 255),
    }
