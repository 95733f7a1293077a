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

Each stage is a process of its own, as a user would start it: write a checkpoint in both layouts, load it, draw an
image, make a LoRA step (1 prompt x 2 samples x 3 timesteps, bfloat16), resume for a second one, merge, evaluate a
prompt, and make a step of all weights where the estimate says that it fits. A stage that is done is not repeated, so a
run that was stopped continues. The table has what `estimate_memory` says beside what the process took.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig

from trl_udm import UDMGRPOConfig, UDMGRPOTrainer, URSAPipeline, estimate_memory
from trl_udm.evaluation import evaluate


GIB = 2**30
ROOT = Path(__file__).parents[1]
PROMPT = "a photo of a red car left of a blue bench"
LORA = LoraConfig(r=16, target_modules="all-linear")


def brightness(prompts, completions, **kwargs):
    return [float(np.asarray(image).mean()) / 255 for image in completions]


def make_args(output_dir: Path, max_steps: int = 1) -> UDMGRPOConfig:
    return UDMGRPOConfig(
        str(output_dir),
        max_steps=max_steps,
        num_generations=2,
        num_train_timesteps=3,
        num_inference_steps=4,
        timestep_window=[0, 1],
        per_device_train_batch_size=1,
        gradient_accumulation_steps=6,
        save_steps=1,
        logging_steps=1,
        bf16=True,
        use_cpu=True,
        report_to="none",
    )


def load(args: argparse.Namespace) -> None:
    pipeline = URSAPipeline.from_pretrained(args.model, dtype=torch.bfloat16)
    print(f"{pipeline.transformer.num_parameters():,} weights")


def train(args: argparse.Namespace) -> None:
    # All weights are trained in float32, where a small step is not lost
    dtype = torch.bfloat16 if args.lora else torch.float32
    pipeline = URSAPipeline.from_pretrained(args.model, dtype=dtype)
    trainer = UDMGRPOTrainer(
        pipeline,
        brightness,
        make_args(args.output_dir, args.max_steps),
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


def run_stage(name: str, command: list, folder: Path) -> dict:
    """Runs a command, and returns its seconds and the peak memory of its process in bytes."""
    record = folder / f"{name.replace(' ', '_')}.json"
    if record.exists():
        return json.loads(record.read_text())
    started = time.perf_counter()
    with open(record.with_suffix(".log"), "w") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    result = {"seconds": time.perf_counter() - started, "peak": usage.ru_maxrss * 1024, "exit_code": code}
    if code == 0:
        record.write_text(json.dumps(result))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="ursa-1.7b-ibq512")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/real_size"))
    parser.add_argument("--stage", choices=["load", "train", "evaluate"], help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--max_steps", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--lora", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage is not None:
        {"load": load, "train": train, "evaluate": evaluate_prompt}[args.stage](args)
        return

    folder = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    ours, original, lora, merged = (folder / name for name in ("ours", "original", "lora", "merged"))
    this = [sys.executable, __file__]
    write = [sys.executable, ROOT / "scripts" / "make_random_checkpoint.py", "--size", args.size]
    cli = [sys.executable, "-m", "trl_udm.cli"]
    step = [*this, "--stage", "train", "--model", ours]
    stages = {
        "write, ours": [*write, "--layout", "ours", "--output_dir", ours],
        "write, original": [*write, "--layout", "original", "--output_dir", original],
        "load, ours": [*this, "--stage", "load", "--model", ours],
        "load, original": [*this, "--stage", "load", "--model", original],
        "image of 3 steps": [*cli, "generate", PROMPT, "--model", ours, "--dtype", "bfloat16"],
        "LoRA step": [*step, "--lora", "--output_dir", lora],
        "LoRA step, resumed": [*step, "--lora", "--resume", "--max_steps", 2, "--output_dir", lora],
        "merge": [*cli, "merge", "--model", ours, "--adapter", lora / "checkpoint-2", "--output_dir", merged],
        "evaluate a prompt": [*this, "--stage", "evaluate", "--model", merged, "--output_dir", folder / "evaluation"],
        "step of all weights": [*step, "--output_dir", folder / "all"],
    }
    stages["image of 3 steps"] += ["--num_inference_steps", 3, "--output_dir", folder / "image"]
    stages["merge"] += ["--dtype", "bfloat16"]
    estimates: dict[str, float] = {}
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print("| stage | seconds | peak GiB | estimated GiB | error |\n|---|---|---|---|---|")
    for name, command in stages.items():
        if name == "load, ours":  # the checkpoint is there
            for stage, dtype, peft_config in (
                ("LoRA step", torch.bfloat16, LORA),
                ("step of all weights", torch.float32, None),
            ):
                pipeline = URSAPipeline.from_configs(ours, dtype=dtype)
                options = make_args(folder / "estimate")
                estimates[stage] = estimate_memory(pipeline, options, peft_config, prompt=PROMPT, device="cpu").peak
        estimate = estimates.get(name.partition(",")[0])
        if name == "step of all weights" and estimate > available:
            print(f"| {name} | not run | | {estimate / GIB:.1f} | the machine has {available / GIB:.1f} |", flush=True)
            continue
        result = run_stage(name, command, folder)
        if result["exit_code"] != 0:
            raise SystemExit(f"{name!r} failed with exit code {result['exit_code']}. Its log is in {folder}.")
        known = "" if estimate is None else f"{estimate / GIB:.1f}"
        error = "" if estimate is None else f"{estimate / result['peak'] - 1:+.0%}"
        print(f"| {name} | {result['seconds']:.1f} | {result['peak'] / GIB:.1f} | {known} | {error} |", flush=True)


if __name__ == "__main__":
    main()
