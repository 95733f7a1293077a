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

import math
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.autoencoders.autoencoder_kl_cosmos import (
    CosmosCausalAttention,
    CosmosCausalConv3d,
    CosmosDecoder3d,
    CosmosEncoder3d,
    CosmosTemporalAttentionProcessor2_0,
    CosmosUpsample3d,
)
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # the loader that diffusers looks up by this name
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ..weights import load_every_weight
from .frames import check_num_frames
from .quantizers import FSQuantizer, LFQuantizer, Quantizer


if TYPE_CHECKING:  # diffusers' decorator has no types
    Init = TypeVar("Init", bound=Callable[..., None])

    def register_to_config(init: Init) -> Init: ...
else:
    from diffusers.configuration_utils import register_to_config


ORIGINAL_LEVELS = (8, 8, 8, 5, 5, 5)
"""Levels of every original tokenizer: 64,000 codes."""

_RENAMES = (
    (r"\.attentions\.(\d+)\.0\.", r".attentions.\1."),
    (r"\.attentions\.(\d+)\.1\.", r".temp_attentions.\1."),
    (r"\.group_norm\.", ".norm.norm."),
    (r"\.norm([12])\.", r".norm\1.norm."),
    (r"\.conv_norm_out\.", ".norm_out.norm."),
    (r"\.(conv_in|conv_out|conv1|conv2)\.0\.", r".\1.conv_s."),
    (r"\.(conv_in|conv_out|conv1|conv2)\.1\.", r".\1.conv_t."),
)
"""Patterns in the names of the original weights, and what diffusers' names have instead. They apply in order."""


class FullTemporalAttentionProcessor(CosmosTemporalAttentionProcessor2_0):
    """Attention over time in which all frames see each other, where diffusers' own is causal."""

    def __call__(
        self, attn: CosmosCausalAttention, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return super().__call__(attn, hidden_states)


class AutoencoderVQCosmos3D(ModelMixin, AutoencoderMixin, ConfigMixin):
    r"""
    Video tokenizer of URSA: diffusers' [`~diffusers.models.autoencoders.autoencoder_kl_cosmos.CosmosEncoder3d`] and
    `CosmosDecoder3d` of Cosmos (https://huggingface.co/papers/2501.03575), with codes in between that are rounded
    channel by channel. Over time all latent frames of a pass attend to each other. In diffusers' Cosmos this attention
    is causal.

    T frames, T = 1 + k · `temporal_stride`, become 1 + k latent frames, and these become T frames again. An image is a
    video of one frame.

    **Long videos.** A pass takes at most n = `sample_frames` frames, or m = 1 + ⌊(n − 1) / `temporal_stride`⌋ latent
    frames. Up to there both modes of `temporal_tiling` are the same. Longer videos are worked on in windows, which
    keeps the memory of a pass bounded, and shows the network no more frames than it was trained with.

    * `"overlap"`, the default: neighboring windows share a frame. The second window's copy of it is dropped, in pixels
      and in latents, so that the numbers of frames are those above for every T.
    * `"original"`: as the authors' code does it. The windows share a frame of the video but no latent frame, and what
      does not fill a window is lost. With n = 17 and a stride of 4, 33 frames become 10 latent frames and not 9, 21
      frames become 5 latent frames, and 13 latent frames become 33 frames instead of 49.

    The default is `"overlap"` since a network draws 1 + k latent frames, of which `"original"` loses some. It is there
    to get the numbers of the authors' code. To have one window for all frames, load with a larger `sample_frames`.

    `enable_slicing()` encodes and decodes one sample of a batch at a time.

    Args:
        in_channels (`int`, *optional*, defaults to `3`):
            Channels of a frame.
        out_channels (`int`, *optional*, defaults to `3`):
            Channels of a decoded frame.
        block_out_channels (`tuple[int, ...]`, *optional*, defaults to `(128, 256, 512, 512)`):
            Channels of the encoder, block by block.
        layers_per_block (`int`, *optional*, defaults to `2`):
            ResNet blocks of a block.
        latent_channels (`int`, *optional*, defaults to `16`):
            Channels between the encoder and the layer that makes the channels of a code.
        sample_size (`int` or `tuple[int, int]`, *optional*, defaults to `(320, 512)`):
            Side, or height and width, that [`URSAPipeline`] draws by default.
        sample_frames (`int`, *optional*, defaults to `17`):
            Number of frames n that a pass takes at most, above `temporal_stride`.
        num_vq_embeddings (`int`, *optional*, defaults to `64000`):
            Number of codes.
        vq_embed_dim (`int`, *optional*, defaults to `6`):
            Channels of a code.
        levels (`tuple[int, ...]`, *optional*, defaults to `(8, 8, 8, 5, 5, 5)`):
            Numbers of values of the channels of a code, for [`FSQuantizer`]. `None` means [`LFQuantizer`].
        patch_size (`int`, *optional*, defaults to `4`):
            Stride of the wavelet transform before the network, a power of 2.
        spatial_stride (`int`, *optional*, defaults to `8`):
            Number of pixels that a token covers in each direction, a power of 2.
        temporal_stride (`int`, *optional*, defaults to `4`):
            Number of frames that a token covers, a power of 2.
        temporal_tiling (`str`, *optional*, defaults to `"overlap"`):
            `"overlap"` or `"original"`.

    Raises:
        ValueError: If the numbers of codes and channels do not fit each other, or a setting is out of its range.

    Example:

    ```python
    >>> import torch
    >>> from trl_udm import AutoencoderVQCosmos3D

    >>> vae = AutoencoderVQCosmos3D(block_out_channels=(8, 8, 8, 8), layers_per_block=1)
    >>> ids = vae.encode_to_ids(torch.rand(1, 3, 9, 32, 48) * 2 - 1)
    >>> ids.shape
    torch.Size([1, 3, 4, 6])
    >>> vae.decode_ids(ids).sample.shape
    torch.Size([1, 3, 9, 32, 48])
    ```
    """

    config: Any  # with attributes, where diffusers says `dict`
    config_name: Any = "config.json"

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        latent_channels: int = 16,
        sample_size: int | tuple[int, int] = (320, 512),
        sample_frames: int = 17,
        num_vq_embeddings: int = 64_000,
        vq_embed_dim: int = 6,
        levels: tuple[int, ...] | None = ORIGINAL_LEVELS,
        patch_size: int = 4,
        spatial_stride: int = 8,
        temporal_stride: int = 4,
        temporal_tiling: Literal["overlap", "original"] = "overlap",
    ):
        super().__init__()
        if temporal_tiling not in ("overlap", "original"):
            raise ValueError(f"`temporal_tiling` must be 'overlap' or 'original', got {temporal_tiling!r}.")
        if sample_frames <= temporal_stride:
            raise ValueError(
                f"`sample_frames` must be above `temporal_stride`, {temporal_stride}, got {sample_frames}. Try "
                f"{temporal_stride + 1}."
            )
        for name, stride in {"spatial_stride": spatial_stride, "temporal_stride": temporal_stride}.items():
            if stride < patch_size or any(number < 1 or number & (number - 1) for number in (stride, patch_size)):
                raise ValueError(
                    f"`{name}` must be a power of 2 that is at least `patch_size`, {patch_size}, got {stride}."
                )
        self.quantizer: Quantizer = LFQuantizer(vq_embed_dim) if levels is None else FSQuantizer(levels)
        sizes = (self.quantizer.num_codes, self.quantizer.num_channels)
        if sizes != (num_vq_embeddings, vq_embed_dim):
            raise ValueError(
                f"`num_vq_embeddings` and `vq_embed_dim` must be {sizes[0]} and {sizes[1]} for `levels` {levels}, got "
                f"{num_vq_embeddings} and {vq_embed_dim}."
            )
        settings: Any = {
            "num_resnet_blocks": layers_per_block,
            "attention_resolutions": (),
            "patch_size": patch_size,
            "spatial_compression_ratio": spatial_stride,
            "temporal_compression_ratio": temporal_stride,
        }
        channels = tuple(block_out_channels)
        self.encoder = CosmosEncoder3d(in_channels, latent_channels, channels, **settings)
        self.decoder = CosmosDecoder3d(latent_channels, out_channels, channels[1:] + channels[-1:], **settings)
        for network in (self.encoder, self.decoder):
            attention = CosmosCausalAttention(1, channels[-1], processor=FullTemporalAttentionProcessor())
            network.mid_block.temp_attentions = nn.ModuleList([attention])
        self.quant_conv = CosmosCausalConv3d(latent_channels, vq_embed_dim, kernel_size=1, padding=0)
        self.post_quant_conv = CosmosCausalConv3d(vq_embed_dim, latent_channels, kernel_size=1, padding=0)
        self.use_slicing = False

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
        return self.config.spatial_stride

    @property
    def temporal_stride(self) -> int:
        """`int`: Number of frames that a token covers."""
        return self.config.temporal_stride

    @property
    def decoded_strides(self) -> tuple[int, int]:
        """
        `tuple[int, int]`: Numbers of pixels and of frames that the decoder makes of a token. With too few blocks, or a
        spatial stride below the temporal one, these are not those that the encoder takes.
        """
        resizes = [layer for layer in self.decoder.modules() if isinstance(layer, CosmosUpsample3d)]
        num_spatial = sum(layer.spatial_upsample for layer in resizes)
        num_temporal = sum(layer.temporal_upsample for layer in resizes)
        return self.config.patch_size * 2**num_spatial, self.config.patch_size * 2**num_temporal

    @overload
    def encode(self, sample: torch.Tensor, return_dict: Literal[True] = True) -> VQEncoderOutput: ...

    @overload
    def encode(self, sample: torch.Tensor, return_dict: Literal[False]) -> tuple[torch.Tensor]: ...

    @apply_forward_hook
    def encode(self, sample: torch.Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[torch.Tensor]:
        """
        Encodes videos to latents.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, num_frames, height, width)`):
                Frames in `[-1, 1]`. Their sides are multiples of `spatial_stride`, and their number is 1 more than a
                multiple of `temporal_stride`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`~diffusers.models.autoencoders.vq_model.VQEncoderOutput`] or a plain tuple.

        Returns:
            [`~diffusers.models.autoencoders.vq_model.VQEncoderOutput`] or `tuple`: `latents` of shape `(batch_size,
            vq_embed_dim, 1 + (num_frames - 1) / temporal_stride, height / spatial_stride, width / spatial_stride)`,
            before they are rounded.

        Raises:
            ValueError: If the shape of `sample` is not as above. With `temporal_tiling="original"` any number of
                frames is taken.
        """
        config, shape = self.config, tuple(sample.shape)
        if sample.ndim != 5 or shape[1] != config.in_channels:
            raise ValueError(
                f"`sample` must have shape (batch_size, {config.in_channels}, num_frames, height, width), got {shape}."
            )
        for name, side in {"height": shape[3], "width": shape[4]}.items():
            if side % config.spatial_stride:
                nearest = max(1, round(side / config.spatial_stride)) * config.spatial_stride
                raise ValueError(
                    f"The {name} of `sample` must be a multiple of {config.spatial_stride}, got {side}. Try {nearest}."
                )
        if config.temporal_tiling != "original":
            check_num_frames("The number of frames of `sample`", shape[2], config.temporal_stride)
        num_dropped = 0 if config.temporal_tiling == "original" else 1
        num_frames, _ = self._window_lengths
        latents = self._map(self._encode, sample, num_frames, num_frames - 1, num_dropped)
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def encode_to_ids(self, sample: torch.Tensor) -> torch.Tensor:
        """
        Encodes videos or images to token ids.

        Args:
            sample (`torch.Tensor`):
                Videos as `encode` takes them, or images of shape `(batch_size, in_channels, height, width)`.

        Returns:
            `torch.LongTensor`: Ids in `[0, num_vq_embeddings)`, of the shape of the latents without their channels. Of
            images they have no axis of frames.

        Raises:
            ValueError: If the shape of `sample` is not that of videos or images.
        """
        if sample.ndim == 4:
            return self.encode_to_ids(sample.unsqueeze(2)).squeeze(1)
        return self.quantizer.encode(self.encode(sample).latents)

    @overload
    def decode(self, codes: torch.Tensor, return_dict: Literal[True] = True) -> DecoderOutput: ...

    @overload
    def decode(self, codes: torch.Tensor, return_dict: Literal[False]) -> tuple[torch.Tensor]: ...

    @apply_forward_hook
    def decode(self, codes: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """
        Decodes codes to videos.

        Args:
            codes (`torch.Tensor` of shape `(batch_size, vq_embed_dim, num_latent_frames, rows, columns)`):
                Codes, from the quantizer's `decode`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`~diffusers.models.autoencoders.vae.DecoderOutput`] or a plain tuple.

        Returns:
            [`~diffusers.models.autoencoders.vae.DecoderOutput`] or `tuple`: `sample` of shape `(batch_size,
            out_channels, num_frames, height, width)`, about in `[-1, 1]`.
        """
        _, num_latents = self._window_lengths
        step = num_latents if self.config.temporal_tiling == "original" else num_latents - 1
        sample = self._map(self._decode, codes.to(self.dtype), num_latents, step, num_dropped=1)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @overload
    def decode_ids(self, ids: torch.Tensor, return_dict: Literal[True] = True) -> DecoderOutput: ...

    @overload
    def decode_ids(self, ids: torch.Tensor, return_dict: Literal[False]) -> tuple[torch.Tensor]: ...

    @apply_forward_hook
    def decode_ids(self, ids: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """
        Decodes token ids to videos or images.

        Args:
            ids (`torch.LongTensor` of shape `(batch_size, num_latent_frames, rows, columns)`):
                Ids in `[0, num_vq_embeddings)`. Those of images have no axis of frames.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`~diffusers.models.autoencoders.vae.DecoderOutput`] or a plain tuple.

        Returns:
            [`~diffusers.models.autoencoders.vae.DecoderOutput`] or `tuple`: `sample` as of `decode`. Images have no
            axis of frames.

        Raises:
            ValueError: If the shape is another, or an id is out of range.
        """
        if ids.ndim not in (3, 4):
            raise ValueError(
                "`ids` must have shape (batch_size, num_latent_frames, rows, columns), or (batch_size, rows, columns) "
                f"for images, got {tuple(ids.shape)}."
            )
        is_image = ids.ndim == 3
        sample = self.decode(self.quantizer.decode(ids.unsqueeze(1) if is_image else ids)).sample
        sample = sample.squeeze(2) if is_image else sample
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @property
    def _window_lengths(self) -> tuple[int, int]:
        """Numbers of frames and of latent frames in a window."""
        config = self.config
        num_latents = (config.sample_frames - 1) // config.temporal_stride + 1
        if config.temporal_tiling == "original":
            return config.sample_frames, num_latents
        return (num_latents - 1) * config.temporal_stride + 1, num_latents

    def _encode(self, sample: torch.Tensor) -> torch.Tensor:
        if sample.device.type == "cpu" and sample.dtype != torch.float32:
            # PyTorch has no average pooling over volumes in lower precision on a CPU
            weights = {name: weight.float() for name, weight in self.encoder.state_dict(keep_vars=True).items()}
            return self.quant_conv(torch.func.functional_call(self.encoder, weights, sample.float()).to(sample.dtype))
        return self.quant_conv(self.encoder(sample))

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(codes))

    def _map(
        self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, size: int, step: int, num_dropped: int
    ) -> torch.Tensor:
        """
        Applies a function to windows along the frames of `x`, of shape `(B, C, T, H, W)`, and joins the results. Those
        of all windows but the first lose their first `num_dropped` frames.
        """
        if self.use_slicing and len(x) > 1:
            return torch.cat([self._map(function, one, size, step, num_dropped) for one in x.split(1)])
        length = x.shape[2]
        if length <= size:
            return function(x)
        # The original leaves the last window out if it is not whole
        end = length - size + 1 if self.config.temporal_tiling == "original" else length - 1
        parts = [function(x[:, :, start : start + size]) for start in range(0, end, step)]
        return torch.cat([parts[0], *(part[:, :, num_dropped:] for part in parts[1:])], dim=2)

    @classmethod
    def from_original_config(cls, config: dict[str, Any]) -> Self:
        """
        Builds the tokenizer that the `config.json` of an original checkpoint (`AutoencoderVQCosmos3D`) describes.

        Args:
            config (`dict`):
                The configuration. Its `_quantizer_name` is `"FSQuantizer"`, with the original's levels if it has no
                `levels`, or `"LFQuantizer"`. Its `sample_size` is not used: it is not that of the models of videos.
                `temporal_tiling` may be added.

        Returns:
            [`AutoencoderVQCosmos3D`]: With random weights.

        Raises:
            ValueError: If the quantizer is not supported.
        """
        quantizer = config.get("_quantizer_name", "FSQuantizer")
        if quantizer not in ("FSQuantizer", "LFQuantizer"):
            raise ValueError(f"`_quantizer_name` must be 'FSQuantizer' or 'LFQuantizer', got {quantizer!r}.")
        same = (
            "in_channels",
            "out_channels",
            "block_out_channels",
            "layers_per_block",
            "latent_channels",
            "sample_frames",
            "vq_embed_dim",
            "patch_size",
            "spatial_stride",
            "temporal_stride",
            "temporal_tiling",
        )
        settings = {key: config[key] for key in same if key in config}
        levels = tuple(config.get("levels", ORIGINAL_LEVELS)) if quantizer == "FSQuantizer" else None
        # The original ignores `num_vq_embeddings`
        num_codes = 2 ** settings["vq_embed_dim"] if levels is None else math.prod(levels)
        return cls(**settings, levels=levels, num_vq_embeddings=num_codes)

    @staticmethod
    def convert_original_weights(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Gives the weights of an original checkpoint the names and shapes that they have here.

        Args:
            state_dict (`dict[str, torch.Tensor]`):
                The original weights.

        Returns:
            `dict[str, torch.Tensor]`: The weights for `load_state_dict`.
        """
        converted = {}
        for name, weight in state_dict.items():
            for pattern, replacement in _RENAMES:
                name = re.sub(pattern, replacement, name)
            # The attention's layers are linear there, and convolutions of one voxel here
            converted[name] = weight[..., None, None, None] if weight.ndim == 2 else weight
        return converted


__all__ = ["AutoencoderVQCosmos3D", "FullTemporalAttentionProcessor"]
