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

import sys

import pytest

from trl_udm.worlds import shapes

from . import load_example


MODEL = ["--model_name_or_path", "some/model"]
MISTAKES = [
    ("train_geneval", MODEL, "`--eval_dataset_name` is needed with `--model_name_or_path`"),
    ("train_ocr", MODEL, "`--eval_dataset_name` is needed with `--model_name_or_path`"),
    ("train_text", MODEL, "`--dataset_name`, `--eval_dataset_name` and `--reward_funcs` must be given"),
    (
        "train_pickscore",
        ["--dataset_name", "a.txt", "--eval_dataset_name", "b.txt"],
        "`--model_name_or_path` is needed",
    ),
    ("train_diffusion_gemma", [], "`--model_name_or_path` is needed, such as google/diffusiongemma-26B-A4B-it"),
    ("train_geneval", ["--num_generations", "1"], "`num_generations` must be >= 2, got 1"),
    ("train_geneval", ["--num_generations", "many"], "invalid int value: 'many'"),
    ("train_geneval", ["--config", "none.yaml"], "No such file or directory: 'none.yaml'"),
    ("train_geneval", ["--lerning_rate", "1"], "--lerning_rate"),
    (
        "train_geneval",
        [*MODEL, "--eval_dataset_name", "a.jsonl", "--detector", "nowhere:D"],
        "`--detector` nowhere:D cannot be imported: No module named 'nowhere'",
    ),
    (
        "train_geneval",
        [*MODEL, "--eval_dataset_name", "a.jsonl", "--detector", "math:nothing"],
        "`--detector` math:nothing cannot be imported: module 'math' has no attribute 'nothing'",
    ),
    (
        "train_text",
        [*MODEL, "--dataset_name", "a", "--eval_dataset_name", "b", "--reward_funcs", "math.pi"],
        "`--reward_funcs` must name what can be called, got math.pi, which is 3.14",
    ),
    ("train_geneval", ["--num_eval_images", "0"], "`--num_eval_images` must be >= 1, got 0"),
    ("train_geneval", ["--eval_images_batch_size", "-1"], "`--eval_images_batch_size` must be >= 1, got -1"),
    ("train_geneval", ["--diagnostics_steps", "0"], "`--diagnostics_steps` must be >= 1, got 0"),
    ("train_text", ["--num_shown", "-1"], "`--num_shown` must be >= 0, got -1"),
    ("train_text", ["--learning_rate", "nan"], "`learning_rate` must be >= 0, got nan"),
    ("train_text", ["--beta", "inf"], "`beta` must be >= 0, got inf"),
    ("train_text", ["--epsilon", "-1"], "`epsilon` must be >= 0, got -1.0"),
    ("train_text", ["--seed", "abc"], "invalid int value: 'abc'"),
    ("train_video", ["--num_eval_videos", "0"], "`--num_eval_videos` must be >= 1, got 0"),
    ("train_video", ["--pipeline_kwargs", '{"num_frames": 9}'], "`pipeline_kwargs` must be {'num_frames': 5}, as in"),
    ("train_text", ["--dtype", "float7"], "argument --dtype: invalid choice: 'float7'"),
]


@pytest.mark.parametrize(("example", "argv", "message"), MISTAKES)
def test_a_mistake_ends_with_one_line_before_anything_is_written(
    example, argv, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        load_example(example).main([*argv, "--bf16", "False", "--output_dir", "out"])
    printed = capsys.readouterr().err
    assert printed.startswith(f"{example}.py: error: ") and printed.count("\n") == 1 and message in printed
    assert not list(tmp_path.iterdir())


CHECKPOINTS = {
    "nowhere": "must be a whole checkpoint, got 'nowhere', which is missing or was not finished",
    "file": "must be a whole checkpoint, got 'file', which",
    "empty": "must be a whole checkpoint, got 'empty', which",
    "torn": "must be a whole checkpoint, got 'torn', which",
    "True": "`resume_from_checkpoint` is True, but `output_dir` 'out' has no whole checkpoint (0 torn ones)",
    "without_weights": "There is no folder without_weights/transformer",
    "without_optimizer": "must have all of its files, but without_optimizer lacks ['optimizer*', 'scheduler.pt', ",
    "of_another_family": "The weights in of_another_family/transformer miss ['",
}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_checkpoint_that_is_none_is_told_before_anything_is_computed(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name in ("empty", "torn", "without_weights", "without_optimizer", "of_another_family"):
        (tmp_path / name).mkdir()
        if name != "empty":
            (tmp_path / name / "trainer_state.json").write_text("{" if name == "torn" else "{}")
    (tmp_path / "without_optimizer" / "rollout_state_0.pth").write_text("")
    (tmp_path / "of_another_family" / "transformer").symlink_to(shapes.CHECKPOINT_PATH / "transformer")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        load_example("train_text").main(["--output_dir", "out", "--resume_from_checkpoint", checkpoint])
    *bars, line, _ = capsys.readouterr().err.split("\n")  # bars of what is loaded
    assert line.startswith("train_text.py: error: ") and CHECKPOINTS[checkpoint] in line
    assert all("it/s]" in bar for bar in bars) and (not bars or checkpoint.startswith(("without", "of")))
    assert {path for path in tmp_path.rglob("*") if path.name != "out"} == before
    assert not list(tmp_path.glob("out/*"))


def test_checked_answers_ask_for_their_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as where the extra `math` is not installed
    with pytest.raises(SystemExit, match="2"):
        load_example("train_diffusion_gemma").main([*MODEL, "--bf16", "False", "--output_dir", str(tmp_path)])
    assert "`--reward_funcs trl.rewards.accuracy_reward` needs the package `math_verify`" in capsys.readouterr().err


def test_a_module_of_the_working_folder_is_found(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_detector.py").write_text("def make():\n    raise ValueError('found')\n")
    monkeypatch.chdir(tmp_path)
    load_example("common")  # anew, as in a process that starts here
    argv = [*MODEL, "--bf16", "False", "--eval_dataset_name", "a.jsonl", "--detector", "my_detector:make"]
    with pytest.raises(SystemExit, match="2"):
        load_example("train_geneval").main(argv)
    assert "error: found" in capsys.readouterr().err
