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

"""Finds the objects in a decoded image from its pixels alone, without the prompt."""

import numpy as np
from PIL import Image


try:
    from scipy import ndimage
except ImportError:
    ndimage = None

from ...rewards.geneval import Detection
from .world import BACKGROUND, CLASS_NAMES, COLORS, IMAGE_SIZE, class_mask


class ShapesDetector:
    """
    A GenEval detector for the world. It finds connected regions that differ from the background. A region has the
    class whose outline, stretched to the region's box, overlaps it most.

    Let o be the overlap (intersection over union) times the ratio of the box's shorter side to its longer. The score
    is 1 − (1 − o)². GenEval's thresholds 0.3 and, for counting, 0.9 are then at o = 0.16 and o = 0.68.

    Args:
        threshold (`int`, *optional*, defaults to `60`):
            Least contrast of an object: distance to the background's color, summed over the channels, in `[0, 765]`.
        min_area (`int`, *optional*, defaults to `12`):
            Least area of an object in pixels.

    Raises:
        ImportError: If SciPy is missing.
    """

    class_names = CLASS_NAMES

    def __init__(self, threshold: int = 60, min_area: int = 12):
        if ndimage is None:
            raise ImportError("`ShapesDetector` needs SciPy: `pip install trl-udm[geneval]`.")
        self.threshold = threshold
        self.min_area = min_area

    def __call__(self, images: list[Image.Image]) -> list[dict[str, list[Detection]]]:
        """
        Detects objects.

        Args:
            images (`list[PIL.Image.Image]`):
                RGB images of 32 x 32 pixels.

        Returns:
            `list[dict[str, list[Detection]]]`: For each image, the detections of each class, with boxes and masks.

        Raises:
            ValueError: If an image has another size.
        """
        return [self._detect(image) for image in images]

    def _detect(self, image: Image.Image) -> dict[str, list[Detection]]:
        if image.size != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"Images must be {IMAGE_SIZE} x {IMAGE_SIZE} pixels, got {image.size}.")
        pixels = np.asarray(image.convert("RGB"), dtype=np.int32)  # (H, W, 3)
        contrast = np.abs(pixels - np.asarray(BACKGROUND)).sum(axis=-1)
        labels = ndimage.label(contrast > self.threshold)[0]
        detections: dict[str, list[Detection]] = {name: [] for name in CLASS_NAMES}
        for index, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            # Half the contrast is where the outline runs through a pixel
            mask = (labels == index) & (contrast > contrast[labels == index].max() / 2)
            if mask.sum() < self.min_area:
                continue
            region = Image.fromarray(mask[rows, columns]).resize((24, 24), Image.Resampling.NEAREST)
            overlaps = {name: _overlap(np.asarray(region), class_mask(name, size=24) > 0.5) for name in CLASS_NAMES}
            name = max(overlaps, key=overlaps.__getitem__)
            height, width = rows.stop - rows.start, columns.stop - columns.start
            overlap = overlaps[name] * min(height, width) / max(height, width)
            box = (columns.start, rows.start, columns.stop, rows.stop)
            detections[name].append(Detection(box=box, score=1 - (1 - overlap) ** 2, mask=mask))
        return detections


class ShapesColorClassifier:
    """Names the color of the world that is nearest to the mean color of a detection's pixels."""

    def __call__(self, image: Image.Image, detections: list[Detection], class_name: str) -> list[str]:
        """
        Names colors.

        Args:
            image (`PIL.Image.Image`):
                The image.
            detections (`list[Detection]`):
                Detections with masks.
            class_name (`str`):
                Their class, which makes no difference here.

        Returns:
            `list[str]`: A color for each.
        """
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
        names, palette = list(COLORS), np.asarray(list(COLORS.values()), dtype=np.float32)
        means = [pixels[detection.mask].mean(axis=0) for detection in detections]
        return [names[np.square(palette - mean).sum(axis=-1).argmin()] for mean in means]


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    return float((first & second).sum() / (first | second).sum())
