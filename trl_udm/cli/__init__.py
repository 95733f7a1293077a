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
The console command `trl-udm`.

A verb is two functions: one that does it, whose arguments are the flags, and one that adds its flags to the parser. What
a verb imports, it imports when it runs, so that `trl-udm --help` is quick and needs no extra.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run the command.

    Args:
        argv (`Sequence[str]`, *optional*):
            Verb and flags. By default those of the process.
    """
    arguments = vars(make_parser().parse_args(argv))
    run = arguments.pop("run")
    run(**arguments)


def make_parser() -> argparse.ArgumentParser:
    """
    Make the parser of all verbs.

    Returns:
        `argparse.ArgumentParser`: The parser. What it parses has the verb's function as `run`, and its arguments.
    """
    parser = argparse.ArgumentParser(
        prog="trl-udm", description="Reinforcement learning for uniform discrete diffusion models."
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_evaluate(verbs)
    _add_generate(verbs)
    _add_merge(verbs)
    _add_memory(verbs)
    _add_serve_reward(verbs)
    _add_env(verbs)
    return parser


# By benchmark: the reward, its options, and the task of the prompts' rows
BENCHMARKS = {
    "geneval": ("geneval", {}, "geneval"),
    "ocr": ("ocr", {}, "ocr"),
    "pickscore": ("pickscore", {"normalize": False}, None),
    "shapes": ("shapes", {}, "geneval"),
    "words": ("words", {}, "ocr"),
}


DTYPES = ("float32", "bfloat16", "float16")


def evaluate(
    benchmark: str,
    output_dir: Path,
    prompts: str | None,
    model: str | None,
    adapter: str | None,
    dtype: str | None,
    options: dict[str, Any],
    batch_size: int,
    overwrite: bool,
    **pipeline_kwargs: Any,
) -> None:
    """
    Evaluate a model, or images, by [`~trl_udm.evaluation.evaluate`].

    Args:
        benchmark (`str`):
            A key of `BENCHMARKS`.
        output_dir (`Path`):
            Folder of the images and the report.
        prompts (`str`, *optional*):
            File or Hub dataset of prompts, as [`~trl_udm.data.loading.load_prompts`] reads it. Needed with a model, unless
            the benchmark is `"shapes"` or `"words"`, which have their own.
        model (`str`, *optional*):
            As in `load_pipeline`. Without one the images in `output_dir` are scored.
        adapter (`str`, *optional*):
            As in `load_pipeline`.
        dtype (`str`, *optional*):
            As in `load_pipeline`.
        options (`dict[str, Any]`):
            Arguments of the reward's constructor.
        batch_size (`int`):
            Images at a time.
        overwrite (`bool`):
            Whether to begin anew.
        pipeline_kwargs (`dict[str, Any]`):
            Further arguments of [`~trl_udm.evaluation.evaluate`]. Those that are `None` are the pipeline's own.

    Raises:
        `ValueError`: If the prompts are missing, or there are prompts or an adapter without a model.
    """
    from accelerate import PartialState

    from ..data.loading import load_prompts
    from ..evaluation.images import evaluate
    from ..rewards import geneval
    from ..rewards.loading import load_reward
    from ..worlds.shapes import prompts as shapes_prompts
    from ..worlds.shapes import world
    from ..worlds.words.prompts import split_words

    reward_name, reward_options, task = BENCHMARKS[benchmark]
    pipeline = rows = settings = None
    if model is None:
        for name, value in (("prompts", prompts), ("adapter", adapter), ("overwrite", overwrite)):
            if value:
                raise ValueError(f"`--{name}` needs `--model`: without one, the images in `--output_dir` are scored.")
    else:
        if prompts is not None:
            class_names = world.CLASS_NAMES if benchmark == "shapes" else geneval.CLASS_NAMES
            rows = list(load_prompts(prompts, task=task, class_names=class_names))
        elif benchmark == "shapes":
            eval_rows = shapes_prompts.split_metadata()[1]
            rows = shapes_prompts.balance_metadata(eval_rows, shapes_prompts.EVAL_NUM_PROMPTS)
        elif benchmark == "words":
            rows = split_words()[1]
        else:
            raise ValueError(f"`--prompts` is needed for {benchmark}: a file or a dataset on the Hub.")
        pipeline = load_pipeline(model, adapter, dtype)
        settings = {"model": model, "adapter": adapter, "dtype": str(pipeline.dtype)}
    options = {**reward_options, **options}
    evaluate(
        [load_reward(reward_name, options)],
        output_dir,
        pipeline,
        rows,
        batch_size=batch_size,
        settings=settings,
        reward_settings={"benchmark": benchmark, "options": options},
        overwrite=overwrite,
        **{name: value for name, value in pipeline_kwargs.items() if value is not None},
    )
    if PartialState().is_main_process:
        print((output_dir / "results.md").read_text())


def _add_evaluate(verbs: Any) -> None:
    parser = verbs.add_parser(
        "evaluate",
        help="draw images of a benchmark's prompts, score them, and write a report",
        description="Draw images of a benchmark's prompts, score them, and write a report. Given again, the command "
        "continues where it was interrupted. Images that are in the folder already are scored if no model is given; they "
        "lie as GenEval's own do. For several GPUs: accelerate launch -m trl_udm.cli evaluate ...",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--benchmark", choices=sorted(BENCHMARKS), required=True, help="what is measured")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the images and the report")
    parser.add_argument("--prompts", help="file or Hub dataset of prompts, such as evaluation_metadata.jsonl")
    parser.add_argument(
        "--options", type=json.loads, default={}, help="arguments of the reward's constructor, as JSON"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="images at a time")
    parser.add_argument("--num_images_per_prompt", type=int, default=4, help="images a prompt")
    parser.add_argument("--overwrite", action="store_true", help="delete what is there first, as for new weights")
    _add_model(parser, required=False)
    parser.set_defaults(run=evaluate)


def generate(
    prompts: list[str],
    output_dir: Path,
    model: str,
    adapter: str | None,
    dtype: str | None,
    seed: int,
    batch_size: int,
    **settings: Any,
) -> None:
    """
    Draw images of prompts into a folder, as `00000.png` and so on, prompt by prompt.

    Args:
        prompts (`list[str]`):
            What to draw.
        output_dir (`Path`):
            The folder. An image that is there is not overwritten.
        model (`str`):
            As in `load_pipeline`.
        adapter (`str`, *optional*):
            As in `load_pipeline`.
        dtype (`str`, *optional*):
            As in `load_pipeline`.
        seed (`int`):
            Seed of all images.
        batch_size (`int`):
            Prompts at a time, > 0.
        settings (`dict[str, Any]`):
            Arguments of the pipeline. Those that are `None` are the pipeline's own.

    Raises:
        `FileExistsError`: If an image would be overwritten.
        `ValueError`: If `batch_size` is not positive.
    """
    import torch

    if batch_size < 1:
        raise ValueError(f"`--batch_size` must be > 0, got {batch_size}.")
    num_images = len(prompts) * settings["num_images_per_prompt"]
    paths = [output_dir / f"{index:05}.png" for index in range(num_images)]
    for path in paths:
        if path.exists():
            raise FileExistsError(f"`--output_dir` has {path.name} already. Give another folder, or move it.")
    pipeline = load_pipeline(model, adapter, dtype)
    settings = {name: value for name, value in settings.items() if value is not None}
    generator = torch.Generator().manual_seed(seed)
    output_dir.mkdir(parents=True, exist_ok=True)
    remaining_paths = iter(paths)
    for start in range(0, len(prompts), batch_size):
        for image in pipeline(prompts[start : start + batch_size], generator=generator, **settings).images:
            path = next(remaining_paths)
            image.save(path)
            print(path)


def _add_generate(verbs: Any) -> None:
    parser = verbs.add_parser(
        "generate",
        help="draw images of prompts",
        description="Draw images of prompts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("prompts", nargs="+", help="what to draw")
    parser.add_argument("--output_dir", type=Path, default=Path("images"), help="folder of the images")
    parser.add_argument("--num_images_per_prompt", type=int, default=1, help="images a prompt")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts at a time")
    _add_model(parser, required=True)
    parser.set_defaults(run=generate)


def merge(model: str, adapter: str, output_dir: Path, dtype: str) -> None:
    """
    Add an adapter to the weights of its base model, and write the pipeline that results.

    Args:
        model (`str`):
            The base model, as in `load_pipeline`.
        adapter (`str`):
            As in `load_pipeline`.
        output_dir (`Path`):
            Folder of the pipeline, new or empty.
        dtype (`str`):
            As in `load_pipeline`.

    Raises:
        `FileExistsError`: If there is something in the folder.
        `ValueError`: If the adapter does not fit the model.
    """
    from peft import PeftModel

    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"`--output_dir` must be new or empty, and {output_dir} is not. Give another folder.")
    load_pipeline(model, adapter, dtype)  # refuses what does not fit; PEFT would leave weights random, with a warning
    pipeline = load_pipeline(model, None, dtype)
    PeftModel.from_pretrained(pipeline.transformer, adapter).merge_and_unload()
    pipeline.forget_local_paths()
    pipeline.save_pretrained(output_dir)
    print(output_dir)


def _add_merge(verbs: Any) -> None:
    parser = verbs.add_parser(
        "merge",
        help="add a LoRA to the weights of its base model",
        description="Add a LoRA to the weights of its base model, and write the pipeline that results.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="base model: folder or Hub repository, or 'shapes' or 'words'")
    parser.add_argument("--adapter", required=True, help="folder or Hub repository of a LoRA")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the pipeline, new or empty")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="in which to add and to save")
    parser.set_defaults(run=merge)


def memory(
    model: str,
    dtype: str,
    lora_r: int,
    every_n_layers: int,
    height: int | None,
    width: int | None,
    gpu_memory: float | None,
    gradient_accumulation_steps: int | None,
    **settings: Any,
) -> None:
    """
    Print the memory that training needs on a GPU, computed by [`~trl_udm.estimate_memory`] from the configurations alone.

    Args:
        model (`str`):
            As in `load_pipeline`. No weight is read or downloaded.
        dtype (`str`):
            Dtype of the weights.
        lora_r (`int`):
            Rank of a LoRA on all linear layers, or 0 to train all weights.
        every_n_layers (`int`):
            Layers of which one is checkpointed, > 0.
        height (`int`, *optional*):
            Height of the images in pixels.
        width (`int`, *optional*):
            Width of the images in pixels.
        gpu_memory (`float`, *optional*):
            Memory of the GPU in GiB, to compare with.
        gradient_accumulation_steps (`int`, *optional*):
            As in [`UDMGRPOConfig`]. By default the fewest with which a step holds whole groups.
        settings (`dict[str, Any]`):
            Further arguments of [`UDMGRPOConfig`].

    Raises:
        `ValueError`: If a value is out of its range, or the batch does not hold whole groups.
    """
    import torch
    from peft import LoraConfig

    from .. import UDMGRPOConfig, URSAPipeline, estimate_memory

    num_rows = settings["per_device_train_batch_size"]
    for name, value, smallest in (
        ("lora_r", lora_r, 0),
        ("every_n_layers", every_n_layers, 1),
        ("per_device_train_batch_size", num_rows, 1),
    ):
        if value < smallest:
            raise ValueError(f"`--{name}` must be >= {smallest}, got {value}.")
    if gradient_accumulation_steps is None:
        group_rows = settings["num_generations"] * settings["num_train_timesteps"]
        gradient_accumulation_steps = group_rows // math.gcd(group_rows, num_rows)
    size = {"height": height, "width": width}
    args = UDMGRPOConfig(
        "outputs",
        gradient_accumulation_steps=gradient_accumulation_steps,
        pipeline_kwargs={name: value for name, value in size.items() if value is not None},
        activation_checkpointing_kwargs={"every_n_layers": every_n_layers},
        use_cpu=True,  # this process needs no GPU
        report_to="none",
        **settings,
    )
    pipeline = URSAPipeline.from_configs(_checkpoint_path(model), dtype=getattr(torch, dtype))
    peft_config = LoraConfig(r=lora_r, target_modules="all-linear") if lora_r else None
    estimate = estimate_memory(pipeline, args, peft_config)
    print("| computed, not measured | GiB |\n|---|---|")
    for name in ("trained_weights", "frozen_weights", "reference_weights", "optimizer_states", "gradients"):
        print(f"| {name.replace('_', ' ')} | {getattr(estimate, name) / 2**30:.2f} |")
    for stage, peak in estimate.stages.items():
        print(f"| peak of the {stage} | {peak / 2**30:.2f} |")
    print("Beside it: about 0.5 GiB of CUDA's context, fragmentation, and reward models.")
    if gpu_memory is not None:
        left = gpu_memory - 0.5 - estimate.peak / 2**30
        print(f"{gpu_memory:g} GiB: {f'fits, {left:.1f} GiB are left' if left >= 0 else f'{-left:.1f} GiB too much'}.")


def _add_memory(verbs: Any) -> None:
    parser = verbs.add_parser(
        "memory",
        help="compute the memory that training needs on a GPU",
        description="Compute the memory that training needs on a GPU, stage by stage, from a model's configurations: no "
        "weight is read, and no GPU is needed. The defaults are those of UDMGRPOConfig.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder or Hub repository, or 'shapes' or 'words'")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights")
    parser.add_argument("--lora_r", type=int, default=0, help="rank of a LoRA on all linear layers; 0 trains all")
    parser.add_argument("--per_device_train_batch_size", type=int, default=24, help="rows of a forward pass")
    parser.add_argument("--gradient_accumulation_steps", type=int, help="by default the fewest for whole groups")
    parser.add_argument("--rollout_batch_size", type=int, help="samples drawn at a time; all by default")
    parser.add_argument("--decode_batch_size", type=int, help="samples decoded at a time; as many by default")
    parser.add_argument("--num_generations", type=int, default=8, help="samples a prompt")
    parser.add_argument("--num_train_timesteps", type=int, default=3, help="rows a sample")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="guidance of rollouts; 1 for none")
    parser.add_argument("--beta", type=float, default=0.05, help="weight of the KL divergence; 0 for no reference")
    for name, text in (("bf16", "compute in bfloat16"), ("activation_checkpointing", "recompute the layers")):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=True, help=text)
    parser.add_argument("--every_n_layers", type=int, default=1, help="recompute one layer of so many")
    parser.add_argument("--height", type=int, help="pixels; the model's own by default")
    parser.add_argument("--width", type=int, help="pixels; the model's own by default")
    parser.add_argument("--gpu_memory", type=float, help="GiB of the GPU, to compare with")
    parser.set_defaults(run=memory)


def load_pipeline(model: str, adapter: str | None, dtype: str | None) -> Any:
    """
    Load a pipeline onto the device of the process.

    Args:
        model (`str`):
            Folder or Hub repository, or `"shapes"` or `"words"` for the model of an embedded world.
        adapter (`str`, *optional*):
            Folder or Hub repository of a PEFT adapter.
        dtype (`str`, *optional*):
            `"float32"`, `"bfloat16"` or `"float16"`. By default bfloat16 on a GPU and float32 on a CPU.

    Returns:
        [`URSAPipeline`]: The pipeline.
    """
    import torch
    from accelerate import PartialState

    from ..pipelines.pipeline_ursa import URSAPipeline

    device = PartialState().device
    if dtype is None:
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    pipeline = URSAPipeline.from_pretrained(_checkpoint_path(model), dtype=getattr(torch, dtype))
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    return pipeline.to(device)


def _checkpoint_path(model: str) -> str | Path:
    from ..worlds import shapes, words

    return {"shapes": shapes.CHECKPOINT_PATH, "words": words.CHECKPOINT_PATH}.get(model, model)


def _add_model(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("--model", required=required, help="folder or Hub repository, or 'shapes' or 'words'")
    parser.add_argument("--adapter", help="folder or Hub repository of a LoRA")
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16 on a GPU by default")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images")
    parser.add_argument("--height", type=int, help="pixels; the model's own by default")
    parser.add_argument("--width", type=int, help="pixels; the model's own by default")
    parser.add_argument("--num_inference_steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="classifier-free guidance; 1 for none")


def serve_reward(reward: str, options: dict[str, Any], token_file: Path | None, **server_options: Any) -> None:
    """
    Serve a reward until the process is stopped, by [`~trl_udm.rewards.remote.server.serve`].

    Args:
        reward (`str`):
            Name of the reward, as in [`~trl_udm.rewards.loading.load_reward`].
        options (`dict[str, Any]`):
            Arguments of its constructor.
        token_file (`Path`, *optional*):
            File that holds the token. By default the environment variable `TRL_UDM_REWARD_TOKEN` does, if it is set.
        server_options (`dict[str, Any]`):
            Arguments of the server.
    """
    from ..rewards.loading import load_reward
    from ..rewards.remote.server import serve
    from ..rewards.remote.wire import TOKEN_VARIABLE

    token = os.environ.get(TOKEN_VARIABLE) if token_file is None else token_file.read_text(encoding="utf-8").strip()
    sys.path.insert(0, os.getcwd())  # a console command does not look there for modules, as `python -m` does
    serve(lambda: load_reward(reward, options), token=token, **server_options)


def _add_serve_reward(verbs: Any) -> None:
    parser = verbs.add_parser(
        "serve-reward",
        help="compute a reward for other processes, over HTTP",
        description="Compute a reward for other processes, over HTTP. Needs `pip install trl-udm[server]`. The clients are "
        "trl_udm.rewards.remote.RemoteReward. If the environment variable TRL_UDM_REWARD_TOKEN is set, clients must know "
        "it; without a token, only processes of this machine are served.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "reward",
        help="geneval, ocr, pickscore, clipscore, hpsv2, shapes, words, or module:attribute of a reward of yours",
    )
    parser.add_argument(
        "--options",
        type=json.loads,
        default={},
        help="""arguments of the reward's constructor as JSON, such as '{"mode": "dense"}' for geneval""",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8765, help="port to listen on; 0 takes a free one")
    parser.add_argument("--token_file", type=Path, help="file that holds the token, instead of the variable")
    parser.add_argument("--max_batch_size", type=int, default=64, help="most images a request")
    parser.add_argument("--max_body_bytes", type=int, default=64 * 1024 * 1024, help="longest request")
    parser.add_argument("--max_pixels", type=int, default=2048 * 2048, help="most pixels an image")
    parser.add_argument("--max_concurrency", type=int, default=1, help="calls of the reward at a time")
    parser.add_argument("--max_queue", type=int, default=256, help="requests that wait for their turn")
    parser.add_argument("--body_timeout", type=float, default=30.0, help="seconds for a request to arrive")
    parser.set_defaults(run=serve_reward)


def env() -> None:
    """Print the versions that a bug report needs."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    print(f"platform: {platform.platform()}")
    print(f"python: {platform.python_version()}")
    for name in ("trl-udm", "torch", "transformers", "trl", "diffusers", "peft", "accelerate", "datasets"):
        print(f"{name}: {version(name)}")
    for name in ("deepspeed", "rapidocr", "onnxruntime", "scipy", "fastapi"):
        try:
            print(f"{name}: {version(name)}")
        except PackageNotFoundError:
            print(f"{name}: not installed")
    print(f"CUDA: {torch.version.cuda}")
    for index in range(torch.cuda.device_count()):
        print(f"GPU {index}: {torch.cuda.get_device_name(index)}")


def _add_env(verbs: Any) -> None:
    parser = verbs.add_parser("env", help="print versions, for bug reports", description="Print versions.")
    parser.set_defaults(run=env)


if __name__ == "__main__":
    main()
