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
import numbers
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, TypeAlias, TypedDict

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.configuration_utils import ConfigMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.quantizers import PipelineQuantizationConfig
from huggingface_hub import snapshot_download
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..models.token_scores import compute_kl, score_tokens
from ..random_tensor import check_generators
from ..schedulers.draws import TiledLogits
from ..weights import load_every_weight
from .lora import LoraMixin
from .pipeline_output import UDMSamplerOutput, UDMTrajectory


HUB_KWARGS = ("cache_dir", "revision", "token", "local_files_only", "force_download")
"""Arguments of `from_pretrained` for downloads from the Hub."""

StepCallback: TypeAlias = Callable[[Any, int, int, dict], dict] | PipelineCallback | MultiPipelineCallbacks
"""What `callback_on_step_end` may be."""


class CallArguments(TypedDict, total=False):
    """Arguments of `__call__` that do not change the type of its result, for type checkers. A family adds its own."""

    negative_prompt: str | list[Any] | None
    num_inference_steps: int
    guidance_scale: float
    guidance_trunc: float
    generator: torch.Generator | list[torch.Generator] | None
    latents: torch.Tensor | None
    return_trajectory: bool
    callback_on_step_end: StepCallback | None
    callback_on_step_end_tensor_inputs: list[str] | None


class UDMPipeline(LoraMixin, DiffusionPipeline):
    """
    Base class of the model families that [`UDMGRPOTrainer`] trains.

    A family registers these components:

    * `transformer`, a [`~transformers.PreTrainedModel`] whose output embeddings are the head over its codebook;
    * `scheduler`, which offers `config.codebook_size`, `set_timesteps`, `timesteps`, `timestep_to_t`, `step`,
      `draw_noise`, `add_noise` and `constrain_logits`, such as [`KineticOptimalScheduler`], and may offer its
      `needs_model_output`;
    * `tokenizer`, and a decoder if it has one.

    It implements the five methods below that raise `NotImplementedError`. It also implements `__call__`, which takes a
    prompt, `num_inference_steps`, `guidance_scale`, `generator` and the size options, and returns an output with
    `images` or `texts`. The sampler, adapters and the Hub are the same for all families. The defaults of `score`,
    `extend_prompt`, `encode_condition` and `completion_mask` fit most of them.

    Shapes: B samples, N tokens a sample (the product of the latent shape), T prompt tokens, V codes.

    Attributes:
        modality (`str`, defaults to `"image"`):
            What `decode` returns: `"image"` for PIL images, `"text"` for strings, `"video"` for lists of PIL images,
            or for PIL images where a sample has one frame.
        transformer_name (`str`, defaults to `"transformer"`):
            Name of the transformer among the components, and of its folder in a saved pipeline.
        takes_token_times (`bool`, defaults to `False`):
            Whether a time t may also have the shape `(B, N)`, with a time for each token. Conditions need it: the
            tokens that they give are clean, at time 1, beside noised ones.
    """

    modality: Literal["image", "text", "video"] = "image"
    transformer_name: str = "transformer"
    takes_token_times: bool = False
    # A family may say what its components are
    transformer: Any
    scheduler: Any
    tokenizer: Any
    config: Any  # with attributes, where diffusers says `dict`
    _callback_tensor_inputs: list[str]
    model_cpu_offload_seq: Any
    # Of the last call. A callback may change the first two between steps.
    _guidance_scale: float = 1.0
    _interrupt: bool = False
    _num_timesteps: int = 0

    @property
    def guidance_scale(self) -> float:
        """`float`: Guidance weight of the next step. A callback changes it as `pipeline._guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """`bool`: Whether that weight means guidance. It does except at 1."""
        return self._guidance_scale != 1.0

    @property
    def interrupt(self) -> bool:
        """`bool`: Whether to end with the state as it is. A callback says so by `pipeline._interrupt = True`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """`int`: Number of steps of the last call."""
        return self._num_timesteps

    def register_modules(self, **kwargs: Any) -> None:
        self.check_components(kwargs)
        super().register_modules(**kwargs)

    def check_components(self, components: dict[str, Any] | None = None) -> None:
        """
        Checks that no component is missing.

        Args:
            components (`dict[str, Any]`, *optional*):
                Components by name. By default those of the pipeline.

        Raises:
            ValueError: If one is `None` that is not optional.
        """
        for name, component in (self.components if components is None else components).items():
            if component is None and name not in self._optional_components:
                raise ValueError(
                    f"`{name}` must be given, got None: `{type(self).__name__}` does not work without it. Leave the "
                    "argument out for `from_pretrained` to load it."
                )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        """
        As in [`~diffusers.DiffusionPipeline.from_pretrained`], with `use_safetensors=True` by default. A weight that
        is missing in a model of transformers, or that it does not have, is an error, where transformers would warn.
        A `quantization_config` of transformers, such as [`~transformers.BitsAndBytesConfig`], is for the transformer.

        Raises:
            ValueError: If the weights of such a model are not those that its configuration says.
        """
        kwargs = {"use_safetensors": True, **kwargs}
        config = kwargs.get("quantization_config")
        if isinstance(config, QuantizationConfigMixin):
            kwargs["quantization_config"] = PipelineQuantizationConfig(quant_mapping={cls.transformer_name: config})
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        for name, component in pipeline.components.items():
            # ZeRO-3 refuses a device map
            if isinstance(component, PreTrainedModel) and name not in kwargs and not is_deepspeed_zero3_enabled():
                # What the loader saw of the weights is not kept. On the meta device it reads their names and shapes.
                names = (*HUB_KWARGS, "variant", "use_safetensors")
                options = {name: kwargs[name] for name in names if name in kwargs}
                load_every_weight(
                    type(component).from_pretrained,
                    pretrained_model_name_or_path,
                    subfolder=name,
                    device_map="meta",
                    **options,
                )
        return pipeline

    def latent_shape(self, *args: Any, **kwargs: Any) -> tuple[int, ...]:
        """
        Shape of a sample's token grid.

        Args:
            args, kwargs:
                The family's own size options, such as `height` and `width` or a length. Without options, the shape is
                the model's native one.

        Returns:
            `tuple[int, ...]`: Its product is the number of tokens N.
        """
        raise NotImplementedError

    def encode_prompt(self, prompt: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Encodes prompts.

        Args:
            prompt (`list[str]` or `list[list[dict]]`):
                B prompts, as text or as messages.

        Returns:
            `tuple`: `prompt_ids` and `prompt_mask` (1 for prompt, 0 for padding), each of shape `(B, T)`. All prompts
            of a call are padded to the same length T, which may differ from call to call.
        """
        raise NotImplementedError

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
        Keyword arguments of the network.

        Args:
            prompt_ids (`torch.LongTensor` of shape `(B, T)`):
                From `encode_prompt`.
            prompt_mask (`torch.Tensor` of shape `(B, T)`):
                From `encode_prompt`.
            noised_samples (`torch.LongTensor` of shape `(B, N)`):
                The state x_t, in `[0, V)`.
            latent_shape (`tuple[int, ...]`):
                From `latent_shape`.
            labels (`torch.LongTensor` of shape `(B, N)`, *optional*):
                Tokens to score. With them, the result also has `shift_labels`, as long as the sequence: each label is
                at the position that predicts it, in the order of the tokens, and all other positions are -100.
            t (`torch.Tensor` of shape `(B,)`, *optional*):
                Time of each state in `[0, 1]`, for networks that take it. Sampler and trainer always pass it. It has
                the shape `(B, N)` in `score` of a family that `takes_token_times`, and in sampling with a condition.

        Returns:
            `dict[str, torch.Tensor]`: The keyword arguments.
        """
        raise NotImplementedError

    def extend_prompt(
        self, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, clean_samples: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Conditioning that samples are scored with. By default it is the one that they were drawn with.

        A family that draws a sample part by part appends the parts that later parts were conditioned on.

        Args:
            prompt_ids, prompt_mask (of shape `(B, T)`):
                From `encode_prompt`.
            clean_samples (`torch.LongTensor` of shape `(B, N)`):
                The samples.

        Returns:
            `tuple`: `prompt_ids` and `prompt_mask` for `score` and `prepare_denoiser_inputs`.
        """
        return prompt_ids, prompt_mask

    def encode_condition(self, rows: list[dict[str, Any]], latent_shape: tuple[int, ...]) -> torch.Tensor | None:
        """
        Tokens that rows of a dataset give, such as the first frame of a video. By default there are none.

        The trainer draws samples with them, as `condition` of `sample_tokens`. It neither noises nor scores them.

        Args:
            rows (`list[dict]`):
                B rows.
            latent_shape (`tuple[int, ...]`):
                From `latent_shape`.

        Returns:
            `torch.LongTensor` of shape `(B, N)`, *optional*: The given tokens, and -1 for those to draw. At least one
            token of a sample is to be drawn.
        """
        return None

    def denoise(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        noised_samples: torch.Tensor,
        latent_shape: tuple[int, ...],
        t: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Calls the network once.

        Args:
            prompt_ids, prompt_mask, noised_samples, latent_shape, t:
                As in `prepare_denoiser_inputs`.

        Returns:
            `torch.Tensor` of shape `(B, N, V)`: Logits of p_θ(x₁ | x_t, c), token by token.
        """
        raise NotImplementedError

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
        """
        The logits that the sampler draws from. With a `guidance_scale`, the second half of the batch is that of the
        negative prompts. A family of many codes may return [`TiledLogits`].
        """
        logits = self.denoise(prompt_ids, prompt_mask, noised_samples, latent_shape, t=t, **denoise_kwargs)
        if guidance_scale is None:
            return logits
        logits, negative_logits = logits.chunk(2)
        return torch.lerp(negative_logits, logits, guidance_scale)

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
        Log-probabilities of tokens, for the trainer.

        By default TRL's fused head computes them without logits. It needs a backbone that returns `last_hidden_state`,
        and a linear head directly on it. Under an adapter on the head, or a scheduler that rules out tokens, they are
        computed from logits. A family of other networks overrides this method.

        Args:
            model (`nn.Module`):
                The transformer as the trainer holds it: with TRL's fused head, and possibly wrapped for several
                devices.
            prompt_ids, prompt_mask, noised_samples, latent_shape, t:
                As in `prepare_denoiser_inputs`.
            labels (`torch.LongTensor` of shape `(B, N)` or `(B, N, n)`):
                Tokens to score: one for each token, or several.

        Returns:
            `tuple`: log p_θ(labels | x_t, c), of the shape of the labels, and the entropies of the tokens, of shape
            `(B, N)`. The entropies may be `None` for a reference model.
        """
        # TRL's fused head scores one label, without an adapter, among all tokens
        if labels.ndim == 3 or self._has_adapter_on_head or getattr(self.scheduler, "rules_out_tokens", False):
            args = (prompt_ids, prompt_mask, noised_samples, latent_shape, labels, t)
            logps, entropies, _ = self.score_with_kl(model, None, *args)
            return logps, entropies
        inputs = self.prepare_denoiser_inputs(prompt_ids, prompt_mask, noised_samples, latent_shape, labels, t)
        inputs = self._complete_scoring_inputs(model, inputs)
        return self._select_labels(model(**inputs, fused_lm_head=True), inputs["shift_labels"], labels)

    def _complete_scoring_inputs(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Adds what a network takes in `score` beside what `prepare_denoiser_inputs` gives with labels."""
        return inputs

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
        """
        The distributions of all tokens, for the trainer's `kl_estimator="full"`.

        By default these are the logits, (B, N, V) of them at once. A family of many codes overrides this method.

        Args:
            model, prompt_ids, prompt_mask, noised_samples, latent_shape, labels, t:
                As in `score`.

        Returns:
            `tuple`: A tensor of shape `(B, N, D)`, and a module that maps it to logits of shape `(B, N, V)`.
        """
        inputs = self.prepare_denoiser_inputs(prompt_ids, prompt_mask, noised_samples, latent_shape, labels, t)
        inputs = self._complete_scoring_inputs(model, inputs)
        is_label = inputs.pop("shift_labels") != -100
        logits = model(**inputs).logits[is_label].view(*labels.shape, -1)  # (B, N, V)
        return self.scheduler.constrain_logits(logits, noised_samples), nn.Identity()

    def score_with_kl(
        self, model: nn.Module, reference: tuple[torch.Tensor, nn.Module] | None, *args: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        As `score`, with the divergence from a reference, from one pass through the network.

        Args:
            model (`nn.Module`):
                As in `score`.
            reference (`tuple`, *optional*):
                What `predict_tokens` returns for the reference and the same arguments.
            args:
                The other arguments of `score`.

        Returns:
            `tuple`: log p_θ(labels | x_t, c), of the shape of the labels, the entropies of the tokens, and with a
            `reference` the divergences KL(p_θ(· | x_t, c) ‖ p_ref(· | x_t, c)), each of shape `(B, N)`.
        """
        labels = args[4]
        one_label = labels if labels.ndim == 2 else labels[..., 0]
        inputs = (*args[:4], one_label, *args[5:])
        hidden_states, head = self.predict_tokens(model, *inputs)
        hidden_states = hidden_states.flatten(0, 1)
        logps, entropies = score_tokens(head, hidden_states, labels.flatten(0, 1))
        kl = None
        if reference is not None:
            kl = compute_kl(head, hidden_states, reference[1], reference[0].flatten(0, 1)).view_as(one_label)
        return logps.view_as(labels), entropies.view_as(one_label), kl

    @property
    def _has_adapter_on_head(self) -> bool:
        """Whether TRL's fused head, which multiplies by the weight of the head, would leave out an adapter on it."""
        return isinstance(self.transformer.get_output_embeddings(), BaseTunerLayer)

    @staticmethod
    def _score_logits(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs = logits.float().log_softmax(dim=-1)  # (B, N, V)
        entropies = -(log_probs.exp() * log_probs).sum(dim=-1)
        return log_probs.gather(-1, labels.view(*entropies.shape, -1)).view_as(labels), entropies

    @staticmethod
    def _select_labels(
        outputs: Any, shift_labels: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        is_label = shift_labels != -100
        entropies = None if outputs.entropy is None else outputs.entropy[is_label].view_as(labels)
        return outputs.log_probs[is_label].view_as(labels), entropies

    def completion_mask(self, clean_samples: torch.Tensor) -> torch.Tensor:
        """
        The tokens whose probability is scored. By default these are all tokens.

        Args:
            clean_samples (`torch.LongTensor` of shape `(B, N)`):
                Clean tokens.

        Returns:
            `torch.LongTensor` of shape `(B, N)`: 1 for tokens that count, else 0. At least one token of a sample
            counts.
        """
        return torch.ones_like(clean_samples)

    def encode_completions(self, completions: list[Any], latent_shape: tuple[int, ...]) -> torch.Tensor:
        """
        Encodes what `decode` returns, for supervised training. A family that has none cannot be trained so.

        Args:
            completions (`list`):
                B PIL images, videos or strings.
            latent_shape (`tuple[int, ...]`):
                From `latent_shape`.

        Returns:
            `torch.LongTensor` of shape `(B, N)`: Clean tokens.
        """
        raise NotImplementedError

    def decode(self, clean_samples: torch.Tensor, latent_shape: tuple[int, ...]) -> list[Any]:
        """
        Decodes tokens to what reward functions see.

        Args:
            clean_samples (`torch.LongTensor` of shape `(B, N)`):
                Clean tokens.
            latent_shape (`tuple[int, ...]`):
                From `latent_shape`.

        Returns:
            `list[PIL.Image.Image]`, `list[list[PIL.Image.Image]]` or `list[str]`: B images, videos or strings.
        """
        raise NotImplementedError

    @torch.no_grad()
    def sample_tokens(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        latent_shape: tuple[int, ...],
        num_inference_steps: int,
        guidance_scale: float = 1.0,
        guidance_trunc: float = 0.9,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_mask: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        condition: torch.Tensor | Callable[[], torch.Tensor] | None = None,
        condition_t: float = 1.0,
        keep_condition: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_trajectory: bool = False,
        step_kwargs: dict[str, Any] | None = None,
        callback: Callable[[int, int, dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
        callback_tensor_inputs: Sequence[str] = ("latents", "logits"),
        **denoise_kwargs,
    ) -> UDMSamplerOutput:
        """
        Draws clean tokens: from noise at t = 0 to the sample at t = 1.

        With guidance the logits are z = z_uncond + w·(z_cond − z_uncond) while t < `guidance_trunc`, and z_cond after.

        Args:
            prompt_ids (`torch.LongTensor` of shape `(B, T)`):
                From `encode_prompt`.
            prompt_mask (`torch.Tensor` of shape `(B, T)`):
                From `encode_prompt`.
            latent_shape (`tuple[int, ...]`):
                From `latent_shape`.
            num_inference_steps (`int`):
                Number of denoising steps S, > 0.
            guidance_scale (`float`, *optional*, defaults to `1.0`):
                Guidance weight w. At 1 there is no guidance, and no second forward pass.
            guidance_trunc (`float`, *optional*, defaults to `0.9`):
                Time in `[0, 1]` from which there is no guidance.
            negative_prompt_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Conditioning of z_uncond. Required with guidance.
            negative_prompt_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                Its mask.
            latents (`torch.LongTensor` of shape `(B, N)` or `(B, *latent_shape)`, *optional*):
                Tokens to start from instead of the scheduler's noise.
            condition (`torch.LongTensor` of shape `(C, N)` or `Callable`, *optional*):
                Known tokens, and -1 for those to draw. Each of the C rows is that of B / C samples in a row. A
                function that gives them is called once the other arguments are checked.
            condition_t (`float`, *optional*, defaults to `1.0`):
                Time in `[0, 1]` of the known tokens in the state. Below 1 they are noised once, before the first step.
            keep_condition (`bool`, *optional*, defaults to `True`):
                Whether known tokens stay in every step, and are clean in the sample. If not, they are only part of the
                first state, and each step treats them as all other tokens.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of every random draw. With a list of B generators, each sample is what its generator alone
                would give.
            return_trajectory (`bool`, *optional*, defaults to `False`):
                Whether to return the states that the sampler passed through.
            step_kwargs (`dict[str, Any]`, *optional*):
                Further arguments of the scheduler's `step`, such as `num_draws`.
            callback (`Callable`, *optional*):
                Called after each step with the step's number, its timestep and a dictionary of tensors. The `latents`
                in the dictionary that it returns replace the state. It may also set `_guidance_scale` and `_interrupt`
                of the pipeline.
            callback_tensor_inputs (`list[str]`, *optional*, defaults to `["latents", "logits"]`):
                The tensors in that dictionary. Without `"logits"` these need not exist whole, and the network is not
                called for a first step that moves no token.
            denoise_kwargs:
                Further arguments of the family's `denoise`, such as a cache.

        Returns:
            [`UDMSamplerOutput`]: The clean tokens and, with `return_trajectory=True`, the trajectory. After an
            interruption these are the state, and the steps, so far.

        Raises:
            TypeError: If `latents` are not `torch.long`.
            ValueError: If `generator`, `latents` or `condition` do not fit the batch, or guidance has no negative
                prompts.
        """
        batch_size, device = prompt_ids.size(0), prompt_ids.device
        check_generators(generator, batch_size)
        size, codebook_size = (batch_size, torch.Size(latent_shape).numel()), self.scheduler.config.codebook_size
        if latents is None:
            latents = self.scheduler.draw_noise(size, generator, device)
        else:
            if latents.dtype != torch.long:
                raise TypeError(f"`latents` must be a `torch.long` tensor of token ids, got {latents.dtype}.")
            if latents.shape == (batch_size, *latent_shape):
                latents = latents.flatten(1)
            if latents.shape != size or latents.min() < 0 or latents.max() >= codebook_size:
                raise ValueError(
                    f"`latents` must have shape {size} and ids in [0, {codebook_size}), got shape "
                    f"{tuple(latents.shape)} and ids in [{latents.min().item()}, {latents.max().item()}]."
                )
            latents = latents.to(device)
        if callable(condition):
            condition = condition()
        if condition is not None:
            if condition.ndim != 2 or batch_size % len(condition) or condition.size(1) != size[1]:
                raise ValueError(
                    f"`condition` must have shape (C, {size[1]}), with C a divisor of {batch_size}, got "
                    f"{tuple(condition.shape)}."
                )
            condition, shown = self._show_condition(condition.to(device), condition_t, batch_size, generator)
            latents = latents.where(condition < 0, shown)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._guidance_scale, self._interrupt = guidance_scale, False
        self._num_timesteps = len(self.scheduler.timesteps)
        needs_logits = callback is not None and "logits" in callback_tensor_inputs
        # Those of a family may not exist whole
        predict: Any = functools.partial(UDMPipeline._predict, self) if needs_logits else self._predict
        needs_model_output = getattr(self.scheduler, "needs_model_output", lambda timestep: True)
        noised_samples, pred_original_samples = [], []
        for i, timestep in enumerate(self.scheduler.timesteps.tolist()):
            if self.interrupt:
                break
            t = torch.full((batch_size,), self.scheduler.timestep_to_t(timestep), device=device)
            if condition is not None and keep_condition and self.takes_token_times:
                t = torch.where(condition < 0, t.unsqueeze(1), condition_t)  # (B, N)
            inputs: Any = (prompt_ids, prompt_mask, latents)
            scale = None
            if self.do_classifier_free_guidance and self.scheduler.timestep_to_t(timestep) < guidance_trunc:
                if negative_prompt_ids is None or negative_prompt_mask is None:
                    raise ValueError(
                        f"`guidance_scale` must be 1.0 without `negative_prompt_ids`, got {self.guidance_scale}."
                    )
                prompts = (prompt_ids, prompt_mask)
                negatives = self._complete_negatives(*prompts, negative_prompt_ids, negative_prompt_mask)
                inputs = (torch.cat(pair) for pair in zip(inputs, (*negatives, latents), strict=True))
                t, scale = torch.cat([t, t]), self.guidance_scale
            logits = None
            if needs_logits or return_trajectory or needs_model_output(timestep):
                logits = predict(*inputs, latent_shape, t, scale, **denoise_kwargs)  # (B, N, V)
            output = self.scheduler.step(logits, timestep, latents, generator=generator, **(step_kwargs or {}))
            if condition is not None and keep_condition:
                is_last = i == self.num_timesteps - 1
                output.prev_sample = output.prev_sample.where(condition < 0, condition if is_last else shown)
                drawn = output.pred_original_sample
                if drawn is not None:
                    known = condition.view(*condition.shape, *[1] * (drawn.ndim - 2))  # there may be several draws
                    output.pred_original_sample = drawn.where(known < 0, known)
            if return_trajectory:
                noised_samples.append(latents)
                pred_original_samples.append(output.pred_original_sample)
            latents = output.prev_sample
            if callback is not None:
                tensors: dict[str, Any] = {"latents": latents, "logits": logits}
                tensors = {name: tensors[name] for name in callback_tensor_inputs}
                latents = callback(i, timestep, tensors).pop("latents", latents)
            del logits  # they would stay in memory while the next ones are computed
        trajectory = None
        if return_trajectory:
            trajectory = UDMTrajectory(
                timesteps=self.scheduler.timesteps[: len(noised_samples)],
                noised_samples=torch.stack(noised_samples),
                pred_original_samples=torch.stack(pred_original_samples),
            )
        return UDMSamplerOutput(latents, trajectory, condition if keep_condition else None)

    def _complete_negatives(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        negative_prompt_ids: torch.Tensor,
        negative_prompt_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What z_uncond is conditioned on. A family may derive it from the prompts."""
        return negative_prompt_ids, negative_prompt_mask

    def _show_condition(
        self,
        condition: torch.Tensor,
        condition_t: float,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The known tokens of each sample, clean and as the state has them."""
        num_repeats = batch_size // len(condition)
        if isinstance(generator, list):  # one for each sample
            condition, num_repeats = condition.repeat_interleave(num_repeats, dim=0), 1
        shown = condition
        if condition_t < 1:
            shown = self.scheduler.add_noise(condition.clamp(min=0), condition_t, generator)
        return condition.repeat_interleave(num_repeats, dim=0), shown.repeat_interleave(num_repeats, dim=0)

    def _sample_prompts(
        self,
        prompts: list[Any],
        negative_prompts: list[Any],
        latent_shape: tuple[int, ...],
        num_inference_steps: int,
        guidance_trunc: float,
        num_per_prompt: dict[str, int],
        callback_on_step_end: StepCallback | None,
        callback_on_step_end_tensor_inputs: list[str] | None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ) -> UDMSamplerOutput:
        """
        Samples of prompts, for `__call__`: with its checks, a progress bar, and diffusers' callbacks.

        `num_per_prompt` is the number of samples of each prompt, under the name of the argument.
        `chat_template_kwargs` are those of a text family's `encode_prompt`, and `kwargs` those of `sample_tokens`.
        """
        self.check_components()
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if callback_on_step_end_tensor_inputs is None:
            callback_on_step_end_tensor_inputs = ["latents"]
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {self._callback_tensor_inputs}, but found "
                f"{unknown}."
            )
        for name, number in {"num_inference_steps": num_inference_steps, **num_per_prompt}.items():
            if not isinstance(number, numbers.Integral) or number < 1:
                raise ValueError(f"`{name}` must be > 0, got {number}.")
        if not 0 <= guidance_trunc <= 1:
            raise ValueError(f"`guidance_trunc` must be in [0, 1], got {guidance_trunc}.")
        if len(negative_prompts) != len(prompts):
            raise ValueError(
                f"`negative_prompt` must have one entry for each prompt ({len(prompts)}), got {len(negative_prompts)}."
            )
        (num,) = num_per_prompt.values()
        # Together, so that all are padded to one length
        encoded = self.encode_prompt([*prompts, *negative_prompts], **(chat_template_kwargs or {}))
        ids, mask = (x.repeat_interleave(num, dim=0) for x in encoded)
        (prompt_ids, negative_prompt_ids), (prompt_mask, negative_prompt_mask) = ids.chunk(2), mask.chunk(2)
        with self.progress_bar(total=num_inference_steps) as progress_bar:

            def callback(step, timestep, tensors):
                progress_bar.update()
                if callback_on_step_end is None:
                    return {}
                returned = callback_on_step_end(self, step, timestep, tensors)
                if not isinstance(returned, dict):
                    raise TypeError(
                        f"`callback_on_step_end` must return a dictionary, like its last argument, got {returned!r}."
                    )
                return returned

            return self.sample_tokens(
                prompt_ids,
                prompt_mask,
                latent_shape,
                num_inference_steps=num_inference_steps,
                guidance_trunc=guidance_trunc,
                negative_prompt_ids=negative_prompt_ids,
                negative_prompt_mask=negative_prompt_mask,
                callback=callback,
                callback_tensor_inputs=callback_on_step_end_tensor_inputs,
                **kwargs,
            )

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """
        Downloads a pipeline for `from_pretrained`.

        The method of [`~diffusers.DiffusionPipeline`] does not serve here: if a component's class is not in diffusers
        or transformers, it looks for code in the repository.

        Args:
            pretrained_model_name (`str`):
                Repository on the Hub.
            kwargs:
                Hub options, and components that need not be downloaded. Others are ignored.

        Returns:
            `str`: The folder, with `model_index.json` and the components' folders.
        """
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        index: Any = cls.load_config(pretrained_model_name, **hub_kwargs)
        names = [name for name, value in index.items() if isinstance(value, list) and name not in kwargs]
        patterns = [cls.config_name, *(f"{name}/*" for name in names)]
        return snapshot_download(pretrained_model_name, allow_patterns=patterns, **hub_kwargs)

    @property
    def hub_id(self) -> str | None:
        """
        Repository on the Hub that the pipeline was loaded from.

        Returns:
            `str`, *optional*: Its id, or `None` if the pipeline was loaded from a folder or built from components.
        """
        name_or_path = self.name_or_path
        return None if name_or_path is None or os.path.exists(name_or_path) else str(name_or_path)

    def forget_local_paths(self) -> None:
        """
        Removes the names of local folders from the configurations of the pipeline and its components. The repository
        on the Hub that they were loaded from takes their place, if there is one.

        Otherwise a saved model would name folders of this machine.
        """
        hub_id = self.hub_id
        for part in (self, *self.components.values()):
            if isinstance(part, ConfigMixin) and "_name_or_path" in part.config:
                part.register_to_config(_name_or_path=hub_id)
        self.transformer.name_or_path = self.transformer.config.name_or_path = hub_id or ""
