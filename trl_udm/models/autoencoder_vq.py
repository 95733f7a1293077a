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

import os
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # the loader that diffusers looks up by this name
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ..weights import load_every_weight


class AutoencoderVQ(VQModel):
    r"""
    Image tokenizer: diffusers' [`~diffusers.VQModel`], whose codes are looked up by the largest inner product (index
    backpropagation quantization, https://huggingface.co/papers/2412.02692), as the image tokenizers of URSA do. Its
    arguments are those of [`~diffusers.VQModel`].

    Two of the original quantizers are supported: `"VQuantizer"`, a learned codebook (IBQ), and `"LFQuantizer"`, which
    is lookup-free: the channels of code `k` are the signs of its bits, so the largest inner product is the sign of
    each channel. `"FSQuantizer"` is refused: it belongs to the video tokenizers, which have another encoder and
    decoder, [`AutoencoderVQCosmos3D`].
    """

    config: Any  # with attributes, where diffusers says `dict`
    temporal_stride: None = None  # it has no frames

    if TYPE_CHECKING:  # mypy takes the class for `Any` by the untyped decorator of diffusers' `__init__`

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs) -> Self:
        """
        As in diffusers, except that a missing weight is an error. Diffusers would leave it random and warn.

        Raises:
            ValueError: If a weight is missing or has the wrong shape.
        """
        return load_every_weight(super().from_pretrained, pretrained_model_name_or_path, **kwargs)

    @property
    def spatial_stride(self) -> int:
        """`int`: Number of pixels that a token covers in each direction."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def codebook(self) -> torch.Tensor:
        """`torch.Tensor` of shape `(num_vq_embeddings, vq_embed_dim)`: The codes as stored, not normalized."""
        return self.quantize.embedding.weight

    @apply_forward_hook
    def encode_to_ids(self, sample: torch.Tensor) -> torch.Tensor:
        """
        Encodes images to token ids, by the largest inner product with a code.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`):
                Images in `[-1, 1]`. Their sides are multiples of `spatial_stride`.

        Returns:
            `torch.LongTensor` of shape `(batch_size, height / spatial_stride, width / spatial_stride)`: Ids in
            `[0, num_vq_embeddings)`.
        """
        latents = self.encode(sample).latents.permute(0, 2, 3, 1)  # (B, h, w, d)
        # 256 tokens at a time: for 131,072 codes their products take 128 MiB in float32, all of an image 0.5 GiB
        ids = [nn.functional.linear(chunk, self.codebook).argmax(dim=-1) for chunk in latents.flatten(0, 2).split(256)]
        return torch.cat(ids).view(latents.shape[:3])

    @overload
    def decode_ids(self, ids: torch.Tensor, return_dict: Literal[True] = True) -> DecoderOutput: ...

    @overload
    def decode_ids(self, ids: torch.Tensor, return_dict: Literal[False]) -> tuple[torch.Tensor]: ...

    @apply_forward_hook
    def decode_ids(self, ids: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """
        Decodes token ids to images.

        Args:
            ids (`torch.LongTensor` of shape `(batch_size, height, width)`):
                Ids in `[0, num_vq_embeddings)`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`~diffusers.models.autoencoders.vae.DecoderOutput`] or a plain tuple.

        Returns:
            [`~diffusers.models.autoencoders.vae.DecoderOutput`] or `tuple`: `sample` of shape `(batch_size,
            out_channels, height * spatial_stride, width * spatial_stride)`, about in `[-1, 1]`.
        """
        codes = self.quantize.embedding(ids).permute(0, 3, 1, 2)  # (B, d, h, w)
        sample = self.decode(codes, force_not_quantize=True).sample
        if not return_dict:
            return (sample,)
        return DecoderOutput(sample=sample)

    @classmethod
    def from_original_config(cls, config: dict[str, Any]) -> Self:
        """
        Builds the autoencoder that the `config.json` of an original checkpoint (`AutoencoderVQ`) describes.

        Args:
            config (`dict`):
                The configuration. Its `_quantizer_name` names the quantizer.

        Returns:
            [`AutoencoderVQ`]: With random weights, except for the fixed codebook of an `"LFQuantizer"`.

        Raises:
            ValueError: If the quantizer is not supported.
        """
        quantizer = config.get("_quantizer_name", "VQuantizer")
        if quantizer not in ("VQuantizer", "LFQuantizer"):
            raise ValueError(f"`_quantizer_name` must be 'VQuantizer' or 'LFQuantizer', got {quantizer!r}.")
        num_blocks = len(config["block_out_channels"])
        down_block_types = ["DownEncoderBlock2D"] * num_blocks
        up_block_types = ["UpDecoderBlock2D"] * num_blocks
        if config.get("attn_down_block", False):
            down_block_types[-1] = "AttnDownEncoderBlock2D"
        if config.get("attn_up_block", False):
            up_block_types[0] = "AttnUpDecoderBlock2D"
        same = (
            "in_channels",
            "out_channels",
            "block_out_channels",
            "layers_per_block",
            "act_fn",
            "latent_channels",
            "norm_num_groups",
            "sample_size",
            "num_vq_embeddings",
            "vq_embed_dim",
        )
        autoencoder = cls(
            **{key: config[key] for key in same if key in config},
            down_block_types=tuple(down_block_types),
            up_block_types=tuple(up_block_types),
        )
        if quantizer == "LFQuantizer":
            num_codes, num_bits = autoencoder.codebook.shape
            bits = 2 ** torch.arange(num_bits - 1, -1, -1)
            signs = 2 * torch.arange(num_codes).unsqueeze(-1).bitwise_and(bits).ne(0).float() - 1
            autoencoder.quantize.embedding.weight = nn.Parameter(signs, requires_grad=False)
        return autoencoder

    def convert_original_weights(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Gives the weights of an original checkpoint the names that they have here.

        Args:
            state_dict (`dict[str, torch.Tensor]`):
                The original weights.

        Returns:
            `dict[str, torch.Tensor]`: The weights for `load_state_dict`, with the codebook of an `"LFQuantizer"`,
            which follows from its size.
        """
        converted = {name.replace("quantizer.", "quantize."): weight for name, weight in state_dict.items()}
        if not self.codebook.requires_grad:
            converted["quantize.embedding.weight"] = self.codebook
        return converted


__all__ = ["AutoencoderVQ"]
