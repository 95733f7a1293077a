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

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self, Unpack, overload

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from diffusers.video_processor import VideoProcessor
from huggingface_hub import snapshot_download
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..cut_prompts import PromptCutter
from ..models.autoencoder_vq import AutoencoderVQ
from ..models.autoencoder_vq_cosmos3d import AutoencoderVQCosmos3D
from ..models.configuration_ursa import URSAConfig
from ..models.frames import check_num_frames
from ..models.modeling_ursa import URSAForImageGeneration
from ..models.token_scores import TILE_WIDTH, is_matrix
from ..schedulers.draws import TiledLogits
from ..schedulers.scheduling_kinetic_optimal import KineticOptimalScheduler
from .conditions import ConditionMixin, read_frames
from .images import check_image_prompts
from .original_checkpoint import (
    check_configs,
    find_vae_class,
    is_original_checkpoint,
    load_json,
    load_original_components,
)
from .pipeline_output import URSAPipelineOutput
from .pipeline_udm import HUB_KWARGS, CallArguments, StepCallback, UDMPipeline


class URSACallArguments(CallArguments, total=False):
    """Those of [`URSAPipeline`]."""

    height: int | None
    width: int | None
    num_images_per_prompt: int
    num_frames: int
    image: Any
    video: Any
    cond_latents: torch.Tensor | None
    cond_indices: Sequence[int] | None
    cond_noise_scale: float
    condition: Literal["clamp", "redraw"]
    motion_score: float | None
    flow_shift: float | None


class URSAPipeline(ConditionMixin, PromptCutter, UDMPipeline):
    r"""
    Images and videos with URSA (https://huggingface.co/papers/2510.24717): from text, from a first image, or as the
    continuation of a video.

    The network reads `[text, BOV, image tokens]`: the text, padded on the left to `max_prompt_length` with its padding
    visible; the beginning-of-vision token; and the codes of the image plus the size of the text vocabulary. A video
    has the codes of all its latent frames, one after the other.

    The position of text token i is (i, i, i), that of BOV is (T, T, T), and that of the image token in frame f, row r
    and column q is (T + 1 + f, r, q). Logits are shifted by one: those at BOV predict image token 0.

    **Conditions.** An `image`, a `video` or `cond_latents` are the first frames of the sample, or those that
    `cond_indices` lists. There are two ways to use them:

    * `condition="clamp"`, the default: these frames stay as they are in every step, and the sample has them.
    * `condition="redraw"`: as the authors' code does it. These frames are only part of the first state. Their tokens
      then move as all others do, and the last step draws all anew, so that the sample shows them only as far as the
      network predicts them.

    The default is `"clamp"` since the condition is known: to show it whole in every step tells the network more, and
    URSA was trained with a time of its own for each frame, so that it knows clean frames beside noised ones.

    Args:
        transformer ([`URSAForImageGeneration`]):
            The denoiser.
        scheduler ([`KineticOptimalScheduler`]):
            The forward and reverse process.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The text tokenizer.
        vae ([`AutoencoderVQ`] or [`AutoencoderVQCosmos3D`], *optional*):
            The tokenizer of images or of videos. Without it the pipeline draws token ids (`output_type="latent"`) and
            no images.
        max_prompt_length (`int`, *optional*, defaults to `320`):
            Length T in tokens that every prompt is padded or truncated to. The first truncation is warned of.
        vae_scale_factor (`int`, *optional*, defaults to `16`):
            Number of pixels that a token covers in each direction. Taken from the image tokenizer if there is one.
        vae_temporal_scale_factor (`int`, *optional*):
            Number of frames that a token covers, for models of videos. Taken from the tokenizer if there is one.

    Raises:
        ValueError: If the components have codebooks of different sizes, or the video tokenizer has strides that its
            decoder does not invert.

    Example:

    ```python
    >>> import torch
    >>> from trl_udm import URSAPipeline

    >>> pipe = URSAPipeline.from_pretrained("BAAI/URSA-1.7B-IBQ512", dtype=torch.bfloat16).to("cuda")
    >>> image = pipe("a photo of a red car left of a blue bench", height=512, width=512).images[0]
    ```
    """

    transformer: URSAForImageGeneration
    scheduler: KineticOptimalScheduler
    tokenizer: PreTrainedTokenizerBase
    vae: AutoencoderVQ | AutoencoderVQCosmos3D | None
    model_cpu_offload_seq = "transformer->vae"
    takes_token_times = True
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents", "logits"]

    def __init__(
        self,
        transformer: URSAForImageGeneration,
        scheduler: KineticOptimalScheduler,
        tokenizer: PreTrainedTokenizerBase,
        vae: AutoencoderVQ | AutoencoderVQCosmos3D | None = None,
        max_prompt_length: int = 320,
        vae_scale_factor: int = 16,
        vae_temporal_scale_factor: int | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, tokenizer=tokenizer, vae=vae)
        sizes = {
            "transformer.config.codebook_size": transformer.config.codebook_size,
            "scheduler.config.codebook_size": scheduler.config.codebook_size,
        }
        if vae is not None:
            vae_scale_factor, vae_temporal_scale_factor = vae.spatial_stride, vae.temporal_stride
            sizes["vae.config.num_vq_embeddings"] = vae.config.num_vq_embeddings
        self.register_to_config(
            max_prompt_length=max_prompt_length,
            vae_scale_factor=vae_scale_factor,
            vae_temporal_scale_factor=vae_temporal_scale_factor,
        )
        if len(set(sizes.values())) > 1:
            raise ValueError(f"The components must share one codebook, got sizes {sizes}.")
        if isinstance(vae, AutoencoderVQCosmos3D) and vae.decoded_strides != (vae.spatial_stride, vae.temporal_stride):
            raise ValueError(
                f"`vae` must have strides that its decoder inverts, got {(vae.spatial_stride, vae.temporal_stride)} "
                f"pixels and frames a token in the encoder, and {vae.decoded_strides} in the decoder. Add blocks in "
                "`block_out_channels`, or use strides of which the spatial one is not below the temporal one."
            )
        self.modality = "image" if vae_temporal_scale_factor is None else "video"
        self.image_processor = VideoProcessor(vae_scale_factor=vae_scale_factor)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        """
        Loads a pipeline from a folder or a Hub repository, in this library's format or in the original one.

        In the original format `model_index.json` names classes of the authors' package. None of their code is run, and
        no pickle that holds more than tensors is loaded.

        Args:
            pretrained_model_name_or_path (`str` or `Path`):
                A folder, or a repository such as `"BAAI/URSA-1.7B-IBQ512"`.
            kwargs:
                As in [`~diffusers.DiffusionPipeline.from_pretrained`], with `use_safetensors=True` by default. The
                original format takes `dtype`, `cache_dir`, `revision`, `token`, `local_files_only`, `force_download`,
                `max_prompt_length` and components.

        Returns:
            [`URSAPipeline`]: The pipeline, in evaluation mode.

        Raises:
            OSError: If a part is missing.
            ValueError: If a part is damaged, lacks a weight, has the wrong shape, or holds more than tensors.
        """
        if "vae" in kwargs and kwargs["vae"] is None:
            hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
            index: Any = cls.load_config(pretrained_model_name_or_path, **hub_kwargs)
            if index["vae"][0] is not None:
                vae_config: Any = AutoencoderVQ.load_config(
                    pretrained_model_name_or_path, subfolder="vae", **hub_kwargs
                )
                kwargs["vae_scale_factor"] = 2 ** (len(vae_config["block_out_channels"]) - 1)
                if find_vae_class(vae_config) is AutoencoderVQCosmos3D:
                    kwargs["vae_scale_factor"] = vae_config["spatial_stride"]
                    kwargs["vae_temporal_scale_factor"] = vae_config["temporal_stride"]
        if is_original_checkpoint(pretrained_model_name_or_path, **kwargs):
            pipeline = cls(**load_original_components(pretrained_model_name_or_path, **kwargs))
            # As `DiffusionPipeline.from_pretrained` does, for `name_or_path`
            pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
            return pipeline
        if Path(pretrained_model_name_or_path).is_dir():
            check_configs(Path(pretrained_model_name_or_path), **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_configs(
        cls, pretrained_model_name_or_path: str | os.PathLike, dtype: torch.dtype = torch.float32, **kwargs
    ) -> Self:
        """
        Builds a pipeline without its weights, on PyTorch's `"meta"` device. [`estimate_memory`] needs no more. From a
        Hub repository, in either format, only the configurations and the tokenizer are downloaded, and for videos the
        scheduler's codes.

        Args:
            pretrained_model_name_or_path (`str` or `Path`):
                As in `from_pretrained`.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
                Dtype of transformer and VQ autoencoder.
            kwargs:
                `cache_dir`, `revision`, `token`, `local_files_only` and `force_download`.

        Returns:
            [`URSAPipeline`]: The pipeline, whose scheduler has no codebook.

        Raises:
            OSError: If a part is missing.
            TypeError: If an argument is unknown.
        """
        unknown = sorted(set(kwargs) - {*HUB_KWARGS})
        if unknown:
            raise TypeError(f"Arguments not supported without weights: {unknown}.")
        is_original = is_original_checkpoint(pretrained_model_name_or_path, **kwargs)
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    str(pretrained_model_name_or_path), allow_patterns=["*.json", "tokenizer/*"], **kwargs
                )
            )
        check_configs(folder)
        transformer_config, vae_config = (load_json(folder / name / "config.json") for name in ("transformer", "vae"))
        with torch.device("meta"):
            config = URSAConfig.from_original_config(transformer_config) if is_original else None
            transformer: Any = URSAForImageGeneration(config or URSAConfig.from_dict(transformer_config))
            vae_class: Any = find_vae_class(vae_config)
            vae: Any = (vae_class.from_original_config if is_original else vae_class.from_config)(vae_config)
        scheduler_config: Any = KineticOptimalScheduler.load_config(folder / "scheduler")
        if scheduler_config.get("codebook_size") is None:
            codebook_dim = vae.config.vq_embed_dim
            if vae_class is AutoencoderVQCosmos3D:  # whose codes are not those of the scheduler, a small file
                codes = KineticOptimalScheduler.from_pretrained(
                    pretrained_model_name_or_path, subfolder="scheduler", **kwargs
                )
                codebook_dim = codes.config.codebook_dim
            sizes = {"codebook_size": transformer.config.codebook_size, "codebook_dim": codebook_dim}
            scheduler_config = {**scheduler_config, **sizes}
        scheduler = KineticOptimalScheduler.from_config(scheduler_config)
        index: Any = cls.load_config(folder)
        return cls(
            transformer=transformer.to(dtype),
            scheduler=scheduler,
            tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
            vae=nn.Module.to(vae, dtype),  # that of diffusers warns of a cast
            max_prompt_length=index.get("max_prompt_length", 320),
        )

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        folder = super().download(pretrained_model_name, **kwargs)
        check_configs(Path(folder), **kwargs)
        return folder

    def latent_shape(
        self, height: int | None = None, width: int | None = None, num_frames: int = 1
    ) -> tuple[int, int, int]:
        """
        Shape of the token grid.

        Args:
            height (`int`, *optional*):
                Height of the image in pixels, a multiple of the image tokenizer's stride. Defaults to
                `vae.config.sample_size`, which is one number or a height and a width.
            width (`int`, *optional*):
                Width of the image in pixels, likewise.
            num_frames (`int`, *optional*, defaults to `1`):
                Number of frames. A model of videos takes 1 more than a multiple of its tokenizer's temporal stride.

        Returns:
            `tuple[int, int, int]`: The numbers of latent frames (1 for images), rows and columns.

        Raises:
            ValueError: If `height` or `width` is not a positive multiple of the stride, or not given without a `vae`,
                or the tokenizer does not give the number of frames back.
        """
        if self.vae is not None:
            sample_size = self.vae.config.sample_size
            native_height, native_width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
            height = native_height if height is None else height
            width = native_width if width is None else width
        elif height is None or width is None:
            raise ValueError(f"`height` and `width` must be given without a `vae`, got {height} and {width}.")
        stride = self.config.vae_scale_factor
        for name, value in (("height", height), ("width", width)):
            if value <= 0 or value % stride != 0:
                nearest = max(stride, round(value / stride) * stride)
                raise ValueError(f"`{name}` must be a positive multiple of {stride}, got {value}. Try {nearest}.")
        temporal_stride = self.config.vae_temporal_scale_factor
        if temporal_stride is None:
            if num_frames != 1:
                raise ValueError(f"`num_frames` must be 1, got {num_frames}: the tokenizer is one of images. Try 1.")
            return 1, height // stride, width // stride
        limit = None
        if self.vae is not None and self.vae.config.temporal_tiling == "original":
            limit = self.vae.config.sample_frames
        check_num_frames("`num_frames`", num_frames, temporal_stride, limit)
        return 1 + (num_frames - 1) // temporal_stride, height // stride, width // stride

    def encode_prompt(self, prompt: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        self._warn_of_cut_prompts(prompt, self.tokenizer, self.config.max_prompt_length, "the pipeline")
        encoded = self.tokenizer(
            prompt,
            padding="max_length",
            padding_side="left",
            truncation=True,
            max_length=self.config.max_prompt_length,
            return_tensors="pt",
        )
        device = self._execution_device
        return encoded["input_ids"].to(device), encoded["attention_mask"].to(device)  # (B, T)

    @staticmethod
    def prepare_position_ids(
        num_text_tokens: int, latent_shape: tuple[int, ...], device: torch.device | None = None
    ) -> torch.Tensor:
        """
        Three-axis positions of `[text, BOV, image tokens]`.

        Args:
            num_text_tokens (`int`):
                Number of text tokens T.
            latent_shape (`tuple[int, int, int]`):
                Frames, rows and columns, whose product is the number of image tokens N.
            device (`torch.device`, *optional*):
                Device of the result.

        Returns:
            `torch.LongTensor` of shape `(T + 1 + N, 3)`: Frame, row and column of each token.
        """
        text = torch.arange(num_text_tokens + 1, device=device).unsqueeze(-1).expand(-1, 3)
        grid = torch.meshgrid(*(torch.arange(size, device=device) for size in latent_shape), indexing="ij")
        image = torch.stack(grid, dim=-1).flatten(0, 2)  # (N, 3)
        image[:, 0] += num_text_tokens + 1
        return torch.cat([text, image])

    def prepare_denoiser_inputs(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        noised_samples: torch.Tensor,
        latent_shape: tuple[int, ...],
        labels: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        # `prompt_mask` and `t` are not used: URSA was trained with visible padding and without the time
        batch_size, num_text_tokens = prompt_ids.shape
        config = self.transformer.config
        bov = prompt_ids.new_full((batch_size, 1), config.bov_token_id)
        position_ids = self.prepare_position_ids(num_text_tokens, latent_shape, device=prompt_ids.device)
        input_ids = torch.cat([prompt_ids, bov, noised_samples + config.text_vocab_size], dim=1)  # (B, T + 1 + N)
        inputs = {
            "input_ids": input_ids,
            "position_ids": position_ids.unsqueeze(0).expand(batch_size, -1, -1),
        }
        if labels is not None:
            shift_labels = torch.full_like(inputs["input_ids"], -100)
            shift_labels[:, num_text_tokens:-1] = labels
            inputs["shift_labels"] = shift_labels
        return inputs

    def denoise(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        noised_samples: torch.Tensor,
        latent_shape: tuple[int, ...],
        t: torch.Tensor | None = None,
    ) -> torch.Tensor:
        inputs = self.prepare_denoiser_inputs(prompt_ids, prompt_mask, noised_samples, latent_shape)
        return self.transformer(**inputs, logits_to_keep=noised_samples.size(1) + 1).logits[:, :-1]

    def _predict(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        noised_samples: torch.Tensor,
        latent_shape: tuple[int, ...],
        t: torch.Tensor,
        guidance_scale: float | None,
        **denoise_kwargs,
    ) -> torch.Tensor | TiledLogits:
        head, codebook_size = self.transformer.get_output_embeddings(), self.scheduler.config.codebook_size
        is_tiled = codebook_size > getattr(self.scheduler, "max_untiled_codes", math.inf)
        # Hooks that move weights, or cast the head, replace its `forward`
        if not is_tiled or not is_matrix(head) or "forward" in vars(head):
            return super()._predict(
                prompt_ids, prompt_mask, noised_samples, latent_shape, t, guidance_scale, **denoise_kwargs
            )
        inputs = self.prepare_denoiser_inputs(prompt_ids, prompt_mask, noised_samples, latent_shape)
        outputs = self.transformer(**inputs, logits_to_keep=noised_samples.size(1) + 1, skip_logits=True)
        hidden_states = outputs.last_hidden_state[:, :-1]  # (B, N, D), with guidance (2 * B, N, D)
        num_parts = 1 if guidance_scale is None else 2
        shape = (len(hidden_states) // num_parts, noised_samples.size(1), codebook_size)
        parts = hidden_states.reshape(num_parts, shape[0] * shape[1], -1)

        def compute(rows: slice | torch.Tensor, codes: slice) -> torch.Tensor:
            # In two dimensions: on a CPU, PyTorch multiplies a batch of slices in bfloat16 many times slower
            logits = F.linear(parts[:, rows].flatten(0, 1), head.weight[codes]).unflatten(0, (num_parts, -1))
            if guidance_scale is None:
                return logits[0].float()
            return torch.lerp(logits[1], logits[0], guidance_scale).float()

        return TiledLogits(shape, compute)

    def score(
        self,
        model: nn.Module,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        noised_samples: torch.Tensor,
        latent_shape: tuple[int, ...],
        labels: torch.Tensor,
        t: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        As in [`UDMPipeline`], except that the network scores the tokens itself where TRL's fused head cannot, with an
        adapter on the head, or is slow, with a large codebook on a CPU, where it has no Triton kernel.
        """
        is_fast = labels.device.type != "cpu" or self.scheduler.config.codebook_size <= TILE_WIDTH
        if labels.ndim == 3 or (is_fast and not self._has_adapter_on_head):
            return super().score(model, prompt_ids, prompt_mask, noised_samples, latent_shape, labels, t)
        inputs = self.prepare_denoiser_inputs(prompt_ids, prompt_mask, noised_samples, latent_shape, labels=labels)
        return self._select_labels(model(**inputs), inputs["shift_labels"], labels)

    def predict_tokens(
        self,
        model: nn.Module,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        noised_samples: torch.Tensor,
        latent_shape: tuple[int, ...],
        labels: torch.Tensor,
        t: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, nn.Module]:
        """As in [`UDMPipeline`], except that no logits of all tokens are made where the head is one matrix."""
        head = extract_model_from_parallel(model).get_output_embeddings()
        if not is_matrix(head):
            return super().predict_tokens(model, prompt_ids, prompt_mask, noised_samples, latent_shape, labels, t)
        inputs = self.prepare_denoiser_inputs(prompt_ids, prompt_mask, noised_samples, latent_shape)
        outputs = model(**inputs, logits_to_keep=noised_samples.size(1) + 1, skip_logits=True)
        return outputs.last_hidden_state[:, :-1], head

    @torch.no_grad()
    def encode_completions(self, completions: list[Any], latent_shape: tuple[int, ...]) -> torch.Tensor:
        """
        As in [`UDMPipeline`].

        Raises:
            ValueError: If a completion has another size than the latent shape says.
        """
        vae = self._check_vae()
        height, width = (self.config.vae_scale_factor * size for size in latent_shape[1:])
        videos = [[one] if latent_shape[0] == 1 else one for one in completions]
        pixels = read_frames("completion", videos, height, width).to(self._execution_device, vae.dtype)
        tokens = vae.encode_to_ids(pixels.squeeze(2) if vae.temporal_stride is None else pixels).flatten(1)
        if tokens.size(1) != torch.Size(latent_shape).numel():
            raise ValueError(f"`completion` must fill the latent shape {latent_shape}, got {tokens.size(1)} tokens.")
        return tokens

    @overload
    def decode(
        self, clean_samples: torch.Tensor, latent_shape: tuple[int, ...], output_type: Literal["pil"] = "pil"
    ) -> list[Image.Image]: ...

    @overload
    def decode(
        self, clean_samples: torch.Tensor, latent_shape: tuple[int, ...], output_type: Literal["pil", "np", "pt"]
    ) -> Any: ...

    @torch.no_grad()
    def decode(
        self,
        clean_samples: torch.Tensor,
        latent_shape: tuple[int, ...],
        output_type: Literal["pil", "np", "pt"] = "pil",
    ) -> Any:
        """
        Decodes tokens to images or videos.

        Args:
            clean_samples (`torch.LongTensor` of shape `(B, N)`):
                Codes.
            latent_shape (`tuple[int, int, int]`):
                From `latent_shape`. With an image tokenizer it has one frame.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` or `"pt"`.

        Returns:
            `list[PIL.Image.Image]`, `list[list[PIL.Image.Image]]`, `np.ndarray` or `torch.Tensor`: As in
            [`URSAPipelineOutput`].

        Raises:
            ValueError: If there is more than one frame for an image tokenizer, or no tokenizer.
        """
        vae = self._check_vae()
        if latent_shape[0] == 1:
            images = vae.decode_ids(clean_samples.view(-1, *latent_shape[1:])).sample
            return self.image_processor.postprocess(images.float(), output_type=output_type)
        if vae.temporal_stride is None:
            raise ValueError(f"`decode` takes images, of one frame, got {latent_shape[0]} frames.")
        videos = vae.decode_ids(clean_samples.view(-1, *latent_shape)).sample
        return self.image_processor.postprocess_video(videos.float(), output_type=output_type)

    @contextlib.contextmanager
    def _use_shift(self, flow_shift: float | None) -> Iterator[None]:
        """A context in which the scheduler has another `shift`. Its own is restored, also after an error."""
        if flow_shift is None:
            yield
            return
        shift = self.scheduler.config.shift
        self.scheduler.register_to_config(shift=flow_shift)
        try:
            yield
        finally:
            self.scheduler.register_to_config(shift=shift)

    def _check_vae(self) -> AutoencoderVQ | AutoencoderVQCosmos3D:
        if self.vae is None:
            raise ValueError("The pipeline has no `vae` to decode images with. Pass one, or `output_type='latent'`.")
        return self.vae

    @overload
    def __call__(
        self,
        prompt: str | list[str],
        *,
        output_type: Literal["pil"] = "pil",
        return_dict: Literal[True] = True,
        **kwargs: Unpack[URSACallArguments],
    ) -> URSAPipelineOutput[list[Image.Image]]: ...

    @overload
    def __call__(
        self,
        prompt: str | list[str],
        *,
        output_type: Literal["np"],
        return_dict: Literal[True] = True,
        **kwargs: Unpack[URSACallArguments],
    ) -> URSAPipelineOutput[np.ndarray]: ...

    @overload
    def __call__(
        self,
        prompt: str | list[str],
        *,
        output_type: Literal["pt", "latent"],
        return_dict: Literal[True] = True,
        **kwargs: Unpack[URSACallArguments],
    ) -> URSAPipelineOutput[torch.Tensor]: ...

    @overload
    def __call__(
        self,
        prompt: str | list[str],
        *,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: Literal[False],
        **kwargs: Unpack[URSACallArguments],
    ) -> tuple: ...

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 7.0,
        guidance_trunc: float = 0.9,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        return_trajectory: bool = False,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        num_frames: int = 1,
        image: Any = None,
        video: Any = None,
        cond_latents: torch.Tensor | None = None,
        cond_indices: Sequence[int] | None = None,
        cond_noise_scale: float = 0.0,
        condition: Literal["clamp", "redraw"] = "clamp",
        motion_score: float | None = None,
        flow_shift: float | None = None,
    ) -> URSAPipelineOutput | tuple:
        """
        Generates images, or videos with `num_frames` above 1.

        Args:
            prompt (`str` or `list[str]`):
                What the images or videos show.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to guide away from. Defaults to the empty prompt. Not used without guidance.
            height (`int`, *optional*):
                Height in pixels, a multiple of the image tokenizer's stride. Defaults to `vae.config.sample_size`.
            width (`int`, *optional*):
                Width in pixels, likewise.
            num_inference_steps (`int`, *optional*, defaults to `25`):
                Number of denoising steps, > 0.
            guidance_scale (`float`, *optional*, defaults to `7.0`):
                Weight of classifier-free guidance. At 1 there is none, as for models that were trained without it.
            guidance_trunc (`float`, *optional*, defaults to `0.9`):
                Time in `[0, 1]` from which there is no guidance.
            num_images_per_prompt (`int`, *optional*, defaults to `1`):
                Number of images of each prompt, > 0.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of every random draw, or one for each image. A CPU generator serves any device.
            latents (`torch.LongTensor` of shape `(batch_size * num_images_per_prompt, num_tokens)`, *optional*):
                Token ids to start from instead of uniform noise. They may have the shape that `output_type="latent"`
                returns.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"` (token ids).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`URSAPipelineOutput`], or a tuple of its fields that are set.
            return_trajectory (`bool`, *optional*, defaults to `False`):
                Whether to also return the states that the sampler passed through.
            callback_on_step_end (`Callable`, `PipelineCallback` or `MultiPipelineCallbacks`, *optional*):
                Called after each step with `(pipeline, step, timestep, callback_kwargs)`. The `latents` in the
                dictionary that it returns replace the state. It may set `pipeline._guidance_scale`, and
                `pipeline._interrupt` to end with the state as it is.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                What goes into `callback_kwargs`: `"latents"` (the state) and `"logits"`.
            num_frames (`int`, *optional*, defaults to `1`):
                Number of frames, 1 more than a multiple of the video tokenizer's `temporal_stride`.
            image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`, *optional*):
                First frame, of the output's size: an RGB image, or an array or tensor of shape `(height, width, 3)` or
                `(3, height, width)`, of `uint8` or of floats in `[0, 1]`. A list has one for each prompt.
            video (list of frames, `np.ndarray` or `torch.Tensor`, *optional*):
                First frames, each as `image`, in a list or along the first axis. Their number is one that `num_frames`
                may be. A list of videos, all of the same length, has one for each prompt.
            cond_latents (`torch.LongTensor` of shape `(num_prompts, num_latent_frames, rows, columns)`, *optional*):
                First latent frames as token ids, for each prompt or with one row for all. Only one of `image`, `video`
                and `cond_latents` may be given.
            cond_indices (`list[int]`, *optional*):
                Latent frames of the condition that are used, each at its own place. By default all are used.
            cond_noise_scale (`float`, *optional*, defaults to `0.0`):
                Noise s in `[0, 1]` of the condition in the state, whose tokens are drawn from p_t at t = 1 − s once
                for all samples of a condition. The sample has the clean condition with `condition="clamp"`.
            condition (`str`, *optional*, defaults to `"clamp"`):
                `"clamp"` keeps the frames of the condition, `"redraw"` draws them anew.
            motion_score (`float`, *optional*):
                Amount of motion in `[1, 10]`, which the prompts then begin with, as those of URSA's training:
                `"motion=9.0, a red cat"`. Prompts may also begin so themselves.
            flow_shift (`float`, *optional*):
                Shift of the time grid in this call, > 0. Defaults to the scheduler's `shift`.

        Returns:
            [`URSAPipelineOutput`] or `tuple`: The images or videos, in the order of the prompts.

        Raises:
            ValueError: If an argument is out of its range.
        """
        prompts, negative_prompts = check_image_prompts(prompt, negative_prompt, output_type)
        if condition not in ("clamp", "redraw"):
            raise ValueError(f"`condition` must be 'clamp' or 'redraw', got {condition!r}.")
        if not 0 <= cond_noise_scale <= 1:
            nearest = float(cond_noise_scale > 1)
            raise ValueError(f"`cond_noise_scale` must be in [0, 1], got {cond_noise_scale}. Try {nearest}.")
        if motion_score is not None:
            if not 1 <= motion_score <= 10:
                nearest = 10.0 if motion_score > 10 else 1.0
                raise ValueError(f"`motion_score` must be in [1, 10], got {motion_score}. Try {nearest}.")
            prompts = [f"motion={motion_score:.1f}, {text}" for text in prompts]
        if flow_shift is not None and ("shift" not in self.scheduler.config or not 0 < flow_shift < math.inf):
            raise ValueError(
                f"`flow_shift` must be a number > 0, and None for a scheduler without `shift`, got {flow_shift} for "
                f"`{type(self.scheduler).__name__}`."
            )
        if output_type != "latent":
            self._check_vae()
        latent_shape = self.latent_shape(height=height, width=width, num_frames=num_frames)
        is_kept = condition == "clamp"
        known = self.prepare_condition(image, video, cond_latents, cond_indices, latent_shape, len(prompts), is_kept)
        if known is None and cond_noise_scale != 0:
            raise ValueError(f"`cond_noise_scale` must be 0 without a condition, got {cond_noise_scale}.")
        with self._use_shift(flow_shift):
            output = self._sample_prompts(
                prompts,
                negative_prompts,
                latent_shape,
                num_inference_steps,
                guidance_trunc,
                {"num_images_per_prompt": num_images_per_prompt},
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
                guidance_scale=guidance_scale,
                latents=latents,
                condition=known,
                condition_t=1 - cond_noise_scale,
                keep_condition=is_kept,
                generator=generator,
                return_trajectory=return_trajectory,
            )
        if output_type == "latent":
            images: Any = output.clean_samples.view(-1, *latent_shape)
        else:
            images = self.decode(output.clean_samples, latent_shape, output_type=output_type)
        self.maybe_free_model_hooks()

        result = URSAPipelineOutput(images=images, trajectory=output.trajectory)
        if not return_dict:
            return result.to_tuple()
        return result


__all__ = ["URSAPipeline"]
