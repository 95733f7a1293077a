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
GenEval's detector on transformers' Mask2Former (https://huggingface.co/papers/2112.01527).

The benchmark's own detector is mmdet's Mask2Former with a Swin-S backbone. transformers has the architecture. But its
`post_process_instance_segmentation` drops scores below 0.5, resizes the masks to 384 x 384 and lets no two objects
overlap, and its image processor stretches images to multiples of 32. So the pre- and post-processing are written here,
as in mmdet.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers import Mask2FormerForUniversalSegmentation

from .geneval import CLASS_NAMES, THRESHOLD, Detection
from .model_reward import load_trained


MAX_CANDIDATES = 100
IMAGE_MEAN = (0.485, 0.456, 0.406)  # ImageNet's
IMAGE_STD = (0.229, 0.224, 0.225)
SIZE_DIVISOR = 32


class Mask2FormerDetector:
    """
    Finds the objects of COCO's 80 classes, for [`GenEvalReward`].

    The default weights are a different training of the architecture that GenEval uses (Mask2Former with a Swin-S
    backbone, here Meta's own and there mmdet's), so single images may be judged differently. How often can be measured
    with `scripts/compare_geneval_detectors.py`.

    The weights are loaded on first use, which needs SciPy: `pip install trl-udm[geneval]`.

    Args:
        model_name_or_path (`str`, *optional*, defaults to `"facebook/mask2former-swin-small-coco-instance"`):
            A Mask2Former for instance segmentation with 80 classes in COCO's order.
        device (`str` or `torch.device`, *optional*):
            Device of the detector. By default the device that Accelerate assigns to this process.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Dtype of the weights. The post-processing is always in float32.
        batch_size (`int`, *optional*, defaults to `8`):
            Images at a time, at most. Only images of the same padded size share a batch: the network cannot tell
            padding from content, so an image's detections would otherwise depend on the other images.
        score_threshold (`float`, *optional*, defaults to `0.3`):
            Lowest score that is returned. GenEval ignores detections with a score of 0.3 or less, so the default makes
            no difference to it. A lower value only costs time, see [`find_objects`]. A higher one hides objects.
        shortest_edge (`int`, *optional*, defaults to `800`):
            Length of the shorter edge to which images are resized. The aspect ratio is kept.
        longest_edge (`int`, *optional*, defaults to `1333`):
            Bound of the longer edge. An image that would exceed it is resized to this length of the longer edge.

    Raises:
        ValueError: If `batch_size` is not positive.

    Example:

    ```python
    >>> from trl_udm.rewards.clip_color import CLIPColorClassifier
    >>> from trl_udm.rewards.geneval import GenEvalReward
    >>> from trl_udm.rewards.mask2former import Mask2FormerDetector

    >>> reward = GenEvalReward(Mask2FormerDetector(), CLIPColorClassifier(), mode="dense")
    ```
    """

    class_names = CLASS_NAMES

    def __init__(
        self,
        model_name_or_path: str = "facebook/mask2former-swin-small-coco-instance",
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 8,
        score_threshold: float = THRESHOLD,
        shortest_edge: int = 800,
        longest_edge: int = 1333,
    ):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be > 0, got {batch_size}.")
        self.model_name_or_path = model_name_or_path
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self.score_threshold = score_threshold
        self.shortest_edge = shortest_edge
        self.longest_edge = longest_edge
        self.model: Any = None

    @torch.inference_mode()
    def __call__(self, images: list[Image.Image]) -> list[dict[str, list[Detection]]]:
        """
        Detect objects.

        Args:
            images (`list[Image.Image]`):
                The images, of any sizes.

        Returns:
            `list[dict[str, list[Detection]]]`: For each image, the detections of each class, with masks, in pixels of
            the image. Classes without detections are left out.

        Raises:
            ImportError: If SciPy is missing.
            ValueError: If the weights lack some of the model's parameters, if the number of classes is not 80, or if
            the outputs are not finite.
        """
        if self.model is None:
            self._load_model()

        by_padded_size: dict[tuple[int, int], list] = {}
        for index, image in enumerate(images):
            scale = min(self.shortest_edge / min(image.size), self.longest_edge / max(image.size))
            height, width = (int(side * scale + 0.5) for side in (image.height, image.width))
            padded_size = -(-height // SIZE_DIVISOR) * SIZE_DIVISOR, -(-width // SIZE_DIVISOR) * SIZE_DIVISOR
            by_padded_size.setdefault(padded_size, []).append((index, (height, width)))
        batches = [
            (padded_size, members[start : start + self.batch_size])
            for padded_size, members in by_padded_size.items()
            for start in range(0, len(members), self.batch_size)
        ]

        mean, std = (torch.tensor(value, device=self.model.device)[:, None, None] for value in (IMAGE_MEAN, IMAGE_STD))
        detected: list[dict[str, list[Detection]]] = [{} for _ in images]
        for padded_size, batch in batches:
            pixel_values = torch.zeros(len(batch), 3, *padded_size, device=self.model.device)
            for row, (index, (height, width)) in enumerate(batch):
                resized = images[index].convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
                pixels = torch.from_numpy(np.array(resized)).to(self.model.device).permute(2, 0, 1) / 255
                pixel_values[row, :, :height, :width] = (pixels - mean) / std
            outputs = self.model(pixel_values.to(self.model.dtype))
            if not (outputs.class_queries_logits.isfinite().all() and outputs.masks_queries_logits.isfinite().all()):
                raise ValueError(
                    f"The outputs of {self.model_name_or_path!r} must be finite. If the weights are sound, use "
                    f"`dtype=torch.float32` (it is {self.dtype})."
                )
            for row, (index, resized_size) in enumerate(batch):
                detected[index] = find_objects(
                    class_logits=outputs.class_queries_logits[row],
                    mask_logits=outputs.masks_queries_logits[row],
                    padded_size=padded_size,
                    resized_size=resized_size,
                    image_size=(images[index].height, images[index].width),
                    score_threshold=self.score_threshold,
                )
        return detected

    def _load_model(self) -> None:
        try:
            import scipy  # noqa: F401
        except ImportError as error:
            raise ImportError("`Mask2FormerDetector` needs SciPy: `pip install trl-udm[geneval]`.") from error
        model = load_trained(Mask2FormerForUniversalSegmentation, self.model_name_or_path, self.device, self.dtype)
        if model.config.num_labels != len(CLASS_NAMES):
            raise ValueError(
                f"`model_name_or_path` must be a model of COCO's {len(CLASS_NAMES)} classes, got "
                f"{self.model_name_or_path!r} with {model.config.num_labels}."
            )
        self.model = model


def find_objects(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    padded_size: tuple[int, int],
    resized_size: tuple[int, int],
    image_size: tuple[int, int],
    score_threshold: float = THRESHOLD,
) -> dict[str, list[Detection]]:
    r"""
    Extract the objects of one image from Mask2Former's outputs, as mmdet does for GenEval.

    A candidate is a query q with a class c. Its class probability \\( p \\) is the softmax over the classes and "no
    object". The `MAX_CANDIDATES` most probable candidates are kept, whatever their queries and classes. The query's
    mask logits m are upsampled to the padded input, cropped to the resized image and resized to the image, both times
    bilinearly. The mask is m > 0, and the score is \\( p \cdot \mathrm{mean}_{m > 0}\, \sigma(m) \\). Masks may
    overlap. The box is that of the mask, and its far corner is exclusive. A candidate with an empty mask is dropped.

    No score exceeds its class probability. So candidates whose class probability is below `score_threshold` are
    dropped before their masks are upsampled, which takes most of the time.

    Args:
        class_logits (`torch.Tensor` of shape `(num_queries, num_classes + 1)`):
            Class logits of each query, "no object" last.
        mask_logits (`torch.Tensor` of shape `(num_queries, mask_height, mask_width)`):
            Mask logits of each query.
        padded_size (`tuple[int, int]`):
            Height and width of the network's input.
        resized_size (`tuple[int, int]`):
            Height and width of the input without the padding.
        image_size (`tuple[int, int]`):
            Height and width of the image.
        score_threshold (`float`, *optional*, defaults to `0.3`):
            Lowest score that is returned.

    Returns:
        `dict[str, list[Detection]]`: The detections by class name, with masks.
    """
    num_classes = class_logits.shape[1] - 1
    class_probabilities = class_logits.float().softmax(dim=-1)[:, :-1].flatten()  # (Q * C,)
    class_probabilities, candidates = class_probabilities.topk(min(MAX_CANDIDATES, len(class_probabilities)))

    detected: dict[str, list[Detection]] = {}
    for class_probability, candidate in zip(class_probabilities.tolist(), candidates.tolist(), strict=True):
        if class_probability < score_threshold:  # exact: neither the mean nor its product rounds to more than this
            break
        query, class_index = divmod(candidate, num_classes)
        logits = functional.interpolate(mask_logits[None, None, query].float(), padded_size, mode="bilinear")
        logits = logits[:, :, : resized_size[0], : resized_size[1]]
        logits = functional.interpolate(logits, image_size, mode="bilinear")[0, 0]  # (H, W)
        inside = logits > 0
        mask = inside.cpu().numpy()
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if len(rows) == 0:
            continue
        score = class_probability * logits[inside].sigmoid().mean().item()
        if score < score_threshold:
            continue
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        detected.setdefault(CLASS_NAMES[class_index], []).append(Detection(box=box, score=score, mask=mask))
    return detected
