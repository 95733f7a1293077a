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

import pytest
from trl.import_utils import is_math_verify_available

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
        "No module named 'nowhere'",
    ),
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


@pytest.mark.skipif(is_math_verify_available(), reason="the extra `math` is installed")
def test_checked_answers_ask_for_their_package(tmp_path, capsys):
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
