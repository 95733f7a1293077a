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

"""Sizes of URSA's models, those of the published ones by name, and pipelines of a size without a checkpoint."""

import dataclasses

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast

from ..models.autoencoder_vq import AutoencoderVQ
from ..models.autoencoder_vq_cosmos3d import AutoencoderVQCosmos3D
from ..models.configuration_ursa import URSAConfig
from ..models.modeling_ursa import URSAForImageGeneration
from ..schedulers.scheduling_kinetic_optimal import KineticOptimalScheduler
from .pipeline_ursa import URSAPipeline


@dataclasses.dataclass(frozen=True)
class URSASize:
    """
    Size of a model and of its samples.

    Args:
        hidden_size (`int`):
            Channels of the network.
        intermediate_size (`int`):
            Channels inside its MLPs.
        num_layers (`int`):
            Its layers.
        num_heads (`int`):
            Its attention heads.
        num_key_value_heads (`int`):
            Its heads of keys and values.
        head_dim (`int`):
            Channels of a head.
        codebook_size (`int`):
            Image codes V.
        num_text_tokens (`int`):
            Length that prompts are padded to.
        side (`int`):
            Rows and columns of the grid of tokens of an image.
        block_out_channels (`tuple[int, ...]`):
            Channels of the image tokenizer, block by block.
        codebook_dim (`int`, *optional*, defaults to `256`):
            Channels of a code.
        text_vocab_size (`int`, *optional*, defaults to `4`):
            Text tokens. The pipeline's tokenizer knows four.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    codebook_size: int
    num_text_tokens: int
    side: int
    block_out_channels: tuple[int, ...]
    codebook_dim: int = 256
    text_vocab_size: int = 4

    @property
    def num_tokens(self) -> int:
        """`int`: Tokens of an image."""
        return self.side**2

    def build_pipeline(self, dtype: torch.dtype = torch.float32, device: str = "meta") -> URSAPipeline:
        """
        Builds a pipeline of this size, with a tokenizer of four words. Nothing is read or downloaded.

        Args:
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
                Dtype of transformer and VQ autoencoder.
            device (`str`, *optional*, defaults to `"meta"`):
                Device. On another than `"meta"`, the weights and the scheduler's codebook are random.

        Returns:
            [`URSAPipeline`]: The pipeline. On the `"meta"` device it has no weights, and its scheduler no codebook.

        Example:

        ```python
        >>> from trl_udm.pipelines.ursa_sizes import PUBLISHED_SIZES

        >>> pipe = PUBLISHED_SIZES["BAAI/URSA-1.7B-IBQ512"].build_pipeline()
        >>> f"{pipe.transformer.num_parameters():,}"
        '2,256,899,072'
        ```
        """
        backend = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "<bov>": 2, "<unk>": 3}, unk_token="<unk>"))
        backend.pre_tokenizer = WhitespaceSplit()
        config = URSAConfig(
            text_vocab_size=self.text_vocab_size,
            codebook_size=self.codebook_size,
            bov_token_id=2,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            pad_token_id=0,
            eos_token_id=1,
        )
        with torch.device(device):
            transformer = URSAForImageGeneration(config)
            vae = self._build_vae()
        scheduler = KineticOptimalScheduler(
            shift=2.0, codebook_size=self.codebook_size, codebook_dim=self.codebook_dim
        )
        if device != "meta":
            is_image = isinstance(vae, AutoencoderVQ)
            codes = vae.codebook.detach() if is_image else torch.empty(self.codebook_size, self.codebook_dim)
            scheduler.set_codebook(codes.normal_())
        return URSAPipeline(
            transformer=nn.Module.to(transformer, dtype),
            scheduler=scheduler,
            tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"),
            vae=nn.Module.to(vae, dtype),  # that of diffusers warns of a cast
            max_prompt_length=self.num_text_tokens,
        )

    def _build_vae(self) -> AutoencoderVQ | AutoencoderVQCosmos3D:
        num_blocks = len(self.block_out_channels)
        return AutoencoderVQ(
            block_out_channels=self.block_out_channels,
            down_block_types=["DownEncoderBlock2D"] * num_blocks,
            up_block_types=["UpDecoderBlock2D"] * num_blocks,
            layers_per_block=2,
            latent_channels=self.codebook_dim,
            vq_embed_dim=self.codebook_dim,
            num_vq_embeddings=self.codebook_size,
            sample_size=self.side * 2 ** (num_blocks - 1),
        )


@dataclasses.dataclass(frozen=True)
class URSAVideoSize(URSASize):
    """
    Size of a model of videos, as [`URSASize`], whose tokenizer has 320 x 512 pixels and 64,000 codes. The numbers of
    frames, rows and columns follow from the size of a call.

    Args:
        patch_size (`int`, *optional*, defaults to `2`):
            Stride of the tokenizer's wavelet transform.
        latent_channels (`int`, *optional*, defaults to `256`):
            Its channels before those of a code.
        sample_frames (`int`, *optional*, defaults to `49`):
            Frames of a pass through it.
    """

    patch_size: int = 2
    latent_channels: int = 256
    sample_frames: int = 49

    def _build_vae(self) -> AutoencoderVQCosmos3D:
        return AutoencoderVQCosmos3D(
            block_out_channels=self.block_out_channels,
            latent_channels=self.latent_channels,
            patch_size=self.patch_size,
            sample_frames=self.sample_frames,
        )


# The network is Qwen3's of this number of parameters, with embeddings and a head for the codes of the image tokenizer
_URSA_1_7B_IBQ512 = URSASize(
    hidden_size=2048,
    intermediate_size=6144,
    num_layers=28,
    num_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    codebook_size=131_072,
    num_text_tokens=320,
    side=32,
    block_out_channels=(128, 128, 256, 256, 512),
    text_vocab_size=151_669,
)
_URSA_1_7B_IBQ1024 = dataclasses.replace(_URSA_1_7B_IBQ512, side=64)

_URSA_1_7B_FSQ320 = URSAVideoSize(
    **{
        **dataclasses.asdict(_URSA_1_7B_IBQ512),
        "codebook_size": 64_000,
        "codebook_dim": 6,
        "block_out_channels": (128, 256, 512, 512),
    }
)

PUBLISHED_SIZES = {
    "BAAI/URSA-0.6B-IBQ1024": dataclasses.replace(_URSA_1_7B_IBQ1024, hidden_size=1024, intermediate_size=3072),
    "BAAI/URSA-1.7B-IBQ512": _URSA_1_7B_IBQ512,
    "BAAI/URSA-1.7B-IBQ1024": _URSA_1_7B_IBQ1024,
    "BAAI/URSA-0.6B-FSQ320": dataclasses.replace(_URSA_1_7B_FSQ320, hidden_size=1024, intermediate_size=3072),
    "BAAI/URSA-1.7B-FSQ320": _URSA_1_7B_FSQ320,
    "Yovecents/URSA-1.7B-IBQ512-UDMGRPO-GenEval": _URSA_1_7B_IBQ512,
    "Yovecents/URSA-1.7B-IBQ512-UDMGRPO-PickScore": _URSA_1_7B_IBQ512,
}
"""The published models by the name of their repository on the Hub."""
