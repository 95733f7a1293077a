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

"""The objects of the world, how they move, and how they are drawn."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..shapes.world import BACKGROUND, COLORS, class_mask


CLASS_NAMES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Rows and columns of a step in each direction."""
SPEEDS = {"slowly": 1, "quickly": 3}
"""Number of pixels that an object moves in a frame, and so the number of cells in a video."""
IMAGE_SIZE = 20  # pixels
NUM_FRAMES = 5
CELL_SIZE = 4  # pixels a token covers
NUM_CELLS = IMAGE_SIZE // CELL_SIZE
OBJECT_SIZE = 8  # pixels, 2 x 2 cells


@dataclass(frozen=True)
class MovingObject:
    """
    One object of a scene.

    Args:
        class_name (`str`):
            One of `CLASS_NAMES`.
        color (`str`):
            One of `COLORS`, those of the world of shapes.
        row (`int`):
            First row of the 2 x 2 cells that it fills in the first frame, in `[0, 3]`.
        column (`int`):
            First column of those cells, in `[0, 3]`.
        direction (`str`):
            One of `DIRECTIONS`.
        speed (`str`):
            One of `SPEEDS`. A fast object passes the whole image, so it begins at a border.
    """

    class_name: str
    color: str
    row: int
    column: int
    direction: str
    speed: str


def render(objects: list[MovingObject]) -> list[Image.Image]:
    """
    Draws a scene.

    Args:
        objects (`list[MovingObject]`):
            What to draw. Later objects cover earlier ones.

    Returns:
        `list[PIL.Image.Image]`: 5 RGB frames of 20 x 20 pixels.
    """
    video = np.empty((NUM_FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    video[:] = BACKGROUND
    for shape in objects:
        coverage = class_mask(shape.class_name, OBJECT_SIZE)[..., None]
        color = np.asarray(COLORS[shape.color], dtype=np.float32)
        row_step, column_step = DIRECTIONS[shape.direction]
        for number, frame in enumerate(video):
            distance = number * SPEEDS[shape.speed]
            top, left = shape.row * CELL_SIZE + distance * row_step, shape.column * CELL_SIZE + distance * column_step
            patch = frame[top : top + OBJECT_SIZE, left : left + OBJECT_SIZE]
            patch += coverage * (color - patch)
    return [Image.fromarray(frame) for frame in video.round().astype(np.uint8)]
