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

import random
import string

import numpy as np
import pytest
import torch

from trl_udm import URSAPipeline
from trl_udm.rewards.ocr import OCRReward
from trl_udm.worlds.words import CHECKPOINT_PATH
from trl_udm.worlds.words.prompts import TEMPLATES, WORDS, misspell, sample_word, split_words
from trl_udm.worlds.words.world import INKS, PAPER, render


def test_the_engine_reads_what_is_written():
    words = [*WORDS[::30], "QUARTZ", "VEX", "JKLPNM"]
    images = [render(word, list(INKS)[i % len(INKS)]) for i, word in enumerate(words)]
    rewards = OCRReward(detect_text=False)(prompts=words, completions=images, target_text=words)
    assert np.mean(rewards) > 0.95


def test_letters_keep_to_their_cells():
    pixels = np.asarray(render("AB", "black"))
    assert pixels.shape == (32, 96, 3)
    inked = (pixels != PAPER).any(axis=-1)
    assert not inked[:8].any() and not inked[24:].any()  # no letter here goes below the line
    assert not inked[:, :32].any() and not inked[:, 64:].any()
    np.testing.assert_array_equal(np.asarray(render("AA", "red"))[:, 32:48], np.asarray(render("AA", "red"))[:, 48:64])


@pytest.mark.parametrize("word", ["", "ABCDEFG", "ab", "A B"])
def test_other_words_are_refused(word):
    with pytest.raises(ValueError, match=f"`word` must have 1 to 6 letters of A to Z, got {word!r}"):
        render(word, "black")


def test_training_and_evaluation_words_are_apart():
    train, evaluation = split_words()
    assert len(set(WORDS)) == len(WORDS) and all(3 <= len(word) <= 6 for word in WORDS)
    assert not {row["target_text"] for row in train} & {row["target_text"] for row in evaluation}
    assert len(evaluation) == 60 and len(train) == (len(WORDS) - 60) * len(TEMPLATES)
    assert all(f'"{row["target_text"]}"' in row["prompt"] for row in [*train, *evaluation])
    assert split_words() == (train, evaluation)


def test_misspelled_words_keep_their_length_and_a_third_of_their_letters():
    rng = random.Random(0)
    kept = []
    for _ in range(2000):
        word = sample_word(rng)
        shown = misspell(word, rng)
        assert len(shown) == len(word) and set(shown) <= set(string.ascii_uppercase)
        kept += [a == b for a, b in zip(word, shown, strict=True)]
    assert np.mean(kept) == pytest.approx(1 / 3 + 2 / 3 / 26, abs=0.02)


def test_the_shipped_model_writes_clearly_and_often_something_else():
    rows = split_words()[1]
    pipeline = URSAPipeline.from_pretrained(CHECKPOINT_PATH)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        [row["prompt"] for row in rows],
        num_inference_steps=10,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
    ).images
    assert {image.size for image in images} == {(96, 32)}
    read = []
    rewards = OCRReward(detect_text=False)(
        prompts=[row["prompt"] for row in rows],
        completions=images,
        target_text=[row["target_text"] for row in rows],
        log_extra=lambda name, texts: read.extend(texts),
    )
    assert 0.5 < np.mean(rewards) < 0.7
    assert np.mean([len(text) == len(row["target_text"]) for text, row in zip(read, rows, strict=True)]) > 0.9
