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

import json

import pytest
from PIL import Image

from . import load_example


SMALL = ["--num_generations", "4", "--num_eval_images", "1", "--num_inference_steps", "5", "--disable_tqdm", "True"]
SMALL += ["--num_inference_steps_eval", "5"]


@pytest.mark.parametrize("extra", [[], ["--use_peft", "--lora_r", "4"]])
def test_the_example_trains_on_words_and_leaves_its_results(tmp_path, capsys, extra):
    argv = ["--output_dir", str(tmp_path), "--max_steps", "2", "--per_device_train_batch_size", "24", *SMALL, *extra]
    results = load_example("train_ocr").main(argv)
    assert set(results["before"]) == set(results["after"]) == {"all", "overall"}
    assert 0.3 < results["before"]["overall"] < 0.9
    assert json.loads((tmp_path / "results.json").read_text()) == results
    for name in ("samples_before.png", "samples_after.png", "reward_curve.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 100
    assert (tmp_path / ("adapter_model.safetensors" if extra else "model_index.json")).exists()
    assert "OCR accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("train_prompts", [None, 'a sign that says "ab"\na sign that says "cd"\n'])
def test_another_model_trains_on_generated_or_given_prompts(tmp_path, oracle_dir, train_prompts):
    (tmp_path / "test.txt").write_text('a sign that says "ef"\na sign that says "gh"\n')
    argv = ["--eval_dataset_name", str(tmp_path / "test.txt"), "--num_train_prompts", "50"]
    if train_prompts is not None:
        (tmp_path / "train.txt").write_text(train_prompts)
        argv += ["--dataset_name", str(tmp_path / "train.txt")]
    argv += ["--model_name_or_path", str(oracle_dir / "tiny-ursa"), "--dtype", "float32", "--max_steps", "1"]
    argv += ["--pipeline_kwargs", '{"height": 16, "width": 16}', "--per_device_train_batch_size", "12"]
    argv += ["--bf16", "False", "--report_to", "none", "--logging_steps", "1", *SMALL]
    results = load_example("train_ocr").main([*argv, "--output_dir", str(tmp_path / "out")])
    assert results["before"]["overall"] == 0.0
    assert (tmp_path / "out" / "model_index.json").exists()
