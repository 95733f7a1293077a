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
HPS v3 (https://huggingface.co/papers/2508.03789), on transformers' Qwen2-VL.

The model reads an image and an instruction with the prompt, and then a token that stands for the reward. The state of
this token gives a mean and an uncertainty of the preference. The reward is the mean.
"""

from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen2VLModel, Qwen2VLPreTrainedModel

from ..weights import find_file
from .model_reward import ModelReward, load_trained


REWARD_TOKEN = "<|Reward|>"
IMAGE_TOKEN = "<|image_pad|>"
PROMPT_FILE = "prompt_template.txt"
"""File of the instruction in a converted folder, with `{text_prompt}` where the prompt goes."""


class HPSv3Model(Qwen2VLPreTrainedModel):
    """Qwen2-VL with the authors' head, which `scripts/convert_hpsv3.py` writes."""

    _keep_in_fp32_modules_strict = ["rm_head"]

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = Qwen2VLModel(config)
        self.rm_head = nn.Sequential(
            nn.Linear(config.text_config.hidden_size, 1024),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.Tensor,
        reward_token_id: int,
    ) -> torch.Tensor:
        """
        Score images.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`):
                Token ids, padded on the right, with one reward token in each row.
            attention_mask (`torch.LongTensor` of shape `(B, L)`):
                0 at padding.
            pixel_values (`torch.FloatTensor` of shape `(num_patches, patch_dim)`):
                Patches of all images.
            image_grid_thw (`torch.LongTensor` of shape `(B, 3)`):
                Numbers of patches of each image.
            reward_token_id (`int`):
                The reward token.

        Returns:
            `torch.FloatTensor` of shape `(B, 2)`: Mean and uncertainty of each image.
        """
        # The authors number the tokens of the image as those of the text, in all three axes of the rotary positions.
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand(3, *input_ids.shape)
        states = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
        ).last_hidden_state  # (B, L, D)
        return self.rm_head(states[input_ids == reward_token_id].float())


class HPSv3Reward(ModelReward):
    """
    HPS v3 (https://huggingface.co/papers/2508.03789): which image people would prefer for the prompt.

    The score is the mean that the model predicts, as the authors report it. Every image is resized to about 448 x 448
    pixels, in its own aspect ratio.

    The authors' file has neither a configuration nor a tokenizer, and no instruction. `scripts/convert_hpsv3.py` makes
    the folder that is read here.

    Args:
        model_name_or_path (`str`):
            The converted folder.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of images that the model processes at a time.
        device (`str` or `torch.device`, *optional*):
            By default the device that Accelerate assigns to this process.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`):
            Dtype of the weights, by default the authors'. The head is always in float32.

    Raises:
        ValueError: If `batch_size` is out of range.

    Example:

    ```python
    >>> from PIL import Image
    >>> from trl_udm.rewards.hpsv3 import HPSv3Reward

    >>> reward = HPSv3Reward("hpsv3")  # scripts/convert_hpsv3.py makes the folder
    >>> (score,) = reward(prompts=["a red square"], completions=[Image.new("RGB", (512, 512), "red")])
    ```
    """

    def __init__(
        self,
        model_name_or_path: str,
        batch_size: int = 8,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(model_name_or_path, batch_size, device, dtype)
        self.__name__ = "hpsv3"

    def _load(self) -> None:
        self._template = find_file(self.model_name_or_path, [PROMPT_FILE]).read_text(encoding="utf-8")
        self._tokenizer = AutoTokenizer.from_pretrained(self.model_name_or_path, padding_side="right")
        self._reward_token_id = self._tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        self._image_processor = Qwen2VLImageProcessorPil.from_pretrained(self.model_name_or_path)
        self._model = load_trained(HPSv3Model, self.model_name_or_path, self.device, self.dtype)

    def _score_batch(self, prompts: list[str], images: list[Image.Image]) -> torch.Tensor:
        pixels = self._image_processor(images=images, return_tensors="pt")
        num_image_tokens = pixels["image_grid_thw"].prod(dim=-1) // self._image_processor.merge_size**2  # (B,)
        texts = [
            self._format(prompt).replace(IMAGE_TOKEN, IMAGE_TOKEN * count, 1)
            for prompt, count in zip(prompts, num_image_tokens.tolist(), strict=True)
        ]
        inputs = self._tokenizer(texts, padding=True, return_tensors="pt")
        device, dtype = self._model.device, self._model.dtype
        predictions = self._model(
            input_ids=inputs["input_ids"].to(device),
            attention_mask=inputs["attention_mask"].to(device),
            pixel_values=pixels["pixel_values"].to(device, dtype),
            image_grid_thw=pixels["image_grid_thw"].to(device),
            reward_token_id=self._reward_token_id,
        )
        return predictions[:, 0]  # (B,)

    def _format(self, prompt: str) -> str:
        for token in self._tokenizer.get_added_vocab():  # a prompt cannot add an image or a second reward token
            prompt = prompt.replace(token, token.replace("|", " "))
        text = self._template.replace("{text_prompt}", prompt)
        messages: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
