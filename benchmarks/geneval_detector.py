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
Compares the processor time of `Mask2FormerDetector`'s post-processing with that of a literal version of its rule.

The literal version resizes the masks of all 100 candidates, whatever their scores. Both get random outputs in the
shapes of the real network: 100 queries, 80 classes, square and wide images. 15 queries are sure of a class.

    python benchmarks/geneval_detector.py
"""

import argparse
import math
import statistics
import time

import torch
from torch.nn import functional

from trl_udm.rewards.geneval import CLASS_NAMES, Detection
from trl_udm.rewards.mask2former import find_objects


SIZES = (
    {"image_size": (512, 512), "resized_size": (800, 800), "padded_size": (800, 800)},
    {"image_size": (480, 640), "resized_size": (800, 1067), "padded_size": (800, 1088)},
)


def make_outputs(padded_size: tuple[int, int], num_queries: int, generator: torch.Generator):
    """Returns class logits and mask logits. Masks are ellipses with soft edges. Every tenth mask is empty."""
    class_logits = 2 * torch.randn(num_queries, len(CLASS_NAMES) + 1, generator=generator)
    class_logits[:, -1] += 8
    for query in torch.randperm(num_queries, generator=generator)[:15].tolist():
        class_logits[query, torch.randint(len(CLASS_NAMES), (2,), generator=generator)] += 11

    height, width = padded_size[0] // 4, padded_size[1] // 4
    rows, columns = torch.arange(height)[:, None] / height, torch.arange(width) / width
    center_y, center_x = torch.rand(2, num_queries, 1, 1, generator=generator)
    radius_y, radius_x = 0.05 + 0.4 * torch.rand(2, num_queries, 1, 1, generator=generator)
    distances = torch.hypot((rows - center_y) / radius_y, (columns - center_x) / radius_x)  # (Q, h, w)
    mask_logits = 8 * (1 - distances) + 0.2 * torch.randn(distances.shape, generator=generator)
    mask_logits[::10] = -mask_logits[::10].abs() - 1
    return class_logits, mask_logits


def find_objects_literally(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    padded_size: tuple[int, int],
    resized_size: tuple[int, int],
    image_size: tuple[int, int],
    score_threshold: float,
) -> dict[str, list[Detection]]:
    """Applies the rule of `find_objects` step by step, in the precision of its input."""
    candidates = []
    for query, logits in enumerate(class_logits.tolist()):
        exponentials = [math.exp(logit) for logit in logits]
        total = sum(exponentials)
        for class_index in range(len(CLASS_NAMES)):
            candidates.append((exponentials[class_index] / total, query, class_index))
    candidates.sort(reverse=True)

    candidates = candidates[:100]
    logits = mask_logits[[query for _, query, _ in candidates], None]  # (100, 1, h, w)
    logits = functional.interpolate(logits, padded_size, mode="bilinear")
    logits = logits[:, :, : resized_size[0], : resized_size[1]]
    logits = functional.interpolate(logits, image_size, mode="bilinear")[:, 0]  # (100, H, W)
    masks = logits > 0
    areas = masks.sum(dim=(1, 2))
    mask_scores = (logits.sigmoid() * masks).sum(dim=(1, 2)) / (areas + 1e-6)

    detected = {}
    for index, (class_probability, _, class_index) in enumerate(candidates):
        score = class_probability * mask_scores[index].item()
        if score < score_threshold or areas[index] == 0:
            continue
        rows, columns = masks[index].nonzero(as_tuple=True)
        box = (columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1)
        detected.setdefault(CLASS_NAMES[class_index], []).append(Detection(box, score, masks[index].numpy()))
    return detected


def largest_difference(first: dict[str, list[Detection]], second: dict[str, list[Detection]]) -> float:
    """Returns the largest difference of scores, boxes and masks. It is infinite where the objects differ."""
    if {name: len(group) for name, group in first.items()} != {name: len(group) for name, group in second.items()}:
        return math.inf
    differences = [0.0]
    for name, group in first.items():
        for one, other in zip(group, second[name], strict=True):
            differences.append(abs(one.score - other.score))
            differences += [abs(a - b) for a, b in zip(one.box, other.box, strict=True)]
            differences.append(float((one.mask != other.mask).any()))
    return max(differences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_outputs", type=int, default=50)
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)

    print(f"{args.num_outputs} outputs, {args.num_threads} threads, medians per image")
    print(f"{'score_threshold':<16} {'objects':>8} {'ours (ms)':>10} {'literal (ms)':>13} {'difference':>11}")
    for score_threshold in (0.3, 0.0):
        num_objects, seconds, literal_seconds, differences = [], [], [], []
        for seed in range(args.num_outputs):
            sizes = SIZES[seed % len(SIZES)]
            outputs = make_outputs(sizes["padded_size"], 100, torch.Generator().manual_seed(seed))
            start = time.process_time()
            found = find_objects(*outputs, **sizes, score_threshold=score_threshold)
            middle = time.process_time()
            literal = find_objects_literally(*outputs, **sizes, score_threshold=score_threshold)
            literal_seconds.append(time.process_time() - middle)
            seconds.append(middle - start)
            num_objects.append(sum(map(len, found.values())))
            differences.append(largest_difference(found, literal))
        print(
            f"{score_threshold:<16} {statistics.median(num_objects):>8.0f} {1000 * statistics.median(seconds):>10.1f} "
            f"{1000 * statistics.median(literal_seconds):>13.1f} {max(differences):>11.1e}"
        )


if __name__ == "__main__":
    main()
