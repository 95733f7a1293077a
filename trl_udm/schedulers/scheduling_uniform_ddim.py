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

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from diffusers.schedulers.scheduling_discrete_ddim import DiscreteDDIMScheduler, DiscreteDDIMSchedulerOutput

# diffusers looks a component's loader up by this name
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin

from ..random_tensor import check_generators, rand_tensor
from .forward_process import ForwardProcessMixin, predicts_leave_one_out


@dataclass
class UniformDDIMSchedulerOutput(DiscreteDDIMSchedulerOutput):
    """
    Output class for the uniform DDIM scheduler's `step`: its parent's, with another name for `sampled_tokens`.

    Args:
        prev_sample (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
            Token ids of the next state, one step closer to the clean sample.
        pred_original_sample (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
            Clean token ids x₁ drawn from the model's logits at this step. With `num_draws` its shape is `(batch_size,
            num_tokens, num_draws)`.
    """

    pred_original_sample: torch.Tensor


class UniformDDIMScheduler(ForwardProcessMixin, DiscreteDDIMScheduler):
    r"""
    Scheduler of uniform corruption, for text: diffusers' [`~diffusers.DiscreteDDIMScheduler`] with the forward process
    and the times that [`UDMPipeline`] needs.

    Time runs from noise, t = 0, to the clean sample, t = 1, and t is the probability that a token has survived. Tokens
    are independent given the clean sample x₁. V is `codebook_size`, and

        p_t(k | x₁) = t · [k = x₁] + (1 − t) / V.

    **Time grid.** Step i of N has t = i / N.

    **Antithetic noise.** A token survives where its uniform number u is below t, and else becomes a code j. In samples
    that `add_noise(..., mirrored=...)` marks, a `torch.BoolTensor` of shape `(batch_size,)`, it survives where u ≥ 1 −
    t, and else becomes j + V // 2 modulo V. Two states of the same generator both have the path's distribution, and
    are as unlike as can be: at t = 1/2 a token survives in exactly one of them.

    **Reverse step** from t to s = t + 1 / N. Draw x₁ ~ softmax(logits), at temperature 1 by default, then x_s from the
    exact posterior

        p(x_s | x_t, x₁) ∝ p_s(x_s | x₁) · ((t / s) · [x_t = x_s] + (1 − t / s) / V),

    so that states have the distribution of the forward process for every N. Unlike [`KineticOptimalScheduler`] on the
    same path, a step may also noise a token again, which corrects early mistakes. The last step returns x₁ itself.

    Args:
        codebook_size (`int`):
            Number of tokens V of the vocabulary, including special tokens.
        num_inference_steps (`int`, defaults to 32):
            Number of steps N, until `set_timesteps` is called.
        prediction_type (`str`, defaults to `"sample"`):
            What the network's logits are of: `"sample"` is p(x₁ⁿ | x_t), and `"leave_one_out"` is p(x₁ⁿ | x_t without
            token n), from which a step and the trainers compute p(x₁ⁿ | x_t) by equation 13 of
            https://huggingface.co/papers/2605.22765. TRL's script for DiffusionGemma trains such a network with
            `--model_prediction_type mean_loo`.

    Raises:
        ValueError: If `prediction_type` is neither of the two.

    Example:

    ```python
    >>> import torch
    >>> from trl_udm import UniformDDIMScheduler

    >>> scheduler = UniformDDIMScheduler(codebook_size=30)
    >>> noised_samples = scheduler.add_noise(torch.randint(30, (2, 16)), torch.tensor([0.1, 0.6]))
    ```
    """

    config: Any  # with attributes, where diffusers says `dict`
    can_mirror_noise = True

    def __init__(
        self,
        codebook_size: int,
        num_inference_steps: int = 32,
        prediction_type: Literal["sample", "leave_one_out"] = "sample",
    ):
        if prediction_type not in ("sample", "leave_one_out"):
            raise ValueError(f"`prediction_type` must be 'sample' or 'leave_one_out', got {prediction_type!r}.")
        # The parent's `__init__` would register the settings of a corrector, which the sampler does not use.
        # Diffusers' decorator would mark arguments given by position as defaults, which `from_config` leaves out.
        self.register_to_config(
            codebook_size=codebook_size, num_inference_steps=num_inference_steps, prediction_type=prediction_type
        )
        self.set_timesteps(num_inference_steps)

    def timestep_to_t(self, timestep: int | torch.Tensor) -> float:
        """
        Time of a step of the grid.

        Args:
            timestep (`int` or `torch.Tensor`):
                Step index, in `[0, num_inference_steps - 1]`.

        Returns:
            `float`: The time t, in `[0, 1)`.
        """
        return self._alpha(int(timestep))

    def sample_timesteps(
        self,
        size: int | tuple[int, ...],
        device: str | torch.device | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """
        Draw noise levels for training.

        Args:
            size (`int` or `tuple[int, ...]`):
                Shape of the result.
            device (`str` or `torch.device`, *optional*):
                Device of the result.
            generator (`torch.Generator`, *optional*):
                RNG of the draw.

        Returns:
            `torch.Tensor` of shape `size`: Times t in float32, uniform on `[0, 1)`.
        """
        return rand_tensor(size, generator, device, torch.float32)

    def _draw_noised_samples(
        self,
        original_samples: torch.Tensor,
        t: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        mirrored: torch.Tensor | None = None,
    ) -> torch.Tensor:
        shape, device = original_samples.shape, original_samples.device
        uniforms = rand_tensor(shape, generator, device)
        survives = uniforms < t
        codebook_size = self.config.codebook_size
        noise = self.draw_noise(shape, generator, device)
        if mirrored is not None:
            survives[mirrored] = (uniforms >= 1 - t)[mirrored]
            noise[mirrored] = (noise[mirrored] + codebook_size // 2) % codebook_size
        return torch.where(survives, original_samples, noise)

    @overload
    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: Literal[True] = True,
        num_draws: int | None = None,
    ) -> UniformDDIMSchedulerOutput: ...

    @overload
    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: Literal[False],
        num_draws: int | None = None,
    ) -> tuple[torch.Tensor, ...]: ...

    @torch.no_grad()
    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        num_draws: int | None = None,
    ) -> UniformDDIMSchedulerOutput | tuple[torch.Tensor, ...]:
        """
        Take one step of the reverse process.

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, num_tokens, codebook_size)`):
                Logits of x₁.
            timestep (`int` or `torch.Tensor`):
                Step index, in `[0, num_inference_steps - 1]`.
            sample (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                Token ids of the state x_t. It is not changed.
            temperature (`float`, *optional*, defaults to `1.0`):
                Temperature of the draw of x₁. 0 takes the most likely tokens.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                RNG of the draws, on any device, or one for each sample. The step is taken on the generator's device.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`UniformDDIMSchedulerOutput`], or a tuple of its fields.
            num_draws (`int`, *optional*):
                Number of clean tokens to draw for each token, > 0, as [`DFlowGRPOTrainer`] needs them. The first is
                the one that the step uses. By default one is drawn, and has no dimension of its own.

        Returns:
            [`UniformDDIMSchedulerOutput`] or `tuple`: The next state, and the clean sample drawn on the way.
        """
        if num_draws is not None and num_draws < 1:
            raise ValueError(f"`num_draws` must be > 0 or None, got {num_draws}.")
        if isinstance(generator, list):
            check_generators(generator, len(sample))
            batch = zip(model_output.split(1), sample.split(1), generator, strict=True)
            settings: dict[str, Any] = {"timestep": timestep, "temperature": temperature, "return_dict": False}
            settings["num_draws"] = num_draws
            rows = [self.step(logits, sample=x_t, generator=each, **settings)[:3] for logits, x_t, each in batch]
            x_s, x_1, probabilities = (torch.cat(tensors) for tensors in zip(*rows, strict=True))
        else:
            # The parent draws on the device of the logits, which must be the generator's
            device = sample.device if generator is None else generator.device
            x_t = sample.to(device)
            logits = self.constrain_logits(model_output.to(device), x_t)
            if predicts_leave_one_out(self):
                evidence = self._own_evidence(torch.as_tensor(self._alpha(int(timestep)), device=device))
                own = evidence.expand(*x_t.shape, 1)
                logits = logits.float().scatter_add(-1, x_t.unsqueeze(-1), own)
            x_s, x_1, probabilities = self._take_step(logits, int(timestep), x_t, temperature, generator)
            if num_draws is not None:
                others = [
                    self._sample_from_logits(logits, temperature=temperature, generator=generator)[0]
                    for _ in range(num_draws - 1)
                ]
                x_1 = torch.stack([x_1, *others], dim=-1)
            x_s, x_1, probabilities = (field.to(sample.device) for field in (x_s, x_1, probabilities))
        output = UniformDDIMSchedulerOutput(x_s, x_1, probabilities, model_output, pred_original_sample=x_1)
        return output if return_dict else output.to_tuple()

    def _take_step(
        self,
        logits: torch.Tensor,
        timestep: int,
        x_t: torch.Tensor,
        temperature: float,
        generator: torch.Generator | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The next state, the clean tokens, and their probabilities, (B, N) each."""
        settings: dict[str, Any] = {"temperature": temperature, "generator": generator, "return_dict": False}
        x_s, x_1, probabilities, _ = super().step(logits, timestep, x_t, **settings)
        return x_s, x_1, probabilities

    @torch.no_grad()
    def transition_probabilities(
        self,
        noised_samples: torch.Tensor,
        prev_samples: torch.Tensor,
        original_samples: torch.Tensor,
        timestep: int | torch.Tensor,
    ) -> torch.Tensor:
        """
        Probabilities p(x_s | x_t, x₁) with which a step moves tokens from one state to the next, given clean tokens.

        Args:
            noised_samples (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                Token ids of the state x_t before the step.
            prev_samples (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                Token ids of the state x_s after it.
            original_samples (`torch.LongTensor` of shape `(batch_size, num_tokens, num_draws)`):
                Clean token ids x₁, several for each token.
            timestep (`int` or `torch.Tensor`):
                Step index, in `[0, num_inference_steps - 1]`.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_tokens, num_draws)`: The probabilities in float32.
        """
        t, s, codebook_size = self._alpha(int(timestep)), self._alpha(int(timestep) + 1), self.config.codebook_size

        def probability(is_same: torch.Tensor, survival: float) -> torch.Tensor:
            return survival * is_same.float() + (1 - survival) / codebook_size

        x_t, x_s = noised_samples.unsqueeze(-1), prev_samples.unsqueeze(-1)
        joint = probability(x_s == original_samples, s) * probability(x_t == x_s, t / s)
        return joint / probability(x_t == original_samples, t)


__all__ = ["UniformDDIMScheduler", "UniformDDIMSchedulerOutput"]
