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

r"""
Rewards from models of the CLIP family: agreement of image and prompt, and human preference.

All of them but [`AestheticReward`] compare an image x with its prompt c by the cosine of their features f(x) and g(c),

$$ \cos(x, c) = \frac{\langle f(x), g(c) \rangle}{\lVert f(x) \rVert \, \lVert g(c) \rVert}, $$

and differ in the weights and in the scale of the score. [`CLIPReward`] computes the cosine. Each other class states
its one difference.
"""

from typing import Any

import torch
from PIL import Image
from torch.nn import functional
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from ..weights import load_tensors
from .model_reward import ModelReward, build_head, load_trained


def load_clip(
    model_name_or_path: str,
    processor_name_or_path: str,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[CLIPModel, CLIPTokenizer, CLIPImageProcessorPil]:
    """
    Load a CLIP model with its tokenizer and its Pillow image processor. torchvision is not needed.

    Args:
        model_name_or_path (`str`):
            A [`~transformers.CLIPModel`] on the Hub or in a folder.
        processor_name_or_path (`str`):
            Repository or folder of its tokenizer and image processor.
        device (`str` or `torch.device`, *optional*):
            By default the device that Accelerate assigns to this process.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Dtype of the weights.

    Returns:
        `tuple[CLIPModel, CLIPTokenizer, CLIPImageProcessorPil]`: The model on its device, the tokenizer and the image
        processor.

    Raises:
        ValueError: If the weights lack a parameter, or the tokenizer belongs to another model.
    """
    model = load_trained(CLIPModel, model_name_or_path, device, dtype)
    # From a folder without a tokenizer, transformers makes an empty one.
    tokenizer = CLIPTokenizer.from_pretrained(processor_name_or_path)
    vocab_size = model.config.text_config.vocab_size
    if len(tokenizer) != vocab_size:
        raise ValueError(
            f"The tokenizer in {processor_name_or_path!r} must have the model's {vocab_size} tokens, "
            f"got {len(tokenizer)}."
        )
    image_processor = CLIPImageProcessorPil.from_pretrained(processor_name_or_path)
    return model, tokenizer, image_processor


class CLIPReward(ModelReward):
    """
    The cosine of an image and its prompt under any CLIP model of transformers, as a reward function for
    [`UDMGRPOTrainer`].

    The weights are loaded when the reward is first called. The features of a prompt are cached. A prompt of more than
    77 tokens, counting the two special tokens around it, is truncated, as the authors of all these models do. A
    warning tells the first time. torchvision is not needed.

    Args:
        model_name_or_path (`str`):
            A [`~transformers.CLIPModel`] on the Hub or in a folder.
        processor_name_or_path (`str`, *optional*):
            Repository or folder of its tokenizer and image processor. By default `model_name_or_path`.
        prefix (`str`, *optional*, defaults to `""`):
            Text that is put before each prompt.
        batch_size (`int`, *optional*, defaults to `32`):
            Number of images that the model processes at a time.
        text_cache_size (`int`, *optional*, defaults to `4096`):
            Number of prompts whose features are cached on the device. With a ViT-H, 4096 take 16 MiB.
        device (`str` or `torch.device`, *optional*):
            By default the device that Accelerate assigns to this process.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Dtype of the weights. The cosine is always computed in float32.

    Raises:
        ValueError: If `batch_size` or `text_cache_size` is out of range.

    Example:

    ```python
    >>> from PIL import Image
    >>> from trl_udm.rewards.clip import CLIPReward

    >>> reward = CLIPReward("openai/clip-vit-large-patch14")
    >>> (cosine,) = reward(prompts=["a red square"], completions=[Image.new("RGB", (512, 512), "red")])
    ```
    """

    def __init__(
        self,
        model_name_or_path: str,
        processor_name_or_path: str | None = None,
        prefix: str = "",
        batch_size: int = 32,
        text_cache_size: int = 4096,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(model_name_or_path, batch_size, device, dtype)
        if text_cache_size < 0:
            raise ValueError(f"`text_cache_size` must be >= 0, got {text_cache_size}.")
        self.processor_name_or_path = processor_name_or_path or model_name_or_path
        self.prefix = prefix
        self.text_cache_size = text_cache_size
        self.__name__ = "clip"
        self._text_features: dict[str, torch.Tensor] = {}

    def _load(self) -> None:
        self._model, self._tokenizer, self._image_processor = load_clip(
            self.model_name_or_path, self.processor_name_or_path, self.device, self.dtype
        )

    def _score_batch(self, prompts: list[str], images: list[Image.Image]) -> torch.Tensor:
        image_features = self._encode_images(images)  # (B, D)
        text_features = self._encode_prompts(prompts)  # (B, D)
        return self._score((image_features * text_features).sum(dim=-1))  # (B,)

    def _encode_images(self, images: list[Image.Image]) -> torch.Tensor:
        images = [self._prepare_image(image) for image in images]
        inputs = self._image_processor(images=images, return_tensors="pt").to(self._model.device)
        features = self._model.get_image_features(**inputs).pooler_output
        return functional.normalize(features.float(), dim=-1)  # (B, D)

    def _prepare_image(self, image: Image.Image) -> Image.Image:
        """Prepare an image for the image processor, which resizes its shorter edge and crops the center."""
        return image

    def _encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        new_prompts = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._text_features]
        if new_prompts:
            texts = [self.prefix + prompt for prompt in new_prompts]
            max_length = self._model.config.text_config.max_position_embeddings
            self._warn_of_cut_prompts(new_prompts, self._tokenizer, max_length, type(self).__name__, self.prefix)
            inputs = self._tokenizer(
                texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
            ).to(self._model.device)
            new_features = self._model.get_text_features(**inputs).pooler_output
            new_features = functional.normalize(new_features.float(), dim=-1)
            self._text_features.update(zip(new_prompts, new_features, strict=True))

        features = torch.stack([self._text_features[prompt] for prompt in prompts])  # (B, D)
        while len(self._text_features) > self.text_cache_size:
            self._text_features.pop(next(iter(self._text_features)))  # the oldest
        return features

    def _score(self, cosines: torch.Tensor) -> torch.Tensor:
        """Turn cosines into scores, both float32 tensors of shape `(B,)`."""
        return cosines


class PickScoreReward(CLIPReward):
    r"""
    PickScore (https://huggingface.co/papers/2305.01569): which of two images people would pick for the prompt.

    The score is the cosine times the model's own scale, \\( s = e^{\mathrm{logit\_scale}} \cos(x, c) \\), or about
    100 cos(x, c). The reward is s / 26, as in UDM-GRPO (https://huggingface.co/papers/2604.18518).

    Args:
        model_name_or_path (`str`, *optional*, defaults to `"yuvalkirstain/PickScore_v1"`):
            The weights.
        processor_name_or_path (`str`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            The tokenizer and image processor, which are those of the model that the authors started from.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether to divide the score by 26. The reward is then named `pickscore_reward`. Otherwise it is s, which is
            what papers report, and is named `pickscore`.
        kwargs (`dict[str, Any]`):
            The other arguments of [`CLIPReward`].

    Example:

    ```python
    >>> from PIL import Image
    >>> from trl_udm.rewards.clip import PickScoreReward

    >>> reward = PickScoreReward()
    >>> (score,) = reward(prompts=["a red square"], completions=[Image.new("RGB", (512, 512), "red")])
    ```
    """

    def __init__(
        self,
        model_name_or_path: str = "yuvalkirstain/PickScore_v1",
        processor_name_or_path: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        normalize: bool = True,
        **kwargs: Any,
    ):
        super().__init__(model_name_or_path, processor_name_or_path, **kwargs)
        self.normalize = normalize
        self.__name__ = "pickscore_reward" if normalize else "pickscore"

    def _score(self, cosines: torch.Tensor) -> torch.Tensor:
        scores = self._model.logit_scale.float().exp() * cosines
        return scores / 26 if self.normalize else scores


class CLIPScoreReward(CLIPReward):
    r"""
    CLIPScore (https://huggingface.co/papers/2104.08718): how well the prompt describes the image.

    The score is \\( 2.5 \max(\cos(x, c), 0) \\). The defaults are those of the paper, which measures captions of
    photographs: a ViT-B/32, and a prefix that makes a sentence of the caption. Work on image generation often uses
    `"openai/clip-vit-large-patch14"` and `prefix=""` instead, and reports 100 cos(x, c), which is 40 times this score.
    Compare figures only where all three agree.

    Args:
        model_name_or_path (`str`, *optional*, defaults to `"openai/clip-vit-base-patch32"`):
            The weights.
        processor_name_or_path (`str`, *optional*):
            Repository or folder of its tokenizer and image processor. By default `model_name_or_path`.
        prefix (`str`, *optional*, defaults to `"A photo depicts "`):
            Text that is put before each prompt.
        kwargs (`dict[str, Any]`):
            The other arguments of [`CLIPReward`].

    Example:

    ```python
    >>> from PIL import Image
    >>> from trl_udm.rewards.clip import CLIPScoreReward

    >>> reward = CLIPScoreReward()
    >>> (score,) = reward(prompts=["a red square"], completions=[Image.new("RGB", (512, 512), "red")])
    ```
    """

    def __init__(
        self,
        model_name_or_path: str = "openai/clip-vit-base-patch32",
        processor_name_or_path: str | None = None,
        prefix: str = "A photo depicts ",
        **kwargs: Any,
    ):
        super().__init__(model_name_or_path, processor_name_or_path, prefix, **kwargs)
        self.__name__ = "clip_score"

    def _score(self, cosines: torch.Tensor) -> torch.Tensor:
        return 2.5 * cosines.clamp(min=0)


class HPSv2Reward(CLIPReward):
    """
    HPS v2 and v2.1 (https://huggingface.co/papers/2306.09341): which image people would prefer for the prompt.

    The score is the cosine. Tables of the benchmark show it times 100. An image that is not square is not cropped: it
    is resized and centered on a black square, as the authors do.

    The authors' file is in the format of open_clip. `scripts/convert_hpsv2.py` converts it to the folder that is read
    here.

    Args:
        model_name_or_path (`str`):
            The converted folder.
        kwargs (`dict[str, Any]`):
            The other arguments of [`CLIPReward`].

    Example:

    ```python
    >>> from PIL import Image
    >>> from trl_udm.rewards.clip import HPSv2Reward

    >>> reward = HPSv2Reward("hpsv2.1")  # python scripts/convert_hpsv2.py HPS_v2.1_compressed.pt hpsv2.1
    >>> (score,) = reward(prompts=["a red square"], completions=[Image.new("RGB", (512, 512), "red")])
    ```
    """

    def __init__(self, model_name_or_path: str, **kwargs: Any):
        super().__init__(model_name_or_path, **kwargs)
        self.__name__ = "hpsv2"

    def _prepare_image(self, image: Image.Image) -> Image.Image:
        size = self._model.config.vision_config.image_size
        scale = size / max(image.size)
        image = image.resize([round(edge * scale) for edge in image.size], Image.Resampling.BICUBIC)
        square = Image.new("RGB", (size, size))
        square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        return square


class AestheticReward(CLIPReward):
    r"""
    LAION's aesthetic predictor (https://github.com/christophschuhmann/improved-aesthetic-predictor): how much people
    would like the image, on a scale of 1 to 10. The prompt makes no difference.

    The score is the output of a small head for the normalized features of the image,
    \\( h(f(x) / \lVert f(x) \rVert) \\). Without activations, as in the file that most papers use, h is affine.

    Args:
        head_path (`str`):
            The authors' file of the head, such as `"sac+logos+ava1-l14-linearMSE.pth"` or the one with activations,
            `"ava+logos-l14-reluMSE.pth"`. No code in it is executed.
        model_name_or_path (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            The CLIP model that the head was trained on.
        kwargs (`dict[str, Any]`):
            The other arguments of [`CLIPReward`].

    Example:

    ```python
    >>> from PIL import Image
    >>> from trl_udm.rewards.clip import AestheticReward

    >>> reward = AestheticReward("sac+logos+ava1-l14-linearMSE.pth")
    >>> (score,) = reward(prompts=["a red square"], completions=[Image.new("RGB", (512, 512), "red")])
    ```
    """

    def __init__(self, head_path: str, model_name_or_path: str = "openai/clip-vit-large-patch14", **kwargs: Any):
        super().__init__(model_name_or_path, **kwargs)
        self.head_path = head_path
        self.__name__ = "aesthetic"

    def _load(self) -> None:
        weights = load_tensors(self.head_path)
        head = build_head({name.removeprefix("layers."): value for name, value in weights.items()}, self.head_path)
        super()._load()
        self._head = head.to(self._model.device)

    def _score_batch(self, prompts: list[str], images: list[Image.Image]) -> torch.Tensor:
        return self._head(self._encode_images(images)).squeeze(-1)  # (B,)
