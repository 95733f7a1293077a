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
Kills a run on shapes with SIGKILL at random moments, and resumes it from its last whole checkpoint each time. Compares
its outcome bit by bit with that of a run that was not killed.

    python benchmarks/survival.py --output_dir outputs/survival

The run saves a checkpoint at every step, so that many kills hit the saving. It has two updates per rollout and an
average of the weights. After the last kill it may finish. `results.json` then lists what each kill hit.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from shapes_runs import build_trainer

from trl_udm import GenEvalReward
from trl_udm.checkpoint_folders import find_checkpoints, is_whole
from trl_udm.worlds.shapes.detector import ShapesColorClassifier, ShapesDetector
from trl_udm.worlds.shapes.prompts import split_metadata


def train(output_dir: Path, lora: bool, num_steps: int) -> None:
    """Trains from the last whole checkpoint, if there is one, and saves the outcome."""
    torch.set_num_threads(1)
    trainer = build_trainer(
        output_dir,
        GenEvalReward(ShapesDetector(), ShapesColorClassifier(), mode="dense"),
        train_dataset=Dataset.from_list([{**row} for row in split_metadata()[0][:12]]),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear") if lora else None,
        num_generations=4,
        num_train_timesteps=1,
        per_device_train_batch_size=8,
        num_iterations=2,
        num_inference_steps=4,
        num_inference_steps_eval=4,
        learning_rate=1e-3,
        max_steps=num_steps,
        ema_decay=0.9,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        logging_steps=3,
        disable_tqdm=True,
    )
    trainer.train(resume_from_checkpoint=any(map(is_whole, find_checkpoints(output_dir))))
    (last,) = [folder for folder in find_checkpoints(output_dir) if folder.endswith(f"-{num_steps}")]
    outcome = {
        "weights": trainer.model.state_dict(),
        "optimizer": torch.load(Path(last) / "optimizer.pt", weights_only=True),
        "average": trainer.ema.shadow_params,
        "metrics": [
            {
                name: value
                for name, value in log.items()
                if not name.endswith(("time", "per_second")) and "profiling" not in name
            }
            for log in trainer.state.log_history
            if "loss" in log  # not the summary at the end, which has timings
        ],
        "next random numbers": torch.rand(8),
    }
    torch.save(outcome, output_dir / "outcome.pth")


def is_equal(first: object, second: object) -> bool:
    """Whether two outcomes are equal bit by bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(is_equal(first[name], second[name]) for name in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(is_equal, first, second))
    return first == second


def describe(output_dir: Path) -> tuple[int, bool]:
    """Returns the step of the last whole checkpoint, and whether there is a torn one."""
    checkpoints = find_checkpoints(output_dir)
    whole = [int(folder.rsplit("-", 1)[1]) for folder in checkpoints if is_whole(folder)]
    return max(whole, default=0), len(whole) < len(checkpoints)


def survive(output_dir: Path, lora: bool, num_kills: int, num_steps: int, seed: int) -> dict[str, object]:
    """Compares an unbroken run with one that is killed `num_kills` times."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trl_udm.trainer.udm_grpo_trainer", "trl_udm.pipelines.pipeline_ursa", "peft"])
    shutil.rmtree(output_dir, ignore_errors=True)

    def start(name: str) -> multiprocessing.Process:
        process = context.Process(target=train, args=(output_dir / name, lora, num_steps))
        process.start()
        return process

    unbroken = start("unbroken")
    started = time.monotonic()
    unbroken.join()
    seconds = time.monotonic() - started
    assert unbroken.exitcode == 0

    # A good part of `seconds` passes before the first step. Most kills should hit a step
    draw, kills = random.Random(seed), []
    while len(kills) < num_kills:
        before, _ = describe(output_dir / "killed")
        if before == 0:
            shutil.rmtree(output_dir / "killed", ignore_errors=True)
        process = start("killed")
        process.join(draw.uniform(0.1, 0.6) * seconds)
        if process.exitcode is not None:
            if process.exitcode != 0:
                return {"kills": kills, "equal": False, "exit code of a resumed run": process.exitcode}
            # The run finished before its kill: the next one starts from the beginning
            if not is_equal(
                *(torch.load(output_dir / name / "outcome.pth", weights_only=True) for name in ("unbroken", "killed"))
            ):
                return {"kills": kills, "equal": False}
            shutil.rmtree(output_dir / "killed")
            continue
        process.kill()
        process.join()
        after, is_torn = describe(output_dir / "killed")
        kills.append({"resumed from step": before, "killed after step": after, "in a checkpoint": is_torn})
        print(kills[-1], flush=True)
    last = start("killed")
    last.join()
    outcomes = [torch.load(output_dir / name / "outcome.pth", weights_only=True) for name in ("unbroken", "killed")]
    return {
        "kills": kills,
        "in a checkpoint": sum(kill["in a checkpoint"] for kill in kills),
        "exit code": last.exitcode,
        "equal": last.exitcode == 0 and is_equal(*outcomes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="where the runs and results.json go")
    parser.add_argument("--num_kills", type=int, default=25, help="kills per kind of run")
    parser.add_argument("--num_steps", type=int, default=20, help="training steps of a run")
    parser.add_argument("--kinds", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    results = {
        kind: survive(args.output_dir / kind, kind == "lora", args.num_kills, args.num_steps, args.seed)
        for kind in args.kinds
    }
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2))
    for kind, result in results.items():
        print(
            f"{kind}: {len(result['kills'])} kills, {result.get('in a checkpoint')} of them in a checkpoint; equal to "
            f"the unbroken run: {result['equal']}"
        )
    if not all(result["equal"] for result in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
