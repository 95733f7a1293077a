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

"""
How pictures look: one palette, one style of figures, and fonts that have the letters of a text.

A letter is drawn with the first font that has it: DejaVu Sans, which comes with Matplotlib, then the installed fonts,
then Noto Sans SC of the package `zhplot`. A letter that no font has is drawn as �, with one warning.
"""

import contextlib
import functools
import itertools
import logging
import unicodedata
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import ImageDraw, ImageFont


# Matplotlib is imported where it is used: a run that draws nothing starts faster
if TYPE_CHECKING:
    from matplotlib.figure import Figure


logger = logging.getLogger(__name__)

# Paul Tol's vibrant colors, which color-blind people can tell apart (technical note SRON/EPS/TN/09-002)
PALETTE = ("#0077BB", "#EE7733", "#009988", "#CC3311", "#33BBEE", "#EE3377", "#000000")
BLUE, _, GREEN, RED = PALETTE[:4]

# A page shows a picture about 830 pixels wide, which are 8.65 inches. So a figure of this width keeps its font size.
PAGE_WIDTH = 8.65
STYLE: dict[str, Any] = {
    "axes.prop_cycle": f"cycler(color={PALETTE})",
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "savefig.dpi": 192,
}


class Font(NamedTuple):
    """A font file, and the number of the font in it."""

    family: str
    path: str
    face_index: int = 0


@functools.cache
def _list_fonts() -> list[Font]:
    import matplotlib
    from matplotlib import font_manager

    bundled = Path(matplotlib.get_data_path(), "fonts", "ttf")
    fonts = [Font("DejaVu Sans", str(bundled / "DejaVuSans.ttf"))]
    installed = font_manager.fontManager.ttflist
    for font in sorted(installed, key=lambda font: (font.style != "normal", font.weight != 400)):  # upright ones first
        # Matplotlib's other fonts are of symbols. Fonts of this name have a placeholder for every letter
        if Path(font.fname).parent != bundled and "LastResort" not in font.name.replace(" ", ""):
            fonts.append(Font(font.name, font.fname, font.index))
    # `import zhplot` would change the settings of Matplotlib
    package = find_spec("zhplot")
    if package is not None and package.origin is not None:
        path = Path(package.origin).parent / "fonts" / "NotoSansSC-Regular.ttf"
        font_manager.fontManager.addfont(path)
        fonts.append(Font("Noto Sans SC", str(path)))
    return fonts


@functools.cache
def _read_letters(font: Font) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(font.path, face_index=font.face_index).get_charmap())
    except (OSError, RuntimeError):  # removed since Matplotlib listed it, or damaged
        return frozenset()


@functools.cache
def _find_font(letter: str) -> Font | None:
    return next((font for font in _list_fonts() if ord(letter) in _read_letters(font)), None)


_reported: set[str] = set()


def make_drawable(text: str) -> str:
    """
    Replaces what no font has: letters by �, control characters by nothing. Warns once of each letter.

    Args:
        text (`str`):
            Any text. Its lines stay.

    Returns:
        `str`: The text, composed (NFC).
    """
    text = unicodedata.normalize("NFC", text)
    unknown = {letter for letter in text if letter != "\n" and _find_font(letter) is None}
    invisible = {letter for letter in unknown if unicodedata.category(letter) in ("Cc", "Cf")}
    if new := unknown - invisible - _reported:
        _reported.update(new)
        names = ", ".join(f"{letter!r} (U+{ord(letter):04X})" for letter in sorted(new))
        logger.warning(f"Pictures show � for letters that no installed font has: {names}. Install a font with them.")
    return text.translate({ord(letter): None if letter in invisible else "�" for letter in unknown})


def text_width(text: str, size: int) -> float:
    """Returns the width of a drawable line in pixels, in a font of the size."""
    return sum(_load(font, size).getlength("".join(letters)) for font, letters in itertools.groupby(text, _find_font))


def draw_text(draw: ImageDraw.ImageDraw, position: tuple[float, float], text: str, size: int, fill: str) -> None:
    """
    Draws a drawable line, each letter with the first font that has it.

    Args:
        draw (`ImageDraw.ImageDraw`):
            Where to draw.
        position (`tuple[float, float]`):
            Left end of the baseline, in pixels.
        text (`str`):
            The line, from [`make_drawable`] or [`wrap_text`].
        size (`int`):
            Size of the font, in pixels.
        fill (`str`):
            Color.
    """
    x, y = position
    for font, letters in itertools.groupby(text, _find_font):
        run = "".join(letters)
        draw.text((x, y), run, fill=fill, font=_load(font, size), anchor="ls")
        x += _load(font, size).getlength(run)


@functools.cache
def _load(font: Font, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font.path, size, index=font.face_index)


def wrap_text(text: str, size: int, width: float, max_lines: int) -> list[str]:
    """
    Breaks a text between words. A word that is wider than a line, as in Chinese, is broken anywhere.

    Args:
        text (`str`):
            Any text.
        size (`int`):
            Size of the font, in pixels.
        width (`float`):
            Width of a line, in pixels.
        max_lines (`int`):
            Maximum number of lines. If the text has more, the last one ends in an ellipsis.

    Returns:
        `list[str]`: Drawable lines.
    """
    lines = [""]
    for word in make_drawable(" ".join(text.split())).split():
        joined = f"{lines[-1]} {word}".lstrip()
        if text_width(joined, size) <= width:
            lines[-1] = joined
            continue
        for number, letter in enumerate(word):
            if lines[-1] and (number == 0 or text_width(lines[-1] + letter, size) > width):
                lines.append("")
            lines[-1] += letter
        if len(lines) > max_lines:
            last = lines[max_lines - 1]
            while last and text_width(f"{last}…", size) > width:
                last = last[:-1]
            return [*lines[: max_lines - 1], f"{last.rstrip()}…"]
    return lines


@contextlib.contextmanager
def open_figure(path: str | Path, height: float) -> "Iterator[Figure]":
    """
    Gives a figure that is as wide as a page, and writes it to a file at the end. It has this module's style and fonts,
    whatever Matplotlib's settings are. They are the same again afterwards.

    Args:
        path (`str` or `Path`):
            The file to write.
        height (`float`):
            Height of the figure, in inches.

    Returns:
        `Iterator[Figure]`: The figure, in a context.
    """
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    with matplotlib.style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(PAGE_WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        # The labels of ticks are still empty. They are Matplotlib's own, and those of a logarithmic axis need its math
        for text in figure.findobj():
            if isinstance(text, Text) and text.get_text():
                drawable = make_drawable(text.get_text())
                fonts = [_find_font(letter) for letter in f"a{drawable}" if letter != "\n"]
                families = list(dict.fromkeys(font.family for font in fonts if font is not None))
                text.set(text=drawable, fontfamily=families, parse_math=False)
        figure.savefig(path)
