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

import math

import pytest
from trl import ModelConfig, TrlParser

from trl_udm import DFlowGRPOConfig, DFlowGRPOTrainer, UDMGRPOConfig
from trl_udm.pipelines.ursa_sizes import PUBLISHED_SIZES

from . import EXAMPLES_DIR, load_example


@pytest.mark.parametrize(
    ("config", "example", "num_generations"),
    [
        ("shapes_paper", "train_geneval", 8),
        ("words_paper", "train_ocr", 8),
        ("arithmetic_paper", "train_text", 8),
        ("moving", "train_video", 8),
        ("ursa_geneval", "train_geneval", 8),
        ("ursa_ocr", "train_ocr", 16),
        ("ursa_pickscore", "train_pickscore", 16),
        ("fudoki_geneval", "train_geneval", 24),
        ("fudoki_pickscore", "train_pickscore", 24),
        ("ursa_1024", "train_pickscore", 16),
        ("ursa_video", "train_pickscore", 8),
    ],
)
def test_the_settings_of_a_file_are_those_of_the_paper(tmp_path, config, example, num_generations):
    parser = TrlParser((load_example(example).ScriptArguments, UDMGRPOConfig, ModelConfig))
    argv = ["--config", str(EXAMPLES_DIR / "configs" / f"{config}.yaml"), "--output_dir", str(tmp_path)]
    if example == "train_pickscore":
        argv += ["--dataset_name", "train.txt", "--eval_dataset_name", "test.txt"]
    script_args, args, model_args = parser.parse_args_and_config([*argv, "--use_cpu", "True"])
    assert args.num_generations == num_generations
    # 16 prompts a step, one update a rollout
    assert args.generation_batch_size == 16 * num_generations * args.num_train_timesteps
    assert args.steps_per_generation == args.gradient_accumulation_steps
    assert args.num_inference_steps == (8 if config.startswith("fudoki") else 10)
    assert (args.num_train_timesteps, args.timestep_window) == (3, [0, 2])
    assert (args.action, args.trajectory, args.guidance_scale) == ("clean", "forward", 1.0)
    if config.startswith("ursa"):
        is_video = config == "ursa_video"
        name, size = {
            "ursa_1024": ("BAAI/URSA-1.7B-IBQ1024", {"height": 1024, "width": 1024}),
            "ursa_video": ("BAAI/URSA-1.7B-FSQ320", {"height": 320, "width": 512, "num_frames": 49}),
        }.get(config, ("BAAI/URSA-1.7B-IBQ512", {"height": 512, "width": 512}))
        assert (model_args.model_name_or_path, args.pipeline_kwargs) == (name, size)
        assert math.prod(PUBLISHED_SIZES[name].build_pipeline().latent_shape(**size)) == {
            "ursa_1024": 4096,
            "ursa_video": 33_280,
        }.get(config, 1024)
        assert (args.learning_rate, model_args.use_peft) == ((1e-4, True) if is_video else (1e-6, False))
        assert (args.adam_beta1, args.adam_beta2, args.weight_decay) == (0.9, 0.95, 0.01)
        assert (args.beta, args.epsilon, args.max_grad_norm, args.bf16) == (0.05, 1e-4, 1.0, True)
        assert (args.num_inference_steps_eval, args.guidance_scale_eval) == (25, 1.0)
    elif config.startswith("fudoki"):
        assert model_args.model_name_or_path == "LucasJinWang/FUDOKI" and args.bf16
        assert (args.learning_rate, args.adam_beta1, args.adam_beta2, args.weight_decay) == (1e-5, 0.9, 0.999, 1e-4)
        assert (args.beta, args.epsilon, args.epsilon_high, args.max_grad_norm) == (0.0, 1e-3, 1.5e-3, 1.0)
        assert (args.num_inference_steps_eval, args.guidance_scale_eval) == (20, 1.0)
        assert (model_args.lora_r, model_args.lora_alpha, model_args.use_peft) == (48, 96, True)
    else:
        assert model_args.model_name_or_path is None


def parse(argv, output_dir, default_config=None):
    load_example("train_geneval")  # so that `common` is found
    from common import ImageArguments, parse_arguments

    return parse_arguments(ImageArguments, [*argv, "--output_dir", str(output_dir)], default_config)


@pytest.mark.parametrize(
    ("config", "num_train_timesteps", "num_updates", "beta"),
    [("shapes", 5, 4, 0.01), ("arithmetic", 5, 4, 0.01), ("words", 3, 1, 0.03)],
)
def test_the_worlds_train_by_the_recipe_of_few_samples(tmp_path, config, num_train_timesteps, num_updates, beta):
    _, args, _ = parse([], tmp_path, f"{config}.yaml")
    # 16 prompts x 8 samples a rollout, and each update has its share of the rows
    assert args.generation_batch_size == 16 * 8 * args.num_train_timesteps and args.num_generations == 8
    assert args.steps_per_generation == num_updates * args.gradient_accumulation_steps
    assert (args.num_train_timesteps, args.timestep_sampling) == (num_train_timesteps, "stratified")
    assert (args.kl_estimator, args.beta) == ("full", beta)
    if num_updates > 1:
        assert args.epsilon == 1e-3
    # The window is the whole grid, of whatever length
    assert args.timestep_window == [0, 10 - num_train_timesteps]
    _, args, _ = parse(["--num_inference_steps", "7"], tmp_path, f"{config}.yaml")
    assert args.timestep_window == [0, 7 - num_train_timesteps]
    most = num_train_timesteps - 1
    with pytest.raises(ValueError, match=f"`num_train_timesteps` must be at most {most}, the steps of the grid, got"):
        parse(["--num_inference_steps", str(most)], tmp_path, f"{config}.yaml")


def test_another_algorithm_has_the_settings_of_the_paper(tmp_path):
    script_args, args, _ = parse(["--algorithm", "dflow_grpo"], tmp_path, "shapes.yaml")
    assert script_args.trainer_class is DFlowGRPOTrainer and isinstance(args, DFlowGRPOConfig)
    assert (args.num_train_timesteps, args.kl_estimator, args.generation_batch_size) == (3, "k3", 384)


def test_a_file_may_choose_another_algorithm(tmp_path):
    argv = ["--config", str(EXAMPLES_DIR / "configs" / "fudoki_dflow.yaml"), "--use_cpu", "True"]
    script_args, args, model_args = parse(argv, tmp_path)
    assert script_args.trainer_class is DFlowGRPOTrainer and isinstance(args, DFlowGRPOConfig)
    assert args.generation_batch_size == 16 * 24 * args.num_train_timesteps and args.num_generations == 24
    assert args.steps_per_generation == args.gradient_accumulation_steps
    assert (args.num_draws, args.old_policy_steps, args.ema_decay, args.ema_steps) == (24, 48, 0.9, 10)
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2, args.weight_decay) == (1e-5, 0.9, 0.999, 1e-4)
    assert (args.beta, args.epsilon, args.epsilon_high, args.scale_rewards) == (0.0, 1e-3, 1.5e-3, "batch")
    assert (model_args.lora_r, model_args.lora_alpha, model_args.use_peft) == (48, 96, True)
