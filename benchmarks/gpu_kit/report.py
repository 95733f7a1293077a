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
The tables of what `run.sh` has measured so far: `python benchmarks/gpu_kit/report.py OUT`. They are also written to
`OUT/report.md`. A cell without a result is empty.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from parts import list_parts


CPU_RUN = Path(__file__).parent / "shapes_cpu.json"


def load(folder: Path, stage: str) -> dict[str, dict[str, Any]]:
    """The results of the parts of a stage, by name, and an empty one where there is none."""
    paths = {name: folder / f"{name}.json" for name in list_parts(stage)}
    return {name: json.loads(path.read_text()) if path.exists() else {} for name, path in paths.items()}


def format_cell(value: Any, template: str) -> str:
    return "" if value is None else template.format(value)


def format_table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report_tests(folder: Path) -> str:
    rows = []
    for name, result in load(folder, "tests").items():
        counts = ["", "", ""]
        if result:
            num_failed = result["failures"] + result["errors"]
            passed = result["tests"] - num_failed - result["skipped"]
            counts = [str(passed), f"{num_failed} {', '.join(result['failed'])}".strip(), str(result["skipped"])]
        rows.append([f"`{name}`", *counts, format_cell(result.get("part_seconds"), "{:.0f}")])
    return format_table(["tests", "passed", "failed", "skipped", "seconds"], rows)


def report_speed(folder: Path) -> str:
    estimates, rows = load(folder, "estimates"), []
    results = {name: result for name, result in load(folder, "speed").items() if not name.startswith("kernels-")}
    for name, result in sorted(results.items(), key=lambda item: sort_key(item[0])):
        stage, kind, num_samples, *compiled = name.split("-")
        estimated = estimates[f"estimate-{kind}-{num_samples}"]
        seconds, memory = result.get("seconds_a_sample"), result.get("peak_mib")
        if stage == "step":
            estimate = estimated.get("peak_mib")
        else:
            # Beside what is held throughout
            memory = result.get("extra_mib")
            estimate = estimated["stages_mib"][stage] - estimated["resident_mib"] if estimated else None
            seconds = result["seconds"] / int(num_samples) if result else None
        cells = [
            format_cell(seconds, "{:.3f}"),
            format_cell(result.get("mfu") if stage != "decode" else None, "{:.0%}"),
        ]
        cells += [format_cell(memory, "{:.0f}"), format_cell(estimate, "{:.0f}")]
        rows.append([stage, kind, num_samples, "yes" if compiled else "no", *cells])
    heads = ["work", "trains", "samples", "compiled", "s a sample", "MFU", "peak MiB", "estimated MiB"]
    return format_table(heads, rows)


def sort_key(name: str) -> tuple:
    stage, kind, num_samples, *compiled = name.split("-")
    return kind != "lora", int(num_samples), len(compiled), name


def report_parts(folder: Path) -> str:
    results = load(folder, "speed")
    rows = [
        [f"`{name}`", part, f"{seconds:.2f}"]
        for name, result in results.items()
        for part, seconds in result.get("parts", {}).items()
    ]
    return "Seconds of a step:\n\n" + format_table(["step", "part", "seconds"], rows or [["", "", ""]])


def report_kernels(folder: Path) -> str:
    (name, result), *_ = ((key, part) for key, part in load(folder, "speed").items() if key.startswith("kernels-"))
    rows = [
        [f"`{kernel['name'][:70]}`".replace("|", "/"), str(kernel["calls"]), f"{kernel['share']:.1%}"]
        for kernel in result.get("kernels", [])
    ]
    return f"The kernels of `{name}`:\n\n" + format_table(["kernel", "calls", "share"], rows or [["", "", ""]])


def report_learning(folder: Path) -> str:
    (result,) = load(folder, "learn").values()
    runs = {"CPU, stored": json.loads(CPU_RUN.read_text()), "this machine": result}
    rows = []
    for name, run in runs.items():
        rewards, cells = run.get("rewards"), [""] * 5
        if rewards:
            ends = [statistics.mean(part) for part in (rewards[:10], rewards[-10:])]
            ends += [run[moment]["overall"] for moment in ("before", "after")]
            # Other work shared the machine of the stored run
            seconds = run["seconds"] / len(rewards) if "seconds" in run else None
            cells = [*(f"{value:.3f}" for value in ends), format_cell(seconds, "{:.2f}")]
        rows.append([name, *cells])
    heads = ["run", "reward, steps 1 to 10", "last 10 steps", "accuracy before", "after", "s a step"]
    return format_table(heads, rows)


def report_rewards(folder: Path) -> str:
    rows = [
        [name, format_cell(result.get("float32"), "{:.0f}"), format_cell(result.get("bfloat16"), "{:.0f}")]
        for name, result in load(folder, "rewards").items()
    ]
    return format_table(["reward", "images a second, float32", "bfloat16"], rows)


def main(folder: Path) -> None:
    results = [result for stage in ("tests", "speed", "learn", "rewards") for result in load(folder, stage).values()]
    machines = sorted({f"{result['machine']}, PyTorch {result['torch']}" for result in results if result})
    sections = {
        "Measured on": "; ".join(machines) or "no machine yet",
        "Tests": report_tests(folder),
        "Speed and memory": f"{report_speed(folder)}\n\n{report_parts(folder)}\n\n{report_kernels(folder)}",
        "Learning": report_learning(folder),
        "Rewards": report_rewards(folder),
    }
    text = "\n\n".join(f"### {title}\n\n{section}" for title, section in sections.items())
    (folder / "report.md").write_text(f"{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
