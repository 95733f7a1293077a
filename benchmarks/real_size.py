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
Seconds and peak memory of what a user does with a model of real size, on a CPU, with random weights.

    python benchmarks/real_size.py --size ursa-1.7b-ibq512 --output_dir outputs/real_size
    python benchmarks/real_size.py --size ursa-0.6b-ibq1024 --images_only --output_dir outputs/real_size_1024

Each stage is a process of its own, as a user would start it: write a checkpoint in both layouts, load it, draw an
image, make a LoRA step (1 prompt x 2 samples x 3 timesteps, bfloat16) from either layout, resume for a second one,
merge, evaluate a prompt, and make a step of all weights where the estimate says that it fits. A stage that is done is
not repeated, so a run that was stopped continues.

"Private" memory is without the pages of files, such as mapped weights, which the system can drop and read again. The
estimate is of tensors, so it is compared with what a process takes beyond one that only imports the library.

The C library keeps freed memory, which is in gaps between what is held. `MALLOC_MMAP_THRESHOLD_` tells it to return
blocks of 4 MiB and more at once. A step is made both ways, so that the gaps are told apart.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image

from trl_udm import UDMGRPOConfig, UDMGRPOTrainer, URSAPipeline, estimate_memory
from trl_udm.evaluation import evaluate
from trl_udm.weights import compute_checksum


GIB = 2**30
ROOT = Path(__file__).parents[1]
PROMPT = "a photo of a red car left of a blue bench"
LORA = LoraConfig(r=16, target_modules="all-linear")


def brightness(prompts, completions, **kwargs):
    return [float(np.asarray(image).mean()) / 255 for image in completions]


def make_args(output_dir: Path, **kwargs) -> UDMGRPOConfig:
    return UDMGRPOConfig(
        str(output_dir),
        num_generations=2,
        num_train_timesteps=3,
        num_inference_steps=3,
        timestep_window=[0, 0],
        per_device_train_batch_size=1,
        gradient_accumulation_steps=6,
        save_steps=1,
        logging_steps=1,
        bf16=True,
        use_cpu=True,
        report_to="none",
        **kwargs,
    )


def import_only(args: argparse.Namespace) -> None:
    """What any process of the library takes."""


def estimate(args: argparse.Namespace) -> None:
    def compute(dtype: torch.dtype, peft_config: LoraConfig | None, **kwargs):
        pipeline = URSAPipeline.from_configs(args.model, dtype=dtype)
        options = make_args(args.output_dir, **kwargs)
        return estimate_memory(pipeline, options, peft_config, prompt=PROMPT, device="cpu")

    # To draw needs what a rollout of one sample needs, under an adapter that weighs next to nothing
    image = compute(torch.bfloat16, LoraConfig(r=1, target_modules="all-linear"), rollout_batch_size=1)
    estimates = {"weights": image.frozen_weights, "image": max(image.stages["rollout"], image.stages["decode"])}
    estimates["LoRA"] = compute(torch.bfloat16, LORA).peak
    estimates["all"] = compute(torch.float32, None).peak
    print(json.dumps(estimates))


def load(args: argparse.Namespace) -> None:
    pipeline = URSAPipeline.from_pretrained(args.model, dtype=torch.bfloat16)
    # Reads every weight: of a mapped file, only what is read takes memory
    print(compute_checksum([*pipeline.transformer.parameters(), *pipeline.vae.parameters()]))


def train(args: argparse.Namespace) -> None:
    # All weights are trained in float32, where a small step is not lost
    dtype = torch.bfloat16 if args.lora else torch.float32
    trainer = UDMGRPOTrainer(
        URSAPipeline.from_pretrained(args.model, dtype=dtype),
        brightness,
        make_args(args.output_dir, max_steps=args.max_steps),
        train_dataset=Dataset.from_dict({"prompt": [PROMPT]}),
        peft_config=LORA if args.lora else None,
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    print(json.dumps(trainer.state.log_history[0]))


def evaluate_prompt(args: argparse.Namespace) -> None:
    pipeline = URSAPipeline.from_pretrained(args.model, dtype=torch.bfloat16)
    rows = [{"prompt": PROMPT}]
    options = {"num_images_per_prompt": 1, "num_inference_steps": 2, "guidance_scale": 1.0}
    print(evaluate([brightness], args.output_dir, pipeline, rows, **options))


STAGES = {"import": import_only, "estimate": estimate, "load": load, "train": train, "evaluate": evaluate_prompt}


def measure(command: list, log_path: Path) -> dict:
    """Runs a command, and returns its seconds, its peaks of all and of private memory in bytes, and its exit code."""
    started, peaks = time.perf_counter(), {"VmHWM": 0, "RssAnon": 0}
    with open(log_path, "w") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            # The peak of this program alone: `ru_maxrss` is never below the size of the process that started it
            status = Path(f"/proc/{process.pid}/status").read_text()
            for name, kilobytes in re.findall(r"(VmHWM|RssAnon):\s+(\d+) kB", status):
                peaks[name] = max(peaks[name], 1024 * int(kilobytes))
            time.sleep(0.02)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak": peaks["VmHWM"], "private": peaks["RssAnon"], "exit_code": process.returncode}


def run_stage(name: str, command: list, folder: Path) -> dict:
    """Measures a stage, unless it is done, and returns its record."""
    record = folder / f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}.json"
    log = record.with_suffix(".log")
    if not record.exists():
        result = measure(command, log)
        if result["exit_code"] != 0:
            raise SystemExit(f"{name!r} failed with exit code {result['exit_code']}: see {log}.")
        record.write_text(json.dumps(result))
    lines = log.read_text().splitlines() or [""]
    return json.loads(record.read_text()) | {"last_line": lines[-1]}


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="ursa-1.7b-ibq512")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/real_size"))
    parser.add_argument("--images_only", action="store_true", help="write, load and draw, and train nothing")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--max_steps", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--lora", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage is not None:
        STAGES[args.stage](args)
        return

    folder = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    ours, original, lora, merged = (folder / name for name in ("ours", "original", "lora", "merged"))
    write = [sys.executable, ROOT / "scripts" / "make_random_checkpoint.py", "--size", args.size]
    cli = [sys.executable, "-m", "trl_udm.cli"]
    memory = [*cli, "memory", "--model", ours, "--per_device_train_batch_size", 1, "--num_generations", 2]
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB

    def stage(name: str, model: Path, output_dir: Path = folder, *options) -> list:
        command = [sys.executable, __file__, "--stage", name, "--model", model, "--output_dir", output_dir]
        return [*command, *options]

    # Name, command, and the key of the estimate
    stages = [
        ("import the library", stage("import", ours), None),
        ("write, this library's layout", [*write, "--layout", "ours", "--output_dir", ours], None),
        ("write, the original layout", [*write, "--layout", "original", "--output_dir", original], None),
        ("estimates", stage("estimate", ours), None),
        ("load, this library's layout", stage("load", ours), "weights"),
        ("load, the original layout", stage("load", original), "weights"),
        ("image of 2 steps", [*cli, "generate", PROMPT, "--model", ours, "--dtype", "bfloat16"], "image"),
    ]
    stages[-1][1].extend(["--num_inference_steps", 2, "--output_dir", folder / "image"])
    if not args.images_only:
        returned = ["env", "MALLOC_MMAP_THRESHOLD_=4194304", *stage("train", ours, folder / "returned", "--lora")]
        merge = [*cli, "merge", "--model", ours, "--adapter", lora / "checkpoint-2", "--output_dir", merged]
        stages += [
            ("LoRA step", stage("train", ours, lora, "--lora"), "LoRA"),
            ("LoRA step, resumed", stage("train", ours, lora, "--lora", "--resume", "--max_steps", 2), "LoRA"),
            ("LoRA step, freed memory returned", returned, "LoRA"),
            ("merge the adapter", [*merge, "--dtype", "bfloat16"], "weights"),
            ("evaluate a prompt", stage("evaluate", merged, folder / "evaluation"), "image"),
            ("LoRA step, the original layout", stage("train", original, folder / "lora_original", "--lora"), "LoRA"),
            ("step of all weights", stage("train", ours, folder / "all"), "all"),
        ]
    print("| stage | seconds | peak GiB | private GiB | beyond imports | estimated | error |\n" + "|---" * 7 + "|")
    results: dict[str, dict] = {}
    for name, command, key in stages:
        estimated = None if key is None else json.loads(results["estimates"]["last_line"])[key] / GIB
        if key == "all" and estimated > available:
            reason = f"not run: the machine has {available:.1f} GiB"
            print(f"| {name} | {reason} | | | | {estimated:.1f} | |", flush=True)
            continue
        result = results[name] = run_stage(name, command, folder)
        peak, private = result["peak"] / GIB, result["private"] / GIB
        beyond = peak - results["import the library"]["peak"] / GIB
        compared = f"{beyond:.1f} | {estimated:.1f} | {estimated / beyond - 1:+.0%}" if estimated else "| |"
        print(f"| {name} | {result['seconds']:.0f} | {peak:.1f} | {private:.1f} | {compared} |", flush=True)

    pixels = np.asarray(Image.open(next((folder / "image").glob("*.png"))), dtype=float)
    print(f"\nThe image has {pixels.shape[1]} x {pixels.shape[0]} pixels of {pixels.mean():.0f} ± {pixels.std():.0f}.")
    if args.images_only:
        return
    checkpoint, weights = folder_bytes(lora / "checkpoint-2"), folder_bytes(ours)
    print(f"A checkpoint of the LoRA run has {checkpoint / 1e6:,.0f} MB, and the model {weights / 1e6:,.0f} MB.")
    if checkpoint > weights / 10:
        raise SystemExit("A checkpoint of a LoRA run must not hold the model under it.")
    for options in (["--dtype", "bfloat16", "--lora_r", 16], ["--dtype", "float32"]):
        command = [str(part) for part in [*memory, *options, "--gpu_memory", f"{available:.1f}"]]
        print(f"\n$ {' '.join(['trl-udm', *command[3:]])}", flush=True)
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
