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
Measures the rewards of `OCRReward` on rendered text, and its time and memory on the CPU.

The first table is about images of 512 x 512 pixels with one to three words, in 12 alternating fonts. The second is
about small images with a single word of three to six random letters, with options for such images. The third uses the
clean images of the first. Every row runs in its own process. "memory" is the growth of the peak resident memory
(`VmHWM`) since before the engines were made. "CPU" is the processor time, which does not depend on other programs.

    python benchmarks/ocr_reward.py
"""

import argparse
import io
import multiprocessing
import random
import string
import time
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from trl_udm.rewards.ocr import OCRReward, ocr_score


MIB = 2**20
SIZE = 512
CONDITIONS = ("clean", "small", "busy", "degraded", "no text", "wrong text")
FONTS = (
    "DejaVuSans DejaVuSans-BoldOblique DejaVuSansMono DejaVuSerif DejaVuSerif-BoldItalic STIXGeneral STIXGeneralBol "
    "STIXGeneralItalic cmr10 cmss10 cmtt10 cmti10"
).split()
WORDS = (
    "Amber Bakery Canyon Dream Exit Falcon Gate Harbor Island Journal Kitchen Lantern Museum Night Orchard Palace "
    "Quiet River Silver Tiger Urban Velvet Window Yellow Zoo OPEN SALE Platform Coffee Books Street New York 24 50% "
    "2026"
).split()

# Name, height, width and font size of the small images, and the options of the reward.
SMALL = (
    ("32 x 96, one line", 32, 96, 22, {"detect_text": False}),
    ("32 x 64, one line", 32, 64, 22, {"detect_text": False}),
    ("32 x 96, detection", 32, 96, 22, {}),
    ("64 x 64, one line", 64, 64, 20, {"detect_text": False}),
    ("64 x 64, detection", 64, 64, 20, {}),
)
POOLS = ((1, 1), (1, 2), (2, 1))  # engines, threads of each


def load_font(index: int, size: int, text: str, max_width: float) -> ImageFont.FreeTypeFont:
    """Returns the font of an image, in a size that fits the text."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(folder / f"{FONTS[index % len(FONTS)]}.ttf", size)
    while font.getlength(text) > max_width:
        font = font.font_variant(size=font.size - 1)
    return font


def draw_busy_background(rng: random.Random) -> Image.Image:
    image = Image.new("RGB", (SIZE, SIZE), draw_color(rng, 0, 255))
    draw = ImageDraw.Draw(image)
    for _ in range(80):
        x, y, width, height = (rng.randrange(-50, SIZE), rng.randrange(-50, SIZE), *rng.sample(range(10, 150), 2))
        shape = rng.choice((draw.ellipse, draw.rectangle))
        shape((x, y, x + width, y + height), fill=draw_color(rng, 0, 255))
        draw.line([rng.randrange(SIZE) for _ in range(4)], fill=draw_color(rng, 0, 255), width=rng.randint(1, 6))
    return image


def draw_color(rng: random.Random, low: int, high: int) -> tuple[int, int, int]:
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def render(condition: str, text: str, index: int, rng: random.Random) -> Image.Image:
    """Draws a dark text on a light background, or a light, outlined and rotated text on a busy background."""
    if condition == "no text":
        return draw_busy_background(rng) if index % 2 else Image.new("RGB", (SIZE, SIZE), draw_color(rng, 0, 255))
    busy = condition == "busy"
    font = load_font(index, {"small": 18, "degraded": 40}.get(condition, 64), text, max_width=0.85 * SIZE)
    dark, light = draw_color(rng, 0, 80), draw_color(rng, 175, 255)

    layer = Image.new("RGBA", (SIZE, SIZE))
    draw = ImageDraw.Draw(layer)
    margin = font.getlength(text) / 2 + 8
    center = (rng.uniform(margin, SIZE - margin), rng.uniform(0.2, 0.8) * SIZE)
    color, stroke_width = (light, 3) if busy else (dark, 0)
    draw.text(center, text, font=font, anchor="mm", fill=color, stroke_width=stroke_width, stroke_fill=dark)
    if busy:
        layer = layer.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC, center=center)
    image = draw_busy_background(rng) if busy else Image.new("RGB", (SIZE, SIZE), light)
    image.paste(layer, mask=layer)

    if condition == "degraded":
        file = io.BytesIO()
        image.filter(ImageFilter.GaussianBlur(2.5)).save(file, "JPEG", quality=12)
        image = Image.open(file).convert("RGB")
    return image


def make_samples(condition: str, num_images: int) -> tuple[list[Image.Image], list[str]]:
    """Returns images of a condition and their targets. A wrong text has no word in common with its target."""
    rng = random.Random(condition)
    images, targets = [], []
    for index in range(num_images):
        words = rng.sample(WORDS, 6)
        shown, other = " ".join(words[: rng.randint(1, 3)]), " ".join(words[3 : rng.randint(4, 6)])
        images.append(render(condition, shown, index, rng))
        targets.append(other if condition == "wrong text" else shown)
    return images, targets


def make_small_samples(height: int, width: int, size: int, num_images: int) -> tuple[list[Image.Image], list[str]]:
    """Returns images with black words on white, half of them in upper case, and the words."""
    rng = random.Random(0)
    images, targets = [], []
    for index in range(num_images):
        letters = string.ascii_uppercase if index % 2 else string.ascii_lowercase
        targets.append("".join(rng.choices(letters, k=rng.randint(3, 6))))
        images.append(Image.new("RGB", (width, height), "white"))
        font = load_font(index, size, targets[-1], max_width=width - 4)
        ImageDraw.Draw(images[-1]).text((width / 2, height / 2), targets[-1], font=font, anchor="mm", fill="black")
    return images, targets


def peak_resident_memory() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def measure(options: dict[str, Any], images: list[Image.Image], targets: list[str]) -> dict[str, float]:
    """Measures mean rewards, the time per image, and the memory."""
    before = peak_resident_memory()
    reward = OCRReward(**options)
    prompts = [""] * len(images)
    reward(prompts[:2], images[:2], target_text=targets[:2])  # loads the weights

    recognized = []
    start, cpu_start = time.perf_counter(), time.process_time()
    rewards = reward(prompts, images, target_text=targets, log_extra=lambda _, texts: recognized.extend(texts))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    partial = [ocr_score(text, target, partial=True) for text, target in zip(recognized, targets, strict=True)]
    return {
        "reward": sum(rewards) / len(images),
        "partial": sum(partial) / len(images),
        "exact": rewards.count(1.0) / len(images),
        "seconds": seconds / len(images),
        "cpu_seconds": cpu_seconds / len(images),
        "memory": peak_resident_memory() - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=48, help="images of each condition")
    parser.add_argument("--num_small_images", type=int, default=240)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")

    def run(*arguments: Any) -> dict[str, float]:
        with context.Pool(1) as pool:
            return pool.apply(measure, arguments)

    print(f"{'512 x 512':<20} {'reward':>7} {'partial':>8} {'exact':>6}")
    for condition in CONDITIONS:
        result = run({}, *make_samples(condition, args.num_images))
        print(f"{condition:<20} {result['reward']:>7.3f} {result['partial']:>8.3f} {result['exact']:>6.2f}")

    print(f"\n{'small':<20} {'reward':>7} {'exact':>6} {'ms':>6} {'CPU ms':>7} {'memory (MiB)':>13}")
    for name, height, width, size, options in SMALL:
        samples = make_small_samples(height, width, size, args.num_small_images)
        result = run(options, *samples)
        print(
            f"{name:<20} {result['reward']:>7.3f} {result['exact']:>6.3f} {1000 * result['seconds']:>6.1f} "
            f"{1000 * result['cpu_seconds']:>7.1f} {result['memory'] / MIB:>13.0f}"
        )

    print(f"\n{'engines x threads':<20} {'s':>7} {'CPU s':>7} {'memory (MiB)':>13}")
    for num_engines, num_threads in POOLS:
        samples = make_samples("clean", args.num_images)
        result = run({"num_engines": num_engines, "num_threads": num_threads}, *samples)
        print(
            f"{f'{num_engines} x {num_threads}':<20} {result['seconds']:>7.2f} {result['cpu_seconds']:>7.2f} "
            f"{result['memory'] / MIB:>13.0f}"
        )


if __name__ == "__main__":
    main()
