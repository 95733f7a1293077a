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

from trl_udm import TextUDMPipeline
from trl_udm.worlds.sums import CHECKPOINT_PATH

from . import load_example


SMALL = ["--num_generations", "4", "--num_inference_steps", "5", "--num_inference_steps_eval", "5", "--max_steps", "2"]
SMALL += ["--per_device_train_batch_size", "24", "--num_generations_eval", "1", "--disable_tqdm", "True"]


@pytest.mark.parametrize(("task", "length"), [("sudoku", 17), ("countdown", 6)])
def test_other_worlds_are_trained_by_their_names(tmp_path, capsys, task, length):
    results = load_example("train_text").main(["--task", task, "--output_dir", str(tmp_path), *SMALL])
    assert 0.3 < results["before"] < 0.6 and 0 <= results["after"] <= 1
    assert TextUDMPipeline.from_pretrained(str(tmp_path)).latent_shape() == (length,)
    assert f"{results['before']:.3f} before" in capsys.readouterr().out


def test_an_unknown_world_is_refused(capsys):
    with pytest.raises(SystemExit):
        load_example("train_text").main(["--task", "chess"])
    assert "chess" in capsys.readouterr().err


@pytest.mark.parametrize(
    "extra",
    [
        ["--per_device_train_batch_size", "20"],
        ["--use_peft", "--lora_r", "4", "--algorithm", "dflow_grpo", "--num_draws", "2"],
    ],
)
def test_the_example_trains_on_sums_and_leaves_its_results(tmp_path, capsys, recwarn, extra):
    results = load_example("train_text").main(["--output_dir", str(tmp_path), *SMALL, *extra])
    assert 0.4 < results["before"] < 0.65 and 0 <= results["after"] <= 1
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert len(results["completions"]) == 8 and "+" in results["completions"][0]["before"]
    with Image.open(tmp_path / "reward_curve.png") as image:
        assert image.width > 100
    if "--use_peft" in extra:
        assert (tmp_path / "adapter_model.safetensors").exists()
    else:
        assert TextUDMPipeline.from_pretrained(str(tmp_path)).latent_shape() == (12,)
    assert f"{results['before']:.3f} before" in capsys.readouterr().out
    assert not [warning for warning in recwarn if "is_gradient_checkpointing" in str(warning.message)]


def test_another_model_trains_on_messages_with_a_reward_of_trl(tmp_path):
    TextUDMPipeline.from_pretrained(CHECKPOINT_PATH).save_pretrained(tmp_path / "model")
    rows = [{"prompt": [{"role": "user", "content": f"{number}+5="}]} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["--model_name_or_path", str(tmp_path / "model"), "--reward_funcs", "trl.rewards.think_format_reward"]
    argv += ["--dataset_name", str(tmp_path / "rows.jsonl"), "--eval_dataset_name", str(tmp_path / "rows.jsonl")]
    argv += ["--bf16", "False", "--report_to", "none", "--logging_steps", "1", "--num_shown", "2", *SMALL]
    results = load_example("train_text").main([*argv, "--output_dir", str(tmp_path / "out")])
    assert results["before"] == results["after"] == 0.0  # its vocabulary has no "<think>"
    assert [row["prompt"] for row in results["completions"]] == [row["prompt"] for row in rows[:2]]
