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

"""Training with `DFlowGRPOTrainer` and `DFlowDPOTrainer`: families, options, resuming, and what is refused."""

import pytest
import torch
from datasets import Dataset
from PIL import Image

from trl_udm import (
    DFlowDPOConfig,
    DFlowDPOTrainer,
    DFlowGRPOConfig,
    DFlowGRPOTrainer,
    FUDOKIPipeline,
    UDMGRPOConfig,
    UniformDDIMScheduler,
    URSAPipeline,
)

from ..pipelines.text_families import build_text_pipeline
from ..pipelines.tiny_diffusion_gemma import build_pipeline as build_gemma_pipeline
from ..trainer.resume_worker import LORA, OF_THE_CALL, PROMPTS
from ..trainer.test_resume import assert_equal
from ..trainer.toy_text_family import build_toy_text_pipeline


WIDE = {"epsilon": 0.2, "epsilon_high": 0.2}


def count_a(prompts, completions, **kwargs):
    return [completion.count("a") / max(1, len(completion)) for completion in completions]


def redness(completions, **kwargs):
    return [image.resize((1, 1)).getpixel((0, 0))[0] / 255 for image in completions]


def build_trainer(
    output_dir, pipeline=None, reward=count_a, peft_config=None, config=DFlowGRPOConfig, prompts=PROMPTS, **kwargs
):
    defaults = {
        "num_generations": 4,
        "num_inference_steps": 5,
        "num_inference_steps_eval": 7,
        "num_train_timesteps": 3,
        "num_draws": 3,
        "per_device_train_batch_size": 24,
        "learning_rate": 3e-3,
        "max_steps": 2,
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return (DFlowDPOTrainer if config is DFlowDPOConfig else DFlowGRPOTrainer)(
        build_toy_text_pipeline() if pipeline is None else pipeline,
        reward,
        config(str(output_dir), **{**defaults, **kwargs}),
        train_dataset=prompts,
        eval_dataset=prompts,
        peft_config=peft_config,
    )


def logged(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


@pytest.mark.parametrize("config", [DFlowGRPOConfig, DFlowDPOConfig])
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_a_text_family_learns(tmp_path, peft_config, config):
    options = {"num_generations": 8, "per_device_train_batch_size": 160, "num_train_timesteps": 5, "max_steps": 12}
    options["learning_rate"] = 3e-3 if peft_config is None else 1e-2
    if config is DFlowDPOConfig:
        options |= {"num_pairs": 4, "dpo_beta": 5.0}
    trainer = build_trainer(tmp_path, peft_config=peft_config, config=config, timestep_window=[0, 0], **options)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert rewards[0] < 0.25 and sum(rewards[-3:]) / 3 > 0.6  # chance is 1 in 10
    assert trainer.evaluate()["eval_reward"] > 0.6


def build_family(family, oracle_dir):
    if family == "ursa":
        return URSAPipeline.from_pretrained(oracle_dir / "tiny-ursa", max_prompt_length=16)
    if family == "fudoki":
        return FUDOKIPipeline.from_pretrained(oracle_dir / "fudoki" / "tiny-fudoki", uncond_token_id=342)
    if family == "gemma":
        return build_gemma_pipeline()
    return build_text_pipeline("bert")


@pytest.mark.parametrize("family", ["ursa", "fudoki", "gemma", "text"])
def test_every_family_is_trained(tmp_path, oracle_dir, family):
    is_image = family in ("ursa", "fudoki")
    trainer = build_trainer(
        tmp_path,
        build_family(family, oracle_dir),
        reward=redness if is_image else lambda completions, **kwargs: [len(text) for text in completions],
        prompts=Dataset.from_dict({"prompt": ["a red car", "b"]}),
        max_steps=1,
        beta=0.01,
        logging_steps=1,
        pipeline_kwargs={"height": 64, "width": 64} if family == "ursa" else None,
    )
    before = [weight.clone() for weight in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(*pair) for pair in zip(before, trainer.model.parameters(), strict=True))
    assert logged(trainer, "ratio") == [pytest.approx(1)] and logged(trainer, "kl") == [pytest.approx(0, abs=1e-6)]
    assert logged(trainer, "entropy")[0] > 0 and trainer.evaluate()["eval_loss"] is not None


def test_given_frames_of_a_video_are_no_actions(tmp_path, oracle_dir):
    pipeline = URSAPipeline.from_pretrained(oracle_dir / "video" / "tiny-ursa-video", max_prompt_length=24)
    image = Image.effect_noise((48, 32), 64).convert("RGB")
    dataset = Dataset.from_dict({"prompt": ["a red car"] * 2, "image": [image] * 2})
    trainer = build_trainer(
        tmp_path,
        pipeline,
        reward=lambda completions, **kwargs: [redness(frames)[-1] for frames in completions],
        prompts=dataset,
        max_steps=1,
        pipeline_kwargs={"height": 32, "width": 48, "num_frames": 9},
    )
    trainer.model.train()
    batch = trainer._generate_and_score_completions([dataset[0]] * 24)
    given = pipeline.encode_condition([dataset[0]], (3, 4, 6)).expand(24, -1) >= 0
    assert given.any() and torch.equal(batch["completion_mask"] == 0, given)
    assert torch.equal(batch["completion_ids"][given], batch["prompt_ids"][:, -72:][given])
    trainer.train()
    assert logged(trainer, "ratio") == [pytest.approx(1)]


@pytest.mark.parametrize("is_ddim", [False, True])
def test_log_probabilities_of_the_old_policy_are_those_of_the_rollout(tmp_path, is_ddim):
    """Two updates a rollout: at the first the ratio is 1, and then it is not."""
    pipeline = build_toy_text_pipeline()
    if is_ddim:
        pipeline.scheduler = UniformDDIMScheduler(pipeline.scheduler.config.codebook_size)
    trainer = build_trainer(tmp_path, pipeline, num_iterations=2, max_steps=4, timestep_window=[0, 0], **WIDE)
    trainer.train()
    first, second, third, fourth = logged(trainer, "ratio")
    assert first == pytest.approx(1, abs=1e-6) and third == pytest.approx(1, abs=1e-6)
    assert abs(second - 1) > 1e-5 and abs(fourth - 1) > 1e-5


def test_an_old_policy_draws_the_samples_of_several_updates(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=6, old_policy_steps=3, timestep_window=[0, 0], **WIDE)
    trainer.train()
    ratios = logged(trainer, "ratio")
    assert [abs(ratio - 1) < 1e-6 for ratio in ratios] == [True, False, False, True, False, False]


@pytest.mark.parametrize(
    ("peft_config", "options"),
    [
        (None, {"old_policy_steps": 4, "ema_decay": 0.9, "ema_steps": 2}),
        (LORA, {"steps_per_generation": 4, "per_device_train_batch_size": 12, "beta": 0.01}),
        (LORA, {"num_iterations": 2, "old_policy_steps": 3}),
    ],
    ids=["old policy", "several steps", "both"],
)
def test_a_resumed_run_is_the_unbroken_one(tmp_path, peft_config, options):
    outcomes = []
    for folder, max_steps, resume in (("unbroken", 6, False), ("broken", 3, False), ("broken", 6, True)):
        trainer = build_trainer(
            tmp_path / folder,
            peft_config=peft_config,
            max_steps=max_steps,
            **{"save_strategy": "steps", "save_steps": 3, "timestep_window": [0, 2], **WIDE, **options},
        )
        trainer.train(resume_from_checkpoint=resume)
        history = [
            {name: value for name, value in log.items() if not any(part in name for part in OF_THE_CALL)}
            for log in trainer.state.log_history[:-1]
        ]
        average = [] if trainer.ema is None else trainer.ema.shadow_params
        outcomes.append((trainer.model.state_dict(), trainer.optimizer.state_dict(), average, history))
    assert_equal(outcomes[0], outcomes[2])


def test_the_average_is_updated_every_few_steps(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=3, ema_decay=0.9, ema_steps=3)
    initial = [weight.clone() for weight in trainer.model.parameters()]
    trainer.train()
    assert trainer.ema.cur_decay_value == pytest.approx(3 / 12)
    for average, first, last in zip(trainer.ema.shadow_params, initial, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(average, first + 0.75 * (last - first), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{"average_rates": True}, {"changed_only": True}, {"clip_token_ratios": True}])
def test_options_train(tmp_path, options):
    trainer = build_trainer(
        tmp_path, timestep_window=[0, 0], num_iterations=2, beta=0.1, kl_reference="old", **options
    )
    trainer.train()
    assert logged(trainer, "kl")[1] > 0 and torch.tensor(logged(trainer, "loss")).isfinite().all()
    if "clip_token_ratios" in options:
        assert logged(trainer, "clip_ratio/low_mean") == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draws": 0}, "`num_draws` must be > 0, got 0"),
        ({"old_policy_steps": 0}, "`old_policy_steps` must be > 0 or None, got 0"),
        ({"step_discount": 1.5}, r"`step_discount` must be in \(0, 1\], got 1.5"),
        ({"kl_reference": "new"}, "`kl_reference` must be 'initial' or 'old', got 'new'"),
        ({"clip_token_ratios": True, "epsilon": 1.0}, "`epsilon` must be < 1 with `clip_token_ratios`, got 1.0"),
        ({"clip_token_ratios": True, "importance_sampling_level": "token"}, "`clip_token_ratios` must be False with"),
        ({"action": "clean"}, "`action` must be 'intermediate', got 'clean': an action is a step of the sampler"),
        ({"trajectory": "forward"}, "`trajectory` must be 'backward', got 'forward'"),
        ({"loss_type": "dapo"}, "`loss_type` must be 'grpo', got 'dapo': the loss is that of dFlowGRPO"),
        ({"kl_estimator": "full"}, "`kl_estimator` must be 'k3', got 'full'"),
        ({"guidance_scale": 3.0}, "`guidance_scale` must be 1.0, got 3.0"),
        ({"ema_steps": 0}, "`ema_steps` must be > 0, got 0"),
        ({"config": DFlowDPOConfig, "num_pairs": 3}, r"`num_pairs` must be in \[1, `num_generations` / 2\], got 3"),
        ({"config": DFlowDPOConfig, "dpo_beta": 0.0}, "`dpo_beta` must be > 0, got 0.0"),
        ({"config": DFlowDPOConfig, "beta": 0.1}, "`beta` must be 0: pairs are compared with the policy"),
        (
            {"config": DFlowDPOConfig, "steps_per_generation": 4, "per_device_train_batch_size": 6},
            "fill its 4 steps equally, got 2 groups",
        ),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build_trainer(tmp_path, **options)


def test_schedulers_and_arguments_that_do_not_fit_are_refused(tmp_path):
    pipeline = build_toy_text_pipeline()
    pipeline.scheduler = UniformDDIMScheduler(pipeline.scheduler.config.codebook_size)
    with pytest.raises(ValueError, match="`average_rates` must be False with a `UniformDDIMScheduler`, got True"):
        build_trainer(tmp_path, pipeline, average_rates=True)
    with pytest.raises(TypeError, match="`args` must be a `DFlowGRPOConfig`, got UDMGRPOConfig"):
        build_trainer(tmp_path, config=lambda *args, **kwargs: UDMGRPOConfig(str(tmp_path), bf16=False))
    with pytest.raises(TypeError, match="`args` must be a `DFlowDPOConfig`, got DFlowGRPOConfig"):
        args = DFlowGRPOConfig(str(tmp_path), bf16=False, use_cpu=True)
        DFlowDPOTrainer(build_toy_text_pipeline(), count_a, args, train_dataset=PROMPTS)
    with pytest.raises(TypeError, match="`pipeline` must be a `UDMPipeline`, got str"):
        build_trainer(tmp_path, "pipeline")
