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
Peak memory and time of the scheduler's two draws on the CPU, at the size of URSA's largest tokenizer.

Each row runs in a process of its own. "extra" is how much the peak of the resident memory (`VmHWM`) grows during the
call, in addition to the logits, the codebook and everything else that was there before.

    python benchmarks/scheduler_memory.py
"""

import argparse
import multiprocessing
import time
from pathlib import Path

import torch

from trl_udm.schedulers.scheduling_kinetic_optimal import KineticOptimalScheduler


MIB = 2**20


def peak_resident_memory() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def measure(name: str, args: argparse.Namespace, results: multiprocessing.Queue) -> None:
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(0)
    scheduler = KineticOptimalScheduler(alpha=None if args.mixture else 0.9, shift=2.0)
    # Drawn in place, so that building the inputs is not the peak that the call is measured against
    codebook = torch.empty(args.codebook_size, args.codebook_dim).normal_()
    scheduler.set_codebook(codebook)
    del codebook
    scheduler.set_timesteps(10)
    sample = torch.randint(args.codebook_size, (args.batch_size, args.num_tokens))
    logits = torch.empty(*sample.shape, args.codebook_size, dtype=torch.bfloat16).normal_()
    calls = {"step": lambda: scheduler.step(logits, 5, sample), "add_noise": lambda: scheduler.add_noise(sample, 0.5)}

    before = peak_resident_memory()
    start = time.perf_counter()
    calls[name]()
    results.put((time.perf_counter() - start, peak_resident_memory() - before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codebook_size", type=int, default=131_072)
    parser.add_argument("--codebook_dim", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--num_tokens", type=int, default=1024)
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--mixture", action="store_true", help="the mixture path instead of the metric path")
    args = parser.parse_args()

    num_logits = args.batch_size * args.num_tokens * args.codebook_size
    print(f"logits (bf16): {2 * num_logits / MIB:.0f} MiB, their float32 copy would be {4 * num_logits / MIB:.0f} MiB")
    print(f"{'call':<10} {'extra (MiB)':>12} {'time (s)':>9}")
    context = multiprocessing.get_context("spawn")
    for name in ("step", "add_noise"):
        results = context.Queue()
        process = context.Process(target=measure, args=(name, args, results))
        process.start()
        seconds, extra = results.get()
        process.join()
        print(f"{name:<10} {extra / MIB:>12.0f} {seconds:>9.1f}")


if __name__ == "__main__":
    main()
