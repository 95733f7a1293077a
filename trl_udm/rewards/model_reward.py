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

"""What the rewards of a network have in common: its loading, batches of images, and the check of its scores."""

import math
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import nn

from ..cut_prompts import PromptCutter
from .images import as_pil_images


# The indices of the linear layers in the authors' `nn.Sequential`, and what the forward pass does between them. The
# indices in between are dropout and activations.
_HEADS: dict[tuple[int, ...], type[nn.Module]] = {(0, 2, 4, 6, 7): nn.Identity, (0, 3, 6, 9, 11): nn.ReLU}


class ModelReward(PromptCutter):
    """
    A network that scores an image and its prompt. A subclass loads the network and scores a batch.

    Args:
        model_name_or_path (`str`):
            The weights on the Hub or in a folder. They are loaded when the reward is first called.
        batch_size (`int`, *optional*, defaults to `32`):
            Number of images that the model processes at a time.
        device (`str` or `torch.device`, *optional*):
            By default the device that Accelerate assigns to this process.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Dtype of the weights. The score is always computed in float32.

    Raises:
        ValueError: If `batch_size` is out of range.
    """

    def __init__(
        self,
        model_name_or_path: str,
        batch_size: int = 32,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be >= 1, got {batch_size}.")
        self.model_name_or_path = model_name_or_path
        self.batch_size = batch_size
        self.device = device
        self.dtype = dtype
        self._model: Any = None

    @torch.inference_mode()
    def __call__(
        self, prompts: list[str], completions: list[Image.Image] | torch.Tensor, **columns: Any
    ) -> list[float]:
        """
        Reward images.

        Args:
            prompts (`list[str]`):
                What each image should show.
            completions (`list[Image.Image]` or `torch.Tensor` of shape `(B, 3, H, W)` and dtype `torch.uint8`):
                The generated images. Both forms are rewarded alike.
            columns (`dict[str, Any]`):
                Other arguments of the trainer. They are not used.

        Returns:
            `list[float]`: A reward for each image.

        Raises:
            ValueError: If a tensor of images has another shape or dtype, if the numbers of images and prompts differ,
            if the checkpoint lacks a weight, if its tokenizer belongs to another model, or if a score is not finite.
        """
        completions = as_pil_images(completions, len(prompts))

        if self._model is None:
            self._load()
        rewards = []
        for start in range(0, len(prompts), self.batch_size):
            batch = slice(start, start + self.batch_size)
            images = [image.convert("RGB") for image in completions[batch]]
            rewards.extend(self._score_batch(prompts[batch], images).tolist())

        for prompt, reward in zip(prompts, rewards, strict=True):
            if not math.isfinite(reward):
                raise ValueError(
                    f"The score of an image for {prompt!r} must be finite, got {reward}. If the weights are sound, "
                    f"use `dtype=torch.float32` (it is {self.dtype})."
                )
        return rewards

    def _load(self) -> None:
        """Set `_model`, and what prepares its inputs."""
        raise NotImplementedError

    def _score_batch(self, prompts: list[str], images: list[Image.Image]) -> torch.Tensor:
        """Score RGB images, in a float32 tensor of shape `(B,)`."""
        raise NotImplementedError


def load_trained(
    model_class: Any, model_name_or_path: str, device: str | torch.device | None, dtype: torch.dtype
) -> Any:
    """
    Load a model of transformers for inference, with all of its weights.

    Args:
        model_class (`type[PreTrainedModel]`):
            Class of the model.
        model_name_or_path (`str`):
            Repository on the Hub, or folder.
        device (`str` or `torch.device`, *optional*):
            By default the device that Accelerate assigns to this process.
        dtype (`torch.dtype`):
            Dtype of the weights.

    Returns:
        [`~transformers.PreTrainedModel`]: The model on its device.

    Raises:
        ValueError: If the weights lack a parameter.
    """
    model, info = model_class.from_pretrained(model_name_or_path, dtype=dtype, output_loading_info=True)
    # transformers leaves missing parameters random, with a warning at most.
    missing = sorted(info["missing_keys"] & dict(model.named_parameters()).keys())
    if missing:
        raise ValueError(
            f"`model_name_or_path` must hold a trained {model_class.__name__}, got {model_name_or_path!r}, which "
            f"lacks {len(missing)} parameters, such as {missing[0]!r}."
        )
    return model.eval().to(device if device is not None else PartialState().device)


def build_head(weights: dict[str, torch.Tensor], source: str) -> nn.Sequential:
    """
    Make the head that LAION's aesthetic predictor and ImageReward have: five linear layers, from a feature to a score.

    Args:
        weights (`dict[str, torch.Tensor]`):
            Weights and biases, as `"0.weight"` and `"0.bias"`. The numbers tell whether there are activations between
            the layers.
        source (`str`):
            Where the weights are from, for the error.

    Returns:
        `nn.Sequential`: The head, in float32.

    Raises:
        ValueError: If the weights are others.
    """
    indices = tuple(sorted({int(name.split(".")[0]) for name in weights if name.split(".")[0].isdecimal()}))
    expected = {f"{index}.{part}" for index in indices for part in ("weight", "bias")}
    if indices not in _HEADS or weights.keys() != expected:
        raise ValueError(
            f"{source} must hold weights and biases of layers {' or '.join(map(str, _HEADS))}, got {sorted(weights)}."
        )
    layers: list[nn.Module] = []
    for index in indices:
        weight, bias = weights[f"{index}.weight"].float(), weights[f"{index}.bias"].float()
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers += [layer, _HEADS[indices]()]
    return nn.Sequential(*layers[:-1])
