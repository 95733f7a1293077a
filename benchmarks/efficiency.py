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
How many samples a recipe needs, by the protocol of docs/efficiency.md, on an embedded world.

    python benchmarks/efficiency.py --output_dir outputs/efficiency --settings paper grid --seeds 42 1 2

A setting is what `SETTINGS` has for its name: options that differ from the paper's recipe, which is in
`examples/configs`. Each run is a process with one thread. It is evaluated before it begins and every 1,280 samples. A
second call of the command continues with the runs, and within the runs, that are not finished. The output folder then
holds the runs, `table.md`, `summary.md` and `curves.png`. `--report` writes these for the runs that are there.

With `--tuning_seed`, each setting has the learning rate that is best with that seed. So do the algorithms of
docs/dflow_grpo.md compare:

    python benchmarks/efficiency.py --output_dir outputs/algorithms --settings paper dFlowGRPO diffu-GRPO \\
        --worlds shapes words sums --learning_rates 1.25e-4 2.5e-4 5e-4 --tuning_seed 5 --num_samples 2560 --bf16
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from ablation import SETTINGS as ABLATION
from ablation import trained_share
from tqdm.auto import tqdm


ROOT = Path(__file__).parents[1]
SAMPLES_BETWEEN_EVALUATIONS = 1280
TARGET = 0.90
NUM_EVAL_SAMPLES = 4  # per held-out prompt
NUM_DIAGNOSED_PROMPTS = 64
WORLDS = {"shapes": "shapes_paper.yaml", "words": "words_paper.yaml", "sums": "arithmetic_paper.yaml"}

ALL_STEPS = {"num_train_timesteps": 8, "timestep_window": [0, 2], "timestep_sampling": "stratified"}
# Rows of a rollout in four parts, with an update for each. The average stands in for a schedule that ends.
FAST = {
    **ALL_STEPS,
    "steps_per_generation": 4,
    "epsilon": 1e-3,
    "beta": 0.5,
    "ema_decay": 0.95,
    "lr_scheduler_type": "constant_with_warmup",
    "lr_scheduler_kwargs": {},
}
# The KL divergence over the whole vocabulary, and a learning rate that ends at 0
LEASH = {"kl_estimator": "full", "beta": 0.03}
FULL_KL = {**FAST, **LEASH}
DECAY = {**FULL_KL, "lr_scheduler_type": "linear"}
LOW_BETA = {**DECAY, "beta": 0.01}
# For each name, the options that differ from the paper's recipe
SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "grid": {"timestep_window": [0, 7]},
    "grid, beta 0.5": {"timestep_window": [0, 7], "beta": 0.5},
    "paper, full KL": LEASH,
    "grid, full KL": {"timestep_window": [0, 7], **LEASH},
    "3 of 10 steps, full KL": {"timestep_window": [0, 7], "timestep_sampling": "stratified", **LEASH},
    "grid, beta 0.5, 4 updates": {
        "timestep_window": [0, 7],
        "beta": 0.5,
        "num_iterations": 4,
        "epsilon": 1e-3,
    },
    "fast": FAST,
    "fast, 64 samples": {**FAST, "samples_per_rollout": 64},
    "fast, negatives x 0.3": {**FAST, "negative_advantage_scale": 0.3},
    "fast, negatives x 0, epsilon 0.2": {**FAST, "negative_advantage_scale": 0.0, "epsilon": 0.2},
    "fast, negatives x 0.3, epsilon 0.2": {**FAST, "negative_advantage_scale": 0.3, "epsilon": 0.2},
    "fast, epsilon 3e-3": {**FAST, "epsilon": 3e-3},
    "fast, decay": {**FAST, "lr_scheduler_type": "linear"},
    "fast, full KL": FULL_KL,
    "fast, full KL, 8 parts": {**FULL_KL, "steps_per_generation": 8},
    "fast, full KL, decay": DECAY,
    "fast, full KL, decay, beta 0.1": {**DECAY, "beta": 0.1},
    "fast, full KL, decay, beta 0.01": LOW_BETA,
    "fast, full KL, decay, beta 0.01, 5 of 10 steps": {
        **LOW_BETA,
        "num_train_timesteps": 5,
        "timestep_window": [0, 5],
    },
    "fast, full KL, decay, beta 0.01, 3 of 10 steps": {
        **LOW_BETA,
        "num_train_timesteps": 3,
        "timestep_window": [0, 7],
    },
    "fast, decay, beta 0": {**DECAY, "beta": 0.0, "kl_estimator": "k3"},
    "fast, decay, beta 0, epsilon 3e-3": {**DECAY, "beta": 0.0, "kl_estimator": "k3", "epsilon": 3e-3},
    "fast, full KL, decay, epsilon 3e-3": {**DECAY, "epsilon": 3e-3},
    "fast, full KL, decay, G = 16": {**DECAY, "num_generations": 16},
    "fast, full KL, decay, no std": {**DECAY, "scale_rewards": "none"},
    "fast, full KL, decay, each part twice": {**DECAY, "num_iterations": 2},
    "fast, full KL, decay, strict reward": {**DECAY, "reward_mode": "official"},
    "fast, full KL, decay, 4 of 10 steps": {**DECAY, "num_train_timesteps": 4, "timestep_window": [0, 6]},
    "fast, full KL, decay, rollouts of 5 steps": {
        **DECAY,
        "num_inference_steps": 5,
        "num_train_timesteps": 5,
        "timestep_window": [0, 0],
    },
    "fast, full KL, decay, drop": {**DECAY, "drop_zero_variance": True},
    "fast, full KL, decay, resample": {**DECAY, "resample_zero_variance": 2},
    "fast, full KL, decay, drop and resample": {**DECAY, "drop_zero_variance": True, "resample_zero_variance": 2},
    "fast, shared noise": {**FAST, "shared_noise": True},
    "fast, ELBO": {**FAST, "timestep_weighting": "elbo"},
    "fast, std of the batch": {**FAST, "scale_rewards": "batch"},
    "fast, no EMA": {**FAST, "ema_decay": None},
    "fast, backward trajectory": {**FAST, "trajectory": "backward"},
}
# The corners of the paper's ablation, over its early starts and over the whole grid
CORNERS = {
    "backward": {"trajectory": "backward"},
    "intermediate": {"action": "intermediate"},
    "intermediate, backward": {"action": "intermediate", "trajectory": "backward"},
}
for window in ("paper", "grid"):
    SETTINGS |= {f"{window}, {corner}": {**SETTINGS[window], **options} for corner, options in CORNERS.items()}
SETTINGS |= ABLATION["algorithms"]


def load_trainer(folder: Path, run: dict[str, Any]):
    """The trainer of a run, the function that measures accuracy, and a pipeline with the weights before training."""
    sys.path.append(str(ROOT / "examples"))
    import train_geneval
    import train_ocr
    import train_text
    from common import ALGORITHMS

    from trl_udm import GenEvalReward, TextUDMPipeline, URSAPipeline

    options = {**run["options"], "output_dir": str(folder)}
    mode = options.pop("reward_mode", "dense")
    if run["world"] == "shapes":
        path, *judges, train_dataset, eval_dataset = train_geneval.load_task(train_geneval.ScriptArguments(), None)
        reward_funcs, accuracy = [GenEvalReward(*judges, mode=mode)], GenEvalReward(*judges, mode="official")
    else:
        script = {"words": train_ocr, "sums": train_text}[run["world"]]
        arguments = script.ScriptArguments()
        if run["world"] == "words":
            arguments.num_engines = 1
        path, reward_func, train_dataset, eval_dataset = script.load_task(arguments, None)
        accuracy = reward_func[0] if isinstance(reward_func, list) else reward_func
        reward_funcs = [accuracy]
    path = run["pipeline"] or path
    pipeline_class = TextUDMPipeline if run["world"] == "sums" else URSAPipeline
    pipeline = pipeline_class.from_pretrained(path)
    if run["options"]["bf16"]:
        pipeline.transformer.set_attn_implementation("eager")  # on a CPU the fastest one in bfloat16
    config_class, trainer_class = ALGORITHMS[options.pop("algorithm", "udm_grpo")]
    trainer = trainer_class(
        pipeline,
        reward_funcs,
        config_class(**options),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )
    return trainer, accuracy, pipeline_class.from_pretrained(path)


def work(folder: Path) -> None:
    """Makes the run that `run.json` describes, from its last checkpoint if there is one."""
    import torch
    from transformers import TrainerCallback

    from trl_udm import DiagnosticsCallback
    from trl_udm.checkpoint_folders import find_checkpoints, is_whole

    run = json.loads((folder / "run.json").read_text())
    trainer, reward_func, initial = load_trainer(folder, run)
    pipeline, rows = trainer.pipeline, [row for row in trainer.eval_dataset for _ in range(NUM_EVAL_SAMPLES)]
    prompts = [row["prompt"] for row in rows]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}

    @torch.no_grad()
    def measure() -> dict[str, float]:
        """Accuracy, diversity and divergence of the policy, with the same random numbers every time."""
        with trainer.ema_weights(), torch.random.fork_rng():
            torch.manual_seed(0)
            rollout = trainer._rollout(prompts, "eval")
            scores = reward_func(prompts=prompts, completions=rollout.completions, **columns)
            samples = rollout.output.clean_samples
            first, second = samples[::NUM_EVAL_SAMPLES], samples[1::NUM_EVAL_SAMPLES]
            counted = pipeline.completion_mask(first)  # (B, N)
            divergences = []
            for timestep in pipeline.scheduler.timesteps.tolist():
                t = torch.full((len(first),), pipeline.scheduler.timestep_to_t(timestep))
                prompt = (rollout.prompt_ids[::NUM_EVAL_SAMPLES], rollout.prompt_mask[::NUM_EVAL_SAMPLES])
                state = (*prompt, pipeline.scheduler.add_noise(first, t), trainer.latent_shape)
                log_probs, initial_log_probs = (
                    one.denoise(*state, t=t).float().log_softmax(dim=-1) for one in (pipeline, initial)
                )
                kl = (log_probs.exp() * (log_probs - initial_log_probs)).sum(dim=-1)  # (B, N)
                divergences.append(((kl * counted).sum() / counted.sum()).item())
        return {
            "accuracy": statistics.fmean(scores),
            "diversity": (first != second).float().mean().item(),
            "kl": statistics.fmean(divergences),
        }

    class Recorder(TrainerCallback):
        """Writes each evaluation to `evaluations.json`, with what it took to get there."""

        rows: list[dict[str, float]]

        def evaluate(self, args: Any, step: int) -> None:
            rollouts = step / (args.num_iterations * args.steps_per_generation)
            # Dynamic sampling logs what it has drawn, once a rollout. The last one has not been logged yet
            drawn = [log["samples_drawn"] for log in trainer.state.log_history if "samples_drawn" in log]
            drawn += trainer._metrics["train"].get("samples_drawn", [])
            samples = round(sum(drawn) or rollouts * args.generation_batch_size / args.num_train_timesteps)
            self.rows.append({"step": step, "samples": samples, "seconds": self.seconds, **measure()})
            (folder / "evaluations.json").write_text(json.dumps(self.rows, indent=1))
            self.start = time.monotonic()

        def on_train_begin(self, args, state, control, **kwargs):
            path = folder / "evaluations.json"
            rows = json.loads(path.read_text()) if path.exists() else []
            self.rows = [row for row in rows if 0 < state.global_step >= row["step"]]
            self.seconds = self.rows[-1]["seconds"] if self.rows else 0.0
            self.start = time.monotonic()
            if state.global_step == 0:
                self.evaluate(args, 0)

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % args.save_steps == 0:
                self.seconds += time.monotonic() - self.start  # while the clock stands still
                self.evaluate(args, state.global_step)

    trainer.add_callback(Recorder())
    diagnosed = trainer.eval_dataset["prompt"][:NUM_DIAGNOSED_PROMPTS]
    trainer.add_callback(DiagnosticsCallback(trainer, diagnosed, measure_steps=run["options"]["save_steps"]))
    checkpoints = [path for path in find_checkpoints(folder) if is_whole(path)]
    trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    (folder / "done").touch()


def build_options(
    world: str, overrides: dict[str, Any], seed: int, num_samples: int, bf16: bool = False
) -> dict[str, Any]:
    """Arguments of `UDMGRPOConfig` for a run of so many samples."""
    paper = yaml.safe_load((ROOT / "examples" / "configs" / WORLDS[world]).read_text())
    samples_per_rollout = paper["per_device_train_batch_size"] // paper["num_train_timesteps"]
    options = {**paper, **overrides, "seed": seed, "bf16": bf16}
    samples_per_rollout = options.pop("samples_per_rollout", samples_per_rollout)
    rows = samples_per_rollout * options["num_train_timesteps"]
    num_minibatches = options.setdefault("steps_per_generation", 1)
    updates = options.get("num_iterations", 1) * num_minibatches
    return {
        **options,
        "per_device_train_batch_size": rows // num_minibatches,
        "rollout_batch_size": 128,
        "max_steps": num_samples // samples_per_rollout * updates,
        "save_steps": SAMPLES_BETWEEN_EVALUATIONS // samples_per_rollout * updates,
        "logging_steps": updates,
        "disable_tqdm": True,
    }


def count_passes(options: dict[str, Any]) -> float:
    """Returns the forward passes of training per sample. A backward pass counts as two."""
    num_timesteps, num_iterations = options["num_train_timesteps"], options.get("num_iterations", 1)
    # The first step of the metric path needs a pass for the trajectory only
    rollout = options["num_inference_steps"] - (options.get("trajectory") != "backward")
    has_old = num_iterations * options["steps_per_generation"] > 1
    has_reference, is_full = options["beta"] != 0, options.get("kl_estimator") == "full"
    scoring = has_old + (has_reference and not is_full)
    update = 3 * trained_share(options) + (has_reference and is_full)
    return rollout + num_timesteps * (scoring + update * num_iterations)


def first_reached(rows: list[dict[str, float]], target: float) -> dict[str, float] | None:
    """The first evaluation at or above the target that the next one, if there is one, confirms."""
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        if row["accuracy"] >= target and (following is None or following["accuracy"] >= target):
            return row
    return None


def train(folder: Path, run: dict[str, Any]) -> None:
    """Makes one run in a process of its own, unless that has been done."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    text = json.dumps(run, indent=1)
    if path.exists() and path.read_text() != text:
        raise ValueError(f"`--output_dir` holds a run with other options: {path}. Give another folder.")
    path.write_text(text)
    if (folder / "done").exists():
        return
    with (folder / "log.txt").open("a") as log:
        command = [sys.executable, __file__, "--output_dir", str(folder), "--work"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if code != 0:
        tqdm.write(f"A run failed with exit code {code}: {folder / 'log.txt'}", file=sys.stderr)


def read_runs(output_dir: Path) -> list[dict[str, Any]]:
    """The runs below a folder, each with its evaluations, and the distances of its two kinds of states at the end."""
    runs = []
    for path in sorted(output_dir.rglob("run.json")):
        rows_path, diagnostics_path = path.with_name("evaluations.json"), path.with_name("diagnostics.json")
        if rows_path.exists():
            run = {**json.loads(path.read_text()), "rows": json.loads(rows_path.read_text())}
            if diagnostics_path.exists():
                last = json.loads(diagnostics_path.read_text())["measurements"][-1]["state_distance"]
                run["distances"] = {name: statistics.fmean(values) for name, values in last.items()}
            runs.append(run)
    return runs


def format_table(runs: list[dict[str, Any]]) -> str:
    """One row for each run: what it took to reach the target, and where it was at certain numbers of samples."""
    lines = [
        "| world | setting | learning rate | seed | samples to 0.90 | passes | seconds | at 3,840 | at 6,400 "
        "| at 12,800 | last | samples | KL | diversity | states: forward | backward |",
        "|---" * 16 + "|",
    ]
    for run in runs:
        options, rows = run["options"], run["rows"]
        reached = first_reached(rows, TARGET)
        distances = run.get("distances", {})
        at = {row["samples"]: f"{row['accuracy']:.3f}" for row in rows}
        cost = ["", "", ""]
        if reached is not None:
            passes = f"{reached['samples'] * count_passes(options) / 1000:.0f} k"
            if options.get("drop_zero_variance") or options.get("resample_zero_variance"):
                passes = ""  # not each sample that was drawn is trained
            cost = [f"{reached['samples']:,}", passes, f"{reached['seconds']:.0f}"]
        cells = [
            run["world"],
            run["setting"],
            f"{options['learning_rate']:g}",
            str(options["seed"]),
            *cost,
            *(at.get(samples, "") for samples in (3840, 6400, 12800)),
            f"{rows[-1]['accuracy']:.3f}",
            f"{rows[-1]['samples']:,}",
            f"{rows[-1]['kl']:.3f}",
            f"{rows[-1]['diversity']:.3f}",
            *(f"{distances[name]:.4f}" if name in distances else "" for name in ("forward", "backward")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def interpolate(rows: list[dict[str, float]], samples: float) -> float | None:
    """The accuracy at a number of samples, on a line between two evaluations."""
    for row, following in zip(rows, rows[1:], strict=False):
        if row["samples"] <= samples <= following["samples"]:
            share = (samples - row["samples"]) / (following["samples"] - row["samples"])
            return row["accuracy"] + share * (following["accuracy"] - row["accuracy"])
    return None


def format_summary(runs: list[dict[str, Any]]) -> str:
    """
    One row for each world, setting and learning rate: means over the seeds, after equal numbers of samples and of
    passes. The passes are those of the cheapest setting of the world.
    """
    lines = [
        "| world | setting | learning rate | seeds | passes a sample | accuracy before | at the end | after passes "
        "| KL | diversity |",
        "|---" * 10 + "|",
    ]
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["world"], run["setting"], run["options"]["learning_rate"]), []).append(run)
    for (world, setting, rate), group in groups.items():
        num_passes = count_passes(group[0]["options"])
        least = min(count_passes(run["options"]) * run["rows"][-1]["samples"] for run in runs if run["world"] == world)
        last = [run["rows"][-1] for run in group]
        ends = [row["accuracy"] for row in last]
        between = [interpolate(run["rows"], least / num_passes) for run in group]
        reached = [accuracy for accuracy in between if accuracy is not None]
        cells = [world, setting, f"{rate:g}", str(len(group)), f"{num_passes:.0f}"]
        cells += [f"{statistics.fmean(run['rows'][0]['accuracy'] for run in group):.3f}"]
        cells += [f"{statistics.fmean(ends):.3f} ({min(ends):.3f} to {max(ends):.3f})"]
        cells += [f"{statistics.fmean(reached):.3f} ({least / 1000:.0f} k)" if reached else ""]
        cells += [f"{statistics.fmean(row[name] for row in last):.3f}" for name in ("kl", "diversity")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def save_curves(path: Path, runs: list[dict[str, Any]]) -> None:
    """Plots accuracy against samples: a panel for each world, a color for each setting, a line for each run."""
    from trl_udm.drawing import open_figure

    worlds = list(dict.fromkeys(run["world"] for run in runs))
    settings = list(dict.fromkeys((run["setting"], run["options"]["learning_rate"]) for run in runs))
    with open_figure(path, height=3.4 * len(worlds)) as figure:
        axes = figure.subplots(len(worlds), 1, squeeze=False)[:, 0]
        for axis, world in zip(axes, worlds, strict=True):
            for run in runs:
                if run["world"] == world:
                    key = (run["setting"], run["options"]["learning_rate"])
                    label = f"{key[0]}, {key[1]:g}"
                    label = None if label in axis.get_legend_handles_labels()[1] else label
                    points = [(row["samples"], row["accuracy"]) for row in run["rows"]]
                    axis.plot(*zip(*points, strict=True), color=f"C{settings.index(key) % 10}", label=label)
            axis.axhline(TARGET, color="gray", linestyle=":")
            axis.set(ylabel=f"{world}: accuracy", xlabel="samples drawn")
            axis.legend(fontsize=8, loc="lower right")


def train_all(args: argparse.Namespace, seeds: list[int], rates: dict[tuple[str, str], list[float | None]]) -> None:
    """Makes the runs of each seed and of each world and setting with its learning rates."""
    runs = []
    for seed in seeds:
        for (world, setting), values in rates.items():
            for rate in values:
                overrides = {**SETTINGS[setting], **({} if rate is None else {"learning_rate": rate})}
                options = build_options(world, overrides, seed, args.num_samples, args.bf16)
                folder = Path(world, setting.replace(", ", "_").replace(" ", "-"), f"{options['learning_rate']:g}")
                run = {"world": world, "setting": setting, "pipeline": args.pipeline, "options": options}
                runs.append((args.output_dir / folder / str(seed), run))
    with ThreadPoolExecutor(args.num_workers) as pool:
        futures = [pool.submit(train, *run) for run in runs]
        for future in tqdm(futures, desc="Training", unit="run"):
            future.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the runs and the report")
    parser.add_argument("--pipeline", help="checkpoint to begin with, by default the one that the world ships")
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=["shapes"])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--learning_rates", nargs="+", type=float, help="by default that of the paper's recipe")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1, 2])
    parser.add_argument("--tuning_seed", type=int, help="try all rates with this seed, the best one with the others")
    parser.add_argument("--num_samples", type=int, default=6400, help="samples of a run, a multiple of 1,280")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16, as the search does")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="runs at a time, each with one thread")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.output_dir)
        return
    if args.num_samples % SAMPLES_BETWEEN_EVALUATIONS != 0:
        parser.error(f"--num_samples must be a multiple of {SAMPLES_BETWEEN_EVALUATIONS}, got {args.num_samples}")
    rates = {(world, setting): args.learning_rates or [None] for world in args.worlds for setting in args.settings}
    if not args.report and args.tuning_seed is not None:
        train_all(args, [args.tuning_seed], rates)
        for run in sorted(read_runs(args.output_dir), key=lambda run: run["rows"][-1]["accuracy"]):
            if run["options"]["seed"] == args.tuning_seed and (run["world"], run["setting"]) in rates:
                rates[run["world"], run["setting"]] = [run["options"]["learning_rate"]]
    if not args.report:
        train_all(args, args.seeds, rates)
    runs = read_runs(args.output_dir)
    table = format_table(runs)
    (args.output_dir / "table.md").write_text(table)
    compared = [run for run in runs if run["options"]["seed"] != args.tuning_seed]
    (args.output_dir / "summary.md").write_text(format_summary(compared))
    save_curves(args.output_dir / "curves.png", runs)
    print(table)


if __name__ == "__main__":
    main()
