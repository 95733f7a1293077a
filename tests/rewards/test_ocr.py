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

import json
import logging
import os
import random
import re
import runpy
import socket
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from rapidocr import RapidOCR
from rapidocr.utils.output import RapidOCROutput
from rapidocr.utils.process_img import ResizeImgError
from torch import nn
from trl.trainer.utils import get_callable_name

from trl_udm.rewards.ocr import OCRReward, extract_target, join_recognized, ocr_score


RENDERS = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "ocr_reward.py"))

# Numbers of an independent run of the public reference code, Yovecent/UDM-GRPO at commit d1bec49.
ORACLE = Path(__file__).parents[1] / "oracle" / "ocr_cases.json"
PAIRS = json.loads(ORACLE.read_text(encoding="utf-8"))["pairs"]


# Left out: the case in which the engine raises, which the reference turns into a reward of zero.
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair["recognised [text, confidence]"] != "RAISE"])
def test_score_matches_the_reference(pair):
    target = extract_target(pair["prompt"])
    recognized = join_recognized(pair["recognised [text, confidence]"] or [])
    assert target == pair["target"]
    assert ocr_score(recognized, target) == pair["reward"]


@pytest.mark.parametrize(
    ("recognized", "target", "score"),
    [
        ("", "abcd", 0.0),
        ("abd", "abcd", 0.75),  # deleted
        ("abxcd", "abcd", 0.75),  # inserted
        ("abxd", "abcd", 0.75),  # replaced
        ("bacd", "abcd", 0.5),  # swapped letters are two edits
    ],
)
def test_score_counts_edits(recognized, target, score):
    assert ocr_score(recognized, target) == score


@pytest.mark.parametrize(
    ("recognized", "target"),
    [
        ("A B C D", "ab cd"),
        ("New\u00a0York\n24\u3000\t7", "new york 24 7"),
        ("ＨＥＬＬＯ", "hello"),
        ("ﬁne ½", "FINE 1⁄2"),
        ("Cafe\u0301", "Café"),
        ("it’s", "It's"),
        ("it´s `so`", "it's 'so'"),
        ("“Hello„ 5″", '"hello" 5"'),
        ("hello", "hel\u200blo\ufeff"),  # of zero width
        ("hello", "\u202ehe\u00adllo\x00\x07"),  # control characters, a soft hyphen
        ("café", "cafe\u200b\u0301"),  # an accent behind a character of zero width
        ("hxllo", "hx\u0302llo"),  # an accent that no letter has
        ("hello", "h\u0336e\u0336l\u0336lo"),
        ("ok❤", "ok❤\ufe0f"),  # the form of a symbol
        ("hi", "\u3164hi\u2800"),  # blank letters
        ("i", "İ"),
    ],
)
def test_case_white_space_and_forms_of_a_character_make_no_difference(recognized, target):
    assert ocr_score(recognized, target) == ocr_score(target, recognized) == 1


@pytest.mark.parametrize(
    ("recognized", "target", "paper", "partial"),
    [
        ("OPEN HELL0 OPEN", "Hello", 0.0, 0.8),
        ("HEXLLO", "Hello", 0.8, 0.8),  # a part of the target's length would need two edits
        ("H", "Help", 0.25, 0.25),
        ("", "Hello", 0.0, 0.0),
        ("XYZ", "Hello", 0.0, 0.0),
    ],
)
def test_partial_score_ignores_the_text_around(recognized, target, paper, partial):
    assert ocr_score(recognized, target) == paper
    assert ocr_score(recognized, target, partial=True) == partial


def test_partial_score_is_that_of_the_closest_part():
    rng = random.Random(0)
    for _ in range(200):
        recognized, target = ("".join(rng.choices("abc", k=rng.randint(1, 12))) for _ in range(2))
        # row[j] is the least distance of the part of the target read so far to a text that ends at j.
        row = [0] * (len(recognized) + 1)
        for i, target_character in enumerate(target, start=1):
            previous, row = row, [i]
            for j, character in enumerate(recognized):
                row.append(min(previous[j] + (character != target_character), previous[j + 1] + 1, row[j] + 1))
        score = ocr_score(recognized, target, partial=True)
        assert score == 1 - min(row) / len(target)
        assert score >= ocr_score(recognized, target)


def test_lines_without_confidence_are_ignored():
    assert join_recognized([("New", 0.9), ("Old", 0.0), ("York", 0.1)]) == "NewYork"


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('A sign that says "HELLO".', "HELLO"),
        ("A sign that says “HELLO”.", "HELLO"),
        ('A sign that says "New York" above "Paris".', "New York"),
        ('A sign that says “New York” above "Paris".', "New York"),
        ('A sign that says "it\'s “here”".', "it's “here”"),
        ('He bought a 5" pipe and a "SALE" sign.', "SALE"),
        ('A 5 " pipe and a "SALE" sign.', "SALE"),
        ('A 6\'2" man at a "5" beside a 3" nail.', "5"),
        ('A "SALE sign above an "OPEN" sign.', "OPEN"),
        ('A "" above an "OPEN" sign.', "OPEN"),
        ('A sign that says " OPEN ".', " OPEN "),
        ('A sign that says"OPEN".', "OPEN"),
        ("A sign: „HALLO“", "HALLO"),
        ("A sign: „CZEŚĆ”", "CZEŚĆ"),
        ("A sign: ”HEJ”", "HEJ"),
        ("A sign: «\u00a0Bonjour\u00a0»", "\u00a0Bonjour\u00a0"),
        ("A sign: »HALLO«", "HALLO"),
        ("A sign: ‹a› and ›b‹", "a"),
        ("A sign: “He said “Hi” twice”", "He said “Hi” twice"),
        ('A sign: “She said "Hi"”', 'She said "Hi"'),
        ("看板「営業中」と『本日』", "営業中"),
        ('写着"你好"的牌子', "你好"),
        ("写着'你好'的牌子", "你好"),
        ("A sign that says 'HELLO'.", "HELLO"),
        ("The dogs' bowl says 'Don't touch Rex'.", "Don't touch Rex"),
        ("The ‘Don’t walk’ sign, 6' x 4'.", "Don’t walk"),
        ("A sign: ‚HALLO‘", "HALLO"),
        ("Don't say \"Hi\" to 'Rex'", "Hi"),
    ],
)
def test_target_is_the_first_quoted_text(prompt, target):
    assert extract_target(prompt) == target


@pytest.mark.parametrize(
    "prompt",
    ["A sign.", 'A 5" sign.', 'A 5" by 7" print.', "A sign that says “HELLO.", "Don't walk, y'all. The dogs' sign."],
)
def test_prompt_without_quoted_text_is_refused(prompt):
    message = f"`prompt` must have its target text in double quotes, got {prompt!r}."
    with pytest.raises(ValueError, match=re.escape(message)):
        extract_target(prompt)


@pytest.mark.parametrize("prompt", ['A sign: "".', 'A sign: "  ".', "A sign: “”.", 'A sign: "\u200b"'])
def test_empty_quoted_text_is_refused(prompt):
    message = f"`prompt` must quote a target text that is not empty, got {prompt!r}."
    with pytest.raises(ValueError, match=re.escape(message)):
        extract_target(prompt)


def test_empty_target_is_refused():
    message = "`target_text` must have a character other than white space, got ' \\n'."
    with pytest.raises(ValueError, match=re.escape(message)):
        ocr_score("HELLO", " \n")


@pytest.fixture(scope="module")
def reward():
    return OCRReward()


@pytest.fixture(scope="module")
def line_reward():
    return OCRReward(detect_text=False)


@pytest.fixture
def seen(monkeypatch):
    """The arrays that the engines get instead of reading them."""
    arrays = []

    def record(self, pixels):
        arrays.append(pixels)
        return RapidOCROutput()

    monkeypatch.setattr(RapidOCR, "__call__", record)
    return arrays


def draw_word(word, mode="RGB", background="white"):
    image = Image.new(mode, (96, 32), background)
    ImageDraw.Draw(image).text((48, 16), word, anchor="mm", fill="black", font_size=24)
    return image


@pytest.mark.parametrize(
    ("condition", "lowest", "highest"),
    [
        ("clean", 0.99, 1),
        ("small", 0.96, 1),
        ("busy", 0.97, 1),
        ("degraded", 0.94, 1),
        ("no text", 0, 0.01),
        ("wrong text", 0, 0.1),
    ],
)
def test_rendered_text_is_read(reward, condition, lowest, highest):
    num_images = len(RENDERS["FONTS"])
    images, targets = RENDERS["make_samples"](condition, num_images)
    rewards = reward(prompts=[""] * num_images, completions=images, target_text=targets)
    assert lowest <= sum(rewards) / num_images <= highest


def test_small_images_of_one_word_are_read_without_detection(line_reward):
    images, targets = RENDERS["make_small_samples"](height=32, width=96, size=22, num_images=24)
    rewards = line_reward(prompts=[""] * 24, completions=images, target_text=targets)
    assert sum(rewards) / 24 > 0.98


def test_small_images_are_read_with_detection(reward):
    images, targets = RENDERS["make_small_samples"](height=64, width=64, size=20, num_images=12)
    assert sum(reward(prompts=[""] * 12, completions=images, target_text=targets)) / 12 > 0.95


def test_empty_line_reads_as_nothing(line_reward):
    noise = np.random.default_rng(0).integers(256, size=(32, 96, 3), dtype=np.uint8)
    images = [Image.new("RGB", (96, 32), "navy"), Image.fromarray(noise)]
    assert line_reward(prompts=['"CAFE"'] * 2, completions=images) == [0.0, 0.0]


def test_every_form_of_an_image_is_read(line_reward):
    image = draw_word("CAFE")
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    images = [
        image,
        *(image.convert(mode) for mode in ("L", "1", "P", "CMYK")),
        draw_word("CAFE", "RGBA", (0, 0, 0, 0)),
    ]
    assert line_reward(prompts=['"CAFE"'] * 6, completions=images) == [1.0] * 6
    assert line_reward(prompts=['"CAFE"'], completions=tensor[None]) == [1.0]


def test_engine_gets_blue_first_and_transparent_parts_white(seen):
    orange = (255, 128, 0)
    image = Image.new("RGBA", (2, 1), orange)
    image.putpixel((1, 0), (0, 0, 0, 0))
    tensor = torch.tensor(orange, dtype=torch.uint8).reshape(1, 3, 1, 1)
    reward = OCRReward()
    assert reward(prompts=['"A"'] * 2, completions=[image, Image.new("L", (1, 1), 7)]) == [0.0, 0.0]
    assert reward(prompts=['"A"'], completions=tensor) == [0.0]
    assert [pixels.tolist() for pixels in seen] == [
        [[[0, 128, 255], [255, 255, 255]]],
        [[[7, 7, 7]]],
        [[[0, 128, 255]]],
    ]
    assert all(pixels.dtype == np.uint8 for pixels in seen)


def test_uncertain_lines_are_dropped():
    prompts, images = ['"CAFE"'], [draw_word("CAFE")]
    assert OCRReward(detect_text=False, min_confidence=1)(prompts, images) == [0.0]
    assert OCRReward(detect_text=False, min_confidence=0)(prompts, images) == [1.0]


def test_reward_can_be_partial():
    images = [draw_word("A CAFE")]
    assert OCRReward(detect_text=False)(['"CAKE"'], images) == [0.5]
    assert OCRReward(detect_text=False, partial=True)(['"CAKE"'], images) == [0.75]


def test_reward_takes_what_the_trainer_passes_and_logs_what_was_read(line_reward):
    logged, extra = [], {}
    rewards = line_reward(
        prompts=["a word", "a cat", "a word"],
        completions=[draw_word("CAFE"), draw_word("CAT"), draw_word("CAFE")],
        completion_ids=[[0], [1], [2]],
        target_text=["café", None, "Cafe"],
        trainer_state=None,
        log_extra=lambda name, values: extra.update({name: values}),
        log_metric=lambda name, value: logged.append((name, value)),
    )
    assert rewards == [0.75, None, 1.0]
    assert logged == [("ocr/exact", 0.0), ("ocr/exact", 1.0)]
    assert extra == {"recognised_text": ["CAFE", None, "CAFE"]}


def test_reward_has_a_name_for_the_logs():
    whole, partial = OCRReward(), OCRReward(partial=True)
    assert get_callable_name(whole) == "ocr_reward"
    assert get_callable_name(partial) == "ocr_partial_reward"
    assert not isinstance(whole, nn.Module)


def test_engines_read_at_a_time_and_keep_the_order(monkeypatch):
    both, reading, used = threading.Barrier(2, timeout=60), set(), set()

    def read(engine, pixels):
        assert engine not in reading
        reading.add(engine)
        used.add(engine)
        both.wait()
        text = "ABCD"[pixels[0, 0, 0]]
        both.wait()
        reading.remove(engine)
        return RapidOCROutput(txts=(text,), scores=(0.9,))

    monkeypatch.setattr(RapidOCR, "__call__", read)
    images = [Image.new("L", (1, 1), value) for value in (0, 1, 2, 3)]
    rewards = OCRReward(num_engines=2)(['"A"', '"B"', '"C"', '"C"'], images)
    assert rewards == [1.0, 1.0, 1.0, 0.0]
    assert len(used) == 2


@pytest.mark.parametrize("num_threads", [1, os.cpu_count()])
def test_engine_has_the_threads_asked_for(monkeypatch, num_threads):
    call, engines = RapidOCR.__call__, []

    def read(engine, pixels):
        engines.append(engine)
        return call(engine, pixels)

    monkeypatch.setattr(RapidOCR, "__call__", read)
    assert OCRReward(detect_text=False, num_threads=num_threads)(['"CAFE"'], [draw_word("CAFE")]) == [1.0]
    (engine,) = engines
    assert engine.text_rec.session.session.get_session_options().intra_op_num_threads == num_threads


def test_nothing_is_downloaded_and_nothing_logged(monkeypatch, caplog):
    def refuse(*args):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    logger = logging.getLogger("RapidOCR")
    logger.addHandler(caplog.handler)
    reward = OCRReward()
    assert reward(['"CAFE"'] * 2, [draw_word("CAFE"), Image.new("RGB", (64, 64))]) == [1.0, 0.0]
    logger.removeHandler(caplog.handler)
    assert caplog.records == []


def test_failed_engine_is_an_error_and_the_next_call_goes_on(monkeypatch, line_reward):
    def fail(self, pixels):
        raise ResizeImgError("no pixels")

    with monkeypatch.context() as patch:
        patch.setattr(RapidOCR, "__call__", fail)
        with pytest.raises(ResizeImgError, match="no pixels"):
            line_reward(['"CAFE"'], [draw_word("CAFE")])
    assert line_reward(['"CAFE"'], [draw_word("CAFE")]) == [1.0]


# The engine itself raises an error without a message for strips of more than 2000 pixels, and draws no box around the
# text of others
@pytest.mark.parametrize("size", [(2080, 32), (3000, 24), (4096, 32), (8192, 64)])
def test_strips_are_read(reward, line_reward, size):
    image = Image.new("RGB", size, "white")
    center, font_size = (size[0] / 2, size[1] / 2), 0.75 * size[1]
    ImageDraw.Draw(image).text(center, "HELLO", anchor="mm", fill="black", font_size=font_size)
    assert reward(['"HELLO"'], [image]) == line_reward(['"HELLO"'], [image]) == [1.0]


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000), (32, 4096)])
def test_images_without_room_for_a_text_read_as_nothing(reward, line_reward, size):
    images = [Image.new("RGB", size, "gray")]
    assert reward(['"HELLO"'], images) == line_reward(['"HELLO"'], images) == [0.0]


@pytest.mark.parametrize("target", ["", " \n", 24])
def test_bad_target_is_refused_before_reading(seen, target):
    message = (
        f"`target_text` of 'a sign' must be `None` or a text with a character other than white space, got {target!r}."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        OCRReward()(["a word", "a sign"], [draw_word("CAFE")] * 2, target_text=["CAFE", target])
    assert seen == []


def test_prompt_without_target_is_refused_before_reading(seen):
    message = "`prompt` must have its target text in double quotes, got 'a sign'."
    with pytest.raises(ValueError, match=re.escape(message)):
        OCRReward()(['"CAFE"', "a sign"], [draw_word("CAFE")] * 2)
    assert seen == []


@pytest.mark.parametrize(
    ("completions", "error", "message"),
    [
        (torch.zeros(1, 3, 32, 96), ValueError, "got a torch.float32 tensor of shape (1, 3, 32, 96)."),
        (
            torch.zeros(1, 32, 96, 3, dtype=torch.uint8),
            ValueError,
            "got a torch.uint8 tensor of shape (1, 32, 96, 3).",
        ),
        (torch.zeros(3, 32, 96, dtype=torch.uint8), ValueError, "got a torch.uint8 tensor of shape (3, 32, 96)."),
        (["CAFE"], TypeError, "got a list with str."),
    ],
)
def test_completions_that_are_no_images_are_refused(seen, completions, error, message):
    message = f"`completions` must be PIL images or a torch.uint8 tensor of shape (B, 3, H, W), {message}"
    with pytest.raises(error, match=re.escape(message)):
        OCRReward()(['"CAFE"'], completions)
    assert seen == []


def test_an_image_is_needed_for_each_prompt(seen):
    message = "`completions` must have an image for each of 2 prompts, got 1 images."
    with pytest.raises(ValueError, match=message):
        OCRReward()(['"CAFE"'] * 2, [draw_word("CAFE")])
    assert seen == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_engines": 0}, "`num_engines` must be >= 1, got 0."),
        ({"num_threads": 0}, "`num_threads` must be >= 1, got 0."),
        ({"min_confidence": 1.5}, "`min_confidence` must be in [0, 1], got 1.5."),
    ],
)
def test_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OCRReward(**options)


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ImportError, match=re.escape("`OCRReward` needs RapidOCR: `pip install trl-udm[ocr]`.")):
        OCRReward()
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(ImportError, match=re.escape("`ocr_score` needs RapidFuzz: `pip install trl-udm[ocr]`.")):
        ocr_score("HELLO", "HELLO")
