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

"""The classes and colors of the world, its scenes, and how they are drawn."""

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw


CLASS_NAMES = ("circle", "square", "triangle", "cross", "diamond", "ring")
COLORS = {
    "red": (214, 39, 40),
    "yellow": (240, 196, 25),
    "green": (34, 150, 60),
    "blue": (42, 92, 220),
    "purple": (158, 60, 196),
    "black": (24, 24, 28),
}
BACKGROUND = (240, 240, 240)
IMAGE_SIZE = 32  # pixels
CELL_SIZE = 4  # pixels a token covers
OBJECT_SIZE = 10  # pixels, centered in a box of 3 x 3 cells
_SUPERSAMPLING = 8


@dataclass(frozen=True)
class ShapesObject:
    """
    One object of a scene.

    Args:
        class_name (`str`):
            One of `CLASS_NAMES`.
        color (`str`):
            One of `COLORS`.
        row (`int`):
            First row of the 3 x 3 cells that the object fills, in `[0, 5]`.
        column (`int`):
            First column of those cells, in `[0, 5]`.
    """

    class_name: str
    color: str
    row: int
    column: int


@functools.cache
def class_mask(class_name: str, size: int = OBJECT_SIZE) -> np.ndarray:
    """
    Computes how much of each pixel of its bounding box a class covers. The renderer and the detector share it.

    Args:
        class_name (`str`):
            One of `CLASS_NAMES`.
        size (`int`, *optional*, defaults to `10`):
            Side in pixels.

    Returns:
        `np.ndarray` of shape `(size, size)`: float32 in `[0, 1]`.

    Raises:
        ValueError: If there is no such class.
    """
    side = size * _SUPERSAMPLING
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    end, third = side - 1, side // 3
    if class_name == "circle":
        draw.ellipse((0, 0, end, end), fill=255)
    elif class_name == "square":
        draw.rectangle((0, 0, end, end), fill=255)
    elif class_name == "triangle":
        draw.polygon(((0, end), (end, end), (end // 2, 0)), fill=255)
    elif class_name == "cross":
        draw.rectangle((third, 0, end - third, end), fill=255)
        draw.rectangle((0, third, end, end - third), fill=255)
    elif class_name == "diamond":
        draw.polygon(((0, end // 2), (end // 2, 0), (end, end // 2), (end // 2, end)), fill=255)
    elif class_name == "ring":
        hole = side * 7 // 24
        draw.ellipse((0, 0, end, end), fill=255)
        draw.ellipse((hole, hole, end - hole, end - hole), fill=0)
    else:
        raise ValueError(f"`class_name` must be one of {CLASS_NAMES}, got {class_name!r}.")
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255


def render(objects: list[ShapesObject]) -> Image.Image:
    """
    Draws a scene.

    Args:
        objects (`list[ShapesObject]`):
            What to draw. Later objects cover earlier ones.

    Returns:
        `PIL.Image.Image`: RGB, 32 x 32 pixels.
    """
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    image[:] = BACKGROUND
    margin = (3 * CELL_SIZE - OBJECT_SIZE) // 2
    for shape in objects:
        top, left = shape.row * CELL_SIZE + margin, shape.column * CELL_SIZE + margin
        patch = image[top : top + OBJECT_SIZE, left : left + OBJECT_SIZE]
        coverage = class_mask(shape.class_name)[..., None]
        patch += coverage * (np.asarray(COLORS[shape.color], dtype=np.float32) - patch)
    return Image.fromarray(image.round().astype(np.uint8))
