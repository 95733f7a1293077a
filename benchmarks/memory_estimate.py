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
`estimate_memory` beside what a stage really takes, and the table of memory recipes.

    python benchmarks/memory_estimate.py --size mid --batch_size 4
    python benchmarks/memory_estimate.py --size mid --batch_size 4 --lora
    python benchmarks/memory_estimate.py --recipes

Stages are those of `throughput.py`, each in a process of its own. What is compared is the peak of a stage beside what
was held before it, measured in two ways. On a GPU both are PyTorch's allocator. On a CPU, "allocated" is the sum of
the bytes that PyTorch's allocator handed out, as its profiler records them. "Process" is the growth of the process,
which also holds the buffers of the libraries below PyTorch and freed memory that the C library keeps.
`MALLOC_MMAP_THRESHOLD_` tells the C library to return blocks of 64 KiB and more at once. Without it, a large update
grows the process by a fifth more. `--recipes` prints the table of docs/memory.md, which is computed for a GPU, with
neither weights nor a GPU.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from throughput import (
    MIB,
    SIZES,
    build_adapter,
    build_config,
    build_pipeline,
    build_stage,
    build_trainer,
    make_parser,
    measure_in_a_process,
)
from trl_udm import MemoryEstimate, UDMGRPOConfig, estimate_memory
from trl_udm.pipelines.ursa_sizes import URSASize


# Full fine-tuning has float32 weights, LoRA bfloat16 ones. Both compute in bfloat16.
STEP_ROWS = 16 * 8 * 3  # prompts, samples of each, timesteps of each
RECIPES = (
    # GPU, LoRA, rows of a forward pass, samples drawn at a time, activation checkpointing, beta
    ("24 GB", True, 24, 32, True, 0.05),
    ("24 GB", True, 3, 16, False, 0.05),
    ("40 GB", True, 48, 64, True, 0.05),
    ("40 GB", True, 6, 32, False, 0.05),
    ("80 GB", False, 4, 16, True, 0.05),
    ("80 GB", False, 24, 32, True, 0.05),
    ("80 GB", False, 4, 16, False, 0.05),
    ("none of these", False, 4, 16, True, 0.0),
)


def print_recipes() -> None:
    """Settings of URSA-1.7B-IBQ512 at 512 x 512, with the GiB of each stage."""
    names = ("weights", "states", "gradients", "peak: rollout", "decode", "scoring", "update")
    settings = ("GPU", "trains", "rows", "rollout", "checkpointing", "β")
    print(f"| {' | '.join([*settings, *names])} |")
    print("|---" * (len(settings) + len(names)) + "|")
    for gpu, lora, num_rows, rollout_batch_size, checkpointing, beta in RECIPES:
        args = argparse.Namespace(lora=lora, bf16=True)
        config = UDMGRPOConfig(
            "outputs",
            per_device_train_batch_size=num_rows,
            gradient_accumulation_steps=STEP_ROWS // num_rows,
            rollout_batch_size=rollout_batch_size,
            activation_checkpointing=checkpointing,
            beta=beta,
            bf16=True,
            use_cpu=True,
            report_to="none",
        )
        pipeline = build_pipeline(SIZES["ursa-1.7b-ibq512"], args, False, "meta")
        estimated = estimate_memory(pipeline, config, build_adapter(args))
        weights = estimated.resident - estimated.optimizer_states
        parts = [weights, estimated.optimizer_states, estimated.gradients, *estimated.stages.values()]
        cells = [gpu, "LoRA" if lora else "all", num_rows, rollout_batch_size, "yes" if checkpointing else "no", beta]
        cells += [f"{part / 2**30:.1f}" for part in parts]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def estimate(size: URSASize, args: argparse.Namespace) -> MemoryEstimate:
    """Of `args.batch_size` samples, on this machine's kind of device."""
    config = build_config(args, naive=False)
    config.rollout_batch_size = args.batch_size
    num_rows = args.batch_size * args.num_train_timesteps
    config.gradient_accumulation_steps = -(-num_rows // config.per_device_train_batch_size)
    pipeline = build_pipeline(size, args, False, "meta")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return estimate_memory(pipeline, config, build_adapter(args), device=device)


def extra_mib(estimated: MemoryEstimate, stage: str) -> float:
    """What `throughput.py` calls so: beside the weights. It makes the optimizer's states within the update."""
    extra = estimated.stages[stage] - estimated.resident
    return (extra + estimated.optimizer_states * (stage == "update")) / MIB


def peak_allocated(run: Callable[[], object]) -> int:
    """Peak of the bytes that PyTorch's CPU allocator hands out within a call, as its profiler records them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def measure_allocated(stage: str, size: URSASize, args: argparse.Namespace, results: multiprocessing.Queue) -> None:
    torch.set_num_threads(args.num_threads)
    run = build_stage(build_trainer(size, args, False), stage, size, args)
    results.put(peak_allocated(lambda: [run(), run()]) / MIB)


def compare(size: URSASize, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Estimated and measured MiB of each stage."""
    estimated = estimate(size, args)
    kind = f"{'LoRA' if args.lora else 'full'}, {'bfloat16' if args.bf16 else 'float32'}"
    print(f"{args.size}, {args.batch_size} samples, K = {args.num_train_timesteps}, {kind}")
    print("| stage | estimated MiB | allocated | estimated / allocated | process | estimated / process |")
    print("|---|---|---|---|---|---|")
    results = {}
    for stage in args.stages:
        row = {"estimated": extra_mib(estimated, stage)}
        row["process"] = measure_in_a_process(stage, "ours", size, args)["extra_mib"]
        row["allocated"] = row["process"]
        if not torch.cuda.is_available():
            context = multiprocessing.get_context("spawn")
            queue = context.SimpleQueue()
            process = context.Process(target=measure_allocated, args=(stage, size, args, queue))
            process.start()
            process.join()
            if process.exitcode != 0:
                raise RuntimeError(f"{stage} died with {process.exitcode}.")
            row["allocated"] = queue.get()
        ratios = {key: row["estimated"] / row[key] for key in ("allocated", "process")}
        print(
            f"| {stage} | {row['estimated']:.0f} | {row['allocated']:.0f} | {ratios['allocated']:.2f} | "
            f"{row['process']:.0f} | {ratios['process']:.2f} |",
            flush=True,
        )
        results[stage] = row
    return results


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--recipes", action="store_true", help="print the table of recipes, instead of the comparison")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/memory_estimate"))
    args = parser.parse_args()
    if args.recipes:
        print_recipes()
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # of the processes that measure
    results = compare(SIZES[args.size], args)
    (args.output_dir / f"{args.size}_{'lora' if args.lora else 'full'}.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
