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

import logging
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageColor

from trl_udm.drawing import GREEN, PAGE_WIDTH, RED, make_drawable, open_figure, text_width, wrap_text
from trl_udm.evaluation import summarize, write_report
from trl_udm.evaluation.report import save_comparison, save_curves
from trl_udm.image_grid import (
    load_picture,
    make_contact_sheet,
    make_image_grid,
    pick_frames,
    save_animation,
    save_picture,
)


NO_LETTER = "\U0001fffe"  # Unicode keeps it unassigned forever


def write_evaluation(folder, prompts, scores, tags=None):
    """Writes an evaluation of one magenta image per prompt, and its report."""
    rows = []
    for i, (prompt, score) in enumerate(zip(prompts, scores, strict=True)):
        path = Path(f"{i:05}", "samples", "00000.png")
        (folder / path).parent.mkdir(parents=True)
        Image.new("RGB", (4, 4), "magenta").save(folder / path)
        rows.append({"filename": str(path), "prompt": prompt, "tag": tags and tags[i], "score": score})
    write_report(folder, {"accuracy": summarize(rows)}, {"accuracy": rows})
    return folder


def draw_grid(folder, text):
    make_image_grid([Image.new("RGB", (4, 4))], [text]).save(folder / "picture.png")


def draw_titles(folder, text):
    image = Image.new("RGB", (4, 4))
    make_image_grid([image], [""], column_titles=[text], row_titles=[text]).save(folder / "picture.png")


def draw_report(folder, text):
    write_evaluation(folder, [text], [1.0])
    (folder / "samples.png").rename(folder / "picture.png")


def draw_comparison(folder, text):
    folders = [write_evaluation(folder / name, [text, "b"], [0.2, 0.5], [text, "b"]) for name in ("before", "after")]
    save_comparison(folder / "picture.png", *folders)


def draw_legend(folder, text):
    save_curves(folder / "picture.png", [{"step": step, "reward": 0.5} for step in range(3)], {text: "reward"})


def draw_title_of_a_figure(folder, text):
    with open_figure(folder / "picture.png", height=2) as figure:
        figure.subplots().set_title(text)


PLACES = [draw_grid, draw_titles, draw_report, draw_comparison, draw_legend, draw_title_of_a_figure]


def picture_of(draw, folder, text):
    folder.mkdir()
    draw(folder, text)
    with Image.open(folder / "picture.png") as picture:
        return picture.convert("RGB").tobytes()


# --- Letters ---


@pytest.mark.parametrize("draw", PLACES)
def test_letters_of_many_scripts_are_told_apart(tmp_path, draw):
    letters = ["é", "я", "ع", "春", "汉", "あ", "$", NO_LETTER]
    pictures = {picture_of(draw, tmp_path / f"U+{ord(letter):X}", letter) for letter in letters}
    assert len(pictures) == len(letters)


@pytest.mark.parametrize("draw", PLACES)
def test_pictures_do_not_depend_on_the_settings_of_matplotlib(tmp_path, draw):
    before = picture_of(draw, tmp_path / "before", "é 春 $x$")
    settings = {"font.family": "monospace", "font.size": 30, "savefig.dpi": 50, "text.usetex": True}
    with matplotlib.rc_context(settings):
        assert picture_of(draw, tmp_path / "after", "é 春 $x$") == before
        assert matplotlib.rcParams["font.family"] == ["monospace"] and matplotlib.rcParams["text.usetex"]
        with pytest.raises(KeyError), open_figure(tmp_path / "none.png", height=1):
            raise KeyError
        assert matplotlib.rcParams["font.size"] == 30 and not (tmp_path / "none.png").exists()


def test_letters_without_a_font_are_named_once(caplog):
    with caplog.at_level(logging.WARNING, logger="trl_udm"):
        assert make_drawable("a\U0002fffe\U0003ffff b\nc\x07\u200b") == "a�� b\nc\u200b"
        assert make_drawable("\U0003ffff") == "�"
    (record,) = caplog.records
    assert "(U+2FFFE)" in record.getMessage() and "(U+3FFFF)" in record.getMessage()


def test_letters_are_composed():
    assert make_drawable("e\u0301") == "é"


# --- Lines ---


@pytest.mark.parametrize(
    "text",
    [
        "a photo of a yellow ring and a purple diamond",
        "a photo of 春天在花园里的红色汽车和蓝色的房子 at night",
        "a very-long-word-without-any-space-in-it and more",
    ],
)
def test_lines_fit_and_keep_every_letter(text):
    lines = wrap_text(text, size=16, width=120, max_lines=10)
    assert len(lines) > 2 and all(text_width(line, 16) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    shortened = wrap_text(text, size=16, width=120, max_lines=2)
    assert shortened[0] == lines[0] and shortened[1][-1] == "…" and lines[1].startswith(shortened[1][:-1])
    assert text_width(shortened[1], 16) <= 120


def test_a_caption_stays_under_its_image():
    images = [Image.new("RGB", (4, 4), "white")] * 2
    pixels = np.asarray(make_image_grid(images, ["word " * 40, ""], num_columns=2))
    is_black = (pixels < 128).all(axis=-1)
    assert is_black[:, :160].any() and not is_black[:, 160:].any()


# --- Grids and verdicts ---


def test_pictures_are_read_as_they_were_written(tmp_path):
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "red", "blue", "red", "red", "red")]
    frames[2].putpixel((0, 0), (1, 2, 3))

    def read():
        return np.asarray(load_picture(tmp_path / "picture.png"))

    for picture in (frames, frames[:2], frames[2]):  # equal frames too
        save_picture(tmp_path / "picture.png", picture)
        assert np.array_equal(read(), np.asarray(picture))
    save_picture(tmp_path / "picture.png", frames[:1])
    assert np.array_equal(read(), np.asarray(frames[0]))


def test_frames_are_picked_at_equal_distances():
    frames = [Image.new("L", (1, 1), value) for value in range(13)]
    for number, expected in ((1, [6]), (2, [0, 12]), (4, [0, 4, 8, 12]), (5, [0, 3, 6, 9, 12]), (20, range(13))):
        assert [frame.getpixel((0, 0)) for frame in pick_frames(frames, number)] == [*expected]


def test_videos_are_shown_in_grids(tmp_path):
    videos = [[Image.new("RGB", (12, 8), (0, 0, shade)) for shade in range(100, 100 + number)] for number in (5, 3, 1)]
    sheet = np.asarray(make_contact_sheet(videos[0]))[::8, ::12]
    assert sheet[..., 2].tolist() == [[100, 101], [103, 104]]
    assert [make_contact_sheet(video).size for video in videos] == [(24, 16), (24, 16), (24, 8)]
    image = Image.new("RGB", (12, 8), "red")
    assert make_contact_sheet(image) is image
    pictures = [*videos, image]
    grid = make_image_grid(pictures, list("abcd"))
    assert grid.size == make_image_grid([image] * 4, list("abcd")).size
    save_animation(tmp_path / "grid.gif", pictures, lambda shown: make_image_grid(shown, list("abcd")))
    with Image.open(tmp_path / "grid.gif") as animation:
        assert (animation.n_frames, animation.size) == (5, grid.size)
    save_animation(tmp_path / "images.gif", [image], lambda shown: shown[0])
    assert not (tmp_path / "images.gif").exists()


def test_images_of_a_grid_keep_their_aspect_ratio():
    wide, tall = Image.new("RGB", (96, 32), "red"), Image.new("RGB", (32, 96), "red")
    assert make_image_grid([wide, wide], ["", ""]).size == (2 * 168, 53 + 8)
    is_red = (np.asarray(make_image_grid([wide, tall], ["a", "b"])) == (255, 0, 0)).all(axis=-1)
    assert is_red[:, :160].any(axis=1).sum() == 53 and is_red[:, :160].any(axis=0).sum() == 160
    assert is_red[:, 168:].any(axis=1).sum() == 160 and is_red[:, 168:].any(axis=0).sum() == 53


def frame_colors(path):
    """The colors of the frames of a picture, row by row: those beside the middle of each image."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    is_image = (pixels == (255, 0, 255)).all(axis=-1)
    tops = [y for y in range(len(pixels)) if is_image[y].any() and (y == 0 or not is_image[y - 1].any())]
    rows = []
    for y in tops:
        lefts = [x for x in range(1, pixels.shape[1]) if is_image[y + 50, x] and not is_image[y + 50, x - 1]]
        rows.append([tuple(pixels[y + 50, x - 3].tolist()) for x in lefts])
    return rows


def test_the_comparison_frames_what_the_reward_calls_right_and_wrong(tmp_path):
    prompts, tags = ["a", "b", "c", "d"], ["two_object", "counting"] * 2
    before = write_evaluation(tmp_path / "before", prompts, [0.0, 1.0, 0.0, 0.0], tags)
    after = write_evaluation(tmp_path / "after", prompts, [1.0, 1.0, 0.0, 1.0], tags)
    save_comparison(tmp_path / "samples.png", before, after)
    right, wrong = ImageColor.getrgb(GREEN), ImageColor.getrgb(RED)
    assert frame_colors(tmp_path / "samples.png") == [[wrong, right], [right, right], [wrong, wrong], [wrong, right]]
    assert frame_colors(before / "samples.png") == [[wrong, right], [wrong, wrong]]

    graded = write_evaluation(tmp_path / "graded", prompts, [1.0, 1.0, 0.5, 1.0], tags)
    save_comparison(tmp_path / "samples.png", before, graded)
    assert {color for row in frame_colors(tmp_path / "samples.png") for color in row} == {(255, 255, 255)}


@pytest.mark.parametrize(("num_prompts", "num_columns", "num_rows"), [(1, 1, 2), (5, 5, 2), (14, 6, 4)])
def test_the_comparison_is_legible_on_a_page(tmp_path, num_prompts, num_columns, num_rows):
    scores = [0.25] * num_prompts
    folders = [
        write_evaluation(tmp_path / name, [f"prompt {i}" for i in range(num_prompts)], scores) for name in ("0", "1")
    ]
    save_comparison(tmp_path / "samples.png", *folders)
    assert [len(row) for row in frame_colors(tmp_path / "samples.png")] == [num_columns] * num_rows
    with Image.open(tmp_path / "samples.png") as picture:
        assert 232 * min(1, 830 / picture.width) >= 96


def test_figures_are_as_wide_as_a_page(tmp_path):
    draw_legend(tmp_path, "reward")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width == int(PAGE_WIDTH * 192) == 2 * 830
