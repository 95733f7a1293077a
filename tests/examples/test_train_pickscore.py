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

from tests.rewards.test_clip import save_tiny_clip

from . import load_example


@pytest.mark.parametrize(
    ("model", "options", "files"),
    [
        ("tiny-ursa", {"height": 16, "width": 16}, []),
        ("video/tiny-ursa-video", {"height": 32, "width": 48, "num_frames": 5}, ["samples.gif"]),
    ],
    ids=["images", "videos"],
)
def test_the_example_trains_on_pickscore_and_leaves_its_results(tmp_path, oracle_dir, capsys, model, options, files):
    save_tiny_clip(tmp_path / "clip")
    (tmp_path / "train.txt").write_text("a red cat\na blue dog\n")
    (tmp_path / "test.txt").write_text("a green cow\na gray fox\na pink pig\n")
    argv = ["--dataset_name", str(tmp_path / "train.txt"), "--eval_dataset_name", str(tmp_path / "test.txt")]
    argv += ["--pickscore_model", str(tmp_path / "clip"), "--pickscore_processor", str(tmp_path / "clip")]
    argv += ["--model_name_or_path", str(oracle_dir / model), "--dtype", "float32", "--max_steps", "1"]
    argv += ["--pipeline_kwargs", json.dumps(options), "--num_generations", "2", "--disable_tqdm", "True"]
    argv += ["--per_device_train_batch_size", "6", "--gradient_accumulation_steps", "1", "--bf16", "False"]
    argv += ["--num_inference_steps", "5", "--num_inference_steps_eval", "5", "--report_to", "none"]
    results = load_example("train_pickscore").main(
        [*argv, "--output_dir", str(tmp_path / "out"), "--logging_steps", "1"]
    )
    assert set(results["before"]) == set(results["after"]) == {"all", "overall"}
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    for name in ("samples_before.png", "samples_after.png", "reward_curve.png", "model_index.json", *files):
        assert (tmp_path / "out" / name).exists()
    assert "PickScore" in capsys.readouterr().out
