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
The OCR reward: whether the image shows the text that the prompt quotes.

An engine reads the image, and [`ocr_score`] compares the recognized text with the target. The functions of this module
are in the order in which [`OCRReward`] applies them.
"""

import queue
import re
import unicodedata
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from .images import as_pil_images


# Typographic quotes, primes and accents, which count as straight quotes.
QUOTES = str.maketrans(dict.fromkeys("‘’‚‛′´`", "'") | dict.fromkeys("“”„‟″", '"'))

MAX_ASPECT = 64
"""Ratio of an image's sides above which white is added to the shorter one."""

# What no engine reads as a character: accents without a letter that has them, blank letters, and variation selectors.
UNREADABLE = re.compile(
    "[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f\u115f\u1160\u2800\u180b-\u180d\ufe00-\ufe0f"
    "\U000e0100-\U000e01ef]"
)


def _quoted(opening: str, closing: str) -> str:
    """A pattern of a text between quotes."""
    if opening == closing:  # after a digit it stands for inches, and beside a space it does not begin or end a text
        return rf"(?<!\d){opening}(?=\S)([^{opening}]*)(?<=\S){opening}"
    inner = f"[^{opening}{closing}]"
    return f"{opening}((?:{inner}|{opening}{inner}*[{closing}])*)[{closing}]"


# Ideographs need no spaces around quotes. After other letters, a single quote is an apostrophe.
_LETTER = r"[^\W\u2e80-\uffff]"
# From the surest to the least sure
_QUOTED_TEXTS = (
    re.compile("|".join(map(_quoted, '"＂“„«»‹›「『”', ('"', "＂", "”", "“”", "»", "«", "›", "‹", "」", "』", "”")))),
    re.compile(r'(?<!\d)"([^"]*)"'),
    re.compile(rf"(?<!{_LETTER})['‘‚](?=\S)((?:[^'‘’]|(?<={_LETTER})['’](?={_LETTER}))*)(?<=\S)['‘’](?!{_LETTER})"),
)


def extract_target(prompt: str) -> str:
    """
    Return the first quoted part of a prompt, which is the text that the image should show.

    Quotes are `"..."`, “...”, „...“, „...”, «...», »...«, ‹...›, ›...‹, ”...”, 「...」 and 『...』. Only a prompt
    without these is searched for single quotes, `'...'`, ‘...’ and ‚...‘. A mark of inches or feet after a digit is no
    quote, an apostrophe is none, and quotes without a text between them do not count.

    Args:
        prompt (`str`):
            A prompt with the target in quotes.

    Returns:
        `str`: The text between the quotes, unchanged.

    Raises:
        ValueError: If the prompt quotes no text, or an empty one.

    Example:

    ```python
    >>> from trl_udm.rewards.ocr import extract_target

    >>> extract_target('A storefront sign that says "New York"')
    'New York'
    >>> extract_target('A 5" pipe under a sign that says "SALE"')
    'SALE'
    ```
    """
    matches = [match for pattern in _QUOTED_TEXTS for match in pattern.finditer(prompt)]
    for match in matches:
        target = match[match.lastindex or 0]
        if normalize_text(target):
            return target
    if matches:
        raise ValueError(f"`prompt` must quote a target text that is not empty, got {prompt!r}.")
    raise ValueError(f"`prompt` must have its target text in double quotes, got {prompt!r}.")


def join_recognized(lines: Iterable[tuple[str, float]]) -> str:
    """
    Join the lines that an OCR engine recognized into one text.

    Args:
        lines (`Iterable[tuple[str, float]]`):
            The recognized texts in the engine's reading order, each with its confidence in `[0, 1]`.

    Returns:
        `str`: The texts of positive confidence, joined without a separator.
    """
    return "".join(text for text, confidence in lines if confidence > 0)


def ocr_score(recognized_text: str, target_text: str, partial: bool = False) -> float:
    r"""
    Score a recognized text against the target. Case, white space, invisible characters, the form of the quotes, and
    variants of a character that Unicode calls compatible (NFKC) make no difference, see [`normalize_text`].

    The score is \\( 1 - \min(\mathrm{distance}, n) / n \\), where n is the length of the target and the distance is
    the number of characters to insert, delete or replace. As in UDM-GRPO (https://huggingface.co/papers/2604.18518),
    the distance is that to the whole recognized text, and the score is 1 wherever the target is a substring. So text
    around the target costs nothing until a character of the target is wrong. With `partial`, the distance is that to
    the part of the recognized text that is closest to the target. Text around the target then never costs anything,
    and the score is never lower.

    Args:
        recognized_text (`str`):
            The text that was recognized in the image.
        target_text (`str`):
            The text that the image should show.
        partial (`bool`, *optional*, defaults to `False`):
            Whether to compare with the closest part only.

    Returns:
        `float`: The score, in `[0, 1]`.

    Raises:
        ImportError: If RapidFuzz is missing.
        ValueError: If the target is empty.

    Example:

    ```python
    >>> from trl_udm.rewards.ocr import ocr_score

    >>> ocr_score("HELL0", "Hello")
    0.8
    >>> ocr_score("OPEN HELL0 OPEN", "Hello"), ocr_score("OPEN HELL0 OPEN", "Hello", partial=True)
    (0.0, 0.8)
    ```
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ImportError("`ocr_score` needs RapidFuzz: `pip install trl-udm[ocr]`.") from error

    recognized, target = normalize_text(recognized_text), normalize_text(target_text)
    if not target:
        raise ValueError(f"`target_text` must have a character other than white space, got {target_text!r}.")
    if target in recognized:
        return 1.0
    parts = [recognized]
    if partial:
        # A part of twice the target's length or more is at least as far from the target as no text at all.
        starts, lengths = range(len(recognized)), range(1, 2 * len(target))
        parts += {recognized[start : start + length] for start in starts for length in lengths}
    distance = min(Levenshtein.distance(part, target) for part in parts)
    return 1 - min(distance, len(target)) / len(target)


def normalize_text(text: str) -> str:
    """
    Normalize a text for comparison: lower case, straight quotes, NFKC, and nothing that cannot be seen. White space,
    control characters, characters of zero width, and accents without a letter that has them are left out.

    Args:
        text (`str`):
            Any text.

    Returns:
        `str`: The normalized text.
    """
    # Quotes first: NFKC splits some of them into a space and an accent. What is invisible would keep an accent from
    # its letter.
    seen = "".join(
        character for character in text.translate(QUOTES) if unicodedata.category(character) not in ("Cc", "Cf")
    )
    return UNREADABLE.sub("", "".join(unicodedata.normalize("NFKC", seen).lower().split()))


class OCRReward:
    """
    Whether the image shows the text that its prompt asks for, as a reward function for [`UDMGRPOTrainer`].

    RapidOCR (https://github.com/RapidAI/RapidOCR) reads the images on the CPU, with the PP-OCR models in its wheel.
    Nothing is downloaded. The reward is [`ocr_score`]. The target of a row is in the dataset's column `target_text`.
    The reward does not apply to rows where it is `None`. Without the column, the target is the quoted part of the
    prompt. All targets are checked before any image is read.

    The share of images whose reward is 1 is logged as `ocr/exact`. The recognized texts are the column
    `recognised_text` of the table of completions.

    Args:
        partial (`bool`, *optional*, defaults to `False`):
            Whether to score only the closest part of the recognized text, see [`ocr_score`]. The reward is then named
            `ocr_partial_reward`, otherwise `ocr_reward`.
        detect_text (`bool`, *optional*, defaults to `True`):
            Whether to look for lines of text in the image. With `False`, the whole image is one line of text. That
            saves a third of the time for small images that show nothing else, such as a word in 32 x 96 pixels. The
            line must fill the height.
        min_confidence (`float`, *optional*, defaults to `0.5`):
            Lowest confidence of the engine, in `[0, 1]`, with which a line counts.
        num_engines (`int`, *optional*, defaults to `1`):
            Number of images that are read at a time. Each has an engine of its own, of about 170 MiB. Raise it to the
            number of cores that this process may use.
        num_threads (`int`, *optional*, defaults to `1`):
            Number of threads of each engine. More engines gain more than more threads.

    Raises:
        ImportError: If RapidOCR is missing.
        ValueError: If an option is out of range.

    Example:

    ```python
    >>> from PIL import Image, ImageDraw
    >>> from trl_udm.rewards.ocr import OCRReward

    >>> image = Image.new("RGB", (512, 512), "white")
    >>> ImageDraw.Draw(image).text((100, 200), "HELLO", fill="black", font_size=96)
    >>> reward = OCRReward()
    >>> reward(prompts=['A sign that says "Hello"'], completions=[image])
    [1.0]
    ```
    """

    def __init__(
        self,
        partial: bool = False,
        detect_text: bool = True,
        min_confidence: float = 0.5,
        num_engines: int = 1,
        num_threads: int = 1,
    ):
        if num_engines < 1:
            raise ValueError(f"`num_engines` must be >= 1, got {num_engines}.")
        if num_threads < 1:
            raise ValueError(f"`num_threads` must be >= 1, got {num_threads}.")
        if not 0 <= min_confidence <= 1:
            raise ValueError(f"`min_confidence` must be in [0, 1], got {min_confidence}.")
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError("`OCRReward` needs RapidOCR: `pip install trl-udm[ocr]`.") from error

        self.partial = partial
        self.detect_text = detect_text
        self.min_confidence = min_confidence
        self.num_engines = num_engines
        self.__name__ = "ocr_partial_reward" if partial else "ocr_reward"
        params = {
            "Global.log_level": "error",
            "Global.text_score": 0.0,  # the engine has such a minimum too, but only for lines that it detects
            "Global.use_det": detect_text,
            "Global.use_cls": False,  # the check for lines that are upside down is sometimes wrong
            # By default an image is enlarged to 736 pixels before lines are detected, and a line padded to 320. That
            # takes twice the time and reads no better, down to letters of 9 pixels.
            "Det.limit_side_len": 64,
            "Rec.rec_img_shape": [3, 48, 96],
            "EngineConfig.onnxruntime.intra_op_num_threads": num_threads,
        }
        # The engines load their weights when they first read.
        self._engines: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(num_engines):
            self._engines.put(RapidOCR(params=params))

    def __call__(
        self,
        prompts: list[str],
        completions: list[Image.Image] | torch.Tensor,
        target_text: list[str | None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """
        Reward images.

        Args:
            prompts (`list[str]`):
                The prompts. They quote the targets if there is no `target_text`.
            completions (`list[Image.Image]` or `torch.Tensor` of shape `(B, 3, H, W)` and dtype `torch.uint8`):
                The generated images. Transparent parts are read on white.
            target_text (`list[str | None]`, *optional*):
                The text that each image should show. `None` where the reward does not apply.
            log_metric (`Callable[[str, float], None]`, *optional*):
                The trainer's logging function.
            log_extra (`Callable[[str, list], None]`, *optional*):
                The trainer's function for columns of the table of completions.
            columns (`dict[str, Any]`):
                Other arguments of the trainer. They are not used.

        Returns:
            `list[float | None]`: A reward in `[0, 1]` for each image, or `None` where there is no target.

        Raises:
            TypeError: If the completions are not images.
            ValueError: If a tensor of images has another shape or dtype, if the numbers of images and prompts differ,
            or if a target is missing or empty.
        """
        completions = as_pil_images(completions, len(prompts))

        if target_text is None:
            target_text = [extract_target(prompt) for prompt in prompts]
        for prompt, target in zip(prompts, target_text, strict=True):
            if target is not None and not (isinstance(target, str) and normalize_text(target)):
                raise ValueError(
                    f"`target_text` of {prompt!r} must be `None` or a text with a character other than white space, "
                    f"got {target!r}."
                )

        def read(image: Image.Image, target: str | None) -> str | None:
            return None if target is None else self._read(image)

        with ThreadPoolExecutor(self.num_engines) as pool:
            recognized_texts = list(pool.map(read, completions, target_text))

        rewards = []
        for recognized, target in zip(recognized_texts, target_text, strict=True):
            rewards.append(
                None if recognized is None or target is None else ocr_score(recognized, target, self.partial)
            )
            if log_metric is not None and target is not None:
                log_metric("ocr/exact", float(rewards[-1] == 1))
        if log_extra is not None:
            log_extra("recognised_text", recognized_texts)
        return rewards

    def _read(self, image: Image.Image) -> str:
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("RGB")
        # The engine shrinks the longer side to 2000 pixels, which would leave nothing of a strip.
        if max(image.size) > MAX_ASPECT * min(image.size):
            aspect = 8 if self.detect_text else MAX_ASPECT  # 8 is where the engine adds a margin before it looks
            size = max(image.width, image.height // aspect), max(image.height, image.width // aspect)
            image = ImageOps.pad(image, size, color="white")
        # It takes the channels of an array as blue, green, red.
        pixels = np.ascontiguousarray(np.asarray(image)[:, :, ::-1])  # (H, W, 3)
        engine = self._engines.get()
        try:
            output = engine(pixels)
        finally:
            self._engines.put(engine)
        lines = zip(output.txts or (), output.scores or (), strict=True)
        return join_recognized(line for line in lines if line[1] >= self.min_confidence)
