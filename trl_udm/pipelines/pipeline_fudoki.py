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

import functools
import logging
import os
from typing import Any, Literal, Self, Unpack, cast, overload

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.janus import JanusConfig, JanusVQVAE

from ..cut_prompts import PromptCutter
from ..models.modeling_fudoki import FUDOKIForImageGeneration
from ..schedulers.scheduling_kinetic_optimal import KineticOptimalScheduler
from .conditions import read_frames
from .images import check_image_prompts
from .original_checkpoint import find_folder, is_original_fudoki, load_json
from .original_fudoki import OriginalFUDOKIMixin, load_original_tokenizer, read_original_config
from .pipeline_output import URSAPipelineOutput
from .pipeline_udm import CallArguments, StepCallback


logger = logging.getLogger(__name__)

UNCOND_TOKEN_ID = 100015
"""The token that FUDOKI has in place of a prompt where it is unconditional. No file of the model names it."""

PROMPT_END = "\n\nAssistant:<begin_of_image>"
"""What comes after the text of a prompt."""

EMPTY_PROMPT = "User:Assistant:<begin_of_image>"
"""What a prompt without a text is."""


class FUDOKICallArguments(CallArguments, total=False):
    """Those of [`FUDOKIPipeline`]."""

    height: int | None
    width: int | None
    num_images_per_prompt: int


class FUDOKIPipeline(PromptCutter, OriginalFUDOKIMixin):
    r"""
    Images from text with FUDOKI (https://huggingface.co/papers/2505.20147), on transformers' modules of Janus.

    The network reads `[BOS, prompt, begin_of_image, image tokens, end_of_image]`, where the prompt is `User: {text}`
    and, after an empty line, `Assistant:`. A code k of the image is token `text vocabulary size + k` here. Attention
    is bidirectional, without the padding on the left. Positions count from BOS. Logits are shifted by one: those at
    `begin_of_image` predict image token 0.

    **Guidance.** The logits are z = z_uncond + g·(z_cond − z_uncond), where the unconditional input is the prompt with
    `uncond_token_id` in place of every token between BOS and `begin_of_image`. FUDOKI's scale s is g − 1:
    `guidance_scale=6.0` is its 5. A `negative_prompt` takes the place of the unconditional input.

    Args:
        transformer ([`FUDOKIForImageGeneration`]):
            The denoiser.
        scheduler ([`KineticOptimalScheduler`]):
            The forward and reverse process, with `metric_power=4.0` for the published weights. Its codes are its own.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The text tokenizer. BOS is put before its tokens, once.
        vae ([`~transformers.JanusVQVAE`]):
            The tokenizer of images, with normalized codes.
        max_prompt_length (`int`, *optional*, defaults to `499`):
            Number of tokens that a longer prompt is cut to, with BOS, template and `begin_of_image`. The text is cut,
            not the template. The first cut is warned of.
        uncond_token_id (`int`, *optional*):
            The token of the unconditional input. Defaults to FUDOKI's 100015, and to the padding token for models
            whose vocabulary is smaller.

    Raises:
        ValueError: If the components have codebooks of different sizes, or a token is missing.

    Example:

    ```python
    >>> import torch
    >>> from trl_udm import FUDOKIPipeline

    >>> pipe = FUDOKIPipeline.from_pretrained("LucasJinWang/FUDOKI", dtype=torch.bfloat16).to("cuda")
    >>> image = pipe("a photo of a red car left of a blue bench").images[0]
    ```
    """

    transformer: FUDOKIForImageGeneration
    scheduler: KineticOptimalScheduler
    tokenizer: PreTrainedTokenizerBase
    vae: JanusVQVAE
    model_cpu_offload_seq: Any = "transformer->vae"
    _callback_tensor_inputs = ["latents", "logits"]

    def __init__(
        self,
        transformer: FUDOKIForImageGeneration,
        scheduler: KineticOptimalScheduler,
        tokenizer: PreTrainedTokenizerBase,
        vae: JanusVQVAE,
        max_prompt_length: int = 499,
        uncond_token_id: int | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, tokenizer=tokenizer, vae=vae)
        sizes = {
            "transformer.config.vq_config.num_embeddings": transformer.config.vq_config.num_embeddings,
            "scheduler.config.codebook_size": scheduler.config.codebook_size,
            "vae.config.num_embeddings": vae.config.num_embeddings,
        }
        if len(set(sizes.values())) > 1:
            raise ValueError(f"The components must share one codebook, got sizes {sizes}.")
        vocab_size = transformer.config.text_config.vocab_size
        if uncond_token_id is None:
            uncond_token_id = UNCOND_TOKEN_ID if vocab_size > UNCOND_TOKEN_ID else tokenizer.pad_token_id
            if uncond_token_id != UNCOND_TOKEN_ID:
                logger.warning(
                    f"The vocabulary of {vocab_size} tokens has no token {UNCOND_TOKEN_ID}, with which FUDOKI is "
                    f"unconditional. The padding token {uncond_token_id} is used. If it is another, give "
                    "`uncond_token_id`."
                )
        self.register_to_config(max_prompt_length=max_prompt_length, uncond_token_id=uncond_token_id)
        begin, end = (tokenizer.convert_tokens_to_ids(f"<{name}_of_image>") for name in ("begin", "end"))
        self.end_token_id: Any = end
        tokens: dict[str, Any] = {
            "uncond_token_id": uncond_token_id,
            "tokenizer.bos_token_id": tokenizer.bos_token_id,
            "tokenizer.pad_token_id": tokenizer.pad_token_id,
            "<begin_of_image>": begin,
            "<end_of_image>": end,
        }
        for name, token_id in tokens.items():
            if token_id is None or not 0 <= token_id < vocab_size:
                raise ValueError(f"`{name}` must be a token in [0, {vocab_size}), got {token_id}.")
        min_length = len(self._tokenize([PROMPT_END])[0]) + 2  # BOS, and one token of the text
        if max_prompt_length < min_length:
            raise ValueError(f"`max_prompt_length` must be at least {min_length}, got {max_prompt_length}.")
        self.image_processor = VaeImageProcessor()

    @classmethod
    def from_configs(
        cls, pretrained_model_name_or_path: str | os.PathLike, dtype: torch.dtype = torch.float32, **hub_kwargs
    ) -> Self:
        """
        Builds a pipeline without its weights, on PyTorch's `"meta"` device. [`estimate_memory`] needs no more.

        Args:
            pretrained_model_name_or_path (`str` or `Path`):
                As in `from_pretrained`. A repository in the original layout is downloaded whole: the shapes of the
                image tokenizer stand in no configuration.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
                Dtype of transformer and VQ autoencoder.
            hub_kwargs:
                `cache_dir`, `revision`, `token`, `local_files_only` and `force_download`.

        Returns:
            [`FUDOKIPipeline`]: The pipeline, whose scheduler has no codebook.

        Raises:
            OSError: If a part is missing.
        """
        is_original = is_original_fudoki(pretrained_model_name_or_path, **hub_kwargs)
        patterns = ["*.json", "*.safetensors"] if is_original else ["*.json"]
        folder = find_folder(pretrained_model_name_or_path, patterns, **hub_kwargs)
        if is_original:
            return cls.from_janus_config(read_original_config(folder), load_original_tokenizer(folder), dtype)
        config = JanusConfig.from_pretrained(folder / "transformer")
        index = load_json(folder / cls.config_name)
        options = {name: index[name] for name in ("max_prompt_length", "uncond_token_id")}
        return cls.from_janus_config(config, AutoTokenizer.from_pretrained(folder / "tokenizer"), dtype, **options)

    @classmethod
    def from_janus_config(
        cls, config: JanusConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype = torch.float32, **kwargs
    ) -> Self:
        """
        Builds a pipeline of a size without its weights, on PyTorch's `"meta"` device.

        Args:
            config ([`~transformers.JanusConfig`]):
                The configuration, with that of the image tokenizer.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                The text tokenizer.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
                Dtype of transformer and VQ autoencoder.
            kwargs:
                `max_prompt_length` and `uncond_token_id`.

        Returns:
            [`FUDOKIPipeline`]: The pipeline, whose scheduler has no codebook.
        """
        vq_config = config.vq_config
        sizes = {"codebook_size": vq_config.num_embeddings, "codebook_dim": vq_config.embed_dim}
        with torch.device("meta"):
            transformer, vae = FUDOKIForImageGeneration(config), JanusVQVAE(vq_config)
        scheduler = KineticOptimalScheduler(metric_power=4.0, **sizes)
        return cls(transformer.to(dtype), scheduler, tokenizer, vae.to(dtype), **kwargs)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """
        Shape of the token grid, which is the same for all images of a model.

        Args:
            height (`int`, *optional*):
                Height of the image in pixels. It may be the model's own only.
            width (`int`, *optional*):
                Width of the image in pixels, likewise.

        Returns:
            `tuple[int, int]`: The numbers of rows and columns.

        Raises:
            ValueError: If another size is asked for.
        """
        num_rows = self.vae.config.num_patches
        size = num_rows * 2 ** (len(self.vae.config.channel_multiplier) - 1)
        for name, value in (("height", height), ("width", width)):
            if value not in (None, size):
                raise ValueError(f"`{name}` must be {size}, the one size of the model's images, got {value}.")
        return num_rows, num_rows

    def encode_prompt(self, prompt: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        max_length, (end,) = self.config.max_prompt_length, self._tokenize([PROMPT_END])
        tokenizer: Any = functools.partial(cast(Any, self.tokenizer), add_special_tokens=False)
        max_text_length = max_length - len(end) - 1  # without BOS
        self._warn_of_cut_prompts(prompt, tokenizer, max_text_length, "the pipeline", prefix="User: ")
        texts = [text.strip() for text in prompt]
        encoded = self._tokenize(
            [f"User: {text}{PROMPT_END}" if text else f"User:{PROMPT_END.strip()}" for text in texts]
        )
        rows = [[self.tokenizer.bos_token_id, *ids] for ids in encoded]
        ids = [torch.tensor(row if len(row) <= max_length else row[: max_length - len(end)] + end) for row in rows]
        padded: dict[str, Any] = {"batch_first": True, "padding_side": "left"}
        prompt_ids = pad_sequence(ids, padding_value=self.tokenizer.pad_token_id, **padded)  # (B, T)
        prompt_mask = pad_sequence([torch.ones_like(row) for row in ids], **padded)  # (B, T)
        return prompt_ids.to(self._execution_device), prompt_mask.to(self._execution_device)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        # Without special tokens: some tokenizers would put a second BOS before them
        return cast(Any, self.tokenizer)(texts, add_special_tokens=False)["input_ids"]

    def _complete_negatives(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        negative_prompt_ids: torch.Tensor,
        negative_prompt_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The unconditional input of each prompt, in the place of the empty negative prompt."""
        is_text = prompt_mask.bool() & (prompt_mask.cumsum(dim=1) > 1)
        is_text[:, -1] = False  # `begin_of_image`
        uncond_ids = prompt_ids.masked_fill(is_text, self.config.uncond_token_id)
        (empty,) = self.encode_prompt([""])[0].to(prompt_ids.device)
        is_empty = negative_prompt_mask.sum(dim=1) == len(empty)
        is_empty &= (negative_prompt_ids[:, -len(empty) :] == empty).all(dim=1)
        if is_empty.all():
            return uncond_ids, prompt_mask
        is_empty = is_empty.unsqueeze(1)
        return uncond_ids.where(is_empty, negative_prompt_ids), prompt_mask.where(is_empty, negative_prompt_mask)

    def prepare_denoiser_inputs(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        noised_samples: torch.Tensor,
        latent_shape: tuple[int, ...],
        labels: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        # `t` is not used: FUDOKI was trained without the time
        codes = noised_samples + self.transformer.config.text_config.vocab_size
        end_of_image = codes.new_full((len(codes), 1), self.end_token_id)
        visible = torch.ones_like(torch.cat([codes, end_of_image], dim=1))
        attention_mask = torch.cat([prompt_mask, visible], dim=1)  # (B, T + N + 1)
        inputs = {
            "input_ids": torch.cat([prompt_ids, codes, end_of_image], dim=1),
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
        }
        if labels is not None:
            inputs["shift_labels"] = torch.full_like(inputs["input_ids"], -100)
            inputs["shift_labels"][:, prompt_ids.size(1) - 1 : -2] = labels
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
        return self.transformer(**inputs, logits_to_keep=noised_samples.size(1) + 2).logits[:, :-2]

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
        """As in [`UDMPipeline`], except that no logits of all tokens are made."""
        inputs = self.prepare_denoiser_inputs(prompt_ids, prompt_mask, noised_samples, latent_shape)
        outputs = model(**inputs, logits_to_keep=noised_samples.size(1) + 2, skip_logits=True)
        return outputs.last_hidden_state[:, :-2], extract_model_from_parallel(model).get_output_embeddings()

    @torch.no_grad()
    def encode_completions(self, completions: list[Any], latent_shape: tuple[int, ...]) -> torch.Tensor:
        """As in [`UDMPipeline`]. Raises a `ValueError` if an image has another size than the model's."""
        size = latent_shape[0] * 2 ** (len(self.vae.config.channel_multiplier) - 1)
        pixels = read_frames("completion", [[image] for image in completions], size, size).squeeze(2)  # one frame each
        tokens = self.vae.encode(pixels.to(self._execution_device, self.vae.dtype)).image_tokens
        return tokens.view(len(completions), -1)

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
        Decodes tokens to images.

        Args:
            clean_samples (`torch.LongTensor` of shape `(B, N)`):
                Codes.
            latent_shape (`tuple[int, int]`):
                From `latent_shape`.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` or `"pt"`.

        Returns:
            `list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`: As in [`URSAPipelineOutput`].
        """
        return self.image_processor.postprocess(self.vae.decode(clean_samples).float(), output_type=output_type)

    @overload
    def __call__(
        self,
        prompt: str | list[str],
        *,
        output_type: Literal["pil"] = "pil",
        return_dict: Literal[True] = True,
        **kwargs: Unpack[FUDOKICallArguments],
    ) -> URSAPipelineOutput[list[Image.Image]]: ...

    @overload
    def __call__(
        self,
        prompt: str | list[str],
        *,
        output_type: Literal["np"],
        return_dict: Literal[True] = True,
        **kwargs: Unpack[FUDOKICallArguments],
    ) -> URSAPipelineOutput[np.ndarray]: ...

    @overload
    def __call__(
        self,
        prompt: str | list[str],
        *,
        output_type: Literal["pt", "latent"],
        return_dict: Literal[True] = True,
        **kwargs: Unpack[FUDOKICallArguments],
    ) -> URSAPipelineOutput[torch.Tensor]: ...

    @overload
    def __call__(
        self,
        prompt: str | list[str],
        *,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: Literal[False],
        **kwargs: Unpack[FUDOKICallArguments],
    ) -> tuple: ...

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        guidance_trunc: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        return_trajectory: bool = False,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> URSAPipelineOutput | tuple:
        """
        Generates images.

        Args:
            prompt (`str` or `list[str]`):
                What the images show.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to guide away from. By default, and where it is empty, this is the unconditional input.
            height (`int`, *optional*):
                Height in pixels, which is the model's own.
            width (`int`, *optional*):
                Width in pixels, likewise.
            num_inference_steps (`int`, *optional*, defaults to `50`):
                Number of denoising steps, > 0.
            guidance_scale (`float`, *optional*, defaults to `6.0`):
                Weight of classifier-free guidance, which is FUDOKI's scale of 5 plus 1. At 1 there is none.
            guidance_trunc, num_images_per_prompt, generator, latents, output_type, return_dict, return_trajectory,
            callback_on_step_end, callback_on_step_end_tensor_inputs (*optional*):
                As in [`URSAPipeline`], except that guidance does not end before the last step by default.

        Returns:
            [`URSAPipelineOutput`] or `tuple`: The images, in the order of the prompts.

        Raises:
            ValueError: If an argument is out of its range.
        """
        prompts, negative_prompts = check_image_prompts(prompt, negative_prompt, output_type)
        latent_shape = self.latent_shape(height=height, width=width)
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
            generator=generator,
            return_trajectory=return_trajectory,
        )
        if output_type == "latent":
            images: Any = output.clean_samples.view(-1, *latent_shape)
        else:
            images = self.decode(output.clean_samples, latent_shape, output_type=output_type)
        self.maybe_free_model_hooks()
        result = URSAPipelineOutput(images=images, trajectory=output.trajectory)
        return result if return_dict else result.to_tuple()


__all__ = ["FUDOKIPipeline"]
