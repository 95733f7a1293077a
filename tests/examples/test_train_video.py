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

from PIL import Image

from . import load_example


def test_the_example_trains_on_videos_and_leaves_its_results(tmp_path, capsys):
    small = ["--max_steps", "2", "--num_generations", "4", "--per_device_train_batch_size", "24"]
    small += ["--num_eval_videos", "1", "--num_inference_steps", "5", "--num_inference_steps_eval", "5"]
    results = load_example("train_video").main(["--output_dir", str(tmp_path), "--disable_tqdm", "True", *small])
    assert set(results["before"]) == set(results["after"]) > {"overall", "image_to_video", "speed"}
    assert 0.1 < results["before"]["overall"] < 0.5 < results["before"]["image_to_video"]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    for name in ("samples_before", "samples_after"):
        with Image.open(tmp_path / f"{name}.gif") as video, Image.open(tmp_path / f"{name}.png") as sheet:
            assert video.n_frames == 5
            assert sheet.width > 2 * 500
    for name in ("reward_curve.png", "trainer_state.json", "model_index.json", "README.md"):
        assert (tmp_path / name).exists()
    assert "Share of right videos" in capsys.readouterr().out
