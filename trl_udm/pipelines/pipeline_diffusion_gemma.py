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

import copy
import os
from typing import Any, Literal, Self, overload

import torch
from diffusers.pipelines.diffusion_gemma.pipeline_diffusion_gemma import DiffusionGemmaPipeline
from diffusers.pipelines.diffusion_gemma.pipeline_output import DiffusionGemmaPipelineOutput
from diffusers.schedulers.scheduling_discrete_ddim import DiscreteDDIMScheduler
from torch import nn
from torch.nn.functional import pad
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    Cache,
    DiffusionGemmaForBlockDiffusion,
    DynamicCache,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaTextRouter

from ..schedulers.scheduling_uniform_ddim import UniformDDIMScheduler
from ..weights import load_every_weight
from .pipeline_output import UDMSamplerOutput
from .pipeline_udm import HUB_KWARGS, UDMPipeline
from .text import TextMixin


LORA_TARGET_MODULES = r".*\.decoder\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
"""Layers for a LoRA: the decoder's attention and dense layers, without encoder, router, experts and embeddings."""

UNQUANTIZED_MODULES = [
    "lm_head",
    "model.decoder.self_conditioning",
    "model.encoder.embed_vision",
    "model.encoder.vision_tower",
    "router.proj",
]
"""Linear layers that keep their 16 bits where the others have 4: those without experts, attention and dense layers."""

# diffusers 0.42 writes "diffusion_gemma" instead of "transformers". That is also a package of diffusers, which does
# not have this class.
_MODEL_CLASS = ("transformers", "DiffusionGemmaForBlockDiffusion")


class DiffusionGemmaUDMPipeline(TextMixin, UDMPipeline, DiffusionGemmaPipeline):
    r"""
    DiffusionGemma, for training by [`UDMGRPOTrainer`]. This is diffusers' [`~diffusers.DiffusionGemmaPipeline`], with
    the same components, folders and `__call__`, and with the methods of [`UDMPipeline`] for text.

    A completion has M canvases of C tokens. A causal encoder reads the prompt and the clean canvases so far, and a
    bidirectional decoder denoises the next canvas, so that

        log π = Σ_b Σ_n m^{b,n} log p_θ(x̂₁^{b,n} | x̂_t^b, x̂₁^{<b}, c) / Σ_b Σ_n m^{b,n},

    where m is 1 up to the first token that ends the completion, and 0 after it.

    `transformer` is the component `model`. `tokenizer` is the component `processor`, or the tokenizer inside it.

    Args:
        model ([`~transformers.DiffusionGemmaForBlockDiffusion`]):
            The network.
        scheduler ([`UniformDDIMScheduler`], [`~diffusers.DiscreteDDIMScheduler`], or another of diffusers):
            The forward and reverse process. A [`~diffusers.DiscreteDDIMScheduler`] without corrector is replaced by a
            [`UniformDDIMScheduler`], which has the same reverse process and what rollouts need. Other schedulers serve
            `__call__` only.
        processor ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Applies the chat template. A tokenizer is enough for text.
        self_conditioning (`bool`, *optional*, defaults to `False`):
            Whether the network sees its own prediction in rollouts and in scoring. If so, each prediction takes two
            passes of the decoder: the first without self-conditioning, the second with the logits of the first at the
            same state. `__call__` is diffusers' and always passes on the logits of the previous step. Not saved.
        train_router (`bool`, *optional*, defaults to `False`):
            Whether full fine-tuning trains the routers of the experts. Not saved.

    Raises:
        ValueError: If the tokenizer has no padding token, or no token ends a completion.

    Example:

    ```python
    >>> import torch
    >>> from trl_udm import DiffusionGemmaUDMPipeline

    >>> pipe = DiffusionGemmaUDMPipeline.from_pretrained("google/diffusiongemma-26B-A4B-it", dtype=torch.bfloat16)
    >>> text = pipe.to("cuda")("Why is the sky blue?", gen_length=256).texts[0]
    ```
    """

    transformer_name = "model"
    model_cpu_offload_seq: Any = "model"

    def __init__(
        self,
        model: DiffusionGemmaForBlockDiffusion,
        scheduler: Any,
        processor: ProcessorMixin | PreTrainedTokenizerBase,
        self_conditioning: bool = False,
        train_router: bool = False,
    ):
        if type(scheduler) is DiscreteDDIMScheduler and scheduler.config.corrector_steps == 0:
            vocab_size = model.config.get_text_config().vocab_size
            scheduler = UniformDDIMScheduler(vocab_size, scheduler.config.num_inference_steps)
        super().__init__(model=model, scheduler=scheduler, processor=processor)
        self.register_to_config(model=_MODEL_CLASS)
        # As in `GRPOTrainer`: every token that the model declares, such as the one that ends a turn
        end_token_ids = model.generation_config.eos_token_id
        if not isinstance(end_token_ids, list):
            end_token_ids = [end_token_ids]
        self.end_token_ids = sorted({*end_token_ids, self.tokenizer.eos_token_id} - {None})
        if self.tokenizer.pad_token_id is None or not self.end_token_ids:
            raise ValueError(
                "`processor` must have a `pad_token` and an `eos_token`, got "
                f"{self.tokenizer.special_tokens_map}. Set them, such as `tokenizer.pad_token = '<pad>'`."
            )
        self.self_conditioning = self_conditioning
        for module in model.modules():
            if isinstance(module, DiffusionGemmaTextRouter):
                module.requires_grad_(train_router)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        """
        Loads a pipeline from a folder or a Hub repository. This may be a pipeline, as
        [`~diffusers.DiffusionGemmaPipeline`] saves it, or a model of transformers, such as
        `"google/diffusiongemma-26B-A4B-it"`. The processor of a model is its tokenizer, and its scheduler a
        [`UniformDDIMScheduler`].

        With `quantization_config=BitsAndBytesConfig(load_in_4bit=True)`, attention, dense layers and experts get 4
        bits, and encoder and decoder go on sharing them. Transformers would quantize none of them: it keeps tied
        weights, and experts are no linear layers. The experts are quantized where they are loaded, on the GPU if there
        is one, and stay on that device.

        Args:
            pretrained_model_name_or_path (`str` or `Path`):
                The folder or repository.
            kwargs:
                Components, `self_conditioning` and `train_router`. Further arguments are those of
                [`~diffusers.DiffusionPipeline.from_pretrained`] for a pipeline, and of
                [`~transformers.PreTrainedModel.from_pretrained`] for a model.

        Returns:
            [`DiffusionGemmaUDMPipeline`]: The pipeline, in evaluation mode.

        Raises:
            ValueError: If the weights of the network are not those that its configuration says.
        """
        path = pretrained_model_name_or_path
        config = kwargs.get("quantization_config")
        if isinstance(config, BitsAndBytesConfig) and config.llm_int8_skip_modules is None:
            kwargs["quantization_config"] = config = copy.copy(config)
            config.llm_int8_skip_modules = UNQUANTIZED_MODULES
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        try:
            cls.load_config(path, **hub_kwargs)
        except OSError:  # no `model_index.json`
            names = ("scheduler", "processor", "self_conditioning", "train_router")
            components = {name: kwargs.pop(name) for name in names if name in kwargs}
            kwargs = {"use_safetensors": True, **kwargs}
            model = load_every_weight(DiffusionGemmaForBlockDiffusion.from_pretrained, path, **kwargs)
            if "processor" not in components:
                components["processor"] = AutoTokenizer.from_pretrained(path, **hub_kwargs)
            if "scheduler" not in components:
                components["scheduler"] = UniformDDIMScheduler(model.config.get_text_config().vocab_size)
            pipeline = cls(model, **components)
        else:
            pipeline = super().from_pretrained(path, **kwargs)
        if getattr(pipeline.model, "is_loaded_in_4bit", False):
            quantize_experts(pipeline.model)
        return pipeline

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        config: Any = super().load_config(*args, **kwargs)
        return {**config, "model": _MODEL_CLASS}

    @overload
    def __call__(
        self,
        prompt: str | list[Any] | None = None,
        *,
        chat_template_kwargs: dict[str, Any] | None = None,
        return_dict: Literal[True] = True,
        **kwargs: Any,
    ) -> DiffusionGemmaPipelineOutput: ...

    @overload
    def __call__(
        self,
        prompt: str | list[Any] | None = None,
        *,
        chat_template_kwargs: dict[str, Any] | None = None,
        return_dict: Literal[False],
        **kwargs: Any,
    ) -> tuple: ...

    def __call__(
        self,
        prompt: str | list[Any] | None = None,
        *args: Any,
        chat_template_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Generates text, as [`~diffusers.DiffusionGemmaPipeline`] does.

        Args:
            prompt (`str`, `list[dict]`, `list[str]` or `list[list[dict]]`, *optional*):
                One prompt, or several: texts, or lists of messages.
            chat_template_kwargs (`dict[str, Any]`, *optional*):
                Arguments of the chat template, such as `{"enable_thinking": True}`. They need a `prompt`.
            args, kwargs:
                Those of [`~diffusers.DiffusionGemmaPipeline`].

        Returns:
            [`~diffusers.DiffusionGemmaPipelineOutput`] or `tuple`: The texts.

        Raises:
            ValueError: If `chat_template_kwargs` are given without a `prompt`, or with an image.
        """
        if chat_template_kwargs:
            if prompt is None or kwargs.get("image") is not None:
                raise ValueError(
                    f"`chat_template_kwargs` need a `prompt` and no `image`, got {chat_template_kwargs}. Messages may "
                    "be the `prompt`."
                )
            options = {"add_generation_prompt": kwargs.pop("add_generation_prompt", True), **chat_template_kwargs}
            prompt = [self._encode(one, **options) for one in self._as_list(prompt)]
        return super().__call__(prompt, *args, **kwargs)

    @property
    def transformer(self) -> DiffusionGemmaForBlockDiffusion:
        return self.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processor.tokenizer if isinstance(self.processor, ProcessorMixin) else self.processor

    def latent_shape(self, gen_length: int | None = None) -> tuple[int, int]:
        """
        Number and length of the canvases.

        Args:
            gen_length (`int`, *optional*):
                Number of tokens of a completion, a multiple of the model's `canvas_length`. Defaults to one canvas.

        Returns:
            `tuple[int, int]`: (M, C), whose product is that number.

        Raises:
            ValueError: If `gen_length` is not a positive multiple of `canvas_length`.
        """
        canvas_length = self.model.config.canvas_length
        gen_length = canvas_length if gen_length is None else gen_length
        if gen_length < 1 or gen_length % canvas_length != 0:
            nearest = max(1, round(gen_length / canvas_length)) * canvas_length
            raise ValueError(
                f"`gen_length` must be a positive multiple of the model's `canvas_length` {canvas_length}, got "
                f"{gen_length}. The nearest is {nearest}."
            )
        return (gen_length // canvas_length, canvas_length)

    def _encode(self, text_or_messages: str | list[Any], **chat_template_kwargs: Any) -> list[int]:
        messages = text_or_messages
        if isinstance(messages, list) and isinstance(messages[0], int):  # ids, which `__call__` has encoded
            return messages
        if isinstance(messages, str):  # a user's message
            messages = [{"role": "user", "content": messages}]
        options = {"add_generation_prompt": True, **chat_template_kwargs}
        encoded = self.processor.apply_chat_template(
            messages, tokenize=True, return_tensors="pt", return_dict=True, **options
        )
        return encoded["input_ids"][0].tolist()

    # diffusers' `__call__` calls this method, whose own version does not pad the prompts of a list to one length, and
    # takes messages under another name
    def _prepare_inputs(self, *, prompt, messages, image, add_generation_prompt):
        if isinstance(prompt, list) and image is None and add_generation_prompt:
            return *self.encode_prompt(self._as_list(prompt)), {}
        return super()._prepare_inputs(
            prompt=prompt, messages=messages, image=image, add_generation_prompt=add_generation_prompt
        )

    def extend_prompt(
        self, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, clean_samples: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in [`UDMPipeline`]: all canvases but the last are appended, `(B, T + (M - 1) * C)` in all."""
        canvases = clean_samples[:, : clean_samples.size(1) - self.model.config.canvas_length]
        prompt_ids = torch.cat([prompt_ids, canvases], dim=1)
        return prompt_ids, torch.cat([prompt_mask, torch.ones_like(canvases)], dim=1)

    def prepare_denoiser_inputs(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        noised_samples: torch.Tensor,
        latent_shape: tuple[int, ...],
        labels: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        As in [`UDMPipeline`], with a row for each canvas: `B * M` rows, sample by sample.

        `prompt_ids` and `prompt_mask` are from `extend_prompt`. The encoder of a row sees the prompt and the canvases
        before the row's own. The network takes no time, so that `t` is not used.
        """
        num_canvases, canvas_length = latent_shape
        # Canvases after a row's own are cut off on the right, and replaced by padding on the left
        hidden = [later * canvas_length for later in reversed(range(num_canvases))]
        input_ids, attention_mask = (
            torch.stack([pad(x[:, : x.size(1) - length], (length, 0)) for length in hidden], dim=1).flatten(0, 1)
            for x in (prompt_ids, prompt_mask)
        )  # (B * M, T + (M - 1) * C)
        canvases = noised_samples.reshape(-1, canvas_length)  # (B * M, C)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
            "decoder_input_ids": canvases,
            "decoder_attention_mask": torch.cat([attention_mask, torch.ones_like(canvases)], dim=1),
            "decoder_position_ids": attention_mask.sum(dim=1, keepdim=True)
            + torch.arange(canvas_length, device=canvases.device),
        }
        if labels is not None:
            inputs["shift_labels"] = labels.reshape(-1, canvas_length)
        return inputs

    def denoise(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        noised_samples: torch.Tensor,
        latent_shape: tuple[int, ...],
        t: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """
        As in [`UDMPipeline`], with `prompt_ids` and `prompt_mask` from `extend_prompt`. `past_key_values` caches the
        part that the encoder has read. The rest is read into it.
        """
        inputs: dict[str, Any] = self.prepare_denoiser_inputs(prompt_ids, prompt_mask, noised_samples, latent_shape)
        num_read = 0 if past_key_values is None else past_key_values.get_seq_length()
        for name in ("input_ids", "position_ids"):
            inputs[name] = inputs[name][:, num_read:]
        if num_read == prompt_ids.size(1):
            inputs["input_ids"] = None
        outputs = self.model(**inputs, past_key_values=past_key_values)
        if self.self_conditioning:
            inputs["input_ids"] = None
            outputs = self.model(
                **inputs, past_key_values=outputs.past_key_values, self_conditioning_logits=outputs.logits
            )
        return outputs.logits.reshape(*noised_samples.shape, -1)  # (B, N, V)

    def _complete_scoring_inputs(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.self_conditioning:
            with torch.no_grad():
                unlabeled = {name: value for name, value in inputs.items() if name != "shift_labels"}
                inputs["self_conditioning_logits"] = model(**unlabeled).logits
            # Under autocast, versions of PyTorch without https://github.com/pytorch/pytorch/pull/165068 would reuse
            # weights that were cast without gradients
            torch.clear_autocast_cache()
        return inputs

    @torch.no_grad()
    def sample_tokens(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        latent_shape: tuple[int, ...],
        num_inference_steps: int,
        guidance_scale: float = 1.0,
        latents: torch.Tensor | None = None,
        **kwargs,
    ) -> UDMSamplerOutput:
        """
        Draws the canvases one after the other, each as [`UDMPipeline.sample_tokens`] does: at temperature 1, without
        guidance, and without stopping early. `prompt_ids` and `prompt_mask` are from `encode_prompt`. `callback` gets
        the number of the step within its canvas.

        Raises:
            ValueError: If there is guidance, or the scheduler is not a [`UniformDDIMScheduler`].
        """
        if guidance_scale != 1.0:
            raise ValueError(f"`guidance_scale` must be 1.0 for DiffusionGemma, got {guidance_scale}.")
        if not (isinstance(self.scheduler, UniformDDIMScheduler) and self.scheduler.has_uniform_noise):
            raise ValueError(
                f"`scheduler` must be a `UniformDDIMScheduler` for rollouts, got {type(self.scheduler).__name__}, "
                "whose states are not those of the forward process. Set `pipeline.scheduler = "
                f"UniformDDIMScheduler({self.model.config.get_text_config().vocab_size})`."
            )
        num_canvases, canvas_length = latent_shape
        starts: Any = [None] * num_canvases if latents is None else latents.split(canvas_length, dim=1)
        past_key_values = DynamicCache(config=self.model.config.get_text_config())
        outputs: list[UDMSamplerOutput] = []
        for canvas in range(num_canvases):
            if outputs and self.interrupt:
                break
            output = super().sample_tokens(
                prompt_ids,
                prompt_mask,
                (1, canvas_length),
                num_inference_steps,
                latents=starts[canvas],
                past_key_values=past_key_values,
                **kwargs,
            )
            outputs.append(output)
            prompt_ids = torch.cat([prompt_ids, output.clean_samples], dim=1)
            prompt_mask = torch.cat([prompt_mask, torch.ones_like(output.clean_samples)], dim=1)
        return UDMSamplerOutput.cat(outputs, dim=1)


def quantize_experts(model: DiffusionGemmaForBlockDiffusion) -> None:
    """
    Quantizes the experts of a model whose linear layers have 4 bits, with the same settings. Encoder and decoder then
    have the same modules as experts, where they had two modules with the same weights.

    Args:
        model ([`~transformers.DiffusionGemmaForBlockDiffusion`]):
            The model, as transformers loads it with a [`~transformers.BitsAndBytesConfig`]. It is changed in place.
    """
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    config = model.config.quantization_config
    settings = {"compress_statistics": config.bnb_4bit_use_double_quant, "quant_type": config.bnb_4bit_quant_type}
    layers = zip(model.model.encoder.language_model.layers, model.model.decoder.layers, strict=True)
    for encoder_layer, decoder_layer in layers:
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(decoder_layer.experts, name, **settings)
        encoder_layer.experts = decoder_layer.experts


__all__ = ["DiffusionGemmaUDMPipeline"]
