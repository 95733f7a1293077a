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


@pytest.mark.parametrize(
    "extra", [[], ["--use_peft", "--lora_r", "4", "--diagnostics_steps", "2", "--ema_decay", "0.9"]]
)
def test_the_example_trains_on_shapes_and_leaves_its_results(tmp_path, capsys, extra):
    small = ["--max_steps", "2", "--num_generations", "4", "--per_device_train_batch_size", "24"]
    small += ["--num_train_timesteps", "3", "--logging_steps", "1"]
    small += ["--num_eval_images", "1", "--num_inference_steps", "5", "--num_inference_steps_eval", "5"]
    results = load_example("train_geneval").main(
        ["--output_dir", str(tmp_path), "--disable_tqdm", "True", *small, *extra]
    )
    assert set(results["before"]) == set(results["after"]) and "overall" in results["before"]
    assert 0.3 < results["before"]["overall"] < 0.9
    assert json.loads((tmp_path / "results.json").read_text()) == results
    sizes = set()
    for name in ("samples_before.png", "samples_after.png"):
        with Image.open(tmp_path / name) as image:
            sizes.add(image.size)
    assert len(sizes) == 1
    with Image.open(tmp_path / "samples.png") as both:
        assert both.width > 6 * 232 and both.height > 4 * 232  # of each kind two images before and two after
    assert (tmp_path / "reward_curve.png").exists()
    assert (tmp_path / "trainer_state.json").exists()
    assert (tmp_path / "diagnostics.png").exists() == bool(extra)
    assert "## Results" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "transformer_ema" / "adapter_model.safetensors").exists() == bool(extra)
    assert (tmp_path / ("adapter_model.safetensors" if extra else "model_index.json")).exists()
    assert "GenEval accuracy" in capsys.readouterr().out
