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

"""The check of the images that a reward scores."""

import torch
from PIL import Image


def as_pil_images(completions: list[Image.Image] | torch.Tensor, num_prompts: int) -> list[Image.Image]:
    """
    Check completions, and return them as PIL images.

    Args:
        completions (`list[Image.Image]` or `torch.Tensor` of shape `(B, 3, H, W)` and dtype `torch.uint8`):
            Images.
        num_prompts (`int`):
            Number of images that there must be.

    Returns:
        `list[Image.Image]`: The images. Those of a tensor are RGB.

    Raises:
        TypeError: If a list contains anything but PIL images.
        ValueError: If a tensor has another shape or dtype, or the number of images is not `num_prompts`.
    """
    rule = "`completions` must be PIL images or a torch.uint8 tensor of shape (B, 3, H, W)"
    if isinstance(completions, torch.Tensor):
        if completions.dtype != torch.uint8 or completions.ndim != 4 or completions.shape[1] != 3:
            raise ValueError(f"{rule}, got a {completions.dtype} tensor of shape {tuple(completions.shape)}.")
        completions = [Image.fromarray(pixels) for pixels in completions.permute(0, 2, 3, 1).cpu().numpy()]
    for image in completions:
        if not isinstance(image, Image.Image):
            remedy = " Wrap the reward in a `FrameReward` for videos." if isinstance(image, list) else ""
            raise TypeError(f"{rule}, got a list with {type(image).__name__}.{remedy}")
    if len(completions) != num_prompts:
        raise ValueError(
            f"`completions` must have an image for each of {num_prompts} prompts, got {len(completions)} images."
        )
    return completions
