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

from typing import Any, ClassVar, cast

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.models.janus import JanusForConditionalGeneration

from ..random_tensor import check_generators
from ..schedulers.scheduling_kinetic_optimal import KineticOptimalScheduler
from .original_fudoki import OriginalFUDOKIMixin
from .text import TextMixin


SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
"""What comes before a question."""


class FUDOKIUnderstandingPipeline(TextMixin, OriginalFUDOKIMixin):
    r"""
    Answers to questions about images with FUDOKI (https://huggingface.co/papers/2505.20147), on transformers' Janus.
    Experimental: it answers, and cannot be trained.

    The network reads `[BOS, system prompt, "User: ", begin_of_image, image, end_of_image, question, "Assistant:",
    answer]` with bidirectional attention. The answer is uniform noise over the text vocabulary at t = 0. Logits are
    shifted by one, as in [`FUDOKIPipeline`]. The sampler takes the most probable token as x₁, and draws no other.

    Args:
        transformer ([`~transformers.JanusForConditionalGeneration`]):
            The network.
        scheduler ([`KineticOptimalScheduler`]):
            The forward and reverse process, over the codes of the text tokens, with `metric_power=4.0` for the
            published weights.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The text tokenizer. BOS is put before its tokens, once.

    Raises:
        ValueError: If the scheduler has not one code for each token of the text vocabulary, or a token is missing.

    Example:

    ```python
    >>> import torch
    >>> from diffusers.utils import load_image
    >>> from trl_udm import FUDOKIUnderstandingPipeline

    >>> pipe = FUDOKIUnderstandingPipeline.from_pretrained("LucasJinWang/FUDOKI", dtype=torch.bfloat16).to("cuda")
    >>> answers = pipe(load_image("bench.png"), "What is on the bench?")
    ```
    """

    transformer: JanusForConditionalGeneration
    scheduler: KineticOptimalScheduler
    tokenizer: PreTrainedTokenizerBase
    _original_options: ClassVar[dict[str, Any]] = {"num_vision_heads": 16}

    def __init__(
        self,
        transformer: JanusForConditionalGeneration,
        scheduler: KineticOptimalScheduler,
        tokenizer: PreTrainedTokenizerBase,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, tokenizer=tokenizer)
        vocab_size, codebook_size = transformer.config.text_config.vocab_size, scheduler.config.codebook_size
        if codebook_size != vocab_size:
            raise ValueError(
                f"`scheduler` must have a code for each of the {vocab_size} text tokens, got {codebook_size} codes. "
                "Those of the original are in `text_embedding.pt`."
            )
        tokens: Any = tokenizer.convert_tokens_to_ids(["<begin_of_image>", "<end_of_image>"])
        self.begin_token_id, self.end_token_id = tokens
        self.end_token_ids = [tokenizer.eos_token_id]
        if None in (tokenizer.bos_token_id, tokenizer.eos_token_id, *tokens):
            raise ValueError(
                "`tokenizer` must have BOS, EOS, `<begin_of_image>` and `<end_of_image>`, got the ids "
                f"{[tokenizer.bos_token_id, tokenizer.eos_token_id, *tokens]}."
            )
        self.image_processor = VaeImageProcessor(do_resize=False)

    def latent_shape(self, *args: Any, **kwargs: Any) -> tuple[int, ...]:
        raise NotImplementedError(
            f"`{type(self).__name__}` cannot be trained: the most probable token is taken, so that no probability of "
            "an answer has a gradient."
        )

    def _encode(self, question: str) -> list[int]:
        tokenizer: Any = self.tokenizer
        texts = [f"{SYSTEM_PROMPT}\n\nUser: ", f"{question}\n\nAssistant:"]
        before, after = tokenizer(texts, add_special_tokens=False)["input_ids"]
        image = [0] * self.transformer.config.vision_config.num_image_tokens
        return [tokenizer.bos_token_id, *before, self.begin_token_id, *image, self.end_token_id, *after]

    def prepare_image(self, image: Image.Image) -> torch.Tensor:
        """
        Scales an image to fit the square that the network sees, and pads it with gray.

        Args:
            image (`PIL.Image.Image`):
                An RGB image of any size.

        Returns:
            `torch.Tensor` of shape `(1, 3, image_size, image_size)`: The pixels, in `[-1, 1]`.
        """
        size = self.transformer.config.vision_config.image_size
        scaled = image.resize(
            [max(14, side * size // max(image.size)) for side in image.size], Image.Resampling.BICUBIC
        )
        canvas = Image.new("RGB", (size, size), (127, 127, 127))
        canvas.paste(scaled, ((size - scaled.width) // 2, (size - scaled.height) // 2))
        return self.image_processor.preprocess(canvas)

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Encodes images.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, image_size, image_size)`):
                From `prepare_image`.

        Returns:
            `torch.Tensor` of shape `(B, num_image_tokens, hidden_size)`: What the network reads as the images.
        """
        return self.transformer.model.get_image_features(pixel_values.to(self._execution_device)).pooler_output

    def denoise(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        noised_samples: torch.Tensor,
        latent_shape: tuple[int, ...],
        t: torch.Tensor | None = None,
        image_features: Any = None,
    ) -> torch.Tensor:
        """As in [`UDMPipeline`], for prompts without padding and with the `image_features` of `encode_image`."""
        input_ids = torch.cat([prompt_ids, noised_samples], dim=1)  # (B, L)
        inputs_embeds = self.transformer.get_input_embeddings()(input_ids)  # (B, L, D)
        start = prompt_ids[0].tolist().index(self.begin_token_id) + 1
        inputs_embeds[:, start : start + image_features.size(1)] = image_features
        # A mask of its own, since without one the attention would be causal
        length = input_ids.size(1)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=input_ids.device)
        outputs = self.transformer(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            logits_to_keep=noised_samples.size(1) + 1,
            use_cache=False,
        )
        return outputs.logits[:, :-1]

    def _predict(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = cast(torch.Tensor, super()._predict(*args, **kwargs))
        return torch.full_like(logits, -torch.inf).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 0.0)

    @torch.no_grad()
    def __call__(
        self,
        images: Image.Image | list[Image.Image],
        questions: str | list[str],
        num_inference_steps: int = 50,
        max_text_length: int = 500,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> list[str]:
        """
        Answers questions about images, one after the other.

        Args:
            images (`PIL.Image.Image` or `list[PIL.Image.Image]`):
                RGB images, one for each question.
            questions (`str` or `list[str]`):
                What to answer.
            num_inference_steps (`int`, *optional*, defaults to `50`):
                Number of denoising steps.
            max_text_length (`int`, *optional*, defaults to `500`):
                Number of tokens beside those of the image. What system prompt and question leave is the answer.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                RNG, or one for each question.

        Returns:
            `list[str]`: The answers, each up to the token that ends it, without special tokens.

        Raises:
            TypeError: If a generator is none.
            ValueError: If an argument is out of its range, or a question leaves no room for an answer.
        """
        self.check_components()
        images = images if isinstance(images, list) else [images]
        questions = questions if isinstance(questions, list) else [questions]
        if not questions or not all(isinstance(question, str) for question in questions):
            raise ValueError(f"`questions` must be a string or a non-empty list of strings, got {questions!r}.")
        modes = [image.mode if isinstance(image, Image.Image) else type(image).__name__ for image in images]
        if set(modes) - {"RGB"}:
            raise ValueError(f'`images` must be PIL images of mode RGB, got {modes}: use `image.convert("RGB")`.')
        if len(images) != len(questions):
            raise ValueError(
                f"`images` must be one for each of the {len(questions)} questions, got {len(images)}. To ask several "
                "questions about an image, give it several times."
            )
        check_generators(generator, len(questions))
        generators = generator if isinstance(generator, list) else [generator] * len(questions)
        num_tokens = max_text_length + self.transformer.config.vision_config.num_image_tokens
        prompts = [self.encode_prompt([question]) for question in questions]
        lengths = [num_tokens - prompt_ids.size(1) for prompt_ids, _ in prompts]
        if min(lengths) < 1:
            raise ValueError(
                f"`max_text_length` must be at least {max_text_length - min(lengths) + 1} for the longest question, "
                f"got {max_text_length}: no room is left for an answer."
            )
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        answers = []
        rows = list(zip(images, prompts, lengths, generators, strict=True))
        for image, (prompt_ids, prompt_mask), length, rng in self.progress_bar(rows):
            features = self.encode_image(self.prepare_image(image))
            options: dict[str, Any] = {"generator": rng, "image_features": features}
            output = self.sample_tokens(prompt_ids, prompt_mask, (length,), num_inference_steps, **options)
            answers += [text.strip() for text in self.decode(output.clean_samples, (length,))]
        return answers
