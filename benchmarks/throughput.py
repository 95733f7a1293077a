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
Time and peak memory of each stage of a training step, between a limit and a naive version of the same stage.

    python benchmarks/throughput.py --size mid --batch_size 4
    python benchmarks/throughput.py --size head --batch_size 1
    python benchmarks/throughput.py --size head --batch_size 4 --stages scoring update --num_threads 1 --cpu_time
    python benchmarks/throughput.py --size mid --batch_size 1 --grow
    python benchmarks/throughput.py --size ursa-1.7b-ibq512 --activation_checkpointing --flops

The model has random weights and a named size. Each stage and version runs in a process of its own.

The limit is what no version of a stage can leave out, in plain transformers code: a Qwen3 of the same shapes with
bidirectional SDPA attention, and logits at the image tokens only. A rollout is ten of its forward passes, scoring is K
of them, and an update is K forward and backward passes and a step of AdamW. Nothing is drawn, no probability or loss
is computed, and the backward pass begins at a given gradient. Logits are whole, so less memory is possible. So is less
time, with `--torch_compile`, which the limit ignores. With `--lora`, only the limit's update has the adapter.

"Naive" is what one would write first: eager attention, logits of all positions in float32, a softmax over all of them,
`torch.multinomial`, velocities of all tokens, nothing in chunks, adapters never merged.

Peak memory is the memory of the GPU, or of the process, that the stage adds. FLOPs of the library's version are
counted from the shapes. The model FLOPs utilization (MFU) is their rate relative to that of a matrix product in the
same process. `--grow` measures the library's version while one of batch, tokens, codes and training timesteps grows,
and the exponent of each.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3ForCausalLM

from trl_udm import UDMGRPOConfig, UDMGRPOTrainer, URSAPipeline
from trl_udm.drawing import open_figure
from trl_udm.models.token_scores import MAX_KEPT_LOGITS
from trl_udm.pipelines.pipeline_output import UDMSamplerOutput
from trl_udm.pipelines.ursa_sizes import PUBLISHED_SIZES, URSASize


MIB = 2**20
STAGES = ("rollout", "decode", "scoring", "update")
VERSIONS = ("limit", "ours", "naive")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AXES = {
    "batch_size": "samples",
    "tokens": "tokens per sample",
    "codes": "codes in the codebook",
    "num_train_timesteps": "timesteps trained on per sample (K)",
}
MEASURES = {"seconds": "seconds", "extra_mib": "added peak memory, MiB"}
STYLES = {"rollout": "C0o-", "update": "C1o-"}
NUM_STEPS = 10  # of the rollout


SIZES = {
    "tiny": URSASize(64, 128, 2, 4, 2, 16, 256, 8, 8, (32, 32), codebook_dim=8),
    "mid": URSASize(512, 1536, 8, 8, 4, 64, 16_384, 64, 16, (32, 32, 64, 64, 64)),
    # Where the sampler and the head dominate
    "head": URSASize(512, 1536, 2, 8, 4, 64, 131_072, 64, 32, (32, 32, 64, 64, 64)),
    "ursa-1.7b-ibq512": PUBLISHED_SIZES["BAAI/URSA-1.7B-IBQ512"],
}


class NaivePipeline(URSAPipeline):
    """The sampler as one would write it first."""

    @torch.no_grad()
    def sample_tokens(self, prompt_ids, prompt_mask, latent_shape, num_inference_steps, **kwargs):
        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps, device=prompt_ids.device)
        codebook = scheduler.codebook
        num_tokens = math.prod(latent_shape)
        sample = torch.randint(len(codebook), (len(prompt_ids), num_tokens), device=prompt_ids.device)
        for i in range(num_inference_steps):
            inputs = self.prepare_denoiser_inputs(prompt_ids, prompt_mask, sample, latent_shape)
            logits = self.transformer(**inputs).logits.float()[:, -num_tokens - 1 : -1]  # (B, N, V)
            clean = torch.multinomial(torch.softmax(logits, dim=-1).flatten(0, 1), 1).view(sample.shape)
            if i == num_inference_steps - 1:
                sample = clean
                break
            t = scheduler.timestep_to_t(i)
            distances = torch.cdist(codebook[clean], codebook.expand(len(sample), -1, -1)).square()  # (B, N, V)
            probabilities = torch.softmax(-scheduler.beta(t) * distances, dim=-1)
            gains = (distances.gather(-1, sample.unsqueeze(-1)) - distances).clamp(min=0)
            velocity = probabilities * scheduler.beta_derivative(t) * gains
            velocity = velocity.scatter(-1, sample.unsqueeze(-1), 0.0)
            rates = velocity.sum(dim=-1)
            jumps = torch.rand_like(rates) < 1 - torch.exp(-(scheduler.timestep_to_t(i + 1) - t) * rates)
            # A token with rate 0 never jumps, but `multinomial` needs a weight
            target = torch.multinomial((velocity + 1e-30).flatten(0, 1), 1).view(sample.shape)
            sample = torch.where(jumps, target, sample)
        return UDMSamplerOutput(clean_samples=sample, trajectory=None)


class NaiveTrainer(UDMGRPOTrainer):
    """The scoring as one would write it first."""

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        num_prompt_tokens = input_ids.size(1) - 2 * logits_to_keep
        prompt_ids, noised_samples, actions = input_ids.split([num_prompt_tokens, logits_to_keep, logits_to_keep], 1)
        inputs = self.pipeline.prepare_denoiser_inputs(prompt_ids, attention_mask, noised_samples, self.latent_shape)
        with self.accelerator.autocast():
            logits = model(**inputs).logits.float()[:, -logits_to_keep - 1 : -1]
        log_probs = torch.log_softmax(logits, dim=-1)
        logps = log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1).mean(dim=1, keepdim=True)
        with torch.no_grad():
            entropies = -(log_probs.exp() * log_probs).sum(dim=-1) if compute_entropy else None
        return logps, entropies, None


def zero_reward(prompts: list[str], **kwargs: Any) -> list[float]:
    return [float(i % 2) for i in range(len(prompts))]


def build_pipeline(size: URSASize, args: argparse.Namespace, naive: bool, device: str) -> URSAPipeline:
    """A pipeline with random weights or, on PyTorch's device `"meta"`, without any."""
    pipeline = size.build_pipeline(torch.bfloat16 if args.bf16 and args.lora else torch.float32, device)
    if args.bf16:
        nn.Module.to(pipeline.vae, torch.bfloat16)  # that of diffusers warns of a cast
    pipeline.transformer.set_attn_implementation("eager" if naive else "sdpa")
    return NaivePipeline(**pipeline.components, max_prompt_length=size.num_text_tokens) if naive else pipeline


def build_config(args: argparse.Namespace, naive: bool) -> UDMGRPOConfig:
    """The configuration of `args.batch_size` samples."""
    num_rows = args.batch_size * args.num_train_timesteps
    return UDMGRPOConfig(
        str(args.output_dir),
        num_generations=2,
        num_train_timesteps=args.num_train_timesteps,
        timestep_window=[0, 0],
        num_inference_steps=NUM_STEPS,
        generation_batch_size=2 * num_rows,
        per_device_train_batch_size=args.micro_batch_size or num_rows,
        bf16=args.bf16,
        use_cpu=DEVICE == "cpu",
        activation_checkpointing=args.activation_checkpointing,
        torch_compile=args.torch_compile and not naive,
        merge_adapter=False if naive else None,
        report_to="none",
        disable_tqdm=True,
    )


def build_adapter(args: argparse.Namespace) -> LoraConfig | None:
    return LoraConfig(r=16, target_modules="all-linear") if args.lora else None


def build_trainer(size: URSASize, args: argparse.Namespace, naive: bool) -> UDMGRPOTrainer:
    """A trainer of a model with random weights."""
    torch.manual_seed(0)
    return (NaiveTrainer if naive else UDMGRPOTrainer)(
        build_pipeline(size, args, naive, DEVICE),
        zero_reward,
        build_config(args, naive),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * max(2, args.batch_size)}),
        peft_config=build_adapter(args),
    )


def build_stage(trainer: UDMGRPOTrainer, stage: str, size: URSASize, args: argparse.Namespace) -> Callable[[], None]:
    """A function whose call is one stage for `args.batch_size` samples."""
    pipeline, device = trainer.pipeline, trainer.accelerator.device
    shape = trainer.latent_shape
    ids = torch.randint(size.codebook_size, (args.batch_size, size.num_tokens), device=device)
    num_rows = args.batch_size * args.num_train_timesteps
    if stage == "rollout":
        pipeline.decode, trainer.args.rollout_batch_size = (lambda samples, latent_shape: [None] * len(samples)), None
        trainer.model.eval()
        return lambda: trainer._rollout(["a"] * args.batch_size, "train")
    if stage == "decode":
        return lambda: pipeline.decode(ids, shape)

    prompt_ids, prompt_mask = (tensor.to(device) for tensor in pipeline.encode_prompt(["a"] * num_rows))
    actions = ids.repeat_interleave(args.num_train_timesteps, dim=0)
    noised = torch.randint_like(actions, size.codebook_size)
    rows = {
        "prompt_ids": torch.cat([prompt_ids, noised], dim=1),
        "prompt_mask": torch.cat([prompt_mask, torch.ones_like(noised)], dim=1),
        "completion_ids": actions,
        "completion_mask": torch.ones_like(actions),
        "advantages": torch.tensor([1.0, -1.0], device=device).repeat(num_rows)[:num_rows],
        "ref_per_token_logps": torch.zeros(num_rows, 1, device=device),
    }
    micro_batch_size = args.micro_batch_size or num_rows
    if stage == "scoring":
        trainer.model.eval()
        inputs = torch.cat([rows["prompt_ids"], actions], dim=1)
        mask = torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1)

        @torch.no_grad()
        def score() -> None:
            for start in range(0, num_rows, micro_batch_size):
                part = slice(start, start + micro_batch_size)
                trainer._get_per_token_logps_and_entropies(trainer.model, inputs[part], mask[part], actions.size(1))

        return score

    trainer.model.train()
    if args.activation_checkpointing:
        trainer.model.activation_checkpointing_enable()
    trainer.current_gradient_accumulation_steps = math.ceil(num_rows / micro_batch_size)
    trainer.create_optimizer()

    def update() -> None:
        for start in range(0, num_rows, micro_batch_size):
            loss = trainer.compute_loss(
                trainer.model, {name: tensor[start : start + micro_batch_size] for name, tensor in rows.items()}
            )
            loss.backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer._metrics["train"].clear()

    return update


def build_limit(stage: str, size: URSASize, args: argparse.Namespace) -> Callable[[], None]:
    """What `build_stage` returns, of the limit."""
    is_update, num_passes = stage == "update", NUM_STEPS if stage == "rollout" else 1
    num_rows = args.batch_size * (1 if stage == "rollout" else args.num_train_timesteps)
    batch_size = num_rows if stage == "rollout" else args.micro_batch_size or num_rows
    first, length = size.num_text_tokens, size.num_text_tokens + 1 + size.num_tokens
    ours = build_pipeline(size, args, False, "meta").transformer
    with torch.device(DEVICE):
        batches = torch.randint(ours.config.vocab_size, (num_rows, length)).split(batch_size) * num_passes
        predicting = torch.arange(first, length - 1)
        model: Any = Qwen3ForCausalLM(ours.config)
        model.set_output_embeddings(nn.Linear(size.hidden_size, size.codebook_size, bias=False))
    model.to(ours.dtype)
    if args.lora and is_update:
        model = get_peft_model(model, build_adapter(args))
    if args.activation_checkpointing:
        model.gradient_checkpointing_enable()
    model.train(is_update)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], fused=True)

    @torch.set_grad_enabled(is_update)
    def run() -> None:
        for ids in batches:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=args.bf16):
                logits = model(
                    ids, {"full_attention": None}, is_causal=False, use_cache=False, logits_to_keep=predicting
                ).logits  # (B, N, V)
            if is_update:
                logits.backward(logits.detach())
            del logits  # they would stay in memory during the next pass
        if is_update:
            optimizer.step()
            optimizer.zero_grad()

    return run


def count_flops(stage: str, size: URSASize, args: argparse.Namespace) -> float:
    """FLOPs of the library's version for `args.batch_size` samples, by the shapes. The decoder is not counted."""
    length = size.num_text_tokens + 1 + size.num_tokens
    attention_width = size.num_heads * size.head_dim
    weights = size.hidden_size * (2 * attention_width + 2 * size.num_key_value_heads * size.head_dim)
    weights += 3 * size.hidden_size * size.intermediate_size
    layers = size.num_layers * (2 * weights * length + 4 * length**2 * attention_width)
    head = 2 * size.hidden_size * size.codebook_size * size.num_tokens
    if stage == "rollout":
        # The first step moves no token. Distances between codes are no part of the network.
        return args.batch_size * (NUM_STEPS - 1) * (layers + head)
    if stage == "decode":
        return math.nan
    num_rows = args.batch_size * args.num_train_timesteps
    if stage == "scoring":
        return num_rows * (layers + head)
    # Backward is twice the forward, or once with frozen weights. Many logits are computed again.
    backward = 1 if args.lora else 2
    keeps_logits = (args.micro_batch_size or num_rows) * size.num_tokens * size.codebook_size <= MAX_KEPT_LOGITS
    head_passes = (1 if DEVICE == "cpu" and keeps_logits else 2) + backward
    return num_rows * ((1 + backward + args.activation_checkpointing) * layers + head_passes * head)


def matmul_rate(args: argparse.Namespace) -> float:
    """FLOPs per second of a large square product."""
    side = 8192 if DEVICE == "cuda" else 2048
    factor = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    seconds = []
    for _ in range(6):
        started = read_clock(args)
        torch.mm(factor, factor)
        seconds.append(read_clock(args) - started)
    return 2 * side**3 / statistics.median(seconds[1:])


def read_clock(args: argparse.Namespace) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if args.cpu_time else time.perf_counter()


def resident_memory(name: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024


def measure(stage: str, version: str, size: URSASize, args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.num_threads)
    if version == "limit":
        run = build_limit(stage, size, args)
    else:
        run = build_stage(build_trainer(size, args, version == "naive"), stage, size, args)
    if DEVICE == "cuda":
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resident_memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    seconds = []
    for _ in range(args.num_repeats):
        started = read_clock(args)
        run()
        seconds.append(read_clock(args) - started)
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else resident_memory("VmHWM")
    result = {
        "seconds": statistics.median(seconds),
        "extra_mib": (peak - before) / MIB,
        "rate": matmul_rate(args),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {args.num_threads} threads",
    }
    if version == "ours":
        result["flops"] = count_flops(stage, size, args)
        result["mfu"] = result["flops"] / result["seconds"] / result["rate"]
    return result


def measure_in_a_process(stage: str, version: str, size: URSASize, args: argparse.Namespace) -> dict[str, Any]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, stage, version, size, args).result()
        except BrokenProcessPool:
            raise RuntimeError(f"The process of {stage} ({version}) died. Was there enough memory?") from None


def compare(size: URSASize, args: argparse.Namespace) -> dict[str, Any]:
    """Measures each stage in all versions."""
    print(f"{args.size}, {args.batch_size} samples, K = {args.num_train_timesteps}")
    versions = " | ".join([*VERSIONS, "ours / limit"])
    print(f"| stage | s a sample: {versions} | peak MiB: {versions} | MFU |")
    print("|---" * (2 * len(VERSIONS) + 4) + "|")
    results = {}
    for stage in args.stages:
        versions = ("ours",) if stage == "decode" else VERSIONS[: 2 if args.skip_naive else 3]
        results[stage] = result = {version: measure_in_a_process(stage, version, size, args) for version in versions}
        cells = [stage]
        for key, divisor, digits in (("seconds", args.batch_size, 3), ("extra_mib", 1, 0)):
            cells += [f"{result[name][key] / divisor:.{digits}f}" if name in result else "" for name in VERSIONS]
            cells.append(f"{result['ours'][key] / result['limit'][key]:.2f}" if "limit" in result else "")
        cells.append("" if stage == "decode" else f"{result['ours']['mfu']:.0%}")
        print(f"| {' | '.join(cells)} |", flush=True)
    return results


def grow(size: URSASize, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of rollout and update while one quantity grows, by axis and stage."""
    axes = {
        "batch_size": [1, 2, 4, 8],
        "tokens": [64, 144, 256, 576],
        "codes": [4096, 16_384, 65_536, 131_072],
        "num_train_timesteps": [1, 2, 3, 5],
    }
    results = {}
    for axis, values in axes.items():
        results[axis] = {"values": values, "stages": {}}
        for stage in ("update",) if axis == "num_train_timesteps" else ("rollout", "update"):
            points = []
            for value in values:
                grown, grown_args = size, argparse.Namespace(**vars(args))
                if axis == "tokens":
                    grown = replace(size, side=math.isqrt(value))
                elif axis == "codes":
                    grown = replace(size, codebook_size=value)
                else:
                    setattr(grown_args, axis, value)
                points.append(measure_in_a_process(stage, "ours", grown, grown_args))
            curves = {key: [point[key] for point in points] for key in ("seconds", "extra_mib")}
            results[axis]["stages"][stage] = curves
            for key, heights in curves.items():
                rounded = [round(height, 3) for height in heights]
                print(f"{axis} {values} {stage} {key}: {rounded}, {exponent(values, heights):.2f}", flush=True)
    return results


def save_growth(path: Path, results: dict[str, Any]) -> None:
    """Draws time and memory, with the exponents: a row for each quantity that grows."""
    with open_figure(path, height=2.6 * len(results)) as figure:
        plots = figure.subplots(len(results), 2, sharey="col", squeeze=False)
        for row, (axis, result) in zip(plots, results.items(), strict=True):
            values = result["values"]
            for plot, (key, label) in zip(row, MEASURES.items(), strict=True):
                exponents = []
                for stage, curves in result["stages"].items():
                    plot.loglog(values, curves[key], STYLES[stage], label=stage)
                    exponents.append(f"{stage} {exponent(values, curves[key]):.2f}")
                plot.set(title=f"exponents: {', '.join(exponents)}", xlabel=AXES[axis], ylabel=label)
                plot.set_xticks(values, [f"{value:,}" for value in values])
                plot.set_xticks([], minor=True)
        figure.legend(*plots[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)


def exponent(values: list[float], heights: list[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    x, y = ([math.log(number) for number in numbers] for numbers in (values, heights))
    return statistics.linear_regression(x, y).slope


def make_parser(description: str) -> argparse.ArgumentParser:
    """Options of the model and of the measurement."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="mid")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--batch_size", type=int, default=4, help="samples")
    parser.add_argument(
        "--micro_batch_size", type=int, help="rows that are scored or trained on at a time, all by default"
    )
    parser.add_argument("--num_train_timesteps", type=int, default=3, help="K: rows per sample in scoring and update")
    parser.add_argument("--num_repeats", type=int, default=3, help="calls of a stage")
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="seconds of the process instead of the clock's, on a machine that is shared",
    )
    parser.add_argument("--lora", action="store_true", help="train an adapter of rank 16 on all linear layers")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--torch_compile", action="store_true", help="compile the layers of the library's version")
    return parser


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--skip_naive", action="store_true")
    parser.add_argument("--grow", action="store_true", help="measure how the cost grows, instead of the comparison")
    parser.add_argument("--flops", action="store_true", help="print the FLOPs of a sample, without running anything")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/throughput"))
    args = parser.parse_args()
    if args.flops:
        flops = {stage: count_flops(stage, SIZES[args.size], args) / args.batch_size for stage in args.stages}
        print("\n".join(f"{stage}: {count / 1e12:.1f} TFLOPs a sample" for stage, count in flops.items()))
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    size = SIZES[args.size]
    if args.grow:
        results = grow(size, args)
        save_growth(args.output_dir / "growth.png", results)
    else:
        results = compare(size, args)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    name = f"{'growth' if args.grow else 'stages'}_{args.size}_{'lora' if args.lora else 'full'}.json"
    (args.output_dir / name).write_text(
        json.dumps({"settings": settings, "size": asdict(size), "results": results}, indent=2)
    )


if __name__ == "__main__":
    main()
