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

"""Diagnostics: how the states, probabilities and samples of a run differ from those before training."""

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..drawing import BLUE, GREEN, RED, open_figure
from ..trainer.completions import mask_after_end
from ..trainer.udm_grpo_trainer import UDMGRPOTrainer


COLORS = {"forward": BLUE, "backward": RED}


class DiagnosticsCallback(TrainerCallback):
    r"""
    Measures the policy on fixed prompts and seeds, before training and every `measure_steps` steps.

    A measurement draws one sample x̂₁ per prompt. For each step of the rollout's grid it takes two kinds of states:
    those of the forward trajectory, x̂_t ~ p_t(· | x̂₁), and those of the backward trajectory, which the sampler
    passed through. Both are measured, whichever of them is trained on:

    - `state_distance`: energy distance ([`energy_distance`]) of the states from clean tokens noised by the forward
      process, as in pretraining. Estimates scatter around 0 if both have the same distribution.
    - `log_prob_variance`: variance over the samples of log π, the mean log-probability of a sample's tokens.
    - `entropy`: mean entropy of p_θ(x₁ | x_t) per token, in nats.
    - `tokens_changed`: share of tokens that differ between the samples and those before training, which are drawn with
      the same seeds.

    Means over the grid are logged as `diagnostics/<name>_<trajectory>` and `diagnostics/tokens_changed`. The values of
    each step of the grid are written to `diagnostics.json` in the output folder. At the end of training they are
    plotted in `diagnostics.png`. The callback does not change the run.

    Args:
        trainer ([`UDMGRPOTrainer`]):
            Trainer to which the callback is added.
        prompts (`list`):
            At least two prompts. A measurement costs 3·S forward passes per prompt, where S is `num_inference_steps`.
        clean_samples (`torch.LongTensor` of shape `(B, N)`, *optional*):
            Clean tokens that represent the data, such as an encoded image for each of the B prompts. By default the
            samples of the model before training.
        measure_steps (`int`, *optional*, defaults to `25`):
            Training steps between two measurements, > 0.
        seed (`int`, *optional*, defaults to `0`):
            Seed of every draw in a measurement.

    Raises:
        ValueError: If there are fewer than two prompts, `clean_samples` has another shape, or `measure_steps` is < 1.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from trl_udm import DiagnosticsCallback, TextUDMPipeline, UDMGRPOConfig, UDMGRPOTrainer
    >>> from trl_udm.worlds.sums import CHECKPOINT_PATH
    >>> from trl_udm.worlds.sums.problems import split_problems, sum_reward

    >>> trainer = UDMGRPOTrainer(
    ...     TextUDMPipeline.from_pretrained(CHECKPOINT_PATH),
    ...     sum_reward,
    ...     UDMGRPOConfig("sums", max_steps=1, bf16=False),
    ...     train_dataset=Dataset.from_list(split_problems()[0]),
    ... )
    >>> trainer.add_callback(DiagnosticsCallback(trainer, prompts=trainer.train_dataset["prompt"][:64]))
    ```
    """

    def __init__(
        self,
        trainer: UDMGRPOTrainer,
        prompts: list[Any],
        clean_samples: torch.Tensor | None = None,
        measure_steps: int = 25,
        seed: int = 0,
    ):
        if len(prompts) < 2:
            raise ValueError(f"`prompts` must have at least 2 prompts, got {len(prompts)}.")
        shape = (len(prompts), torch.Size(trainer.latent_shape).numel())
        if clean_samples is not None and clean_samples.shape != shape:
            raise ValueError(f"`clean_samples` must have the shape {shape}, got {tuple(clean_samples.shape)}.")
        if measure_steps < 1:
            raise ValueError(f"`measure_steps` must be > 0, got {measure_steps}.")
        self.trainer = trainer
        self.prompts = list(prompts)
        self.clean_samples = clean_samples
        self.measure_steps = measure_steps
        self.seed = seed
        self.initial_samples: torch.Tensor | None = None
        self.measurements: list[dict[str, Any]] = []
        """Each has `step` and `tokens_changed`, and the others by trajectory: a value per step of the grid."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        path = Path(args.output_dir, "diagnostics.json")
        if state.global_step > 0 and path.exists():  # a resumed run
            saved = json.loads(path.read_text())
            self.initial_samples = torch.tensor(saved["initial_samples"])
            self.measurements = [one for one in saved["measurements"] if one["step"] <= state.global_step]
        else:
            self._measure(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.global_step % self.measure_steps == 0:
            self._measure(args, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.is_world_process_zero:
            save_diagnostics(Path(args.output_dir, "diagnostics.png"), self.measurements)

    def _measure(self, args: TrainingArguments, state: TrainerState) -> None:
        model = self.trainer.model
        was_training = model.training
        model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(self.seed)
            measurement = {"step": state.global_step, **self._measure_policy()}
        model.train(was_training)
        self.measurements.append(measurement)
        metrics = self.trainer._metrics["train"]
        for name, value in measurement.items():
            if isinstance(value, dict):
                for trajectory, values in value.items():
                    metrics[f"diagnostics/{name}_{trajectory}"].append(statistics.fmean(values))
        metrics["diagnostics/tokens_changed"].append(measurement["tokens_changed"])
        if state.is_world_process_zero:
            saved = {"initial_samples": self.initial_samples.tolist(), "measurements": self.measurements}
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            Path(args.output_dir, "diagnostics.json").write_text(json.dumps(saved))

    def _measure_policy(self) -> dict[str, Any]:
        trainer, scheduler = self.trainer, self.trainer.pipeline.scheduler
        rollout = trainer._rollout(self.prompts, "train", return_trajectory=True)
        prompt_ids, prompt_mask, output = rollout.prompt_ids, rollout.prompt_mask, rollout.output
        samples = output.clean_samples  # (B, N)
        if self.initial_samples is None:
            self.initial_samples = samples.cpu()
        clean_samples = self.initial_samples if self.clean_samples is None else self.clean_samples
        clean_samples = clean_samples.to(samples.device)
        grid = [scheduler.timestep_to_t(timestep) for timestep in scheduler.timesteps.tolist()]
        states = {
            "forward": torch.stack([scheduler.add_noise(samples, t) for t in grid]),
            "backward": output.trajectory.noised_samples,
        }  # each (S, B, N)
        pretraining_states = [scheduler.add_noise(clean_samples, t) for t in grid]
        measurement: dict[str, Any] = {
            "tokens_changed": self._share_changed(samples, self.initial_samples.to(samples.device)),
            "state_distance": {},
            "log_prob_variance": {},
            "entropy": {},
        }
        repeated_ids, repeated_mask, actions = (x.repeat(len(grid), 1) for x in (prompt_ids, prompt_mask, samples))
        times = (
            torch.tensor(grid, device=samples.device).repeat_interleave(len(samples)).unsqueeze(1).expand_as(actions)
        )
        counted = trainer.pipeline.completion_mask(actions)  # (S * B, N)
        for trajectory, noised_samples in states.items():
            pairs = zip(noised_samples, pretraining_states, strict=True)
            measurement["state_distance"][trajectory] = [energy_distance(x, y) for x, y in pairs]
            log_probs, entropies, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model,
                torch.cat([repeated_ids, noised_samples.flatten(0, 1), actions], dim=1),
                torch.cat([repeated_mask, times, counted], dim=1),
                logits_to_keep=actions.size(1),
                batch_size=trainer.args.per_device_train_batch_size,
                compute_entropy=True,
            )
            log_probs, entropies = (
                ((values * counted).sum(dim=1) / counted.sum(dim=1)).unflatten(0, (len(grid), -1))  # (S, B)
                for values in (log_probs, entropies)
            )
            measurement["log_prob_variance"][trajectory] = log_probs.var(dim=1).tolist()
            measurement["entropy"][trajectory] = entropies.mean(dim=1).tolist()
        return measurement

    def _share_changed(self, *samples: torch.Tensor) -> float:
        completion_mask = self.trainer.pipeline.completion_mask
        after, before = (mask_after_end(tokens, completion_mask(tokens)) for tokens in samples)
        return ((after != before).sum() / ((after >= 0) | (before >= 0)).sum()).item()


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    r"""
    Unbiased estimate of the energy distance 2·E d(X, Y) − E d(X, X') − E d(Y, Y') between two distributions of tokens
    (Székely and Rizzo, https://doi.org/10.1016/j.jspi.2013.03.018). d is the square root of the share of tokens that
    differ.

    This d is a Euclidean distance of one-hot vectors, so the energy distance is 0 only for equal distributions. Row i
    of both arguments belongs to the same prompt. Only pairs of different prompts are compared, so that the choice of
    prompts makes no difference.

    Args:
        x (`torch.LongTensor` of shape `(B, N)`):
            B > 1 independent draws from the first distribution.
        y (`torch.LongTensor` of shape `(B, N)`):
            B draws from the second distribution.

    Returns:
        `float`: The estimate, at most 2. It may be below 0.
    """

    def mean_distance(x: torch.Tensor, y: torch.Tensor) -> float:
        distances = torch.stack([(row != y).float().mean(dim=1).sqrt() for row in x])  # (B, B)
        return (distances.sum() - distances.trace()).item() / (len(x) * (len(x) - 1))

    return 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)


def save_diagnostics(path: str | Path, measurements: list[dict[str, Any]]) -> None:
    """
    Plots measurements of [`DiagnosticsCallback`]: the first and the last one over the steps of the grid, and the share
    of changed tokens over training.

    Args:
        path (`str` or `Path`):
            Image file to write.
        measurements (`list[dict]`):
            Measurements, at least one.
    """
    titles = {
        "state_distance": "energy distance of the states\nfrom the noised clean samples",
        "log_prob_variance": "variance of log π",
        "entropy": "entropy per token, nats",
    }
    with open_figure(path, height=6.5) as figure:
        *axes, axis_of_tokens = figure.subplots(2, 2).flat
        for axis, (name, title) in zip(axes, titles.items(), strict=True):
            for measurement, style in ((measurements[0], "--"), (measurements[-1], "-")):
                for trajectory, color in COLORS.items():
                    label = f"{trajectory}, step {measurement['step']}" if axis is axes[0] else None
                    axis.plot(measurement[name][trajectory], style, color=color, label=label)
            axis.set(xlabel="step of the grid, from noise to clean", title=title)
        figure.legend(loc="outside upper center", ncols=4)
        steps = [measurement["step"] for measurement in measurements]
        axis_of_tokens.plot(steps, [measurement["tokens_changed"] for measurement in measurements], "o-", color=GREEN)
        axis_of_tokens.set(xlabel="training step", title="share of changed tokens", ylim=(0, 1))
