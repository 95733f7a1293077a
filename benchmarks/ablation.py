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
The ablation of UDM-GRPO (https://huggingface.co/papers/2604.18518) on the world of shapes.

The first setting is the method itself. Each other setting differs from it in one thing. `examples/train_geneval.py`
trains each setting with several seeds. A second call of the command continues with the runs that are not finished. The
output folder then holds the runs, `results.json`, `table.md`, `curves.png` with reward and KL divergence, and
`accuracies.png`. The runs of the four corners also have `diagnostics.png`.

    python benchmarks/ablation.py --output_dir outputs/ablation

"Passes" is the cost of a step per sample, in forward passes of the network: those of the rollout, those that score
with the reference and the old policy, and three for each training row, for its forward and backward pass. With
`--max_passes`, all settings have the same number of them instead of the same number of steps and samples.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from trl_udm.drawing import open_figure


ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples" / "configs" / "shapes_paper.yaml"
NUM_SAMPLES = 64  # per rollout: half of those in `CONFIG`
NUM_STEPS = 10  # of the time grid

# As in `CONFIG`, which also has the options that are not varied
METHOD = {
    "action": "clean",
    "trajectory": "forward",
    "guidance_scale": 1.0,
    "num_train_timesteps": 3,
    "timestep_window": (0, 2),
    "beta": 0.1,
    "num_generations": 8,
    "num_iterations": 1,
    "epsilon": 1e-4,
}
# The policy gradient of the sampler's own steps, all of which but the first move tokens of shapes
DFLOW = {
    "algorithm": "dflow_grpo",
    "action": "intermediate",
    "trajectory": "backward",
    "num_train_timesteps": NUM_STEPS - 2,
    "timestep_window": (1, 1),
    "beta": 0.0,
    "epsilon": 1e-3,
    "epsilon_high": 1.5e-3,
}
# For each group and name, the options that differ from the method's
SETTINGS = {
    "corners": {
        "clean action, forward trajectory": {},
        "clean action, backward trajectory": {"trajectory": "backward"},
        "intermediate action, forward trajectory": {"action": "intermediate"},
        "intermediate action, backward trajectory": {"action": "intermediate", "trajectory": "backward"},
    },
    "guidance": {"rollouts with guidance scale 3": {"guidance_scale": 3.0}},
    "timesteps": {
        "K = 1": {"num_train_timesteps": 1},
        "K = 2": {"num_train_timesteps": 2},
        "K = 5": {"num_train_timesteps": 5},
        "all 10 timesteps": {"num_train_timesteps": NUM_STEPS, "timestep_window": (0, 0)},
        "start in a late window (5 to 7)": {"timestep_window": (5, 7)},
        "start anywhere (0 to 7)": {"timestep_window": (0, 7)},
    },
    "KL": {"beta = 0": {"beta": 0.0}, "beta = 0.05": {"beta": 0.05}, "beta = 0.5": {"beta": 0.5}},
    "groups": {"G = 4": {"num_generations": 4}, "G = 16": {"num_generations": 16}},
    "updates": {
        "4 updates per rollout, epsilon = 1e-4": {"num_iterations": 4},
        "4 updates per rollout, epsilon = 1e-3": {"num_iterations": 4, "epsilon": 1e-3},
        "4 updates per rollout, epsilon = 0.2": {"num_iterations": 4, "epsilon": 0.2},
    },
    # Four times the method's learning rate: there the naive baseline collapses
    "learning rate": {
        "clean action, forward trajectory, learning rate 1e-3": {"learning_rate": 1e-3},
        "intermediate action, backward trajectory, learning rate 1e-3": {
            "action": "intermediate",
            "trajectory": "backward",
            "learning_rate": 1e-3,
        },
    },
    "algorithms": {
        "UDM-GRPO, beta = 0": {"beta": 0.0},
        "dFlowGRPO": DFLOW,
        "dFlowGRPO, and the last step": {**DFLOW, "num_train_timesteps": NUM_STEPS - 1},
        "dFlowGRPO, as its authors' code": {
            **DFLOW,
            "num_train_timesteps": NUM_STEPS - 1,
            "timestep_window": (0, 0),
            "average_rates": True,
        },
        "DPO on the pairs of a group": {**DFLOW, "algorithm": "dflow_dpo", "num_pairs": 4},
        "diffu-GRPO": {
            "trajectory": "backward",
            "num_train_timesteps": 1,
            "timestep_window": (0, 0),
            "importance_sampling_level": "token",
            "beta": 0.0,
            "epsilon": 1e-3,
            "epsilon_high": 1.5e-3,
        },
        "online rejection fine-tuning": {"negative_advantage_scale": 0.0, "beta": 0.0},
    },
}


def count_passes(options: dict[str, Any]) -> float:
    """Returns the forward passes of a training step per sample."""
    rollout = NUM_STEPS * (1 if options["guidance_scale"] == 1.0 else 2)
    num_scorings = (options["beta"] != 0) + (options["num_iterations"] > 1)
    scoring = num_scorings * options["num_train_timesteps"]
    return (rollout + scoring) / options["num_iterations"] + 3 * trained_share(options) * options[
        "num_train_timesteps"
    ]


def trained_share(options: dict[str, Any]) -> float:
    """The share of the samples that are trained on: all of them, or those that are in pairs."""
    return 2 * options["num_pairs"] / options["num_generations"] if "num_pairs" in options else 1.0


def run(options: dict[str, Any], seed: int, output_dir: Path, extra: list[str]) -> None:
    """Trains one setting with one seed, unless that has been done."""
    flags = ["--config", str(CONFIG), "--output_dir", str(output_dir), "--seed", str(seed)]
    flags += ["--per_device_train_batch_size", str(NUM_SAMPLES * options["num_train_timesteps"])]
    for name, value in options.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    output_dir.mkdir(parents=True, exist_ok=True)
    flags_path = output_dir / "flags.json"
    if flags_path.exists() and json.loads(flags_path.read_text()) != [*flags, *extra]:
        raise ValueError(f"`--output_dir` holds a run with other flags: {flags_path}. Give another folder.")
    if (output_dir / "results.json").exists():
        return
    flags_path.write_text(json.dumps([*flags, *extra]))
    with (output_dir / "log.txt").open("w") as log:
        subprocess.run(
            [sys.executable, str(ROOT / "examples" / "train_geneval.py"), *flags, *extra],
            cwd=ROOT,
            env={"OMP_NUM_THREADS": "1", **os.environ},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
        )


def read(output_dir: Path) -> dict[str, Any]:
    """Reads the accuracy before and after, the curves, and the seconds of one run."""
    results = json.loads((output_dir / "results.json").read_text())
    logs = [log for log in json.loads((output_dir / "trainer_state.json").read_text())["log_history"] if "loss" in log]
    return {
        "before": results["before"]["overall"],
        "after": results["after"]["overall"],
        "seconds": results["seconds"],
        # Pairs of step and value. Not every step has a rollout with a reward, nor every run a reference with a
        # divergence
        "reward": [(log["step"], log["reward"]) for log in logs if "reward" in log],
        "kl": [(log["step"], log["kl"]) for log in logs if "kl" in log],
    }


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def write_table(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Writes one row for each setting: the mean over the seeds, with minimum and maximum."""
    lines = [
        "| setting | accuracy before | after | KL at the end | passes per step | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for group, settings in results.items():
        for name, setting in settings.items():
            runs = setting["runs"].values()
            kl = [statistics.fmean(value for _, value in run["kl"][-10:]) for run in runs if run["kl"]]
            lines.append(
                f"| {group}: {name} | {statistics.fmean(run['before'] for run in runs):.3f} "
                f"| {spread([run['after'] for run in runs])} | {spread(kl) if kl else ''} "
                f"| {setting['passes']:.1f} | {statistics.fmean(run['seconds'] for run in runs):.0f} |"
            )
    path.write_text("\n".join(lines) + "\n")


def save_curves(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Plots reward and KL divergence. Each group is a row, which also shows the method itself."""
    with open_figure(path, height=2.6 * len(results)) as figure:
        # The third column has the legends
        axes = figure.subplots(len(results), 3, sharex="col", sharey="col", squeeze=False, width_ratios=(3, 3, 2.2))
        method_name, method = next(iter(next(iter(results.values())).items()))
        for (reward_axis, kl_axis, legend_axis), (group, settings) in zip(axes, results.items(), strict=True):
            for index, (name, setting) in enumerate({method_name: method, **settings}.items()):
                label = "\n".join(textwrap.wrap(f"the method: {name}" if setting is method else name, 24))
                for axis, curve in ((reward_axis, "reward"), (kl_axis, "kl")):
                    curves = [run[curve] for run in setting["runs"].values() if run[curve]]
                    if curves:
                        steps = [step for step, _ in curves[0]]
                        means = [statistics.fmean(value for _, value in pairs) for pairs in zip(*curves, strict=True)]
                        means = [statistics.fmean(means[max(0, i - 4) : i + 1]) for i in range(len(means))]
                        axis.plot(steps, means, color=f"C{index}", label=label)
            kl_axis.set_yscale("log", nonpositive="mask")  # at first the divergence is 0
            reward_axis.set(ylabel=group)
            legend_axis.axis("off")
            legend_axis.legend(*reward_axis.get_legend_handles_labels(), loc="center left", fontsize=9)
        axes[0, 0].set_title("reward, running mean of 5 steps")
        axes[0, 1].set_title("KL divergence from the initial model")
        for axis in axes[-1, :2]:
            axis.set(xlabel="training step")


def save_accuracies(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Plots the accuracy after training of each setting: the mean over the seeds, from the least to the greatest."""
    rows = [
        (group, name, [run["after"] for run in setting["runs"].values()])
        for group, settings in results.items()
        for name, setting in settings.items()
    ]
    groups = list(results)
    method = statistics.fmean(rows[0][2])
    with open_figure(path, height=1.2 + 0.26 * len(rows)) as figure:
        axis = figure.subplots()
        axis.axvline(method, color="gray", linestyle=":", zorder=0)
        for y, (group, _, accuracies) in enumerate(rows):
            color = f"C{groups.index(group)}"
            axis.plot([min(accuracies), max(accuracies)], [y, y], color=color)
            axis.plot(statistics.fmean(accuracies), y, "o", color=color)
        axis.set_yticks(range(len(rows)), [textwrap.shorten(name, 64) for _, name, _ in rows])
        axis.invert_yaxis()
        axis.set(xlabel="accuracy after training")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the runs and the report")
    parser.add_argument("--groups", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="what is varied")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1, 2])
    parser.add_argument("--max_steps", type=int, default=60, help="training steps per run")
    parser.add_argument("--max_passes", type=float, help="passes per sample and run, in place of a number of steps")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="runs at a time, each with one thread")
    args, extra = parser.parse_known_args()
    groups = {group: SETTINGS[group] for group in dict.fromkeys(["corners", *args.groups])}
    if "corners" not in args.groups:  # the method itself is needed to compare with
        groups["corners"] = dict([next(iter(SETTINGS["corners"].items()))])

    runs = []
    for group, settings in groups.items():
        for name, options in settings.items():
            folder = args.output_dir / group / name.replace(" ", "-")
            options = {**METHOD, **options}
            if group == "corners":
                options["diagnostics_steps"] = max(1, args.max_steps // 4)
            if args.max_passes is not None:
                options["max_steps"] = max(1, round(args.max_passes / count_passes(options)))
            runs += [(options, seed, folder / str(seed)) for seed in args.seeds]
    # All settings are trained with the first seed before any is trained with the second
    runs.sort(key=lambda arguments: args.seeds.index(arguments[1]))
    if args.max_passes is None:
        extra = ["--max_steps", str(args.max_steps), *extra]
    with ThreadPoolExecutor(args.num_workers) as pool:
        futures = [pool.submit(run, *arguments, extra) for arguments in runs]
        for future in tqdm(futures, desc="Training", unit="run"):
            future.result()

    results = {}
    for group, settings in groups.items():
        for name, options in settings.items():
            folder = args.output_dir / group / name.replace(" ", "-")
            results.setdefault(group, {})[name] = {
                "options": {**METHOD, **options},
                "passes": count_passes({**METHOD, **options}),
                "runs": {seed: read(folder / str(seed)) for seed in args.seeds},
            }
    (args.output_dir / "results.json").write_text(json.dumps({"arguments": extra, "results": results}, indent=2))
    write_table(args.output_dir / "table.md", results)
    save_curves(args.output_dir / "curves.png", results)
    save_accuracies(args.output_dir / "accuracies.png", results)
    print((args.output_dir / "table.md").read_text())


if __name__ == "__main__":
    main()
