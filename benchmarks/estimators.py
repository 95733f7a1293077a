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

"""
Compares the estimators of log π with the true log-probability of the sampler, on a model whose samples are enumerated.

A small BERT is trained on random samples of four tokens with three codes. The sampler is a Markov chain of ten steps
on 81 states, so that the probability of each of the 81 samples is a product of matrices. For each estimator, the
trainer draws scores of all samples. Prints two Markdown tables.

    python benchmarks/estimators.py
"""

import argparse
import itertools
import logging
import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from trl_udm import KineticOptimalScheduler, TextUDMPipeline, UDMGRPOConfig, UDMGRPOTrainer, UniformDDIMScheduler
from trl_udm.pipelines.pipeline_output import UDMSamplerOutput


NUM_CODES, NUM_TOKENS, NUM_STEPS = 3, 4, 10
STATES = torch.tensor(list(itertools.product(range(NUM_CODES), repeat=NUM_TOKENS)))  # (81, N)
NUM_TIMESTEPS, WINDOW = 4, [0, 6]  # of each sample, anywhere on the grid
ESTIMATORS: dict[str, dict[str, Any]] = {
    "mean-field": {},
    "stratified": {"timestep_sampling": "stratified"},
    "antithetic": {"antithetic_noise": True},
    "stratified, antithetic": {"timestep_sampling": "stratified", "antithetic_noise": True},
    "shared noise": {"shared_noise": True},
    "leave-one-out": {"leave_one_out": True},
    "leave-one-out, stratified": {"leave_one_out": True, "timestep_sampling": "stratified"},
    "ELBO weights, stratified": {"timestep_weighting": "elbo", "timestep_sampling": "stratified"},
    "power 1": {"negative_bound_power": 1.0},
    "power 2": {"negative_bound_power": 2.0},
}


class EnumerablePipeline(TextUDMPipeline):
    """A text pipeline in which no code ends a sample."""

    def completion_mask(self, clean_samples: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(clean_samples)


def build_pipeline(seed: int = 0, num_steps: int = 300) -> EnumerablePipeline:
    """Builds a pipeline and trains its network on a random distribution of samples."""
    torch.manual_seed(seed)
    backend = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    backend.pre_tokenizer = Split(Regex("."), behavior="isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="a", eos_token="b", unk_token="a")
    config = BertConfig(
        vocab_size=NUM_CODES,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    network = BertForMaskedLM(config)
    pipeline = EnumerablePipeline(network, UniformDDIMScheduler(NUM_CODES), tokenizer, NUM_TOKENS)
    pipeline.set_progress_bar_config(disable=True)
    data = (1.5 * torch.randn(len(STATES))).softmax(dim=0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(num_steps):
        clean_samples = STATES[data.multinomial(256, replacement=True)]
        noised_samples = pipeline.scheduler.add_noise(clean_samples, torch.rand(256))
        logits = pipeline.denoise(*encode(pipeline, 256), noised_samples, pipeline.latent_shape())
        loss = functional.cross_entropy(logits.flatten(0, 1), clean_samples.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    return pipeline


def encode(pipeline: TextUDMPipeline, num_samples: int) -> list[torch.Tensor]:
    return [tensor.expand(num_samples, -1) for tensor in pipeline.encode_prompt(["c"])]


@torch.no_grad()
def tabulate(pipeline: TextUDMPipeline) -> torch.Tensor:
    """log p_θ(x₁ⁿ = k | x) of all states, (81, N, V)."""
    logits = pipeline.denoise(*encode(pipeline, len(STATES)), STATES, pipeline.latent_shape())
    return logits.double().log_softmax(dim=-1)


def enumerate_chain(pipeline: TextUDMPipeline, num_steps: int = NUM_STEPS) -> torch.Tensor:
    """True log-probabilities of all samples (81,): those of the sampler's chain."""
    scheduler, denoiser = pipeline.scheduler, tabulate(pipeline).exp()
    scheduler.set_timesteps(num_steps)
    probabilities = torch.full((len(STATES),), 1 / len(STATES), dtype=torch.double)
    for timestep in range(num_steps):
        matrix = torch.ones(len(STATES), len(STATES), dtype=torch.double)  # from one state to the next
        for n in range(NUM_TOKENS):
            x_t, x_s, x_1 = torch.meshgrid(*[torch.arange(NUM_CODES)] * 3, indexing="ij")
            flat = (x_t.reshape(1, -1), x_s.reshape(1, -1), x_1.reshape(1, -1, 1))
            given = scheduler.transition_probabilities(*flat, timestep).view_as(x_t).double()  # (x_t, x_s, x₁)
            moves = torch.einsum("isj,ij->is", given[STATES[:, n]], denoiser[:, n])  # (81, V)
            matrix *= moves[:, STATES[:, n]]
        probabilities = probabilities @ matrix
    return probabilities.log()


def tabulate_noise(t: float) -> torch.Tensor:
    """p_t(x | x₁) of all samples and states, (81 samples, 81 states)."""
    is_same = STATES.unsqueeze(1) == STATES
    return (t * is_same.double() + (1 - t) / NUM_CODES).prod(dim=-1)


def tabulate_scores(pipeline: TextUDMPipeline, t: float, options: dict[str, Any]) -> torch.Tensor:
    """What an estimator gives at a state: Σ_n log p (81 samples, 81 states)."""
    pairs = torch.cartesian_prod(*[torch.arange(len(STATES))] * 2)
    samples, states, logps = STATES[pairs[:, 0]], STATES[pairs[:, 1]], tabulate(pipeline)[pairs[:, 1]]
    scores = logps.gather(-1, samples.unsqueeze(-1)).squeeze(-1)  # (81 * 81, N)
    times = torch.full((len(pairs),), t)
    if options.get("leave_one_out"):  # Bayes' rule itself, where the trainer has its consequence
        likelihoods = t * functional.one_hot(states, NUM_CODES) + (1 - t) / NUM_CODES
        scores = (logps - likelihoods.log()).log_softmax(dim=-1).gather(-1, samples.unsqueeze(-1)).squeeze(-1)
    if options.get("timestep_weighting") == "elbo":
        scores = scores * pipeline.scheduler.elbo_weights(samples, states, times, NUM_STEPS)
    return scores.sum(dim=-1).view(len(STATES), len(STATES))


def expect(pipeline: TextUDMPipeline, options: dict[str, Any]) -> torch.Tensor:
    """What the equation of an estimator says its expectation is, for all samples: (81,)."""
    power = options.get("negative_bound_power")
    first, last = WINDOW
    starts = range(first, last + 1)
    values = []
    if options.get("timestep_sampling") == "stratified":  # all steps are as likely
        grids = [[step] for step in range(first, last + NUM_TIMESTEPS)]
    else:
        grids = [[start + k for k in range(NUM_TIMESTEPS)] for start in starts]
    for grid in grids:
        times = [step / NUM_STEPS for step in grid]
        scores = [tabulate_scores(pipeline, t, options) for t in times]
        noise = [tabulate_noise(t) for t in times]
        if power is None:
            values.append(sum((p * s).sum(dim=1) for p, s in zip(noise, scores, strict=True)) / len(grid))
        else:  # a log-mean-exp of four states of 81 each: by the distribution of each summand on a grid of its values
            values.append(expect_bound(noise, scores, power))
    return torch.stack(values).mean(dim=0)


def expect_bound(noise: list[torch.Tensor], scores: list[torch.Tensor], power: float) -> torch.Tensor:
    """E (1 / β) log (1 / K) Σ_k exp(β · score_k) over independent states, for all samples: (81,)."""
    # log z = ∫ (exp(−s) − exp(−s · z)) / s ds, and the expectation of exp(−s · Σ_k) is a product over k
    points, weights = torch.linspace(-50, 30, 801, dtype=torch.double).exp(), 80 / 800
    shift = max(score.max() for score in scores)
    values = []
    for sample in range(len(STATES)):
        products = torch.ones_like(points)
        for p, score in zip(noise, scores, strict=True):
            terms = (power * (score[sample] - shift)).exp() / len(scores)  # (81,)
            products = products * ((-points.unsqueeze(1) * terms).exp() @ p[sample])
        values.append(((-points).exp() - products).sum() * weights / power + shift)  # ds = s dlog s
    return torch.stack(values)


def build_trainer(pipeline: TextUDMPipeline, output_dir: str, **options: Any) -> UDMGRPOTrainer:
    args = UDMGRPOConfig(
        output_dir,
        num_train_timesteps=NUM_TIMESTEPS,
        timestep_window=WINDOW,
        num_inference_steps=NUM_STEPS,
        num_inference_steps_eval=NUM_STEPS,
        num_generations=2,
        per_device_train_batch_size=2 * NUM_TIMESTEPS,
        beta=0.0,
        bf16=False,
        use_cpu=True,
        report_to="none",
        **options,
    )
    prompts = Dataset.from_dict({"prompt": ["c"]})
    return UDMGRPOTrainer(pipeline, lambda completions, **kwargs: [0.0] * len(completions), args, prompts)


@torch.no_grad()
def draw(trainer: UDMGRPOTrainer, clean_samples: torch.Tensor, group_size: int = 1) -> torch.Tensor:
    """Draws of an estimator as the trainer makes them, one for each sample (B, N): (B,)."""
    args, pipeline = trainer.args, trainer.pipeline
    pipeline.scheduler.set_timesteps(args.num_inference_steps)
    output = UDMSamplerOutput(clean_samples, None, None)
    noised_samples, actions, t = trainer._build_rows(output, group_size)
    prompt_ids, prompt_mask = encode(pipeline, len(actions))
    ids = torch.cat([prompt_ids, noised_samples, actions], dim=1)
    times = t.unsqueeze(1).expand_as(actions)
    mask = torch.cat([prompt_mask, times, torch.ones_like(times)], dim=1)
    logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, NUM_TOKENS)[0]
    scores = NUM_TOKENS * logps.double().view(-1, args.num_train_timesteps)  # (B, K)
    power = args.negative_bound_power
    if power is None:
        return scores.mean(dim=1)
    return ((power * scores).logsumexp(dim=1) - torch.tensor(float(scores.size(1))).log()) / power


def measure(
    pipeline: TextUDMPipeline, options: dict[str, Any], num_draws: int, output_dir: str, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Draws (num_draws, 81), what the equation says (81,), and differences of two samples' draws (num_draws, 81)."""
    if options.get("timestep_weighting") == "elbo":
        scheduler = KineticOptimalScheduler(alpha=None, c=None, codebook_size=NUM_CODES)
        pipeline = EnumerablePipeline(pipeline.transformer, scheduler, pipeline.tokenizer, NUM_TOKENS)
    trainer = build_trainer(pipeline, output_dir, **options)
    torch.manual_seed(seed)
    # A group has a sample, and the one whose last token is the next code
    others = STATES.clone()
    others[:, -1] = (others[:, -1] + 1) % NUM_CODES
    pairs = torch.stack([STATES, others], dim=1).flatten(0, 1)  # (81 * 2, N)
    group_size = 2 if options.get("shared_noise") else 1
    draws = draw(trainer, pairs.repeat(num_draws, 1), group_size).view(num_draws, len(STATES), 2)
    return {
        "draws": draws[..., 0],
        "differences": draws[..., 0] - draws[..., 1],
        "equation": expect(pipeline, options),
    }


def expect_one_step(pipeline: TextUDMPipeline) -> dict[str, torch.Tensor]:
    """Expectations of the mean-field score at t = 0, and of bounds from any number of states there: (81,) each."""
    scores, log_noise = tabulate_scores(pipeline, 0.0, {}), tabulate_noise(0.0).log()
    values = {"mean-field at t = 0": (log_noise.exp() * scores).sum(dim=1)}
    for power in (0.5, 1.0, 2.0):
        values[f"power {power:g}, K → ∞"] = (log_noise + power * scores).logsumexp(dim=1) / power
    return values


def format_row(name: str, value: torch.Tensor, truth: torch.Tensor) -> str:
    bias = (truth.exp() * (value - truth)).sum()
    below, above = (value <= truth + 1e-9).sum(), (value >= truth - 1e-9).sum()
    return f"| {name} | {bias:+.3f} | {below} of {len(truth)} | {above} of {len(truth)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_draws", type=int, default=500, help="draws of each estimator for each of 81 samples")
    parser.add_argument("--seed", type=int, default=0, help="seed of the network and the draws")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    pipeline = build_pipeline(args.seed)
    truth = enumerate_chain(pipeline)
    print("| Estimator | Bias | At most log p | At least log p | Mean − equation | Std | Std of differences |")
    print("|---" * 7 + "|")
    with tempfile.TemporaryDirectory() as output_dir:
        for name, options in ESTIMATORS.items():
            result = measure(pipeline, options, args.num_draws, output_dir, args.seed)
            draws, equation = result["draws"], result["equation"]
            error = (draws.mean(dim=0) - equation).mean()
            standard_error = (draws.var(dim=0) / len(draws)).sum().sqrt() / len(STATES)
            stds = [result[key].var(dim=0).mean().sqrt() for key in ("draws", "differences")]
            row = format_row(name, equation, truth)
            print(f"{row} {error:+.4f} ± {standard_error:.4f} | {stds[0]:.2f} | {stds[1]:.2f} |", flush=True)
    print("\n| One step from noise | Bias | At most log p | At least log p |\n|---|---|---|---|")
    truth = enumerate_chain(pipeline, num_steps=1)
    for name, value in expect_one_step(pipeline).items():
        print(format_row(name, value, truth))


if __name__ == "__main__":
    main()
