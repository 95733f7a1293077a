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
Measures for how many images this library's GenEval agrees with GenEval's own.

Takes the results that GenEval's `evaluate_images.py` wrote (https://github.com/djghosh13/geneval), and the folder of
images that it read. Judges every image again with `Mask2FormerDetector` and `CLIPColorClassifier`. Prints a table by
tag. Both apply the same rule, so only the detectors differ.

    python scripts/compare_geneval_detectors.py --results results.jsonl --images_dir images --output agreement.json
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from trl_udm.rewards.clip_color import CLIPColorClassifier
from trl_udm.rewards.geneval import TAGS, GenEvalReward
from trl_udm.rewards.mask2former import Mask2FormerDetector


def load_results(path: Path) -> list[dict[str, Any]]:
    """Reads GenEval's results: one JSON object per line, in which the metadata is JSON text."""
    results = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        result = json.loads(line)
        missing = sorted({"filename", "tag", "correct", "metadata"} - result.keys())
        if missing:
            raise ValueError(
                f"Line {number} of {path} must be a result of GenEval's `evaluate_images.py`, lacks {missing}."
            )
        results.append({**result, "metadata": json.loads(result["metadata"])})
    return results


def judge(results: list[dict[str, Any]], images_dir: Path, reward: GenEvalReward, batch_size: int) -> list[bool]:
    """Judges the images `<images_dir>/<number of the prompt>/samples/<number of the image>.png`."""
    correct = []
    for start in range(0, len(results), batch_size):
        batch = results[start : start + batch_size]
        images = []
        for result in batch:
            # The results may come from another machine. Only the end of the path is the same here
            with Image.open(images_dir.joinpath(*Path(result["filename"]).parts[-3:])) as image:
                images.append(image.convert("RGB"))
        metadata = [result["metadata"] for result in batch]
        columns = {name: [row.get(name) for row in metadata] for name in ("tag", "include", "exclude")}
        rewards = reward([row["prompt"] for row in metadata], images, **columns)
        correct += [value == 1.0 for value in rewards]
        print(f"{len(correct)} of {len(results)} images", file=sys.stderr)
    return correct


def summarize(results: list[dict[str, Any]], correct: list[bool]) -> dict[str, dict[str, float]]:
    """Counts, by tag and over all images, which images GenEval and this library call correct."""
    summary = {}
    for tag in (*TAGS, "all"):
        pairs = [
            (result["correct"], ours)
            for result, ours in zip(results, correct, strict=True)
            if tag in (result["tag"], "all")
        ]
        if pairs:
            summary[tag] = {
                "images": len(pairs),
                "agreement": sum(theirs == ours for theirs, ours in pairs) / len(pairs),
                "both": pairs.count((True, True)),
                "geneval_only": pairs.count((True, False)),
                "ours_only": pairs.count((False, True)),
                "neither": pairs.count((False, False)),
            }
    return summary


def format_table(summary: dict[str, dict[str, float]]) -> str:
    titles = f"{'both':>6} {'GenEval only':>13} {'ours only':>10} {'neither':>8}"
    lines = [f"{'correct by':<14} {'images':>7} {'agreement':>10} {titles}"]
    for tag, row in summary.items():
        counts = f"{row['both']:>6} {row['geneval_only']:>13} {row['ours_only']:>10} {row['neither']:>8}"
        lines.append(f"{tag:<14} {row['images']:>7} {row['agreement']:>10.3f} {counts}")
    return "\n".join(lines)


def main(argv: list[str]) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, required=True, help="JSON lines written by GenEval's evaluate_images.py"
    )
    parser.add_argument("--images_dir", type=Path, required=True, help="folder of the images that it read")
    parser.add_argument("--output", type=Path, help="JSON file for the summary and the images judged differently")
    parser.add_argument("--detector", default="facebook/mask2former-swin-small-coco-instance")
    parser.add_argument("--color_classifier", default="openai/clip-vit-large-patch14")
    parser.add_argument("--device", help="by default the accelerator, if there is one")
    parser.add_argument("--batch_size", type=int, default=8)
    args = parser.parse_args(argv)

    results = load_results(args.results)
    reward = GenEvalReward(
        Mask2FormerDetector(args.detector, device=args.device, batch_size=args.batch_size),
        CLIPColorClassifier(args.color_classifier, device=args.device),
    )
    correct = judge(results, args.images_dir, reward, args.batch_size)
    summary = summarize(results, correct)
    print(format_table(summary))
    if args.output is not None:
        differing = [
            {"filename": result["filename"], "prompt": result["metadata"]["prompt"], "geneval": result["correct"]}
            for result, ours in zip(results, correct, strict=True)
            if result["correct"] != ours
        ]
        args.output.write_text(json.dumps({"summary": summary, "differing": differing}, indent=2), encoding="utf-8")
    return summary


if __name__ == "__main__":
    main(sys.argv[1:])
