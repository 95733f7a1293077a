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

"""GenEval's color classifier on transformers' CLIP (https://huggingface.co/papers/2103.00020)."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from .clip import load_clip
from .geneval import COLORS, Detection


TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BACKGROUND = (153, 153, 153)


class CLIPColorClassifier:
    r"""
    Names the color of objects by zero-shot classification, for [`GenEvalReward`].

    An object is cropped to its box, with gray outside of its mask. Its color is the one whose text embedding has the
    largest inner product with the embedding of the crop. A color's text embedding is the mean of the unit embeddings
    of three captions that name the color, normalized again.

    The weights are loaded on first use. Images are processed without torchvision.

    Args:
        model_name_or_path (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            A CLIP model with its tokenizer and image processor. The default is the benchmark's.
        device (`str` or `torch.device`, *optional*):
            Device of the classifier. By default the device that Accelerate assigns to this process.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Dtype of the weights.

    Example:

    ```python
    >>> from PIL import Image
    >>> from trl_udm.rewards.clip_color import CLIPColorClassifier
    >>> from trl_udm.rewards.geneval import Detection

    >>> classify = CLIPColorClassifier()
    >>> image = Image.new("RGB", (64, 64), "red")
    >>> colors = classify(image, [Detection(box=(8, 8, 56, 56), score=0.9)], class_name="stop sign")
    ```
    """

    def __init__(
        self,
        model_name_or_path: str = "openai/clip-vit-large-patch14",
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.model_name_or_path = model_name_or_path
        self.device = device
        self.dtype = dtype
        self.model: Any = None
        self.text_embeddings: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def __call__(self, image: Image.Image, detections: list[Detection], class_name: str) -> list[str]:
        """
        Name colors.

        Args:
            image (`Image.Image`):
                The image.
            detections (`list[Detection]`):
                Objects in it, all of one class. CLIP processes them in one batch: GenEval's `MAX_OBJECTS` bounds their
                number.
            class_name (`str`):
                Their class.

        Returns:
            `list[str]`: One of `COLORS` for each detection.

        Raises:
            ValueError: If the weights lack some of the model's parameters, if the tokenizer belongs to another model,
            if a mask has another size than the image, or if an embedding is not finite.
        """
        if not detections:
            return []
        if self.model is None:
            self.model, self.tokenizer, self.image_processor = load_clip(
                self.model_name_or_path, self.model_name_or_path, self.device, self.dtype
            )
        if class_name not in self.text_embeddings:
            self.text_embeddings[class_name] = self._embed_colors(class_name)

        crops = [crop_object(image, detection) for detection in detections]
        pixel_values = self.image_processor(crops, return_tensors="pt").pixel_values
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)  # (N, 3, H, W)
        image_embeddings = self.model.get_image_features(pixel_values).pooler_output  # (N, D)
        similarities = image_embeddings.float() @ self.text_embeddings[class_name].T  # (N, 10)
        if not similarities.isfinite().all():
            raise ValueError(
                f"The outputs of {self.model_name_or_path!r} must be finite. If the weights are sound, use "
                f"`dtype=torch.float32` (it is {self.dtype})."
            )
        return [COLORS[index] for index in similarities.argmax(dim=-1).tolist()]

    def _embed_colors(self, class_name: str) -> torch.Tensor:
        """Return the unit text embeddings of all colors, of shape `(10, D)`."""
        texts = [template.format(color=color, name=class_name) for color in COLORS for template in TEMPLATES]
        inputs = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.model.device)
        embeddings = self.model.get_text_features(**inputs).pooler_output  # (10 * 3, D)
        embeddings = functional.normalize(embeddings.float(), dim=-1)
        embeddings = embeddings.unflatten(0, (len(COLORS), len(TEMPLATES))).mean(dim=1)
        return functional.normalize(embeddings, dim=-1)


def crop_object(image: Image.Image, detection: Detection) -> Image.Image:
    """
    Crop an image to the box of an object, with gray outside of the object's mask.

    The box is rounded to whole pixels and clipped to the image. If it then covers no pixel, because it is thinner than
    half a pixel or lies outside of the image, it is widened to the nearest pixel: a degenerate box is no reason to
    stop a training run. [`Mask2FormerDetector`] returns no such box.

    Args:
        image (`Image.Image`):
            The image.
        detection (`Detection`):
            The object. Without a mask, everything in its box is shown.

    Returns:
        `Image.Image`: The crop, in RGB, of at least one pixel.

    Raises:
        ValueError: If the mask has another size than the image.
    """
    image = image.convert("RGB")
    if detection.mask is not None:
        if detection.mask.shape != (image.height, image.width):
            raise ValueError(
                f"`mask` must have the image's shape {(image.height, image.width)}, got {detection.mask.shape}."
            )
        background = Image.new("RGB", image.size, BACKGROUND)
        image = Image.composite(image, background, Image.fromarray(detection.mask.astype(np.uint8) * 255))
    box = []
    for axis, size in enumerate(image.size):
        lower = min(max(round(detection.box[axis]), 0), size - 1)
        upper = min(max(round(detection.box[axis + 2]), lower + 1), size)
        box.append((lower, upper))
    (left, right), (top, bottom) = box
    return image.crop((left, top, right, bottom))
