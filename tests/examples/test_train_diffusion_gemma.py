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
from trl import ModelConfig, TrlParser
from trl.import_utils import is_math_verify_available

from tests.pipelines.tiny_diffusion_gemma import build_model, build_pipeline, build_tokenizer
from trl_udm import DiffusionGemmaUDMPipeline, UDMGRPOConfig

from . import EXAMPLES_DIR, load_example


CONFIG = ["--config", str(EXAMPLES_DIR / "configs" / "diffusion_gemma.yaml")]
SMALL = ["--dtype", "float32", "--bf16", "False", "--pipeline_kwargs", '{"gen_length": 16}', "--max_steps", "2"]
SMALL += ["--num_generations", "4", "--num_inference_steps", "6", "--num_inference_steps_eval", "7"]
SMALL += ["--timestep_window", "0", "2", "--per_device_train_batch_size", "12", "--gradient_accumulation_steps", "1"]
SMALL += ["--num_eval_prompts", "3", "--per_device_eval_batch_size", "3", "--lora_r", "4", "--disable_tqdm", "True"]


def answers_early(completions, solution, **kwargs):
    """Reward of messages: how early the solution stands."""
    return [1 / (2 + message["content"].find(text)) for (message,), text in zip(completions, solution, strict=True)]


@pytest.fixture
def problems(tmp_path):
    rows = [{"prompt": f"{number}+1=", "solution": str(number + 1)} for number in range(9)]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--dataset_name", str(tmp_path / "problems.jsonl")]


@pytest.mark.parametrize("extra", [[], ["--use_peft", "False", "--self_conditioning", "True"]])
def test_the_example_trains_and_leaves_its_results(tmp_path, capsys, problems, extra):
    build_pipeline().save_pretrained(tmp_path / "model")
    argv = [*CONFIG, *problems, *SMALL, "--model_name_or_path", str(tmp_path / "model")]
    argv += ["--reward_funcs", "tests.examples.test_train_diffusion_gemma.answers_early", *extra]
    results = load_example("train_diffusion_gemma").main([*argv, "--output_dir", str(tmp_path / "out")])
    assert 0 < results["before"] <= 1 and 0 < results["after"] <= 1
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    with Image.open(tmp_path / "out" / "reward_curve.png") as image:
        assert image.width > 100
    if extra:
        assert DiffusionGemmaUDMPipeline.from_pretrained(tmp_path / "out").latent_shape() == (1, 8)
    else:
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["target_modules"].startswith(r".*\.decoder\.layers") and config["r"] == 4
    assert f"{results['before']:.3f} before" in capsys.readouterr().out


@pytest.mark.skipif(not is_math_verify_available(), reason="the extra `math` is not installed")
def test_a_repository_of_transformers_trains_on_checked_answers(tmp_path, problems):
    build_model().save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    argv = [*CONFIG, *problems, *SMALL, "--model_name_or_path", str(tmp_path / "model")]
    results = load_example("train_diffusion_gemma").main([*argv, "--output_dir", str(tmp_path / "out")])
    assert results == {"before": 0.0, "after": 0.0}  # random letters solve nothing


def test_the_settings_hold_whole_groups(tmp_path):
    parser = TrlParser((load_example("train_diffusion_gemma").ScriptArguments, UDMGRPOConfig, ModelConfig))
    argv = [*CONFIG, "--output_dir", str(tmp_path), "--use_cpu", "True"]
    script_args, args, model_args = parser.parse_args_and_config(argv)
    assert script_args.reward_funcs == ["trl.rewards.accuracy_reward"]
    assert model_args.model_name_or_path == "google/diffusiongemma-26B-A4B-it" and model_args.use_peft
    assert args.generation_batch_size == 8 * args.num_generations * args.num_train_timesteps
    assert args.steps_per_generation == args.gradient_accumulation_steps
