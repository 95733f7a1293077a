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

"""How a word of the world is written."""

import functools
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont


IMAGE_SIZE = (32, 96)  # height and width in pixels
CELL_SIZE = 8  # pixels a token covers
LETTER_WIDTH = 16  # pixels, two cells
MAX_LENGTH = IMAGE_SIZE[1] // LETTER_WIDTH
INKS = {"black": (24, 24, 28), "blue": (30, 60, 170), "red": (180, 30, 40), "green": (20, 110, 50)}
PAPER = (244, 244, 240)
_BASELINE = 24  # pixels from the top, a border of cells


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    # Its capitals are 16 pixels high at this size
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono-Bold.ttf")), 22)


def render(word: str, ink: str) -> Image.Image:
    """
    Writes a word in capitals, centered. Each letter is in the middle of two columns of cells.

    Args:
        word (`str`):
            1 to 6 letters of `A` to `Z`.
        ink (`str`):
            One of `INKS`.

    Returns:
        `PIL.Image.Image`: RGB, 96 x 32 pixels.

    Raises:
        ValueError: If the word is too long or has another character.
    """
    if not 1 <= len(word) <= MAX_LENGTH or not all("A" <= letter <= "Z" for letter in word):
        raise ValueError(f"`word` must have 1 to {MAX_LENGTH} letters of A to Z, got {word!r}.")
    height, width = IMAGE_SIZE
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    left = (width - len(word) * LETTER_WIDTH) // 2
    for i, letter in enumerate(word):
        x = left + i * LETTER_WIDTH + LETTER_WIDTH // 2
        draw.text((x, _BASELINE), letter, font=_font(), fill=INKS[ink], anchor="ms")
    return image
