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
import inspect
import math
import os
from collections.abc import Callable
from typing import Any, Literal, Self, Unpack, overload

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..schedulers.scheduling_kinetic_optimal import KineticOptimalScheduler
from ..schedulers.scheduling_masked import MaskedDDIMScheduler
from ..schedulers.scheduling_uniform_ddim import UniformDDIMScheduler
from .original_text import find_original_text, load_original_text
from .pipeline_output import TextUDMPipelineOutput
from .pipeline_udm import HUB_KWARGS, CallArguments, StepCallback, UDMPipeline
from .text import TextMixin


class TextCallArguments(CallArguments, total=False):
    """Those of [`TextUDMPipeline`]."""

    max_completion_length: int | None
    num_completions_per_prompt: int
    chat_template_kwargs: dict[str, Any] | None


@functools.cache  # for each pass of the network
def _takes_position_ids(forward: Callable) -> bool:
    arguments = inspect.signature(forward).parameters.values()
    return any(argument.name == "position_ids" or argument.kind is argument.VAR_KEYWORD for argument in arguments)


class TextUDMPipeline(TextMixin, UDMPipeline):
    r"""
    Text generation by discrete diffusion, with any network that has the form of a masked language model: a
    bidirectional transformer with logits over its vocabulary at every position, such as `AutoModelForMaskedLM` loads.

    The network reads `[prompt, canvas]`. The prompt is padded on the left, and its padding is hidden. The canvas has
    `max_completion_length` tokens, which are noise at first: uniform over the whole vocabulary, or with a
    [`MaskedDDIMScheduler`] the mask token. The logits at a canvas position predict the clean token of that position.

    A completion ends with the first end-of-sequence token. This is the tokenizer's `eos_token`, or its `sep_token` if
    it has no `eos_token`, like BERT's. The tokens after it are neither decoded nor scored.

    Positions are counted from the first token of the prompt. Networks with segments, such as BERT
    (`config.type_vocab_size` of 2 or more), see the prompt as segment 0 and the canvas as segment 1. Other networks
    must recognize the end of the prompt by its last tokens.

    Args:
        transformer ([`~transformers.PreTrainedModel`]):
            The denoiser, which takes `input_ids`, `attention_mask` and, unless only distances between tokens count for
            it, `position_ids`. It returns `logits`.
        scheduler ([`UniformDDIMScheduler`], [`MaskedDDIMScheduler`] or [`KineticOptimalScheduler`]):
            The forward and reverse process, over the network's vocabulary.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer. It needs a chat template if prompts are messages.
        max_completion_length (`int`, *optional*, defaults to `64`):
            Number of tokens N of the canvas.
        time_argument (`str`, *optional*):
            Name of the argument of the network's `forward` that takes the time t, of shape `(B,)`, if it takes one: 0
            for noise, 1 for a clean sample. For another convention override `prepare_denoiser_inputs`.

    Raises:
        ValueError: If the components do not fit each other, or `time_argument` is not an argument of the network.

    Example:

    ```python
    >>> from trl_udm import TextUDMPipeline
    >>> from trl_udm.worlds.sums import CHECKPOINT_PATH

    >>> pipe = TextUDMPipeline.from_pretrained(CHECKPOINT_PATH)
    >>> text = pipe("17+45=").texts[0]
    ```
    """

    transformer: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    scheduler: UniformDDIMScheduler | KineticOptimalScheduler
    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ["latents", "logits"]

    def __init__(
        self,
        transformer: PreTrainedModel,
        scheduler: UniformDDIMScheduler | KineticOptimalScheduler,
        tokenizer: PreTrainedTokenizerBase,
        max_completion_length: int = 64,
        time_argument: str | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, tokenizer=tokenizer)
        self.register_to_config(max_completion_length=max_completion_length, time_argument=time_argument)
        if scheduler.config.codebook_size != transformer.config.vocab_size:
            raise ValueError(
                "`scheduler.config.codebook_size` must be the network's vocabulary, "
                f"`transformer.config.vocab_size` {transformer.config.vocab_size}, got "
                f"{scheduler.config.codebook_size}."
            )
        if isinstance(scheduler, MaskedDDIMScheduler) and scheduler.config.mask_token_id != tokenizer.mask_token_id:
            raise ValueError(
                f"`scheduler.config.mask_token_id` must be `tokenizer.mask_token_id`, {tokenizer.mask_token_id}, got "
                f"{scheduler.config.mask_token_id}. If the tokenizer does not name its mask token, set "
                "`tokenizer.mask_token`."
            )
        arguments = inspect.signature(type(transformer).forward).parameters
        if time_argument is not None and time_argument not in arguments:
            raise ValueError(
                f"`time_argument` must be an argument of `{type(transformer).__name__}.forward`, one of "
                f"{[*arguments][1:]}, got {time_argument!r}. Leave it out for a network that does not take the time."
            )
        if tokenizer.pad_token_id is None or self.end_token_id is None:
            raise ValueError(
                "`tokenizer` must have a `pad_token`, and an `eos_token` or a `sep_token`, got "
                f"{tokenizer.special_tokens_map}. Set them, such as `tokenizer.pad_token = tokenizer.eos_token`."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        """
        Loads a pipeline from a folder or a Hub repository, in this library's layout or in that of Duo, UDLM or the
        uniform models of GIDD. No code of theirs is run.

        Args:
            pretrained_model_name_or_path (`str` or `Path`):
                A folder, or a repository such as `"s-sahoo/duo"`.
            kwargs:
                As in [`~diffusers.DiffusionPipeline.from_pretrained`], with `use_safetensors=True` by default. The
                layouts of Duo, UDLM and GIDD take `dtype`, `cache_dir`, `revision`, `token`, `local_files_only`,
                `force_download`, `max_completion_length` and components. They need a `tokenizer` where there is none.

        Returns:
            The pipeline, in evaluation mode.

        Raises:
            OSError: If a part is missing.
            ValueError: If a part is damaged, lacks a weight, or is of a model that is not supported.
        """
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        family = find_original_text(pretrained_model_name_or_path, **hub_kwargs)
        if family is None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        pipeline = cls(**load_original_text(pretrained_model_name_or_path, family, **kwargs))
        # As `DiffusionPipeline.from_pretrained` does, for `name_or_path`
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipeline

    @property
    def end_token_id(self) -> int | None:
        """`int`, *optional*: The token that ends a completion."""
        if self.tokenizer.eos_token_id is None:
            return self.tokenizer.sep_token_id
        return self.tokenizer.eos_token_id

    @property
    def end_token_ids(self) -> list[int]:
        """`list[int]`: That token alone."""
        return [] if self.end_token_id is None else [self.end_token_id]

    def latent_shape(self, max_completion_length: int | None = None) -> tuple[int]:
        """
        Shape of the canvas.

        Args:
            max_completion_length (`int`, *optional*):
                Its number of tokens, > 0. Defaults to the pipeline's.

        Returns:
            `tuple[int]`: That number.

        Raises:
            ValueError: If the number is not positive.
        """
        length = self.config.max_completion_length if max_completion_length is None else max_completion_length
        if length < 1:
            raise ValueError(f"`max_completion_length` must be > 0, got {length}.")
        return (length,)

    def _encode(self, text_or_messages: str | list[dict[str, Any]], **chat_template_kwargs: Any) -> list[int]:
        if isinstance(text_or_messages, str):
            return self.tokenizer(text_or_messages)["input_ids"]
        options = {"add_generation_prompt": True, **chat_template_kwargs, "return_dict": True}
        encoded: Any = self.tokenizer.apply_chat_template(text_or_messages, **options)
        return encoded["input_ids"]

    def prepare_denoiser_inputs(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        noised_samples: torch.Tensor,
        latent_shape: tuple[int, ...],
        labels: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        attention_mask = torch.cat([prompt_mask, torch.ones_like(noised_samples)], dim=1)  # (B, T + N)
        tables = [
            module.num_embeddings
            for name, module in self.transformer.named_modules()
            if isinstance(module, nn.Embedding) and "position" in name
        ]
        if attention_mask.size(1) > min(tables, default=math.inf):
            raise ValueError(
                f"A prompt and its completion must have at most the {min(tables)} tokens that "
                f"`{type(self.transformer).__name__}` has positions for, got {prompt_ids.size(1)} + "
                f"{noised_samples.size(1)} tokens. Shorten the prompt, or lower `max_completion_length`."
            )
        inputs: dict[str, Any] = {
            "input_ids": torch.cat([prompt_ids, noised_samples], dim=1),
            "attention_mask": attention_mask,
        }
        if _takes_position_ids(type(self.transformer).forward):
            inputs["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        if getattr(self.transformer.config, "type_vocab_size", 1) > 1:
            inputs["token_type_ids"] = torch.cat(
                [torch.zeros_like(prompt_ids), torch.ones_like(noised_samples)], dim=1
            )
        if self.config.time_argument is not None:
            inputs[self.config.time_argument] = t
        if labels is not None:
            inputs["shift_labels"] = torch.cat([torch.full_like(prompt_ids, -100), labels], dim=1)
        return inputs

    def denoise(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        noised_samples: torch.Tensor,
        latent_shape: tuple[int, ...],
        t: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self._denoise(self.transformer, prompt_ids, prompt_mask, noised_samples, latent_shape, t)

    def _denoise(
        self,
        model: nn.Module,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        noised_samples: torch.Tensor,
        latent_shape: tuple[int, ...],
        t: torch.Tensor | None,
    ) -> torch.Tensor:
        inputs = self.prepare_denoiser_inputs(prompt_ids, prompt_mask, noised_samples, latent_shape, t=t)
        return model(**inputs).logits[:, prompt_ids.size(1) :]  # (B, N, V)

    def score(
        self,
        model: nn.Module,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        noised_samples: torch.Tensor,
        latent_shape: tuple[int, ...],
        labels: torch.Tensor,
        t: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # From logits: many of these networks have more than a linear head on the backbone, such as BERT's transform,
        # which TRL's fused head would leave out
        logits = self._denoise(model, prompt_ids, prompt_mask, noised_samples, latent_shape, t)
        return self._score_logits(self.scheduler.constrain_logits(logits, noised_samples), labels)

    @overload
    def __call__(
        self,
        prompt: str | list[Any],
        *,
        output_type: Literal["text"] = "text",
        return_dict: Literal[True] = True,
        **kwargs: Unpack[TextCallArguments],
    ) -> TextUDMPipelineOutput[list[str]]: ...

    @overload
    def __call__(
        self,
        prompt: str | list[Any],
        *,
        output_type: Literal["latent"],
        return_dict: Literal[True] = True,
        **kwargs: Unpack[TextCallArguments],
    ) -> TextUDMPipelineOutput[torch.Tensor]: ...

    @overload
    def __call__(
        self,
        prompt: str | list[Any],
        *,
        output_type: Literal["text", "latent"] = "text",
        return_dict: Literal[False],
        **kwargs: Unpack[TextCallArguments],
    ) -> tuple: ...

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[Any],
        max_completion_length: int | None = None,
        num_inference_steps: int = 32,
        num_completions_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_trajectory: bool = False,
        negative_prompt: str | list[Any] | None = None,
        guidance_scale: float = 1.0,
        guidance_trunc: float = 0.9,
        latents: torch.Tensor | None = None,
        output_type: Literal["text", "latent"] = "text",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> TextUDMPipelineOutput | tuple:
        """
        Generates text.

        Args:
            prompt (`str`, `list[dict]`, `list[str]` or `list[list[dict]]`):
                One prompt, or several: texts, or lists of messages.
            max_completion_length (`int`, *optional*):
                Number of tokens of the canvas. Defaults to the pipeline's.
            num_inference_steps (`int`, *optional*, defaults to `32`):
                Number of denoising steps, > 0.
            num_completions_per_prompt (`int`, *optional*, defaults to `1`):
                Number of completions of each prompt, > 0.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of every random draw, or one for each completion. A CPU generator serves any device.
            return_trajectory (`bool`, *optional*, defaults to `False`):
                Whether to also return the states that the sampler passed through.
            negative_prompt (`str`, `list[dict]`, `list[str]` or `list[list[dict]]`, *optional*):
                What to guide away from: one for all prompts, or a list with one for each. Defaults to the empty text.
                Not used without guidance.
            guidance_scale (`float`, *optional*, defaults to `1.0`):
                Weight of classifier-free guidance. At 1 there is none.
            guidance_trunc (`float`, *optional*, defaults to `0.9`):
                Time in `[0, 1]` from which there is no guidance.
            latents (`torch.LongTensor` of shape `(batch_size * num_completions_per_prompt, num_tokens)`, *optional*):
                Token ids to start from instead of the scheduler's noise.
            output_type (`str`, *optional*, defaults to `"text"`):
                `"text"`, or `"latent"` (token ids).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`TextUDMPipelineOutput`], or a tuple of its fields that are set.
            callback_on_step_end (`Callable`, `PipelineCallback` or `MultiPipelineCallbacks`, *optional*):
                As in [`URSAPipeline`].
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                As in [`URSAPipeline`].
            chat_template_kwargs (`dict[str, Any]`, *optional*):
                Arguments of the chat template, for prompts that are messages.

        Returns:
            [`TextUDMPipelineOutput`] or `tuple`: The completions, in the order of the prompts.

        Raises:
            ValueError: If an argument is out of its range.
        """
        if not prompt and prompt != "":
            raise ValueError(f"`prompt` must be a text, messages, or a non-empty list of them, got {prompt!r}.")
        if output_type not in ("text", "latent"):
            raise ValueError(f"`output_type` must be 'text' or 'latent', got {output_type!r}.")
        latent_shape = self.latent_shape(max_completion_length)
        prompts, negative_prompts = self._as_list(prompt), self._as_list(negative_prompt or "")
        if negative_prompts is not negative_prompt:  # one for all
            negative_prompts = negative_prompts * len(prompts)
        output = self._sample_prompts(
            prompts,
            negative_prompts,
            latent_shape,
            num_inference_steps,
            guidance_trunc,
            {"num_completions_per_prompt": num_completions_per_prompt},
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            chat_template_kwargs,
            guidance_scale=guidance_scale,
            latents=latents,
            generator=generator,
            return_trajectory=return_trajectory,
        )
        texts: Any = output.clean_samples
        if output_type == "text":
            texts = self.decode(texts, latent_shape)
        self.maybe_free_model_hooks()
        result = TextUDMPipelineOutput(texts=texts, trajectory=output.trajectory)
        return result if return_dict else result.to_tuple()


__all__ = ["TextUDMPipeline"]
