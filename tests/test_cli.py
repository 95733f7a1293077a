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
from trl_udm.cli import VERBS, evaluate, generate, main, memory, parse_arguments, serve_reward
from trl_udm.rewards.remote.server import create_app, serve
from trl_udm.rewards.remote.wire import TOKEN_VARIABLE
from trl_udm.worlds.shapes import CHECKPOINT_PATH
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


def test_other_machines_are_not_served_without_a_token(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ValueError, match="`host` must be a loopback address where there is no token, got '0.0.0.0'."):
        main(["serve-reward", "shapes", "--host", "0.0.0.0"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: VERB"),
        (["serve-rewards"], "invalid choice: 'serve-rewards'"),
        (["serve-reward"], "the following arguments are required: reward"),
        (
            ["serve-reward", "geneval", "--options", "mode=dense"],
            "argument --options: must be a JSON object such as '{\"mode\": \"dense\"}', got 'mode=dense'",
        ),
        (["env", "--versions", "all"], "trl-udm env: error: unrecognized arguments: --versions all"),
    ],
)
def test_a_wrong_command_line_is_refused(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert message in capsys.readouterr().err


def test_help_loads_no_heavy_package():
    code = "import sys, trl_udm.cli\nprint(*{'torch', 'trl', 'numpy', 'PIL', 'fastapi', 'msgpack'} & set(sys.modules))"
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
    assert files - {"__init__", "__main__", "arguments"} == {verb.replace("-", "_") for verb in VERBS}


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

    (tmp_path / "config.yaml").write_text("benchmark: geneva\noutput_dir: out\n")
    with pytest.raises(ValueError, match=r"`--benchmark` must be one of \['geneval', .* got 'geneva'"):
        main(["evaluate", *argv[:2]])


def test_a_config_file_with_an_unknown_name_is_refused(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("reward: shapes\nprot: 7\n")
    with pytest.raises(SystemExit, match="2"):
        main(["serve-reward", "--config", str(tmp_path / "config.yaml")])
    assert "unrecognized arguments: --prot 7" in capsys.readouterr().err


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


def test_evaluate_asks_for_prompts(tmp_path):
    with pytest.raises(ValueError, match="`--prompts` is needed for ocr"):
        main(["evaluate", "--benchmark", "ocr", "--model", "shapes", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("flags", [["--prompts", "a.txt"], ["--adapter", "lora"], ["--overwrite"]])
def test_evaluate_refuses_what_needs_a_model(tmp_path, flags):
    with pytest.raises(ValueError, match=f"`{flags[0]}` needs `--model`"):
        main(["evaluate", "--benchmark", "ocr", "--output_dir", str(tmp_path), *flags])


def test_evaluate_begins_anew_when_asked(tmp_path):
    (tmp_path / "prompts.jsonl").write_text(
        json.dumps({"tag": "colors", "include": [{"class": "ring", "count": 1}], "prompt": "a photo of a ring"})
    )
    argv = [*EVALUATE, "--model", "shapes", "--prompts", str(tmp_path / "prompts.jsonl")]
    argv += ["--output_dir", str(tmp_path / "out")]
    main(argv)
    with pytest.raises(ValueError, match="has seed=0, got 1"):
        main([*argv, "--seed", "1"])
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
    with pytest.raises(FileExistsError, match="`--output_dir` has 00000.png already"):
        main(argv)


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


def test_merge_overwrites_nothing(tmp_path, adapter):
    argv = ["merge", "--model", "shapes", "--adapter", str(adapter), "--output_dir"]
    for path in (adapter, adapter / "adapter_config.json"):
        with pytest.raises(
            FileExistsError, match=f"`--output_dir` must be new or empty, and {path} is not. Give another"
        ):
            main([*argv, str(path)])


def test_merge_refuses_an_adapter_that_lacks_a_weight(tmp_path, adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    del weights["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]
    save_file(weights, adapter / "adapter_model.safetensors")
    argv = ["merge", "--model", "shapes", "--adapter", str(adapter), "--output_dir", str(tmp_path / "merged")]
    with pytest.raises(ValueError, match="does not fit the transformer: .*up_proj.lora_A"):
        main(argv)
    assert not (tmp_path / "merged").exists()


def test_memory_prints_each_stage_and_whether_it_fits(capsys, adapter):
    argv = ["memory", "--model", "shapes", "--no-bf16", "--per_device_train_batch_size", "48", "--gpu_memory"]
    main([*argv, "24"])
    full = capsys.readouterr().out
    main([*argv, "0.6", "--lora_r", "4", "--no-activation_checkpointing"])
    lora = capsys.readouterr().out
    main([*argv, "24", "--adapter", str(adapter), "--ema_decay", "0.9"])
    further = capsys.readouterr().out
    for stage in ("rollout", "decode", "scoring", "update"):
        assert f"| peak of the {stage} | 0." in full and f"| peak of the {stage} | 0." in lora
    assert "24 GiB: fits, 23." in full
    assert "0.6 GiB: 0." in lora and "GiB too much." in lora
    assert "| reference weights | 0.00 |" in lora
    assert "| ema weights | 0.00 |" in full and "| ema weights | 0.00 |" in further


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_r", "-1"], "`--lora_r` must be >= 0, got -1."),
        (["--every_n_layers", "0"], "`--every_n_layers` must be >= 1, got 0."),
        (["--per_device_train_batch_size", "0"], "`--per_device_train_batch_size` must be >= 1, got 0."),
        (
            ["--gradient_accumulation_steps", "5", "--per_device_train_batch_size", "4"],
            "must hold whole groups of 24 rows",
        ),
        (["--height", "33"], "`height` must be a positive multiple of"),
    ],
)
def test_memory_refuses(flags, message):
    with pytest.raises(ValueError, match=message):
        main(["memory", "--model", "shapes", *flags])


def test_memory_of_a_folder_that_lacks_a_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match="The checkpoint has no .*config.json"):
        main(["memory", "--model", str(tmp_path)])


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
