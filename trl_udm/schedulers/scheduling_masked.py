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

from typing import Literal

import torch

# diffusers looks a component's loader up by this name
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin

from ..random_tensor import rand_tensor
from .scheduling_uniform_ddim import UniformDDIMScheduler


class MaskedDDIMScheduler(UniformDDIMScheduler):
    r"""
    Scheduler of masked diffusion, also called absorbing diffusion, for text: [`UniformDDIMScheduler`] with a mask
    token as noise, for models such as MDLM (https://huggingface.co/papers/2406.07524) and LLaDA
    (https://huggingface.co/papers/2502.09992).

    Time runs from noise, t = 0, where all tokens are masks, to the clean sample, t = 1. With m the mask token,

        p_t(k | x₁) = t · [k = x₁] + (1 − t) · [k = m].

    **What the network predicts.** A visible token of a state is the clean token, and a clean token is never the mask.
    So `constrain_logits` sets p_θ(x₁ | x_t) to [x₁ = x_t] at visible tokens, and to 0 at the mask elsewhere (the
    parametrization of MDLM, section 3.2.3). The log-probability of a sample is then a sum over masked tokens alone.

    **Reverse step** from t to s = t + 1 / N. Draw x₁ ~ p_θ(x₁ | x_t). A masked token becomes x₁ with probability (s −
    t) / (1 − t), and a visible one stays. In the last step all become x₁.

    Args:
        codebook_size (`int`):
            Number of tokens of the vocabulary, including the mask token.
        mask_token_id (`int`):
            The mask token, in `[0, codebook_size)`.
        num_inference_steps (`int`, defaults to 32):
            Number of steps N, until `set_timesteps` is called.
        remasking (`str`, defaults to `"random"`):
            Which masked tokens a step leaves masked. `"random"`: each by itself, as above. `"low_confidence"`, as in
            LLaDA: those whose x₁ has the lowest probability, so many that a share of s of all tokens is visible,
            rounded down. The states of the sampler are then not those of the forward process.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    ```python
    >>> import torch
    >>> from trl_udm import MaskedDDIMScheduler

    >>> scheduler = MaskedDDIMScheduler(codebook_size=31, mask_token_id=30)
    >>> noised_samples = scheduler.add_noise(torch.randint(30, (2, 16)), torch.tensor([0.1, 0.6]))
    ```
    """

    has_uniform_noise = False
    rules_out_tokens = True

    def __init__(
        self,
        codebook_size: int,
        mask_token_id: int,
        num_inference_steps: int = 32,
        remasking: Literal["random", "low_confidence"] = "random",
    ):
        if not 0 <= mask_token_id < codebook_size:
            raise ValueError(f"`mask_token_id` must be in [0, {codebook_size}), got {mask_token_id}.")
        if remasking not in ("random", "low_confidence"):
            raise ValueError(f"`remasking` must be 'random' or 'low_confidence', got {remasking!r}.")
        # Without the parent's `__init__`, which would register a type of prediction
        self.register_to_config(
            codebook_size=codebook_size,
            mask_token_id=mask_token_id,
            num_inference_steps=num_inference_steps,
            remasking=remasking,
        )
        self.set_timesteps(num_inference_steps)

    def draw_noise(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None = None,
        device: str | torch.device | None = None,
    ) -> torch.Tensor:
        """As in [`UniformDDIMScheduler`]: masks alone, without a random draw."""
        return torch.full(shape, self.config.mask_token_id, device=device)

    def _draw_noised_samples(
        self,
        original_samples: torch.Tensor,
        t: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        mirrored: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if (original_samples == self.config.mask_token_id).any():
            raise ValueError(
                f"`original_samples` must not have the mask token {self.config.mask_token_id}: clean tokens are never "
                "masked. Remove it from the texts."
            )
        uniforms = rand_tensor(original_samples.shape, generator, original_samples.device)
        survives = uniforms < t
        if mirrored is not None:
            survives[mirrored] = (uniforms >= 1 - t)[mirrored]
        return original_samples.where(survives, self.config.mask_token_id)

    def constrain_logits(self, logits: torch.Tensor, noised_samples: torch.Tensor) -> torch.Tensor:
        """
        As in [`UniformDDIMScheduler`]: without the mask token, and at visible tokens with no other than these.

        Args:
            logits (`torch.Tensor` of shape `(batch_size, num_tokens, codebook_size)`):
                Output of the network.
            noised_samples (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                Token ids of the state x_t.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_tokens, codebook_size)`: The logits. Those that are ruled out
            have the least value of their dtype, whose product with a probability of 0 is not NaN.
        """
        ruled_out = torch.finfo(logits.dtype).min
        tokens = noised_samples.unsqueeze(-1)  # (B, N, 1)
        is_visible = tokens != self.config.mask_token_id
        own_logits = torch.zeros_like(logits[..., :1]).masked_fill(~is_visible, ruled_out)
        # At a masked token, the token of the state is the mask
        return logits.masked_fill(is_visible, ruled_out).scatter(-1, tokens, own_logits)

    def _take_step(
        self,
        logits: torch.Tensor,
        timestep: int,
        x_t: torch.Tensor,
        temperature: float,
        generator: torch.Generator | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x_1, probabilities = self._sample_from_logits(logits, temperature=temperature, generator=generator)
        is_masked = x_t == self.config.mask_token_id
        if self.config.remasking == "low_confidence":
            num_tokens = x_t.size(1)
            num_masked = num_tokens - num_tokens * (timestep + 1) // self.num_inference_steps
            confidence = probabilities.masked_fill(~is_masked, 2.0)  # above every probability
            stays = confidence.argsort(dim=1).argsort(dim=1) < num_masked
        else:
            stays = rand_tensor(x_t.shape, generator, x_t.device) >= self._unmasking_probability(timestep)
        return x_t.where(is_masked & stays, x_1), x_1, probabilities  # x₁ is x_t at visible tokens

    def _unmasking_probability(self, timestep: int) -> float:
        """(s − t) / (1 − t), which is exactly 1 in the last step."""
        return 1 / (self.num_inference_steps - timestep)

    def elbo_weights(
        self, original_samples: torch.Tensor, noised_samples: torch.Tensor, t: torch.Tensor, num_inference_steps: int
    ) -> torch.Tensor:
        r"""
        Weights of log p_θ(x₁ | x_t), token by token, in the evidence lower bound of a clean sample.

        A step from t to s moves a masked token to x₁ with probability a = (s − t) / (1 − t) given x₁, and with a ·
        p_θ(x₁ | x_t) without it. So the divergence of the two is −a · log p_θ(x₁ | x_t), and with x_t ~ p_t(· | x₁),

            −log p_θ(x₁) ≤ −(1 / N) Σ_i E Σ_{n masked} log p_θ(x₁ⁿ | x_tᵢ) / (1 − tᵢ).

        The weight is 1 / (1 − t) at masked tokens and 0 at visible ones. The mean over the N steps is the bound. This
        is for `remasking="random"`, whose steps move each token by itself.

        Args:
            original_samples (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                Clean token ids x₁.
            noised_samples (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                Token ids of the states x_t.
            t (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_tokens)`):
                Their times, in `[0, 1]`.
            num_inference_steps (`int`):
                Number of steps N of the grid, on which the weights do not depend.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_tokens)`: The weights in float32, >= 0.
        """
        is_masked = noised_samples == self.config.mask_token_id
        return torch.where(is_masked, 1 / (1 - self._expand_t(t, original_samples)), 0.0)

    @torch.no_grad()
    def transition_probabilities(
        self,
        noised_samples: torch.Tensor,
        prev_samples: torch.Tensor,
        original_samples: torch.Tensor,
        timestep: int | torch.Tensor,
    ) -> torch.Tensor:
        """As in [`UniformDDIMScheduler`]. At visible tokens, x₁ must be x_t."""
        a = self._unmasking_probability(int(timestep))
        x_t, x_s = noised_samples.unsqueeze(-1), prev_samples.unsqueeze(-1)
        return a * (x_s == original_samples).float() + (1 - a) * (x_s == x_t).float()


__all__ = ["MaskedDDIMScheduler"]
