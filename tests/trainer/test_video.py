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

"""Reinforcement learning of videos, on the tiny model of the video oracle."""

import re

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, List
from peft import LoraConfig
from PIL import Image as PILImage

from trl_udm import FrameReward, TextUDMPipeline, UDMGRPOConfig, UDMGRPOTrainer, URSAPipeline
from trl_udm.rewards.frames import flicker, motion_amount
from trl_udm.rewards.images import as_pil_images
from trl_udm.worlds.sums import CHECKPOINT_PATH as SUMS_PATH


SHAPE, NUM_TOKENS, NUM_FRAME_TOKENS = (3, 4, 6), 72, 24
PROMPTS = ["motion=9.0, a red cat", "motion=5.0, two dogs on a hill"]


def brightness(completions, **kwargs):
    return [float(np.mean([np.asarray(frame).mean() for frame in frames])) / 255 for frames in completions]


def make_images(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    return list(map(PILImage.fromarray, pixels))


@pytest.fixture(scope="module")
def image_dataset():
    images = [make_images(0)[0], make_images(1)[0]]
    return Dataset.from_dict({"prompt": PROMPTS, "image": images}).cast_column("image", Image())


def build_trainer(oracle_dir, tmp_path, dataset=None, peft_config=None, reward_funcs=brightness, **kwargs):
    settings = {
        "num_generations": 2,
        "per_device_train_batch_size": 12,
        "num_inference_steps": 5,
        "num_inference_steps_eval": 5,
        "learning_rate": 1e-3,
        "max_steps": 2,
        "pipeline_kwargs": {"height": 32, "width": 48, "num_frames": 9},
        "bf16": False,
        "activation_checkpointing": False,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    pipeline = URSAPipeline.from_pretrained(oracle_dir / "video" / "tiny-ursa-video", max_prompt_length=24)
    pipeline.set_progress_bar_config(disable=True)
    args = UDMGRPOConfig(str(tmp_path), **{**settings, **kwargs})
    dataset = Dataset.from_dict({"prompt": PROMPTS}) if dataset is None else dataset
    return UDMGRPOTrainer(pipeline, reward_funcs, args, train_dataset=dataset, peft_config=peft_config)


def make_batch(trainer, rows):
    """The rows of a generation batch of one sample for each of the dataset's rows."""
    trainer.model.train()
    inputs = [row for row in rows for _ in range(trainer.num_generations * trainer.args.num_train_timesteps)]
    return trainer._generate_and_score_completions(inputs)


# Given frames


@pytest.mark.parametrize(
    "settings", [{}, {"trajectory": "backward"}, {"frame_timesteps": True}, {"shared_noise": True}]
)
def test_given_frames_are_clean_at_time_1_and_do_not_count(oracle_dir, tmp_path, image_dataset, settings):
    trainer = build_trainer(oracle_dir, tmp_path, image_dataset, num_iterations=2, **settings)
    batch = make_batch(trainer, list(image_dataset))
    tokens = trainer.pipeline.encode_condition(list(image_dataset), SHAPE)
    assert (tokens[:, NUM_FRAME_TOKENS:] == -1).all()
    tokens = tokens[:, :NUM_FRAME_TOKENS].repeat_interleave(6, dim=0)
    assert not torch.equal(tokens[0], tokens[6])
    actions, noised_samples = batch["completion_ids"], batch["prompt_ids"][:, -NUM_TOKENS:]
    t, mask = batch["prompt_mask"][:, -NUM_TOKENS:], batch["completion_mask"]
    for one in (actions, noised_samples):
        assert torch.equal(one[:, :NUM_FRAME_TOKENS], tokens)
    assert (t[:, :NUM_FRAME_TOKENS] == 1).all()
    assert (t[:, NUM_FRAME_TOKENS:] < 1).all()
    assert (mask[:, :NUM_FRAME_TOKENS] == 0).all()
    assert (mask[:, NUM_FRAME_TOKENS:] == 1).all()
    assert not torch.equal(noised_samples[:, NUM_FRAME_TOKENS:], actions[:, NUM_FRAME_TOKENS:])
    # The score is the mean over the frames that were drawn
    prompt_ids = batch["prompt_ids"][:, :-NUM_TOKENS]
    logits = trainer.pipeline.denoise(prompt_ids, torch.ones_like(prompt_ids), noised_samples, SHAPE)
    logps = logits.log_softmax(dim=-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    expected = logps[:, NUM_FRAME_TOKENS:].mean(dim=1, keepdim=True)
    torch.testing.assert_close(batch["old_per_token_logps"], expected, atol=1e-5, rtol=0)


def test_given_frames_give_the_loss_no_gradient(oracle_dir, tmp_path, image_dataset):
    trainer = build_trainer(oracle_dir, tmp_path, image_dataset, beta=0.0)
    trainer.current_gradient_accumulation_steps = 1
    batch = make_batch(trainer, list(image_dataset)[:1] * 2)
    losses = []
    for _ in range(2):
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        losses.append([loss.item(), trainer.model.lm_head.weight.grad.clone()])
        # Other labels where nothing counts
        batch["completion_ids"] = batch["completion_ids"].clone()
        batch["completion_ids"][:, :NUM_FRAME_TOKENS] = 0
    assert losses[0][0] == losses[1][0]
    assert torch.equal(losses[0][1], losses[1][1])


def test_diversity_is_that_of_drawn_tokens(oracle_dir, tmp_path, image_dataset):
    trainer = build_trainer(oracle_dir, tmp_path, image_dataset)
    batch = make_batch(trainer, list(image_dataset))
    samples = batch["completion_ids"][::3, NUM_FRAME_TOKENS:].view(2, 2, -1)
    expected = (samples[:, 0] != samples[:, 1]).float().mean().item()
    assert trainer._metrics["train"]["diversity"] == [pytest.approx(expected)]


def test_rows_with_and_without_given_frames_mix(oracle_dir, tmp_path):
    images = [make_images(0), None]
    dataset = Dataset.from_dict({"prompt": PROMPTS, "video": images}).cast_column("video", List(Image()))
    options = {"rollout_batch_size": 3, "async_rewards": True, "timestep_weighting": "elbo"}
    trainer = build_trainer(oracle_dir, tmp_path, dataset, **options)
    mask = make_batch(trainer, list(dataset))["completion_mask"].view(2, 6, *SHAPE)
    assert (mask[0, :, :2] == 0).all()
    assert (mask[0, :, 2:] == 1).all()
    assert (mask[1] == 1).all()
    trainer.train()
    assert all(np.isfinite(log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log)


def test_reward_functions_see_the_given_frame(oracle_dir, tmp_path, image_dataset):
    seen = []

    def reward(completions, image, **kwargs):
        seen.extend(zip(completions, image, strict=True))
        return [0.0] * len(completions)

    trainer = build_trainer(oracle_dir, tmp_path, image_dataset, reward_funcs=reward)
    make_batch(trainer, list(image_dataset))
    assert len(seen) == 4
    for (frames, image), row in zip(seen, image_dataset.select([0, 0, 1, 1]), strict=True):
        assert len(frames) == 9
        assert image == row["image"]


def test_models_of_images_do_not_read_the_columns(oracle_dir, image_dataset):
    pipeline = URSAPipeline.from_pretrained(oracle_dir / "tiny-ursa")
    assert pipeline.encode_condition(list(image_dataset), (1, 2, 2)) is None


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            {"image": PILImage.new("RGB", (40, 48))},
            "`image` must have the size of the output, 32 pixels high and 48 wide",
        ),
        ({"image": PILImage.new("RGBA", (48, 32))}, "`image` must be RGB, got mode 'RGBA'."),
        ({"video": make_images(0)[:4]}, "The number of frames of `video` must be 1 more than a multiple of 4"),
        ({"image": make_images(0)[0], "video": make_images(0)}, "are one condition: give one of them"),
        ({"video": make_images(0) + make_images(1)[:4]}, "all frames, so that none is left to draw. Try 13"),
    ],
)
def test_given_frames_that_do_not_fit_are_refused_before_the_first_rollout(oracle_dir, tmp_path, column, message):
    dataset = Dataset.from_list([{"prompt": prompt, **column} for prompt in PROMPTS])
    with pytest.raises(ValueError, match=re.escape(message)):
        build_trainer(oracle_dir, tmp_path, dataset)


# A time for each frame


def test_each_frame_has_steps_of_its_own(oracle_dir, tmp_path):
    trainer = build_trainer(oracle_dir, tmp_path, frame_timesteps=True)
    trainer.model.train()
    output = trainer._rollout(PROMPTS * 40, "train").output
    noised_samples, _, t = trainer._build_rows(output)
    times = t.view(80, 3, 3, NUM_FRAME_TOKENS)  # sample, step, frame
    assert (times == times[..., :1]).all()
    times = times[..., 0]
    assert len(times[:, 0].unique(dim=0)) > 20  # of the 27 combinations of the starts 0, 1 and 2
    grid = torch.tensor([trainer.pipeline.scheduler.timestep_to_t(step) for step in range(5)])
    steps = (times.unsqueeze(-1) == grid).int().argmax(dim=-1)
    assert torch.equal(steps, steps[:, :1] + torch.arange(3).view(1, 3, 1))
    # The state of a frame is drawn at its time
    same = noised_samples.view(80, 3, *SHAPE).flatten(3) == output.clean_samples.view(80, 1, *SHAPE).flatten(3)
    probabilities = trainer.pipeline.scheduler.probabilities(output.clean_samples.repeat_interleave(3, dim=0), t)
    clean_samples = output.clean_samples.repeat_interleave(3, dim=0).unsqueeze(-1)
    expected = probabilities.gather(-1, clean_samples).view(80, 3, 3, NUM_FRAME_TOKENS)
    for step in range(5):
        is_step = steps == step
        if is_step.any():
            assert same[is_step].float().mean().item() == pytest.approx(expected[is_step].mean().item(), abs=0.05)


def test_frame_timesteps_need_forward_states_and_times_by_token(oracle_dir, tmp_path):
    for settings in ({"trajectory": "backward"}, {"action": "intermediate"}, {"timestep_weighting": "elbo"}):
        with pytest.raises(ValueError, match="`frame_timesteps` must be False with `action="):
            UDMGRPOConfig(str(tmp_path), frame_timesteps=True, bf16=False, **settings)
    pipeline = TextUDMPipeline.from_pretrained(SUMS_PATH)
    args = UDMGRPOConfig(str(tmp_path), frame_timesteps=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match="`frame_timesteps` must be False with a TextUDMPipeline, got True"):
        UDMGRPOTrainer(pipeline, brightness, args, train_dataset=Dataset.from_dict({"prompt": PROMPTS}))


# Whole runs


@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
def test_a_resumed_run_of_videos_equals_an_unbroken_one_and_loads_again(oracle_dir, tmp_path, image_dataset, is_lora):
    async def redness(completions, **kwargs):
        return [float(np.asarray(image)[..., 0].mean()) / 255 for image in completions]

    def build(folder, max_steps):
        return build_trainer(
            oracle_dir,
            tmp_path / folder,
            image_dataset,
            LoraConfig(r=4, target_modules="all-linear") if is_lora else None,
            [FrameReward(redness, frames=3, reduce="min"), motion_amount, flicker],
            reward_weights=[1.0, 0.0, 0.0],
            frame_timesteps=True,
            num_iterations=2,
            save_steps=2,
            max_steps=max_steps,
            log_completions=folder == "unbroken",
        )

    trainers = []
    for folder, max_steps, resume in (("unbroken", 3, False), ("broken", 2, False), ("broken", 3, True)):
        trainer = build(folder, max_steps)
        before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
        trainer.train(resume_from_checkpoint=resume)
        trainers.append([trainer.model.state_dict(), trainer.optimizer.state_dict()["state"], torch.rand(1)])
    (unbroken, states, draw), _, (resumed, resumed_states, resumed_draw) = trainers
    assert all(torch.equal(weight, resumed[name]) for name, weight in unbroken.items())
    assert any(not torch.equal(weight, unbroken[name]) for name, weight in before.items())
    for index, state in states.items():
        assert all(torch.equal(value, resumed_states[index][name]) for name, value in state.items())
    assert torch.equal(draw, resumed_draw)

    logs = trainer.state.log_history[0]
    assert logs["reward"] == logs["rewards/redness/mean"]
    assert logs["rewards/motion_amount/mean"] > 0
    assert logs["rewards/flicker/mean"] > 0
    assert 0 <= logs["images/dark_fraction"] <= 1
    completions = tmp_path / "unbroken" / "completions"
    with PILImage.open(completions / "completions_00001.gif") as video:
        assert video.n_frames == 9
        with PILImage.open(completions / "completions_00001.png") as grid:
            assert grid.size == video.size

    trainer.save_model(str(tmp_path / "saved"))
    source = oracle_dir / "video" / "tiny-ursa-video" if is_lora else tmp_path / "saved"
    loaded = URSAPipeline.from_pretrained(source, **{"max_prompt_length": 24} if is_lora else {})
    if is_lora:
        loaded.load_lora_weights(tmp_path / "saved")
    trainer.model.eval()
    videos = [
        pipeline(
            PROMPTS[0],
            image=image_dataset[0]["image"],
            generator=torch.Generator().manual_seed(0),
            num_inference_steps=3,
            guidance_scale=1.0,
            output_type="latent",
            **trainer.args.pipeline_kwargs,
        ).frames
        for pipeline in (trainer.pipeline, loaded)
    ]
    assert torch.equal(*videos)


def test_an_evaluation_of_videos_reads_its_own_frames(oracle_dir, tmp_path, image_dataset):
    trainer = build_trainer(oracle_dir, tmp_path, per_device_eval_batch_size=2)
    metrics = trainer.evaluate(image_dataset)
    assert 0 < metrics["eval_reward"] < 1


def test_rewards_of_images_say_how_to_reward_videos(oracle_dir, tmp_path):
    def reward(prompts, completions, **kwargs):
        return [0.0 for _ in as_pil_images(completions, len(prompts))]

    trainer = build_trainer(oracle_dir, tmp_path, reward_funcs=reward)
    with pytest.raises(RuntimeError, match="The reward function 'reward' failed") as error:
        trainer.train()
    assert "Wrap the reward in a `FrameReward` for videos." in str(error.value.__cause__)
    with pytest.raises(TypeError, match="`reward_funcs` must be functions where samples are videos, got 'model'"):
        build_trainer(oracle_dir, tmp_path, reward_funcs="model")
