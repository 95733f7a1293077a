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
The parts of the stages of `run.sh`. Each part is a process of its own, with a bound on its time, and leaves one JSON
file. A part whose file is there is not run again, so that a stage that was stopped goes on. The log of a part is
beside it. The most important parts come first.
"""

import argparse
import json
import os
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree


ROOT = Path(__file__).resolve().parents[2]
STAGES = ("tests", "speed", "learn", "rewards", "estimates")
IS_REHEARSAL = os.environ.get("REHEARSE") == "1"
SIZE = "tiny" if IS_REHEARSAL else "ursa-1.7b-ibq512"
BATCH_SIZES = (2,) if IS_REHEARSAL else (16, 64, 4)  # in the order of their importance
NUM_STEPS = 3 if IS_REHEARSAL else 60  # of learning
NUM_IMAGES = 4 if IS_REHEARSAL else 64  # of a call of a reward
STAGE_SECONDS = 3600 if IS_REHEARSAL else 520
MAX_ROWS = 24  # that are scored or trained on at a time


# --- What the parts measure, each in a process of its own ---


def run_tests(target: str, folder: Path) -> dict[str, Any]:
    report = folder / "report.xml"
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # those of the machine
    if IS_REHEARSAL:
        environment["GPU_DEVICE"] = "cpu"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/gpu/{target}", "-rs", "--durations=5"]
    subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, env=environment)
    (suite,) = ElementTree.parse(report).getroot()
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [case.get("name") for case in suite if {child.tag for child in case} & {"failure", "error"}]
    reasons = sorted({child.get("message") for case in suite for child in case if child.tag == "skipped"})
    return {**counts, "failed": failed, "reasons": reasons, "test_seconds": float(suite.get("time", 0))}


def run_throughput(stage: str, kind: str, batch_size: int, compiled: bool, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "benchmarks/throughput.py", "--size", SIZE, "--stages", stage, "--skip_naive", "--bf16"]
    num_rows = min(MAX_ROWS, 3 * batch_size)
    command += ["--batch_size", str(batch_size), "--micro_batch_size", str(num_rows), "--num_repeats", "2"]
    command += ["--activation_checkpointing", "--output_dir", str(folder)]
    command += ["--lora"] * (kind == "lora") + ["--torch_compile"] * compiled
    subprocess.run(command, cwd=ROOT, check=True)
    (path,) = folder.glob("stages_*.json")
    return json.loads(path.read_text())["results"][stage]["ours"]


def build_trainer(kind: str, batch_size: int, folder: Path, device: str, **kwargs: Any) -> tuple[Any, Any, Any]:
    """Pipeline, configuration and adapter of a step of `batch_size` samples, as users train URSA."""
    import torch
    from peft import LoraConfig

    from trl_udm import UDMGRPOConfig
    from trl_udm.pipelines.ursa_sizes import PUBLISHED_SIZES, URSASize

    size = PUBLISHED_SIZES["BAAI/URSA-1.7B-IBQ512"]
    if IS_REHEARSAL:
        size = URSASize(64, 128, 2, 4, 2, 16, 256, 8, 8, (32, 32), codebook_dim=8)
    torch.manual_seed(0)
    pipeline = size.build_pipeline(torch.bfloat16 if kind == "lora" else torch.float32, device)
    num_rows = min(MAX_ROWS, 3 * batch_size)
    config = UDMGRPOConfig(
        str(folder),
        num_generations=2,
        per_device_train_batch_size=num_rows,
        gradient_accumulation_steps=3 * batch_size // num_rows,
        rollout_batch_size=batch_size,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **kwargs,
    )
    return pipeline, config, LoraConfig(r=16, target_modules="all-linear") if kind == "lora" else None


def alternate(prompts: list[str], **kwargs: Any) -> list[float]:
    return [float(i % 2) for i in range(len(prompts))]


def run_step(kind: str, batch_size: int, folder: Path) -> dict[str, Any]:
    """Two whole steps of a run, of which the second is measured, with the seconds of its parts."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from trl_udm import UDMGRPOTrainer

    is_cuda = torch.cuda.is_available()
    result: dict[str, Any] = {"parts": {}}

    def wait() -> float:
        if is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    class TimedTrainer(UDMGRPOTrainer):
        def measure(self, name: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
            started = wait()
            output = function(*args, **kwargs)
            if self.state.global_step == 1:
                result["parts"][name] = result["parts"].get(name, 0.0) + wait() - started
            return output

        def _rollout(self, *args: Any, **kwargs: Any) -> Any:
            return self.measure("rollout, with decoding", super()._rollout, *args, **kwargs)

        def _score_rows(self, *args: Any, **kwargs: Any) -> Any:
            return self.measure("scoring", super()._score_rows, *args, **kwargs)

        def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return self.measure("forward passes of the update", super()._compute_loss, *args, **kwargs)

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.started = wait()
            if state.global_step == 1 and is_cuda:
                torch.cuda.reset_peak_memory_stats()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                result["seconds"] = wait() - self.started
                result["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20 if is_cuda else None

    pipeline, config, adapter = build_trainer(kind, batch_size, folder, "cuda" if is_cuda else "cpu", max_steps=2)
    prompts = Dataset.from_dict({"prompt": ["a"] * batch_size})
    trainer = TimedTrainer(pipeline, alternate, config, prompts, callbacks=[Watch()], peft_config=adapter)
    decode = pipeline.decode
    pipeline.decode = lambda *args, **kwargs: trainer.measure("decoding", decode, *args, **kwargs)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    losses = [log["loss"] for log in logs]
    return {**result, "seconds_a_sample": result["seconds"] / batch_size, "losses": losses, "log": logs[1]}


def run_kernels(kind: str, batch_size: int, folder: Path) -> dict[str, Any]:
    """The kernels of a step with a rollout of three steps: ten are too many events. The first moves no token."""
    import torch
    from datasets import Dataset
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    from trl_udm import UDMGRPOTrainer

    is_cuda = torch.cuda.is_available()
    profiler = profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU], acc_events=True)

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                profiler.start()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                profiler.stop()

    settings = {"max_steps": 2, "num_inference_steps": 3, "timestep_window": [0, 0]}
    pipeline, config, adapter = build_trainer(kind, batch_size, folder, "cuda" if is_cuda else "cpu", **settings)
    prompts = Dataset.from_dict({"prompt": ["a"] * batch_size})
    UDMGRPOTrainer(pipeline, alternate, config, prompts, callbacks=[Watch()], peft_config=adapter).train()
    attribute = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    events = [event for event in profiler.key_averages() if getattr(event, attribute) > 0]
    if is_cuda:
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(getattr(event, attribute) for event in events)
    kernels = [
        {"name": event.key, "calls": event.count, "share": getattr(event, attribute) / total} for event in events
    ]
    kernels.sort(key=lambda kernel: -kernel["share"])
    return {"kernels": kernels[:20], "num_calls": sum(event.count for event in events), "seconds": total / 1e6}


def run_learning(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "examples/train_geneval.py", "--config", "examples/configs/shapes_paper.yaml"]
    command += ["--max_steps", str(NUM_STEPS), "--output_dir", str(folder), "--use_cpu", str(IS_REHEARSAL)]
    command += ["--per_device_train_batch_size", "24"] * IS_REHEARSAL
    subprocess.run(command, cwd=ROOT, check=True)
    return read_learning(folder)


def read_learning(folder: Path) -> dict[str, Any]:
    """The rewards of the steps of a run, its step time, and its evaluations."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    results = json.loads((folder / "results.json").read_text())
    rewards = [log["reward"] for log in history if "reward" in log]
    results = {name: results[name] for name in ("before", "after", "seconds")}
    return {"rewards": rewards, **results}


def run_reward(name: str, folder: Path) -> dict[str, Any]:
    """Images per second of a reward model with random weights, with what a CPU does for each image."""
    import numpy as np
    import torch
    from PIL import Image

    device = "cuda" if torch.cuda.is_available() else "cpu"
    {"mask2former": save_mask2former}.get(name, save_clip)(folder)
    pixels = np.random.default_rng(0).integers(256, size=(NUM_IMAGES, 512, 512, 3), dtype=np.uint8)
    images, prompts = [Image.fromarray(one) for one in pixels], ["a photo of a dog"] * NUM_IMAGES
    result: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "CPU"}
    for dtype in (torch.float32, torch.bfloat16):
        judge = build_judge(name, folder, device, dtype)
        calls = []
        for _ in range(3):  # the first loads the weights
            started = time.perf_counter()
            judge(images, prompts)
            calls.append(time.perf_counter() - started)
        result[str(dtype).removeprefix("torch.")] = NUM_IMAGES / min(calls[1:])
    return result


def build_judge(name: str, folder: Path, device: str, dtype: Any) -> Callable:
    from trl_udm.rewards.clip import HPSv2Reward, PickScoreReward
    from trl_udm.rewards.mask2former import Mask2FormerDetector

    if name == "mask2former":
        edges = {"shortest_edge": 128, "longest_edge": 128} if IS_REHEARSAL else {}
        detector = Mask2FormerDetector(str(folder), device=device, dtype=dtype, **edges)
        return lambda images, prompts: detector(images)
    reward_class = {"pickscore": PickScoreReward, "hpsv2": HPSv2Reward}[name]
    options = {"processor_name_or_path": str(folder)} if name == "pickscore" else {}
    reward = reward_class(str(folder), **options, device=device, dtype=dtype)
    return lambda images, prompts: reward(prompts=prompts, completions=images)


def save_clip(folder: Path) -> None:
    """CLIP ViT-H/14, as PickScore and HPS v2 are, with a tokenizer of letters."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    letters = [*string.ascii_lowercase]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    if IS_REHEARSAL:
        text, vision = ({**sizes, "num_hidden_layers": 1, "intermediate_size": 64} for sizes in (text, vision))
    text |= {"vocab_size": len(tokens), "bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    config = CLIPConfig(
        text_config={**text, "hidden_act": "gelu"},
        vision_config={**vision, "hidden_act": "gelu", "image_size": 224, "patch_size": 14},
        projection_dim=1024,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        CLIPModel(config).save_pretrained(folder)
    CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil(size=224, crop_size=224).save_pretrained(folder)


def save_mask2former(folder: Path) -> None:
    """Mask2Former with a Swin-S backbone, as GenEval's detector is."""
    import torch
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 2 if IS_REHEARSAL else 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=80)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)


def estimate(kind: str, batch_size: int, folder: Path) -> dict[str, Any]:
    """What `estimate_memory` says of a step on a GPU. It needs none."""
    from trl_udm import estimate_memory

    pipeline, config, adapter = build_trainer(kind, batch_size, folder, "meta")
    estimated = estimate_memory(pipeline, config, adapter)
    stages = {name: value / 2**20 for name, value in estimated.stages.items()}
    return {"peak_mib": estimated.peak / 2**20, "resident_mib": estimated.resident / 2**20, "stages_mib": stages}


# --- The parts of a stage ---


def list_parts(stage: str) -> dict[str, tuple[Callable[..., dict[str, Any]], tuple, int]]:
    """For each part the function that measures it, its arguments, and the seconds that it may take."""
    first, *others = BATCH_SIZES
    if stage == "tests":
        seconds = {"test_numbers": 150, "test_runs": 280, "test_on_a_cpu": 90}
        return {name: (run_tests, (f"{name}.py",), limit) for name, limit in seconds.items()}
    if stage == "learn":
        return {"learn": (run_learning, (), 500)}
    if stage == "rewards":
        return {name: (run_reward, (name,), 170) for name in ("pickscore", "mask2former", "hpsv2")}
    kinds = ("lora", "full")
    if stage == "estimates":
        return {f"estimate-{kind}-{size}": (estimate, (kind, size), 500) for size in BATCH_SIZES for kind in kinds}
    parts: dict[str, Any] = {f"step-{kind}-{first}": (run_step, (kind, first), 120) for kind in kinds}
    parts[f"kernels-lora-{first}"] = (run_kernels, ("lora", first), 90)
    settings = [(kind, first, False) for kind in kinds] + [("lora", first, True)]
    settings += [(kind, size, False) for size in others for kind in kinds] + [("full", first, True)]
    for kind, size, compiled in settings:
        for measured in ("rollout", "scoring", "update"):
            name = f"{measured}-{kind}-{size}{'-compiled' * compiled}"
            parts[name] = (run_throughput, (measured, kind, size, compiled), 120)
    parts[f"decode-lora-{first}"] = (run_throughput, ("decode", "lora", first, False), 60)
    parts |= {f"step-{kind}-{size}": (run_step, (kind, size), 120) for size in others for kind in kinds}
    return parts


def run_stage(stage: str, output_dir: Path, deadline: float) -> int:
    """Runs the parts that are left, as far as the time goes. Returns how many are left then."""
    num_left = 0
    for name, (_, _, limit) in list_parts(stage).items():
        path, left = output_dir / f"{name}.json", deadline - time.monotonic()
        if path.exists():
            continue
        outcome, started = "not started", time.monotonic()
        if left > 20:
            outcome = start_part(stage, name, path, min(left, 5 * limit if IS_REHEARSAL else limit))
        num_left += outcome != "done"
        print(f"{stage}: {name}: {outcome} ({time.monotonic() - started:.0f} s)", flush=True)
    return num_left


def start_part(stage: str, name: str, path: Path, num_seconds: float) -> str:
    """Runs a part in a process of its own. Returns what became of it."""
    command = [sys.executable, __file__, stage, str(path.parent), "--part", name]
    with open(path.with_suffix(".log"), "w") as log:
        # A group of its own, so that the processes that it started end with it
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, process_group=0)
        try:
            return "done" if process.wait(num_seconds) == 0 else f"failed, see {log.name}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped, see {log.name}"


def run_part(stage: str, name: str, output_dir: Path) -> None:
    measure, arguments, _ = list_parts(stage)[name]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(*arguments, Path(folder))
    import torch

    result["machine"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result |= {"torch": torch.__version__, "part_seconds": time.monotonic() - started, "is_rehearsal": IS_REHEARSAL}
    partial = output_dir / f"{name}.partial"
    partial.write_text(json.dumps(result, indent=2))
    partial.rename(output_dir / f"{name}.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.part is not None:
        run_part(args.stage, args.part, args.output_dir)
        return
    import torch

    needs_gpu = args.stage != "estimates" and not IS_REHEARSAL
    if needs_gpu and not torch.cuda.is_available():
        raise SystemExit(f"The stage {args.stage!r} needs a CUDA device. REHEARSE=1 takes tiny sizes and a CPU.")
    stages = STAGES if args.stage == "all" else (args.stage,)
    end = time.monotonic() + float(os.environ.get("KIT_SECONDS", len(stages) * STAGE_SECONDS))
    num_left = sum(run_stage(stage, args.output_dir, min(end, time.monotonic() + STAGE_SECONDS)) for stage in stages)
    results = [args.output_dir / f"{name}.json" for name in list_parts("tests") if "tests" in stages]
    failed = [test for path in results if path.exists() for test in json.loads(path.read_text())["failed"]]
    if failed:
        raise SystemExit(f"Tests failed: {', '.join(failed)}. Delete the JSON files of their parts to run them again.")
    if num_left > 0:
        raise SystemExit(f"{num_left} parts have no result. The same command runs them again.")


if __name__ == "__main__":
    main()
