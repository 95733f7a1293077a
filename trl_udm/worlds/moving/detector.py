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

"""Finds the objects of a decoded video and how they move, from its pixels alone, without the prompt."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image


try:
    from scipy import ndimage
    from scipy.optimize import linear_sum_assignment
except ImportError:
    ndimage = linear_sum_assignment = None

from ..shapes.world import BACKGROUND, COLORS, class_mask
from .world import CELL_SIZE, CLASS_NAMES, DIRECTIONS, IMAGE_SIZE, NUM_FRAMES, SPEEDS


@dataclass(frozen=True)
class Track:
    """
    An object that is seen in every frame. What is not clear is `None`.

    Args:
        class_name (`str`, *optional*):
            The class that it has in at least three quarters of the frames.
        color (`str`, *optional*):
            The color that it has in at least three quarters of the frames.
        direction (`str`, *optional*):
            Where it moves. `None` if it stands still or moves askew.
        speed (`str`, *optional*):
            Whether it passes the distance of `"slowly"` or `"quickly"`, whichever is nearer. `None` without a
            direction.
    """

    class_name: str | None
    color: str | None
    direction: str | None
    speed: str | None


@dataclass(frozen=True)
class _Region:
    center: np.ndarray  # row and column
    class_name: str | None
    color: str


class MovingDetector:
    """
    Finds objects by tracking.

    1. In each frame, connected pixels that differ from the background are a region. It has the class whose outline,
       stretched to the region's box, overlaps it most, and the color that is nearest to its mean.
    2. The regions of two neighboring frames are paired so that the sum of their distances is least. A pair farther
       apart than a cell is none.
    3. Each region of the first frame that is followed to the last one is a [`Track`].

    Args:
        threshold (`int`, *optional*, defaults to `60`):
            Least contrast of an object: distance to the background's color, summed over the channels, in `[0, 765]`.
        min_area (`int`, *optional*, defaults to `12`):
            Least area of an object in pixels.
        min_overlap (`float`, *optional*, defaults to `0.6`):
            Least overlap (intersection over union) of a region and the outline of its class, in `[0, 1]`.

    Raises:
        ImportError: If SciPy is missing.

    Example:

    ```python
    >>> from trl_udm.worlds.moving.detector import MovingDetector
    >>> from trl_udm.worlds.moving.world import MovingObject, render

    >>> MovingDetector()([render([MovingObject("circle", "red", 1, 3, "left", "quickly")])])
    [[Track(class_name='circle', color='red', direction='left', speed='quickly')]]
    ```
    """

    def __init__(self, threshold: int = 60, min_area: int = 12, min_overlap: float = 0.6):
        if ndimage is None:
            raise ImportError("`MovingDetector` needs SciPy: `pip install trl-udm[geneval]`.")
        self.threshold = threshold
        self.min_area = min_area
        self.min_overlap = min_overlap
        self.outlines = np.stack([class_mask(name, size=24) > 0.5 for name in CLASS_NAMES])

    def __call__(self, videos: list[list[Image.Image]]) -> list[list[Track]]:
        """
        Detects and follows objects.

        Args:
            videos (`list[list[PIL.Image.Image]]`):
                Videos of 5 RGB frames of 20 x 20 pixels.

        Returns:
            `list[list[Track]]`: The objects of each video.

        Raises:
            TypeError: If a video is no list of PIL images.
            ValueError: If it has another number of frames, or a frame has another size.
        """
        return [self._detect(video) for video in videos]

    def _detect(self, video: list[Image.Image]) -> list[Track]:
        if not isinstance(video, list) or not all(isinstance(frame, Image.Image) for frame in video):
            raise TypeError(f"`videos` must be lists of PIL images, got {type(video).__name__}.")
        sizes = {frame.size for frame in video}
        if len(video) != NUM_FRAMES or sizes != {(IMAGE_SIZE, IMAGE_SIZE)}:
            raise ValueError(
                f"`videos` must have {NUM_FRAMES} frames of {IMAGE_SIZE} x {IMAGE_SIZE} pixels, got {len(video)} of "
                f"{sorted(sizes)}."
            )
        first, *others = (self._find_regions(frame) for frame in video)
        paths = [[region] for region in first]
        for regions in others:
            distances = np.array(
                [[np.linalg.norm(path[-1].center - region.center) for region in regions] for path in paths]
            ).reshape(len(paths), len(regions))
            pairs = list(zip(*linear_sum_assignment(distances), strict=True))
            paths = [[*paths[i], regions[j]] for i, j in pairs if distances[i, j] <= CELL_SIZE]
        return [_describe(path) for path in paths]

    def _find_regions(self, frame: Image.Image) -> list[_Region]:
        pixels = np.asarray(frame.convert("RGB"), dtype=np.float32)  # (H, W, 3)
        contrast = np.abs(pixels - BACKGROUND).sum(axis=-1)
        labels = ndimage.label(contrast > self.threshold)[0]
        regions = []
        for index in range(1, labels.max() + 1):
            weights = contrast * (labels == index)
            # Half the contrast is where the outline runs through a pixel
            mask = weights > weights.max() / 2
            if mask.sum() < self.min_area:
                continue
            region = Image.fromarray(mask)
            outline = np.asarray(region.crop(region.getbbox()).resize((24, 24), Image.Resampling.NEAREST))
            overlaps = (outline & self.outlines).sum(axis=(1, 2)) / (outline | self.outlines).sum(axis=(1, 2))
            best = overlaps.argmax()
            regions.append(
                _Region(
                    center=np.array(ndimage.center_of_mass(weights)),
                    class_name=CLASS_NAMES[best] if overlaps[best] >= self.min_overlap else None,
                    color=_nearest_color(pixels[mask].mean(axis=0)),
                )
            )
        return regions


def _nearest_color(pixel: np.ndarray) -> str:
    return min(COLORS, key=lambda name: np.square(pixel - COLORS[name]).sum())


def _describe(path: list[_Region]) -> Track:
    def agree(names: list[str | None]) -> str | None:
        name, count = Counter(names).most_common(1)[0]
        return name if count >= 0.75 * len(names) else None

    row, column = path[-1].center - path[0].center
    along, across = sorted((abs(row), abs(column)), reverse=True)
    direction = speed = None
    if along >= CELL_SIZE / 2 and along >= 2 * across:
        step = (0, np.sign(column)) if abs(column) == along else (np.sign(row), 0)
        direction = next(name for name, other in DIRECTIONS.items() if other == step)
        speed = min(SPEEDS, key=lambda name: abs(SPEEDS[name] * CELL_SIZE - along))
    return Track(
        class_name=agree([region.class_name for region in path]),
        color=agree([region.color for region in path]),
        direction=direction,
        speed=speed,
    )
