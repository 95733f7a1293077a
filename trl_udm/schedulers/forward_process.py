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

"""The forward process of a scheduler, with the checks of token ids and times."""

from typing import Any

import torch

from ..random_tensor import randint_tensor


def predicts_leave_one_out(scheduler: Any) -> bool:
    """
    Whether a scheduler says that the network predicts a token from all other tokens of the state.

    Args:
        scheduler (`SchedulerMixin`):
            The scheduler.

    Returns:
        `bool`: Its `prediction_type` is `"leave_one_out"`.
    """
    return getattr(scheduler.config, "prediction_type", None) == "leave_one_out"


class ForwardProcessMixin:
    """
    Noised samples x_t ~ p_t(· | x₁).

    Needs the setting `codebook_size` and the method `_draw_noised_samples(original_samples, t, generator, **kwargs)`,
    where `t` has a time for each token. The noise at t = 0 is uniform by default.

    Attributes:
        can_mirror_noise (`bool`, defaults to `False`):
            Whether `add_noise` has the argument `mirrored`.
        has_uniform_noise (`bool`, defaults to `True`):
            Whether p_t(k | x₁) = t · [k = x₁] + (1 − t) / V, which `leave_one_out` needs.
        rules_out_tokens (`bool`, defaults to `False`):
            Whether a state rules out clean tokens, so that `constrain_logits` changes logits.
    """

    can_mirror_noise = False
    has_uniform_noise = True
    rules_out_tokens = False

    def draw_noise(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None = None,
        device: str | torch.device | None = None,
    ) -> torch.Tensor:
        """
        Draw states at t = 0. Here these are uniform codes.

        Args:
            shape (`tuple[int, ...]`):
                Shape of the result, `(batch_size, ...)`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                RNG of the draw, on any device, or one for each sample.
            device (`str` or `torch.device`, *optional*):
                Device of the result.

        Returns:
            `torch.LongTensor` of shape `shape`: Token ids.
        """
        return randint_tensor(self.config.codebook_size, shape, generator, device)

    @torch.no_grad()
    def add_noise(
        self,
        original_samples: torch.Tensor,
        t: float | torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        Draw noised samples x_t ~ p_t(· | x₁), each token by itself.

        Args:
            original_samples (`torch.LongTensor` of shape `(batch_size, ...)`):
                Clean token ids x₁, in `[0, codebook_size)`.
            t (`float` or `torch.Tensor`):
                Times in `[0, 1]`: one for all, or a tensor whose shape is that of the first dimensions of
                `original_samples`. Shape `(batch_size,)` is a time for each sample, the full shape a time for each
                token.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                RNG of the draw, on any device, or one for each sample.
            kwargs:
                Further arguments of the scheduler's own draw.

        Returns:
            `torch.LongTensor`: Noised token ids x_t, of the shape of `original_samples`.

        Raises:
            TypeError: If the ids are not `torch.long`.
            ValueError: If an id or a time is out of range, or the shape of `t` does not fit.
        """
        self._check_token_ids("original_samples", original_samples)
        return self._draw_noised_samples(original_samples, self._expand_t(t, original_samples), generator, **kwargs)

    def leave_one_out(
        self, logps: torch.Tensor, labels: torch.Tensor, noised_samples: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        r"""
        Log-probabilities of tokens given all *other* tokens of a state, under uniform corruption.

        The state x_t has the token's own noised value, and by Bayes' rule
        (https://huggingface.co/papers/2605.22765, equation 13)

            p(k | x_t) ∝ p(k | x_t without token n) · p_t(x_tⁿ | k),    p_t(j | k) = t · [j = k] + (1 − t) / V.

        So the probability of k = x_tⁿ is divided by 1 + r with r = V · t / (1 − t), and all are normalized again.

        Args:
            logps (`torch.Tensor` of shape `(batch_size, num_tokens, 2)`):
                log p(k | x_t) of the labels and of the noised tokens.
            labels (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                Token ids to score.
            noised_samples (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                Token ids of the state x_t.
            t (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_tokens)`):
                Times in `[0, 1]`. Those above 1 − 1e-6 count as that.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_tokens)`: The log-probabilities, in float32.
        """
        evidence = self._own_evidence(self._expand_t(t, labels))
        logps, state_logps = logps.float().unbind(dim=-1)
        # The normalizer is 1 − p + p / (1 + r), with p the probability of the token in the state
        normalizer = -torch.expm1(state_logps.clamp(max=0)) + torch.exp(state_logps - evidence)
        return logps - evidence * (labels == noised_samples) - normalizer.log()

    def constrain_logits(self, logits: torch.Tensor, noised_samples: torch.Tensor) -> torch.Tensor:
        """
        Logits of p_θ(x₁ | x_t), without the clean tokens that the state rules out. Here it rules out none.

        Args:
            logits (`torch.Tensor` of shape `(batch_size, num_tokens, codebook_size)`):
                Output of the network.
            noised_samples (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                Token ids of the state x_t.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_tokens, codebook_size)`: The logits.
        """
        return logits

    def undo_leave_one_out(
        self, logps: torch.Tensor, labels: torch.Tensor, noised_samples: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        r"""
        Log-probabilities of tokens given a state, from those given all *other* tokens of it: the inverse of
        `leave_one_out`. The probability of k = x_tⁿ is multiplied by 1 + r, and all are normalized again.

        Args:
            logps (`torch.Tensor` of shape `(batch_size, num_tokens, 2)`):
                log p(k | x_t without token n) of the labels and of the noised tokens.
            labels, noised_samples, t:
                As in `leave_one_out`.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_tokens)`: The log-probabilities, in float32.
        """
        evidence = self._own_evidence(self._expand_t(t, labels))
        logps, state_logps = logps.float().unbind(dim=-1)
        normalizer = torch.log1p(torch.expm1(evidence) * state_logps.exp())
        return logps + evidence * (labels == noised_samples) - normalizer

    def _own_evidence(self, t: torch.Tensor) -> torch.Tensor:
        """log(1 + r), by which the logit of the noised token is higher in a prediction that sees it."""
        t = t.clamp(max=1 - 1e-6)
        return torch.log1p(self.config.codebook_size * t / (1 - t))

    def needs_model_output(self, timestep: int | torch.Tensor) -> bool:
        """Whether the next state depends on the model's output."""
        return True

    def _check_token_ids(self, name: str, token_ids: torch.Tensor) -> None:
        codebook_size = self.config.codebook_size
        if codebook_size is None:
            raise ValueError("The scheduler does not know its `codebook_size`: pass it, or call `set_codebook`.")
        if token_ids.dtype != torch.long:
            raise TypeError(f"`{name}` must be a `torch.long` tensor, got {token_ids.dtype}.")
        smallest, largest = torch.stack(token_ids.aminmax()).tolist()
        if smallest < 0 or largest >= codebook_size:
            raise ValueError(f"`{name}` must be in [0, {codebook_size}), got ids from {smallest} to {largest}.")

    def _expand_t(self, t: float | torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        t = torch.as_tensor(t, dtype=torch.float32, device=samples.device)
        if t.shape != samples.shape[: t.ndim]:
            raise ValueError(
                "`t` must be a scalar or have the shape of the first dimensions of the samples, "
                f"{tuple(samples.shape)}, got {tuple(t.shape)}."
            )
        if not ((t >= 0) & (t <= 1)).all():
            raise ValueError(f"`t` must be in [0, 1], got values from {t.min().item()} to {t.max().item()}.")
        return t.view((*t.shape, *[1] * (samples.ndim - t.ndim))).expand(samples.shape)
