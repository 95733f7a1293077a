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

import dataclasses
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from trl_udm import UDMGRPOConfig, URSAPipeline, __version__, cli
from trl_udm.cli import VERBS, evaluate, generate, main, memory, serve_reward
from trl_udm.cli.mistakes import DEBUG_VARIABLE
from trl_udm.cli.parser import parse_arguments
from trl_udm.rewards.remote.server import create_app, serve
from trl_udm.rewards.remote.wire import TOKEN_VARIABLE
from trl_udm.worlds.shapes import CHECKPOINT_PATH
from trl_udm.worlds.shapes.prompts import split_metadata
from trl_udm.worlds.shapes.world import ShapesObject, render

from .trainer.hub_server import USER, HubServer, Repository


def test_serve_reward_has_the_defaults_of_the_server():
    arguments = vars(parse_arguments("serve-reward", serve_reward.Arguments, ["shapes"]))
    defaults = {
        name: parameter.default
        for function in (create_app, serve)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty and name != "token"
    }
    assert {name: arguments[name] for name in defaults} == defaults
    assert set(arguments) - set(defaults) == {"reward", "options", "token_file"}


@pytest.mark.parametrize(
    ("name", "options", "reward_name"),
    [
        ("shapes", {"mode": "dense"}, "geneval_reward"),
        ("words", {"partial": True}, "ocr_partial_reward"),
        ("tests.rewards.served_rewards:make_reward", {}, "make_reward"),
    ],
)
def test_serve_reward_knows_the_worlds_and_the_rewards_by_name(name, options, reward_name):
    assert serve_reward.make_reward(name, options).__name__ == reward_name


def test_a_reward_of_the_working_folder_is_found(monkeypatch, tmp_path):
    (tmp_path / "reward_of_the_working_folder.py").write_text("raise LookupError('found')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    with pytest.raises(LookupError, match="found"):  # which stops the server
        main(["serve-reward", "reward_of_the_working_folder:reward", "--port", "0"])


def find_mistake(argv, capsys):
    """What a mistaken command writes to stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.out) == (2, "")
    return captured.err


EVALUATE_SHAPES = "evaluate --benchmark shapes --model shapes --output_dir out"
MISTAKES = {
    "": "the following arguments are required: VERB. `trl-udm --help` lists the arguments",
    "serve-rewards": "argument VERB: invalid choice: 'serve-rewards'",
    "env --versions all": "unrecognized arguments: --versions all. `trl-udm env --help`",
    # Models and adapters
    "generate ring": "the following arguments are required: --model",
    "generate ring --model no/such": "There is no folder or cached repository no/such, and the Hub cannot be reached",
    "generate ring --model ./no/such": "There is no folder ./no/such, and its name cannot be that of a repository",
    "generate ring --model folder": "There is no `model_index.json` in folder",
    "generate ring --model shapes --adapter folder": "There is no `adapter_model.safetensors` or `adapter_model.bin`",
    "generate ring --model shapes --dtype float8": "argument --dtype: invalid choice: 'float8'",
    "merge --model shapes --output_dir out": "the following arguments are required: --adapter",
    "merge --model shapes --adapter no/such --output_dir out": "There is no folder or cached repository no/such",
    "merge --model shapes --adapter folder --output_dir file/out": "`--output_dir` must be a folder, got file/out",
    # Numbers
    "generate ring --model shapes --num_inference_steps -3": "`--num_inference_steps` must be >= 1, got -3",
    "generate ring --model shapes --num_inference_steps many": "invalid int value: 'many'",
    "generate ring --model shapes --seed -1": "`--seed` must be in [0, 9223372036854775807], got -1",
    "generate ring --model shapes --guidance_scale nan": "`--guidance_scale` must be in [-1.79",
    "generate ring --model shapes --batch_size 0": "`--batch_size` must be >= 1, got 0",
    "generate ring --model shapes --num_images_per_prompt 0": "`--num_images_per_prompt` must be >= 1, got 0",
    "generate ring --model shapes --height 33": "`height` must be a positive multiple of 4, got 33. Try 32",
    "generate ring --model shapes --num_frames 5": "`num_frames` must be 1, got 5: the tokenizer is one of images",
    "generate ring --model shapes --num_frames 0": "`--num_frames` must be >= 1, got 0",
    "generate ring --model shapes --fps 0": "`--fps` must be in [1, 100], got 0",
    "generate ring --model shapes --image file": "`--image` needs `--num_frames`: it is the first frame of videos",
    "generate ring --model shapes --num_frames 5 --image none.png": "No such file or directory: 'none.png'",
    "generate ring --model shapes --video_format webm": "--video-format: invalid choice: 'webm'",
    "generate ring --model shapes --output_dir file": "`--output_dir` must be a folder, got file",
    "generate ring --model shapes --seed abc": "argument --seed: invalid int value: 'abc'",
    # Adapters that are none
    "generate ring --model shapes --adapter nameless": "has no `adapter_config.json` and no weights of a LoRA",
    "generate ring --model shapes --adapter foreign": "adapter_config.json is not a configuration that PEFT knows",
    "memory --model shapes --lora_r 100000000000": "`--lora_r` must be in [0, 2147483648], got 100000000000",
    # The page
    "demo --port 99999": "`--port` must be in [0, 65535], got 99999",
    "demo --port 0 --host 192.0.2.1": "Cannot assign requested address",
    "demo --port 0 --num_inference_steps 0": "`--num_inference_steps` must be >= 1, got 0",
    "demo --port 0 --model no/such": "There is no folder or cached repository no/such, and the Hub cannot be reached",
    "demo --port 0 --model folder": "There is no `model_index.json` in folder",
    "demo --port 0 --compare folder": "There is no `model_index.json` or `adapter_model.safetensors` or `adapter_mod",
    "demo --port 0 --compare no/such": "There is no folder or cached repository no/such, and the Hub",
    "demo --port 0 --adapter folder": "There is no `adapter_model.safetensors` or `adapter_model.bin`",
    "demo --port 0 --height 33": "`height` must be a positive multiple of 4, got 33. Try 32",
    "demo --port 0 --num_frames 5": "`--num_frames` must be left out, got 5: the page shows images",
    "demo --port 0 --model sums --height 32": "`--height` and `--width` must be left out for a model of text",
    # Configuration files
    "generate ring --config binary": "The file of `--config` is not valid YAML: 'utf-8' codec can't decode",
    "generate ring --config folder": "Is a directory: 'folder'",
    "generate ring --config none.yaml": "No such file or directory: 'none.yaml'",
    "generate ring --config": "argument --config: expected one argument",
    "generate ring --config broken.yaml": "The file of `--config` is not valid YAML",
    "generate ring --config list.yaml": "Config file list.yaml must contain a YAML mapping",
    "generate ring --config type.yaml": "`batch_size` must be int, got [16]",
    "evaluate --config choice.yaml": "`--benchmark` must be one of ['dpg', 'drawbench', 'geneval', ",
    "generate ring --config dtype.yaml": "`dtype` must be Optional[Literal['float32', 'bfloat16', 'float16']], got",
    "generate ring --config unknown.yaml": "unrecognized arguments: --modle shapes",
    # Evaluation
    "evaluate --benchmark geneva --output_dir out": "argument --benchmark: invalid choice: 'geneva'",
    "evaluate --benchmark ocr --model shapes --output_dir out": "`--prompts` is needed for ocr",
    "evaluate --benchmark ocr --output_dir out --prompts a.txt": "`--prompts` needs `--model`",
    "evaluate --benchmark ocr --output_dir out --adapter lora": "`--adapter` needs `--model`",
    "evaluate --benchmark ocr --output_dir out --overwrite": "`--overwrite` needs `--model`",
    "evaluate --benchmark shapes --output_dir folder": "`images_dir` must have folders like 00000",
    f"{EVALUATE_SHAPES} --num_inference_steps -3": "`--num_inference_steps` must be >= 1, got -3",
    f"{EVALUATE_SHAPES} --num_inference_steps 1 --height 33": "`height` must be a positive multiple of 4, got 33",
    f"{EVALUATE_SHAPES} --options '[1]'": "argument --options: must be a JSON object such as",
    f"{EVALUATE_SHAPES} --options '{{\"x\": 1}}'": "unexpected keyword argument 'x'",
    f"{EVALUATE_SHAPES} --frames every": "`frames` must be 'first', 'middle', 'last', 'all' or a number > 0, got 'eve",
    f"{EVALUATE_SHAPES} --num_frames 5": "`num_frames` must be 1, got 5: the tokenizer is one of images. Try 1",
    f"{EVALUATE_SHAPES} --prompts none.jsonl": "none.jsonl",
    f"{EVALUATE_SHAPES} --prompts binary.jsonl": "got 'binary.jsonl': it is not utf-8",
    f"{EVALUATE_SHAPES} --prompts file.txt": "got 'file.txt': it has no row",
    "evaluate --benchmark shapes --output_dir promptless": "metadata.jsonl must have a `prompt`, got {'tag': 'a'}",
    "evaluate --benchmark shapes --output_dir broken": "00000/metadata.jsonl is not valid JSON",
    "evaluate --benchmark prompts --output_dir out": "`--rewards` is needed for prompts, which has none of its own",
    "evaluate --benchmark dpg --model shapes --output_dir out": "`--prompts` is needed for dpg",
    "evaluate --benchmark dpg --output_dir out": "The reward 'dpg' cannot be made with `options` {}: missing a req",
    f"{EVALUATE_SHAPES} --rewards nothing": "`name` must be one of ('geneval', ",
    f"{EVALUATE_SHAPES} --rewards shapes shapes": "`--rewards` must have names that differ, got ['shapes', 'sh",
    f"{EVALUATE_SHAPES} --rewards shapes --options '{{\"x\": 1}}'": "`--options` must have an object for names of",
    f"{EVALUATE_SHAPES} --rewards shapes --options '{{\"shapes\": 1}}'": "got 1 for 'shapes'",
    "compare folder": "the following arguments are required: folders",
    "compare folder folder": "There is no evaluation in folder: a folder of `trl-udm evaluate` has a results.json",
    "compare folder folder --num_shown -1": "`--num_shown` must be >= 0, got -1",
    # Memory
    "memory --model BAAI/URSA-7B": "the Hub cannot be reached: there is no network, or HF_HUB_OFFLINE is set. These",
    "memory --model ./no/such": "These need no network: BAAI/URSA-0.6B-IBQ1024, BAAI/URSA-1.7B-IBQ512, BAAI/",
    "memory --model folder": "There is no `model_index.json` in folder",
    "memory --model shapes --gpu_memory -4": "`--gpu_memory` must be >= 0, got -4.0",
    "memory --model shapes --lora_r -1": "`--lora_r` must be in [0, 2147483648], got -1",
    "memory --model shapes --every_n_layers 0": "`--every_n_layers` must be >= 1, got 0",
    "memory --model shapes --per_device_train_batch_size 0": "`--per_device_train_batch_size` must be >= 1, got 0",
    "memory --model shapes --beta nan": "`--beta` must be >= 0, got nan",
    "memory --model shapes --beta inf": "`--beta` must be >= 0, got inf",
    "memory --model shapes --gpu_memory inf": "`--gpu_memory` must be >= 0, got inf",
    "memory --model shapes --guidance_scale inf": "`--guidance_scale` must be in [-1.79",
    "memory --model shapes --height 33": "`height` must be a positive multiple of 4, got 33. Try 32",
    "memory --model shapes --gradient_accumulation_steps 5 --per_device_train_batch_size 4": "whole groups of 24 rows",
    # Rewards
    "serve-reward": "the following arguments are required: reward",
    "serve-reward shapes --port 99999": "`--port` must be in [0, 65535], got 99999",
    "serve-reward shapes --max_pixels 0": "`--max_pixels` must be >= 1, got 0",
    "serve-reward shapes --body_timeout 0": "`--body_timeout` must be > 0, got 0.0",
    "serve-reward shapes --host 0.0.0.0": "`host` must be a loopback address where there is no token, got '0.0.0.0'",
    "serve-reward shapes --token_file no-token": "No such file or directory: 'no-token'",
    "serve-reward shapes --token_file binary": "`token` must be of visible ASCII characters",
    "serve-reward shapes --options mode=dense": "argument --options: must be a JSON object",
    "serve-reward shapes --options '{\"x\": 1}'": "unexpected keyword argument 'x'",
    "serve-reward ocr --options '{\"x\": 1}'": "The reward 'ocr' cannot be made with `options` {'x': 1}",
    "serve-reward nothing": "`name` must be one of ('geneval', ",
    "serve-reward no_such_module:reward": "The reward 'no_such_module:reward' cannot be imported: No module named",
    "serve-reward math:nothing": "cannot be imported: module 'math' has no attribute 'nothing'",
    "serve-reward math:pi": "must be a function, or a class whose objects can be called, with `prompts` and",
    "serve-reward math:sqrt": "got <built-in function sqrt>",
    "serve-reward fractions:Fraction": "got <class 'fractions.Fraction'>",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_ends_with_one_line_before_anything_is_written(command, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "nameless", "foreign", "promptless/00000", "broken/00000"):
        (tmp_path / name).mkdir(parents=True)
    model = "model: shapes\n"
    for name, text in {
        "file": "",
        "file.txt": "",
        "promptless/00000/metadata.jsonl": '{"tag": "a"}',
        "broken/00000/metadata.jsonl": "{",
        "broken.yaml": "model: [",
        "list.yaml": "- model",
        "type.yaml": model + "batch_size: [16]",
        "choice.yaml": "benchmark: geneva\noutput_dir: out",
        "dtype.yaml": model + "dtype: f4",
        "unknown.yaml": model + "modle: shapes",
    }.items():
        (tmp_path / name).write_text(text)
    for name in ("nameless", "foreign"):
        save_file({"weight": torch.zeros(1)}, tmp_path / name / "adapter_model.safetensors")
    (tmp_path / "foreign" / "adapter_config.json").write_text('{"peft_type": "NONE"}')
    for name in ("binary", "binary.jsonl"):
        (tmp_path / name).write_bytes(b"\x80\xff")
    before = {path: path.stat().st_size for path in tmp_path.rglob("*")}
    mistake = find_mistake(shlex.split(command), capsys)
    assert re.fullmatch("trl-udm.*: error: .*\n", mistake) and MISTAKES[command] in mistake
    assert {path: path.stat().st_size for path in tmp_path.rglob("*")} == before


def test_debug_shows_the_traceback_of_a_mistake(monkeypatch):
    monkeypatch.setenv(DEBUG_VARIABLE, "")
    with pytest.raises(ValueError, match=r"`--lora_r` must be in \[0, 2147483648\], got -1"):
        main(["memory", "--model", "shapes", "--lora_r", "-1", "--debug"])


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"trl-udm {__version__}\n"


def test_help_loads_no_heavy_package():
    """That of each verb takes a quarter of a second. To import PyTorch or TRL takes several."""
    code = "import contextlib, io, sys\nfrom trl_udm.cli import VERBS, main\nfor verb in ('', *VERBS):\n"
    code += "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
    code += "        main([*verb.split(), '--help'])\n"
    code += "print(*{'torch', 'transformers', 'numpy', 'datasets', 'fastapi'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert run.stdout.split() == []


def test_help_of_a_verb_names_its_arguments(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit, match="0"):
            main([verb, "--help"])
        printed = capsys.readouterr().out
        module = importlib.import_module(f"trl_udm.cli.{verb.replace('-', '_')}")
        for field in dataclasses.fields(module.Arguments):
            assert field.name in printed, (verb, field.name)


def test_every_folder_file_is_a_verb():
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py")}
    assert files - {"__init__", "__main__", "arguments", "mistakes", "parser"} == {
        verb.replace("-", "_") for verb in VERBS
    }


def test_defaults_are_those_of_the_training_configuration():
    defaults = {field.name: field.default for field in dataclasses.fields(UDMGRPOConfig)}
    arguments = parse_arguments("memory", memory.Arguments, ["--model", "shapes"])
    shared = vars(arguments).keys() & defaults.keys()
    assert {"per_device_train_batch_size", "num_generations", "num_train_timesteps", "beta", "bf16"} <= shared
    assert {name: getattr(arguments, name) for name in shared} == {
        name: defaults[name] if name != "gradient_accumulation_steps" else None for name in shared
    }
    for module, flags in ((generate, ["a ring"]), (evaluate, ["--benchmark", "shapes", "--output_dir", "out"])):
        arguments = parse_arguments("verb", module.Arguments, [*flags, "--model", "shapes"])
        assert arguments.num_inference_steps == defaults["num_inference_steps_eval"]
        assert arguments.guidance_scale == defaults["guidance_scale_eval"]


@pytest.mark.parametrize(
    ("flags", "bf16", "activation_checkpointing"),
    [
        ([], None, None),
        (["--bf16", "--activation_checkpointing"], True, True),
        (["--no-bf16", "--no-activation_checkpointing"], False, False),
        (["--bf16", "false", "--activation-checkpointing", "false"], False, False),
    ],
)
def test_switches_are_given_in_either_form(flags, bf16, activation_checkpointing):
    arguments = parse_arguments("memory", memory.Arguments, ["--model", "shapes", *flags])
    assert (arguments.bf16, arguments.activation_checkpointing) == (bf16, activation_checkpointing)


def test_a_config_file_gives_defaults_that_flags_override(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "reward: shapes\noptions: {mode: dense}\nport: 7\ntoken_file: token\nmax_queue: 5\n"
    )
    argv = ["--config", str(tmp_path / "config.yaml"), "--port", "8"]
    arguments = parse_arguments("serve-reward", serve_reward.Arguments, argv)
    assert (arguments.reward, arguments.options, arguments.port) == ("shapes", {"mode": "dense"}, 8)
    assert (arguments.token_file, arguments.max_queue) == (Path("token"), 5)
    assert parse_arguments("serve-reward", serve_reward.Arguments, ["words", *argv]).reward == "words"


def test_the_command_lists_its_verbs():
    run = subprocess.run([sys.executable, "-m", "trl_udm.cli", "--help"], capture_output=True, text=True, check=True)
    assert all(verb in run.stdout for verb in VERBS)


EVALUATE = ["evaluate", "--benchmark", "shapes", "--num_inference_steps", "2", "--num_images_per_prompt", "1"]


def test_evaluate_reports_on_shapes_and_continues(tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": f"a photo of a {name}"}
        for name in ("circle", "ring", "cross")
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [*EVALUATE, "--prompts", str(prompts), "--output_dir", str(tmp_path / "out"), "--batch_size", "2"]
    main([*argv, "--model", "shapes"])
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["settings"]["model"] == "shapes"
    assert [row["prompt"] for row in report["results"]["geneval_accuracy"]] == [row["prompt"] for row in rows]
    assert "| single_object |" in capsys.readouterr().out

    # Without a model the folder's images are scored, here after one was exchanged
    image = render([ShapesObject("ring", "red", 0, 0)])
    image.save(tmp_path / "out" / "00001" / "samples" / "00000.png")
    (tmp_path / "out" / "00001" / "scores_geneval_accuracy.json").unlink()
    main([*EVALUATE, "--output_dir", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["results"]["geneval_accuracy"][1]["score"] == 1.0


REWARDS_OF_THE_WORKING_FOLDER = """
def width(prompts, completions, target_text, **columns):
    return [image.width if text == "007" else None for image, text in zip(completions, target_text)]

class Constant:
    def __init__(self, value=0.5):
        self.value = value

    def __call__(self, prompts, completions, **columns):
        return [self.value] * len(prompts)
"""


def test_evaluate_measures_several_rewards_of_the_same_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text(REWARDS_OF_THE_WORKING_FOLDER)
    Path("prompts.csv").write_text("prompt,target_text\na ring,007\na cross,NA\n")
    argv = [
        "evaluate",
        "--benchmark",
        "prompts",
        "--prompts",
        "prompts.csv",
        "--model",
        "shapes",
        "--output_dir",
        "out",
    ]
    argv += ["--num_inference_steps", "1", "--num_images_per_prompt", "1", "--rewards", "my_rewards:width"]
    main(argv)
    assert json.loads(Path("out/00000/metadata.jsonl").read_text()) == {"prompt": "a ring", "target_text": "007"}
    kept = [*Path("out").glob("*/samples/*.png"), Path("out/00000/scores_width.json")]
    times = [path.stat().st_mtime_ns for path in kept]
    # Another reward draws no image again, and the first one scores none again
    main([*argv, "my_rewards:Constant", "--options", json.dumps({"my_rewards:Constant": {"value": 2.0}})])
    assert len(kept) == 3 and times == [path.stat().st_mtime_ns for path in kept]
    summaries = json.loads(Path("out/results.json").read_text())["summaries"]
    assert [summaries[name]["overall"]["mean"] for name in ("width", "Constant")] == [32, 2]
    table = Path("out/results.md").read_text()
    assert "1 of 2 images have no score: width abstained." in table and "| Constant | mean |" in table


def test_evaluate_killed_and_given_again_ends_as_an_unbroken_run(tmp_path):
    argv = [*EVALUATE, "--model", "shapes", "--batch_size", "1"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "trl_udm.cli", *argv, "--output_dir", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(killed.rglob("*.png"))) < 3:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 3 <= len(list(killed.rglob("*.png"))) < 120
    for folder in (killed, whole):
        main([*argv, "--output_dir", str(folder)])

    def contents(folder):
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert len(contents(whole)) == 120 * 3 + 4
    assert contents(killed) == contents(whole)


def test_evaluate_begins_anew_when_asked(tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text(
        json.dumps({"tag": "colors", "include": [{"class": "ring", "count": 1}], "prompt": "a photo of a ring"})
    )
    argv = [*EVALUATE, "--model", "shapes", "--prompts", str(tmp_path / "prompts.jsonl")]
    argv += ["--output_dir", str(tmp_path / "out")]
    main(argv)
    assert "has seed=0, got 1" in find_mistake([*argv, "--seed", "1"], capsys)
    main([*argv, "--seed", "1", "--overwrite"])
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["settings"]["seed"] == 1
    assert report["reward_settings"] == {"benchmark": "shapes", "options": {}}


def test_generate_draws_and_does_not_overwrite(tmp_path, capsys):
    argv = ["generate", "a photo of a ring", "a photo of a cross", "--model", "shapes"]
    argv += ["--output_dir", str(tmp_path / "images"), "--batch_size", "1"]
    argv += ["--num_images_per_prompt", "2", "--num_inference_steps", "2"]
    main(argv)
    images = [Image.open(tmp_path / "images" / name) for name in ("00000.png", "00003.png")]
    assert [image.size for image in images] == [(32, 32), (32, 32)]
    assert "00003.png" in capsys.readouterr().out
    assert "`--output_dir` has 00000.png already" in find_mistake(argv, capsys)


@pytest.mark.parametrize("video_format", ["gif", "mp4"])
def test_generate_draws_videos(tmp_path, capsys, oracle_dir, video_format):
    Image.new("RGB", (48, 32), "red").save(tmp_path / "first.png")
    argv = ["generate", "a red cat", "a dog", "--model", str(oracle_dir / "video" / "tiny-ursa-video")]
    argv += ["--output_dir", str(tmp_path / "videos"), "--video_format", video_format]
    argv += ["--num_inference_steps", "2", "--height", "32", "--width", "48", "--num_frames", "9"]
    if video_format == "mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        assert "`--video_format mp4` needs imageio with ffmpeg" in find_mistake(argv, capsys)
        return
    main([*argv, "--image", str(tmp_path / "first.png")])
    for name in (f"00000.{video_format}", f"00001.{video_format}"):
        assert (tmp_path / "videos" / name).stat().st_size > 0
    if video_format == "gif":
        with Image.open(tmp_path / "videos" / "00001.gif") as video:
            assert (video.n_frames, video.size) == (9, (48, 32))
            assert video.info["duration"] == 80  # hundredths of a second


def test_evaluate_scores_frames_of_videos(tmp_path, oracle_dir):
    model, prompts = str(oracle_dir / "video" / "tiny-ursa-video"), tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, split_metadata()[1][:2])))
    argv = ["evaluate", "--model", model, "--output_dir", str(tmp_path / "out"), "--prompts", str(prompts)]
    argv += ["--benchmark", "shapes", "--num_images_per_prompt", "1", "--num_inference_steps", "1"]
    argv += ["--height", "32", "--width", "32", "--num_frames", "5", "--frames", "2"]
    main(argv)
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["settings"]["num_frames"] == 5
    assert report["reward_settings"]["frames"] == 2
    assert (tmp_path / "out" / "samples.gif").exists()


def test_generate_counts_the_prompts_that_are_cut(tmp_path, caplog):
    argv = [
        "generate",
        "a ring",
        "a red ring " * 30,
        "a cross " * 30,
        "--model",
        "shapes",
        "--num_inference_steps",
        "1",
    ]
    main([*argv, "--output_dir", str(tmp_path), "--batch_size", "1"])
    (record,) = (record for record in caplog.records if record.name == "trl_udm.cut_prompts")
    assert record.message.startswith("2 of 3 prompts are longer than the ")


def test_env_names_versions(capsys):
    main(["env"])
    printed = capsys.readouterr().out
    assert f"trl-udm: {__version__}" in printed and f"torch: {torch.__version__}" in printed


@pytest.fixture
def adapter(tmp_path):
    """A saved adapter of the model of shapes, with random weights."""
    torch.manual_seed(0)
    transformer = URSAPipeline.from_pretrained(CHECKPOINT_PATH).transformer
    config = LoraConfig(r=4, lora_alpha=1, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(transformer, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def compute_logits(pipeline):
    prompt_ids, prompt_mask = pipeline.encode_prompt(["a photo of a ring"])
    with torch.no_grad():
        return pipeline.denoise(prompt_ids, prompt_mask, torch.arange(64).unsqueeze(0), (1, 8, 8))


def test_merge_writes_a_pipeline_with_the_logits_of_the_adapter(tmp_path, adapter, capsys):
    output_dir = tmp_path / "merged"
    main(["merge", "--model", "shapes", "--adapter", str(adapter), "--output_dir", str(output_dir)])
    assert capsys.readouterr().out == f"{output_dir}\n"
    pipeline = URSAPipeline.from_pretrained(CHECKPOINT_PATH)
    base = compute_logits(pipeline)
    pipeline.load_lora_weights(adapter)
    expected = compute_logits(pipeline)
    assert (expected - base).abs().max() > 0.1
    merged = compute_logits(URSAPipeline.from_pretrained(output_dir))
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    assert not any(str(CHECKPOINT_PATH) in path.read_text() for path in output_dir.rglob("*.json"))


def test_merge_overwrites_nothing(tmp_path, adapter, capsys):
    argv = ["merge", "--model", "shapes", "--adapter", str(adapter), "--output_dir"]
    for path in (adapter, adapter / "adapter_config.json"):
        mistake = find_mistake([*argv, str(path)], capsys)
        assert f"`--output_dir` must be new or empty, and {path} is not. Give another" in mistake


def test_merge_refuses_an_adapter_that_lacks_a_weight(tmp_path, adapter, capsys):
    weights = load_file(adapter / "adapter_model.safetensors")
    del weights["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]
    save_file(weights, adapter / "adapter_model.safetensors")
    argv = ["merge", "--model", "shapes", "--adapter", str(adapter), "--output_dir", str(tmp_path / "merged")]
    assert re.search("does not fit the transformer: .*up_proj.lora_A", find_mistake(argv, capsys))
    assert not (tmp_path / "merged").exists()


def find_peak(report, stage):
    return float(re.search(rf"peak of the {stage} \| ([0-9.]+)", report).group(1))


def test_memory_prints_each_stage_and_whether_it_fits(capsys, adapter):
    argv = ["memory", "--model", "shapes", "--no-bf16", "--per_device_train_batch_size", "48", "--gpu_memory"]
    main([*argv, "24"])
    full = capsys.readouterr().out
    main([*argv, "0.6", "--lora_r", "4", "--no-activation_checkpointing"])
    lora = capsys.readouterr().out
    main([*argv, "24", "--adapter", str(adapter), "--ema_decay", "0.9"])
    further = capsys.readouterr().out
    main([*argv, "24", "--kl_estimator", "full"])
    full_kl = capsys.readouterr().out
    for stage in ("rollout", "decode", "scoring", "update"):
        assert f"| peak of the {stage} | 0." in full and f"| peak of the {stage} | 0." in lora
    assert "24 GiB: fits, 23." in full
    assert find_peak(full_kl, "scoring") < find_peak(full, "scoring")  # the reference scores in the update
    assert "0.6 GiB: 0." in lora and "GiB too much." in lora
    assert "| reference weights | 0.00 |" in lora
    assert "| ema weights | 0.00 |" in full and "| ema weights | 0.00 |" in further


def test_memory_takes_a_folder_before_a_published_model_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "BAAI/URSA-1.7B-IBQ512"
    assert memory.build_pipeline(name, torch.bfloat16).latent_shape() == (1, 32, 32)
    (tmp_path / "BAAI").mkdir()
    (tmp_path / name).symlink_to(CHECKPOINT_PATH)
    pipeline = memory.build_pipeline(name, torch.bfloat16)
    assert pipeline.latent_shape() == (1, 8, 8) and pipeline.transformer.dtype == torch.bfloat16


def test_memory_downloads_configurations_only(tmp_path):
    files = {
        str(path.relative_to(CHECKPOINT_PATH)): path.read_bytes()
        for path in CHECKPOINT_PATH.rglob("*")
        if path.is_file()
    }
    assert any(path.endswith(".safetensors") for path in files)
    with HubServer() as server:
        server.repositories[f"{USER}/shapes"] = Repository()
        server.repositories[f"{USER}/shapes"].commit(files, "initial commit")
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        environment.pop("HF_TOKEN", None)
        environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-m", "trl_udm.cli", "memory", "--model", f"{USER}/shapes"]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "| peak of the update |" in run.stdout
    downloaded = [path for path in tmp_path.rglob("snapshots/*/**/*") if path.is_file()]
    assert "model_index.json" in {path.name for path in downloaded}
    assert {path.suffix for path in downloaded} == {".json"}
