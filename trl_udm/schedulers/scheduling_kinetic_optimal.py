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

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput

from ..random_tensor import rand_tensor, widest_dtype
from .codebook import CodebookMixin
from .draws import (
    Compute,
    TiledLogits,
    block_size,
    chunk_length,
    compute_blocks,
    draw_codes,
    draw_tiled_codes,
    draw_uniform_codes,
    invert_cumulative,
    split_codes,
)
from .forward_process import ForwardProcessMixin


@dataclass
class KineticOptimalSchedulerOutput(BaseOutput):
    """
    Output class for the kinetic-optimal scheduler's `step`.

    Args:
        prev_sample (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
            Token ids of the next state, one step closer to the clean sample.
        pred_original_sample (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
            Clean token ids x₁ drawn from the model's logits at this step, if it got any. With `num_draws` its shape is
            `(batch_size, num_tokens, num_draws)`.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class KineticOptimalScheduler(CodebookMixin, ForwardProcessMixin, SchedulerMixin, ConfigMixin):
    """
    Scheduler of uniform discrete diffusion: the probability paths of "Flow Matching with General Discrete Paths: A
    Kinetic-Optimal Perspective" (https://huggingface.co/papers/2412.03487), as UDM-GRPO
    (https://huggingface.co/papers/2604.18518) uses them.

    Time runs from noise, t = 0, to the clean sample, t = 1. Tokens are independent given the clean sample x₁, and V is
    `codebook_size`.

    **Metric path** (`alpha` is a number). The codes are the L2-normalized rows e of a codebook, `d(j, k) = ‖e_j −
    e_k‖^metric_power`, `beta_t = c · (t / (1 − t))^alpha`, and

        p_t(k | x₁) = softmax_k(−beta_t · d(x₁, k)).

    **Mixture path** (`alpha` is `None`). `p_t(k | x₁) = t · [k = x₁] + (1 − t) / V`.

    Both are uniform over V codes at t = 0 and a point mass on x₁ at t = 1.

    **Time grid.** Step i of N has `sigma = 1 − i / N` and `t = 1 − shift · sigma / (1 + (shift − 1) · sigma)`.

    **Reverse step** from t to t + h. Draw x₁ ~ softmax(logits). A token in state x_t jumps to code k ≠ x_t at the rate

        u(k) = p_t(k | x₁) · beta'_t · max(0, d(x_t, x₁) − d(k, x₁))        metric path
        u(k) = [k = x₁] / (1 − t)                                           mixture path

    with `beta'_t = c · alpha · t^(alpha − 1) / (1 − t)^(alpha + 1)`, which is taken as 0 at t = 0. With λ = Σ_k u(k),
    the token jumps to k ~ u / λ with probability `1 − exp(−h · λ)`, and otherwise stays. The last step returns x₁
    itself.

    **Memory and precision.** `step` and `add_noise` work on at most `max_chunk_elements` pairs of a token and a code
    at a time, and on at most `max_chunk_elements_on_cpu` on a CPU, whose caches hold them. A few float32 tensors of
    that size exist at once, for every batch size. With more than `max_untiled_codes` codes, even a token's own row of
    probabilities is computed in parts. Codes, distances and probabilities are float32 for every dtype of the logits,
    also under autocast. Leave TF32 matrix products off, as PyTorch does by default: they round codes to 10 bits, which
    changes p_t by up to about 1e-3 in total variation.

    **Codes** are the scheduler's own weights. They are saved and loaded with it, and a scheduler that `from_config`
    makes from `other.config` has a copy of the other's.

    Args:
        alpha (`float`, *optional*, defaults to 0.9):
            Exponent of `beta_t`, in `(0, ∞)`. `None` means the mixture path.
        c (`float`, *optional*, defaults to 3.0):
            Factor of `beta_t`, in `(0, ∞)`. Not used by the mixture path.
        shift (`float`, defaults to 1.0):
            Shift of the time grid, in `(0, ∞)`. Above 1, more steps are close to the noise.
        eps (`float`, defaults to 1e-5):
            Smallest norm by which an embedding is divided when it is normalized.
        codebook_size (`int`, *optional*):
            Number of codes V. Taken from the codebook if there is one.
        codebook_dim (`int`, *optional*):
            Length of a code. Taken from the codebook if there is one.
        metric_power (`float`, defaults to 2.0):
            Power of the distance between two codes that d is, in `(0, ∞)`: 2 for URSA, 4 for FUDOKI. Not used by the
            mixture path.

    Raises:
        ValueError: If a setting is not in its range.

    Example:

    ```python
    >>> import torch
    >>> from trl_udm.schedulers.scheduling_kinetic_optimal import KineticOptimalScheduler

    >>> scheduler = KineticOptimalScheduler(shift=2.0)
    >>> scheduler.set_codebook(torch.randn(256, 8))

    >>> clean_samples = torch.randint(256, (2, 64))
    >>> noised_samples = scheduler.add_noise(clean_samples, torch.tensor([0.1, 0.6]))

    >>> scheduler.set_timesteps(10)
    >>> sample = torch.randint(256, (2, 64))
    >>> for timestep in scheduler.timesteps:
    ...     logits = torch.randn(2, 64, 256)  # a denoiser's output at (sample, timestep)
    ...     sample = scheduler.step(logits, timestep, sample).prev_sample
    ```
    """

    order = 1
    max_chunk_elements = 2**24
    max_chunk_elements_on_cpu = 2**20
    max_untiled_codes = 4096

    def __init__(
        self,
        alpha: float | None = 0.9,
        c: float | None = 3.0,
        shift: float = 1.0,
        eps: float = 1e-5,
        codebook_size: int | None = None,
        codebook_dim: int | None = None,
        metric_power: float = 2.0,
    ):
        settings = {"alpha": alpha, "c": c, "shift": shift, "eps": eps, "metric_power": metric_power}
        for name, value in settings.items():
            is_unused = alpha is None and name in ("alpha", "c")
            if not is_unused and (value is None or not 0 < value < math.inf):
                raise ValueError(f"`{name}` must be a number > 0, got {value}.")

        # Diffusers' decorator would mark arguments given by position as defaults, which `from_config` leaves out
        self.register_to_config(**settings, codebook_size=codebook_size, codebook_dim=codebook_dim)
        self.num_inference_steps: Any = None  # a number then
        self.timesteps: Any = None  # a tensor after `set_timesteps`
        self._normed: torch.Tensor | None = None  # the codebook that `_squared_norms` is of

    @property
    def needs_codebook(self) -> bool:
        """`bool`: Whether the path is the metric path, which depends on the distances between codes."""
        return self.config.alpha is not None

    @property
    def has_uniform_noise(self) -> bool:
        """`bool`: Whether the path is the mixture path, whose noise is uniform."""
        return not self.needs_codebook

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """
        Set the grid of the reverse process.

        Args:
            num_inference_steps (`int`):
                Number of steps, in `[1, ∞)`.
            device (`str` or `torch.device`, *optional*):
                Device of `timesteps` and of the codebook.

        Raises:
            ValueError: If `num_inference_steps` is not positive.
        """
        if num_inference_steps <= 0:
            raise ValueError(f"`num_inference_steps` must be > 0, got {num_inference_steps}.")
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps, device=device, dtype=torch.long)
        if self.codebook is not None:
            self.codebook = self.codebook.to(device)

    def timestep_to_t(self, timestep: int | torch.Tensor) -> float:
        """
        Time of a step of the grid.

        Args:
            timestep (`int` or `torch.Tensor`):
                Step index, in `[0, num_inference_steps - 1]`.

        Returns:
            `float`: The time t, in `[0, 1)`.

        Raises:
            ValueError: If `set_timesteps` was not called, or the grid has no such step.
        """
        step_index = self._step_index(timestep)
        # For some shifts the formula gives ±1e-16 at the first step
        return 0.0 if step_index == 0 else self._sigma_to_t(1 - step_index / self.num_inference_steps)

    def needs_model_output(self, timestep: int | torch.Tensor) -> bool:
        """
        Whether the next state depends on the model's output. It does not at t = 0 of the metric path, where no token
        jumps because `beta'_0` is 0.

        Args:
            timestep (`int` or `torch.Tensor`):
                Step index, in `[0, num_inference_steps - 1]`.

        Returns:
            `bool`: If it is `False`, `step` takes `None` for the output.
        """
        is_last = self._step_index(timestep) == self.num_inference_steps - 1
        return is_last or self.config.alpha is None or self.timestep_to_t(timestep) > 0

    def _step_index(self, timestep: int | torch.Tensor) -> int:
        if self.num_inference_steps is None:
            raise ValueError("The scheduler has no time grid yet: call `set_timesteps` first.")
        step_index = int(timestep)
        if step_index != timestep or not 0 <= step_index < self.num_inference_steps:
            raise ValueError(
                f"`timestep` must be a step index in [0, {self.num_inference_steps - 1}], got {timestep}."
            )
        return step_index

    def _sigma_to_t(self, sigma: Any) -> Any:
        shift = self.config.shift
        return 1 - shift * sigma / (1 + (shift - 1) * sigma)

    def sample_timesteps(
        self,
        size: int | tuple[int, ...],
        device: str | torch.device | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """
        Draw noise levels for training: the time grid's map on `sigma = 1 − 0.999 · u`, u uniform on `[0, 1)`.

        Args:
            size (`int` or `tuple[int, ...]`):
                Shape of the result.
            device (`str` or `torch.device`, *optional*):
                Device of the result.
            generator (`torch.Generator`, *optional*):
                RNG of the draw.

        Returns:
            `torch.Tensor` of shape `size`: Times t in float32, in `[0, 1)`.
        """
        return self._sigma_to_t(1 - 0.999 * rand_tensor(size, generator, device, torch.float32))

    def beta(self, t: float | torch.Tensor) -> torch.Tensor:
        """Inverse temperature `beta_t` of the metric path at times `t` in `[0, 1]`: from 0 to infinity."""
        t = torch.as_tensor(t)
        return self.config.c * (t / (1 - t)) ** self.config.alpha

    def beta_derivative(self, t: float | torch.Tensor) -> torch.Tensor:
        """Derivative `beta'_t` of `beta_t` at times `t` in `[0, 1)`, taken as 0 at t = 0."""
        t = torch.as_tensor(t)
        alpha = self.config.alpha
        return torch.where(t > 0, self.config.c * alpha * t ** (alpha - 1) / (1 - t) ** (alpha + 1), 0.0)

    def _draw_noised_samples(
        self,
        original_samples: torch.Tensor,
        t: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        device = original_samples.device
        uniforms = rand_tensor((*original_samples.shape, 2), generator, device, widest_dtype(device)).view(-1, 2)
        x_1, t = original_samples.flatten(), t.flatten()
        # Without a pass over the codes: all of them are as likely at t = 0, and x₁ is certain at t = 1
        noised_samples = torch.where(t == 1, x_1, draw_uniform_codes(self.config.codebook_size, uniforms))
        between = ((t > 0) & (t < 1)).nonzero().squeeze(1)
        for rows in between.split(self._chunk_length(device)):
            noised_samples[rows] = self._draw_noise(x_1[rows], t[rows], uniforms[rows])
        _check_drawn(noised_samples)
        return noised_samples.view(original_samples.shape)

    def _draw_noise(self, original_samples: torch.Tensor, t: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        if not self._is_tiled:
            return draw_codes(self._probabilities(original_samples, t), uniforms)
        logits = self._path_logits(original_samples, self.beta(t))
        return draw_tiled_codes(logits, self.config.codebook_size, uniforms, self._chunk_elements(uniforms.device))

    def probabilities(self, original_samples: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        """
        The probabilities p_t(k | x₁) that [`~KineticOptimalScheduler.add_noise`] draws from.

        Args:
            original_samples (`torch.LongTensor` of shape `(batch_size, ...)`):
                Clean token ids x₁, in `[0, codebook_size)`.
            t (`float` or `torch.Tensor`):
                Times in `[0, 1]`, as in [`~KineticOptimalScheduler.add_noise`].

        Returns:
            `torch.Tensor` of shape `(batch_size, ..., codebook_size)`: The probabilities in float32, not in chunks.

        Raises:
            ValueError: If an id or a time is out of range, or the shape of `t` does not fit.
        """
        self._check_token_ids("original_samples", original_samples)
        t = self._expand_t(t, original_samples)
        return self._probabilities(original_samples.flatten(), t.flatten()).view(*original_samples.shape, -1)

    def _probabilities(
        self, original_samples: torch.Tensor, t: torch.Tensor, distances: torch.Tensor | None = None
    ) -> torch.Tensor:
        original_samples, t = original_samples.unsqueeze(-1), t.unsqueeze(-1)  # (T, 1), (T, 1)
        if self.config.alpha is None:
            uniform = (1 - t) / self.config.codebook_size
            return uniform.repeat(1, self.config.codebook_size).scatter_add_(-1, original_samples, t)
        if distances is None:
            distances = self._distances(original_samples.squeeze(-1))
        # At t = 1, beta_t is infinite and x₁'s own logit must be 0, not NaN. No distance is 0, so all others are −∞.
        # `distances` is overwritten, which saves a tensor of (T, V).
        logits = distances.mul_(-self.beta(t)).scatter_(-1, original_samples, 0.0)  # (T, V)
        return torch.softmax(logits, dim=-1)

    def _codes(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes on a device, and their squared norms."""
        if self.codebook is None:
            raise ValueError(
                "The metric path needs a codebook: call `set_codebook`, load one with `from_pretrained`, or pass "
                "`from_config` the `config` of a scheduler that has one. A plain dictionary of settings has no codes."
            )
        self.codebook = self.codebook.to(device)
        if self._normed is not self.codebook:
            # In parts, whose squares need little memory
            norms = [codes.square().sum(dim=-1) for codes in self.codebook.split(2**12)]
            self._normed, self._squared_norms = self.codebook, torch.cat(norms)
        return self.codebook, self._squared_norms

    def _distances(self, token_ids: torch.Tensor) -> torch.Tensor:
        codebook, squared_norms = self._codes(token_ids.device)
        with torch.autocast(token_ids.device.type, enabled=False):
            distances = torch.addmm(squared_norms, codebook[token_ids], codebook.T, alpha=-2)  # (T, V)
        distances.add_(squared_norms[token_ids].unsqueeze(-1)).clamp_(min=torch.finfo(torch.float32).tiny)
        return self._raise_squares(distances)

    def _raise_squares(self, squared_distances: torch.Tensor) -> torch.Tensor:
        """The metric d from squared distances, which it overwrites."""
        if self.config.metric_power == 2:
            return squared_distances
        return squared_distances.pow_(self.config.metric_power / 2).clamp_(min=torch.finfo(torch.float32).tiny)

    def _path_logits(self, original_samples: torch.Tensor, beta: torch.Tensor) -> Compute:
        """The metric path's logits −beta_t · d(x₁, k) of T tokens, tile by tile. `beta` has shape `(T,)` or none."""
        codebook, squared_norms = self._codes(original_samples.device)
        norms = squared_norms[original_samples].unsqueeze(-1)
        # d = ‖x₁‖² + ‖k‖² − 2 x₁ · k is a product of two rows
        rows_of_tokens = torch.cat([2 * codebook[original_samples], -norms, -torch.ones_like(norms)], dim=-1)
        beta = beta.unsqueeze(-1).expand_as(norms)  # (T, 1)
        is_square = self.config.metric_power == 2
        if is_square:  # the product is that of the logits then
            rows_of_tokens *= beta  # (T, D + 2)

        def compute(rows: slice | torch.Tensor, codes: slice) -> torch.Tensor:
            norms = squared_norms[codes].unsqueeze(-1)
            with torch.autocast(norms.device.type, enabled=False):
                logits = rows_of_tokens[rows] @ torch.cat([codebook[codes], torch.ones_like(norms), norms], dim=-1).T
            return logits if is_square else self._raise_squares(logits.neg_().clamp_(min=0)).mul_(-beta[rows])

        return compute

    def velocity(
        self, noised_samples: torch.Tensor, original_samples: torch.Tensor, t: float | torch.Tensor
    ) -> torch.Tensor:
        """
        The rates u(k) at which a token jumps from x_t to every other code k, given x₁.

        Args:
            noised_samples (`torch.LongTensor` of shape `(batch_size, ...)`):
                Token ids of the state x_t, in `[0, codebook_size)`.
            original_samples (`torch.LongTensor` of shape `(batch_size, ...)`):
                Clean token ids x₁, in `[0, codebook_size)`.
            t (`float` or `torch.Tensor`):
                Times in `[0, 1)`, as in [`~KineticOptimalScheduler.add_noise`].

        Returns:
            `torch.Tensor` of shape `(batch_size, ..., codebook_size)`:
                The rates in float32, not in chunks, 0 at k = x_t.

        Raises:
            ValueError: If an id or a time is out of range, or shapes do not fit.
        """
        self._check_token_ids("noised_samples", noised_samples)
        self._check_token_ids("original_samples", original_samples)
        if noised_samples.shape != original_samples.shape:
            raise ValueError(
                "`noised_samples` and `original_samples` must have one shape, got "
                f"{tuple(noised_samples.shape)} and {tuple(original_samples.shape)}."
            )
        t = self._expand_t(t, original_samples)
        if (t == 1).any():
            raise ValueError("`t` must be in [0, 1), got 1: the velocity is infinite there.")
        velocity = self._velocity(noised_samples.flatten(), original_samples.flatten(), t.flatten())
        return velocity.view(*original_samples.shape, -1)

    def _velocity(self, noised_samples: torch.Tensor, original_samples: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        noised_samples = noised_samples.unsqueeze(-1)  # (T, 1)
        if self.config.alpha is None:
            velocity = t.new_zeros(len(t), self.config.codebook_size)
            velocity.scatter_(-1, original_samples.unsqueeze(-1), 1 / (1 - t.unsqueeze(-1)))
        else:
            distances = self._distances(original_samples)  # (T, V)
            gains = (distances.gather(-1, noised_samples) - distances).clamp_(min=0)
            velocity = self._probabilities(original_samples, t, distances)
            velocity.mul_(gains).mul_(self.beta_derivative(t).unsqueeze(-1))
        return velocity.scatter_(-1, noised_samples, 0.0)

    @torch.no_grad()
    def elbo_weights(
        self, original_samples: torch.Tensor, noised_samples: torch.Tensor, t: torch.Tensor, num_inference_steps: int
    ) -> torch.Tensor:
        r"""
        Weights of log p_θ(x₁ | x_t), token by token, in the evidence lower bound of a clean sample.

        Until its last step, at T, the sampler is a Markov chain in continuous time. A token in state x_t jumps to k at
        the rate Σ_j p_θ(j | x_t) · u(k | x_t, j), and given x₁ at the rate u(k | x_t, x₁). Let λ_θ and λ be the sums
        of these rates over k. By the log-sum inequality, with x_t ~ p_t(· | x₁),

            −log p_θ(x₁) ≤ ∫₀ᵀ dt E Σ_n [−λ_n · log p_θ(x₁ⁿ | x_t) + λ_θ,n − λ_n] − E Σ_n log p_θ(x₁ⁿ | x_T).

        On a grid of N steps the integral is a sum. So the weight of a token at step i is N · (t_{i + 1} − t_i) · λ,
        and N at the last step. The mean over the steps is then the part of the bound that log p_θ(x₁ | x_t) enters. On
        the mixture path λ is 1 / (1 − t), and 0 for a token that is at x₁ already.

        Args:
            original_samples (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                Clean token ids x₁.
            noised_samples (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                Token ids of the states x_t.
            t (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_tokens)`):
                Their times, in `[0, 1]`. A token at time 1 counts as one at the last step.
            num_inference_steps (`int`):
                Number of steps N of the grid.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_tokens)`: The weights in float32, >= 0.
        """
        t, shift = self._expand_t(t, original_samples), self.config.shift
        next_sigma = (1 - t) / (shift - (shift - 1) * (1 - t)) - 1 / num_inference_steps
        is_last = next_sigma < 0.5 / num_inference_steps
        x_t, x_1, times = noised_samples.flatten(), original_samples.flatten(), t.flatten()
        rates = torch.zeros_like(times)
        length = max(1, self._chunk_elements(x_t.device) // self.config.codebook_size)
        for rows in ((x_t != x_1) & ~is_last.flatten()).nonzero().squeeze(1).split(length):
            rates[rows] = self._velocity(x_t[rows], x_1[rows], times[rows]).sum(dim=-1)
        weights = (self._sigma_to_t(next_sigma) - t) * rates.view_as(t)
        return num_inference_steps * weights.masked_fill(is_last, 1.0)

    @torch.no_grad()
    def transition_probabilities(
        self,
        noised_samples: torch.Tensor,
        prev_samples: torch.Tensor,
        original_samples: torch.Tensor,
        timestep: int | torch.Tensor,
    ) -> torch.Tensor:
        """
        Probabilities with which a step moves tokens from one state to the next, given clean tokens x₁.

        A token stays with probability `exp(−h · λ)`, and moves to k with probability `(1 − exp(−h · λ)) · u(k) / λ`.
        The last step moves every token to x₁.

        Args:
            noised_samples (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                Token ids of the state before the step.
            prev_samples (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                Token ids of the state after it.
            original_samples (`torch.LongTensor` of shape `(batch_size, num_tokens, num_draws)`):
                Clean token ids x₁, several for each token.
            timestep (`int` or `torch.Tensor`):
                Step index, in `[0, num_inference_steps - 1]`.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_tokens, num_draws)`: The probabilities in float32.
        """
        step_index = self._step_index(timestep)
        x_t, x_s = (x.unsqueeze(-1).expand_as(original_samples) for x in (noised_samples, prev_samples))
        if step_index == self.num_inference_steps - 1:
            return (x_s == original_samples).float()
        t = self.timestep_to_t(step_index)
        step_size = self.timestep_to_t(step_index + 1) - t
        probabilities = (x_s == x_t).float().flatten()  # those of a token that is at x₁ already
        if not self.needs_model_output(step_index):
            return probabilities.view_as(x_t)
        x_t, x_s, x_1 = x_t.flatten(), x_s.flatten(), original_samples.flatten()
        length = max(1, self._chunk_elements(x_t.device) // self.config.codebook_size)
        for rows in (x_t != x_1).nonzero().squeeze(1).split(length):
            velocity = self._velocity(x_t[rows], x_1[rows], torch.full_like(x_t[rows], t, dtype=torch.float32))
            rates = velocity.sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
            moved = velocity.gather(-1, x_s[rows].unsqueeze(-1)).squeeze(-1) / rates * -torch.expm1(-step_size * rates)
            probabilities[rows] = torch.where(x_s[rows] == x_t[rows], torch.exp(-step_size * rates), moved)
        return probabilities.view_as(original_samples)

    @overload
    def step(
        self,
        model_output: torch.Tensor | TiledLogits | None,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: Literal[True] = True,
        num_draws: int | None = None,
        average_rates: bool = False,
    ) -> KineticOptimalSchedulerOutput: ...

    @overload
    def step(
        self,
        model_output: torch.Tensor | TiledLogits | None,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        *,
        return_dict: Literal[False],
        num_draws: int | None = None,
        average_rates: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    @torch.no_grad()
    def step(
        self,
        model_output: torch.Tensor | TiledLogits | None,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        num_draws: int | None = None,
        average_rates: bool = False,
    ) -> KineticOptimalSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Take one step of the reverse process.

        Args:
            model_output (`torch.Tensor` or [`TiledLogits`], of shape `(batch_size, num_tokens, codebook_size)`):
                Logits of x₁, of any floating dtype. It may be `None` where `needs_model_output` is `False`: the same
                random numbers are consumed, and `pred_original_sample` is `None`.
            timestep (`int` or `torch.Tensor`):
                Step index, in `[0, num_inference_steps - 1]`.
            sample (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                Token ids of the state x_t, in `[0, codebook_size)`. It is not changed.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                RNG of the draws, on any device, or one for each sample.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`KineticOptimalSchedulerOutput`] or a plain tuple.
            num_draws (`int`, *optional*):
                Number of clean tokens to draw for each token, > 0, as [`DFlowGRPOTrainer`] needs them. The first is
                the one that the step uses. By default one is drawn, and has no dimension of its own.
            average_rates (`bool`, defaults to `False`):
                Whether the rates of the step, but for the last one, are the means over all draws.

        Returns:
            [`KineticOptimalSchedulerOutput`] or `tuple`: The next state, and the clean sample drawn on the way.

        Raises:
            ValueError: If the step is not in the grid, shapes do not fit, or an id or the logits are out of range.
        """
        step_index = self._step_index(timestep)
        self._check_token_ids("sample", sample)
        if num_draws is not None and num_draws < 1:
            raise ValueError(f"`num_draws` must be > 0 or None, got {num_draws}.")
        if model_output is None and self.needs_model_output(timestep):
            raise ValueError(f"`model_output` must be given at timestep {step_index}, got None: tokens move there.")
        expected_shape = (*sample.shape, self.config.codebook_size)
        if sample.ndim != 2 or (model_output is not None and model_output.shape != expected_shape):
            raise ValueError(
                "`model_output` must have shape (batch_size, num_tokens, codebook_size) and `sample` its first two "
                f"dimensions, with `codebook_size` {self.config.codebook_size}, got "
                f"{None if model_output is None else tuple(model_output.shape)} and {tuple(sample.shape)}."
            )
        # Drawn at once, so that no draw depends on the size of the chunks or on other tokens
        uniforms = rand_tensor((*sample.shape, 5), generator, sample.device, widest_dtype(sample.device))
        more_uniforms = uniforms.new_empty(*sample.shape, 0)
        if num_draws is not None and num_draws > 1:
            size = (*sample.shape, 2 * (num_draws - 1))
            more_uniforms = rand_tensor(size, generator, sample.device, uniforms.dtype)
        draws: Any = None  # (B, N, n)
        if model_output is not None:
            draws = self._draw_original_samples(model_output, torch.cat([uniforms[..., :2], more_uniforms], dim=-1))
        if step_index == self.num_inference_steps - 1:
            prev_sample = draws[..., 0].clone()
        elif not self.needs_model_output(timestep):
            prev_sample = sample.clone()
        elif average_rates:
            prev_sample = self._jump_at_mean_rates(sample, draws, step_index, uniforms[..., 2:])
        else:
            prev_sample = self._jump(sample, draws[..., 0], step_index, uniforms[..., 2:])
        pred_original_sample = draws if num_draws is not None or draws is None else draws[..., 0]

        if not return_dict:
            return prev_sample, pred_original_sample
        return KineticOptimalSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def _draw_original_samples(self, logits: torch.Tensor | TiledLogits, uniforms: torch.Tensor) -> torch.Tensor:
        """Clean tokens (B, N, n), from random numbers (B, N, 2n)."""
        uniforms = uniforms.unflatten(-1, (-1, 2))  # (B, N, n, 2)
        codes = torch.empty(uniforms.shape[:-1], dtype=torch.long, device=uniforms.device)
        num_elements = self._chunk_elements(uniforms.device)
        if isinstance(logits, TiledLogits):
            for i in range(codes.size(-1)):
                codes[..., i] = logits.draw(uniforms[..., i, :], num_elements)
        else:
            # Logits are often a slice of the model's output. Slices of both dimensions do not copy it, as `flatten`
            # would.
            num_tokens = max(1, num_elements // self.config.codebook_size)
            num_samples = max(1, num_tokens // codes.shape[1])
            starts = itertools.product(range(0, codes.shape[0], num_samples), range(0, codes.shape[1], num_tokens))
            for i, j in starts:
                chunk = (slice(i, i + num_samples), slice(j, j + num_tokens))
                probabilities = torch.softmax(logits[chunk], dim=-1, dtype=torch.float32).flatten(0, 1)
                for draw in range(codes.size(-1)):
                    drawn = draw_codes(probabilities, uniforms[chunk][..., draw, :].flatten(0, 1))
                    codes[chunk][..., draw] = drawn.view(codes[chunk].shape[:-1])
        _check_drawn(codes)
        return codes

    def _jump(
        self,
        noised_samples: torch.Tensor,
        original_samples: torch.Tensor,
        step_index: int,
        uniforms: torch.Tensor,
    ) -> torch.Tensor:
        t = self.timestep_to_t(step_index)
        step_size = self.timestep_to_t(step_index + 1) - t
        prev_samples = noised_samples.flatten().clone()  # (B * N,)
        original_samples, uniforms = original_samples.flatten(), uniforms.flatten(0, 1)  # (B * N,), (B * N, 3)
        # A token at x₁ never leaves it, and needs no pass over V
        is_moving = prev_samples != original_samples
        if self._is_tiled:
            codebook, _ = self._codes(prev_samples.device)
            gains = self._raise_squares((codebook[prev_samples] - codebook[original_samples]).square().sum(dim=-1))
            # No gain is larger than d(x_t, x₁), here without what rounding may take from it
            rates = self.beta_derivative(t).to(gains.device) * (1e-5 + 1.0001 * gains)
            is_moving &= _is_jumping(rates, step_size, uniforms[:, 0])
        for rows in is_moving.nonzero().squeeze(1).split(self._chunk_length(is_moving.device)):
            jump = self._jump_in_tiles if self._is_tiled else self._jump_at_once
            prev_samples[rows] = jump(prev_samples[rows], original_samples[rows], t, step_size, uniforms[rows])
        _check_drawn(prev_samples)
        return prev_samples.view_as(noised_samples)

    def _jump_at_once(
        self, x_t: torch.Tensor, x_1: torch.Tensor, t: float, step_size: float, uniforms: torch.Tensor
    ) -> torch.Tensor:
        velocity = self._velocity(x_t, x_1, torch.full_like(x_t, t, dtype=torch.float32))  # (T, V)
        return self._jump_by(velocity, x_t, step_size, uniforms)

    def _jump_at_mean_rates(
        self, noised_samples: torch.Tensor, original_samples: torch.Tensor, step_index: int, uniforms: torch.Tensor
    ) -> torch.Tensor:
        """As `_jump`, at rates that are the means over clean tokens (B, N, n)."""
        t = self.timestep_to_t(step_index)
        step_size = self.timestep_to_t(step_index + 1) - t
        chunks = []
        length = max(
            1, self._chunk_elements(uniforms.device) // (self.config.codebook_size * original_samples.size(-1))
        )
        tensors = (noised_samples.flatten(), original_samples.flatten(0, 1), uniforms.flatten(0, 1))
        for x_t, x_1, numbers in zip(*(tensor.split(length) for tensor in tensors), strict=True):
            states = x_t.repeat_interleave(x_1.size(-1))  # (T * n,)
            velocity = self._velocity(states, x_1.flatten(), torch.full_like(states, t, dtype=torch.float32))
            velocity = velocity.unflatten(0, x_1.shape).mean(dim=1)  # (T, V)
            chunks.append(self._jump_by(velocity, x_t.clone(), step_size, numbers))
        return torch.cat(chunks).view_as(noised_samples)

    @staticmethod
    def _jump_by(velocity: torch.Tensor, x_t: torch.Tensor, step_size: float, uniforms: torch.Tensor) -> torch.Tensor:
        jumping = _is_jumping(velocity.sum(dim=-1), step_size, uniforms[:, 0]).nonzero().squeeze(1)
        x_t[jumping] = draw_codes(velocity[jumping], uniforms[jumping, 1:])
        return x_t

    def _jump_in_tiles(
        self, x_t: torch.Tensor, x_1: torch.Tensor, t: float, step_size: float, uniforms: torch.Tensor
    ) -> torch.Tensor:
        """As `_jump_at_once`, from one pass over tiles of codes. x₁'s own logit is 0, so no exponential overflows."""
        codebook_size, device = self.config.codebook_size, x_t.device
        codebook, _ = self._codes(device)
        beta = self.beta(t).to(device)
        logits = self._path_logits(x_1, beta)
        squared_distances = (codebook[x_t] - codebook[x_1]).square().sum(dim=-1, keepdim=True)
        logits_of_state = -beta * self._raise_squares(squared_distances)  # (T, 1)

        def weigh(logits: torch.Tensor, rows: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            probabilities = logits.exp()  # not normalized
            gains = logits.sub_(logits_of_state[rows]).clamp_(min=0)  # beta_t times those of the velocity
            return probabilities, gains.mul_(probabilities)

        size = block_size(codebook_size)
        total = torch.zeros(len(x_t), dtype=torch.float32, device=device)
        block_sums = torch.empty(len(x_t), codebook_size // size, dtype=torch.float32, device=device)
        for codes, blocks in split_codes(len(x_t), codebook_size, self._chunk_elements(device)):
            probabilities, weights = weigh(logits(slice(None), codes), slice(None))
            total += probabilities.sum(dim=-1)
            block_sums[:, blocks] = weights.unflatten(-1, (-1, size)).sum(dim=-1)
        rates = block_sums.sum(dim=-1) / total * (self.beta_derivative(t).to(device) / beta)
        jumping = _is_jumping(rates, step_size, uniforms[:, 0]).nonzero().squeeze(1)
        block = invert_cumulative(block_sums[jumping], uniforms[jumping, 1])
        weights = compute_blocks(
            lambda rows, codes: weigh(logits(jumping[rows], codes), jumping[rows])[1], block, codebook_size
        )
        code = block * size + invert_cumulative(weights, uniforms[jumping, 2])
        # A block whose weight was nothing but rounding may have none when it is computed again
        x_t[jumping] = code.where(weights.sum(dim=-1) > 0, x_t[jumping])
        return x_t

    @property
    def _is_tiled(self) -> bool:
        """Whether even a token's own row of probabilities is computed in parts."""
        return self.needs_codebook and self.config.codebook_size > self.max_untiled_codes

    def _chunk_elements(self, device: torch.device) -> int:
        elements = self.max_chunk_elements
        return min(elements, self.max_chunk_elements_on_cpu) if device.type == "cpu" else elements

    def _chunk_length(self, device: torch.device) -> int:
        """Number of tokens that are worked on at a time."""
        elements, codebook_size = self._chunk_elements(device), self.config.codebook_size
        return chunk_length(codebook_size, elements) if self._is_tiled else max(1, elements // codebook_size)


def _is_jumping(rates: torch.Tensor, step_size: float, uniforms: torch.Tensor) -> torch.Tensor:
    """Whether tokens jump within a step: each with the probability 1 − exp(−h · λ)."""
    return 1 - uniforms <= -torch.expm1(-step_size * rates)


def _check_drawn(codes: torch.Tensor) -> None:
    # Once for all chunks, since the host waits for the device here
    if (codes < 0).any():
        raise ValueError("Cannot draw tokens: the logits must be finite, got NaN or infinite values.")
