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

"""The numbers come from an independent run of the public reference code, baaivision/URSA at commit 29284bb."""

import copy
import json
import math
import re

import numpy as np
import pytest
import torch
from diffusers.utils import export_to_gif, export_to_video
from PIL import Image
from safetensors.torch import load_file

from trl_udm import AutoencoderVQCosmos3D, UniformDDIMScheduler, URSAPipeline
from trl_udm.pipelines.conditions import read_frames


PROMPTS = ["motion=9.0, a red cat", "motion=5.0, two dogs on a hill"]
NEGATIVE = "worst quality, low quality, inconsistent motion, static, still, blurry, jittery, distorted, ugly"
SIZE = {"height": 32, "width": 48}
RUNS = {
    "t2v": {
        "prompt": PROMPTS,
        "num_frames": 5,
        "guidance_scale": 7,
        "guidance_trunc": 0.45,
        "generator": 71,
        "latent_shape": (2, 4, 6),
    },
    "t2i": {
        "prompt": PROMPTS[0],
        "num_frames": 1,
        "guidance_scale": 1,
        "generator": 73,
        "latent_shape": (1, 4, 6),
    },
    "i2v": {
        "prompt": PROMPTS,
        "num_frames": 9,
        "guidance_scale": 3,
        "guidance_trunc": 0.9,
        "generator": 72,
        "condition": "redraw",
        "latent_shape": (3, 4, 6),
    },
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def video_dir(oracle_dir):
    return oracle_dir / "video"


@pytest.fixture(scope="module")
def i2v(video_dir):
    return load_file(video_dir / "sampling_i2v.safetensors")


@pytest.fixture(scope="module")
def sampling(video_dir, i2v):
    return {**load_file(video_dir / "sampling_t2v.safetensors"), **i2v}


@pytest.fixture(scope="module")
def loaded(video_dir):
    pipe = URSAPipeline.from_pretrained(video_dir / "tiny-ursa-video", max_prompt_length=24)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(loaded):
    """With a fresh transformer's hooks and scheduler, since tests add some and change others."""
    components = {**loaded.components, "scheduler": type(loaded.scheduler).from_config(loaded.scheduler.config)}
    pipe = URSAPipeline(**components, max_prompt_length=24)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt=PROMPTS[0], **kwargs):
    """A short call that returns token ids."""
    settings = {"num_frames": 9, "num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
    return pipe(prompt, **{**settings, **SIZE, "generator": seeded()} | kwargs).images


def initial_state(pipe, **kwargs):
    """The state before the first step."""
    settings = {"num_frames": 9, "num_inference_steps": 1, "output_type": "latent", "return_trajectory": True}
    trajectory = pipe(**{"prompt": PROMPTS, "condition": "redraw", **settings, **SIZE} | kwargs).trajectory
    return trajectory.noised_samples[0].view(-1, 3, 4, 6)


# Against the reference


def test_prompts_become_the_references_ids(pipe, video_dir):
    recorded = json.loads((video_dir / "text.json").read_text(encoding="utf-8"))
    assert pipe.encode_prompt(recorded["prompts"])[0].tolist() == recorded["prompt_ids"]
    assert pipe.encode_prompt([recorded["negative_prompt"]])[0].tolist() == recorded["negative_ids"][:1]


def test_motion_score_is_what_prompts_begin_with(pipe):
    texts = ["a red cat", "two dogs on a hill"]
    for score, prefix in ((9, "motion=9.0, "), (5.25, "motion=5.2, "), (1.0, "motion=1.0, ")):
        by_hand = draw(pipe, [prefix + text for text in texts])
        assert torch.equal(draw(pipe, texts, motion_score=score), by_hand)


def test_shapes_are_the_references(pipe, video_dir):
    for case in json.loads((video_dir / "shapes_and_times.json").read_text(encoding="utf-8"))["latents_shape"]:
        size = {name: case[name] for name in ("height", "width", "num_frames")}
        if [case["frames decoded without tiling"], *case["pixels decoded"]] == [
            case["num_frames"],
            *list(size.values())[:2],
        ]:
            assert pipe.latent_shape(**size) == tuple(case["latents_shape"])
        else:  # what the reference's tokenizer does not give back
            with pytest.raises(ValueError, match="Try "):
                pipe.latent_shape(**size)
    assert pipe.latent_shape() == (1, 40, 64)


def test_times_are_the_references(pipe, video_dir):
    for name, times in json.loads((video_dir / "shapes_and_times.json").read_text())["timestep_to_t"].items():
        steps, shift = re.fullmatch(r"n=(\d+),shift=([\d.]+)", name).groups()
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=float(shift))
        scheduler.set_timesteps(int(steps))
        assert [scheduler.timestep_to_t(step) for step in range(int(steps))] == times


def test_positions_are_the_references(pipe, video_dir):
    for name, recorded in load_file(video_dir / "rope.safetensors").items():
        shape, shift = re.fullmatch(r"pos\.(\S+)\.shift(\d+)", name).groups()
        position_ids = pipe.prepare_position_ids(int(shift), tuple(map(int, shape.split("x"))))
        assert torch.equal(position_ids[int(shift) :], recorded[0])


@torch.no_grad()
def test_logits_of_videos_are_the_references(pipe, video_dir):
    oracle = load_file(video_dir / "logits.safetensors")
    for case in ("2x4x6", "3x4x4", "4x2x3"):
        latents, input_ids = oracle[f"{case}.latents"], oracle[f"{case}.input_ids"]
        prompt_ids = input_ids[:, :24]
        inputs = pipe.prepare_denoiser_inputs(
            prompt_ids, torch.ones_like(prompt_ids), latents.flatten(1), latents.shape[1:]
        )
        assert torch.equal(inputs["input_ids"], input_ids)
        assert torch.equal(inputs["position_ids"][0], oracle[f"{case}.rope_pos"])
        torch.testing.assert_close(pipe.transformer(**inputs).logits, oracle[f"{case}.logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("run", RUNS)
def test_sampler_along_the_references_states_gives_its_logits_and_frames(pipe, sampling, run):
    settings = {name: value for name, value in RUNS[run].items() if name != "latent_shape"}
    recorded = {name.removeprefix(f"{run}."): value for name, value in sampling.items() if name.startswith(f"{run}.")}
    states, steps, inputs = [*recorded["x_t"], recorded["final"].flatten(1)], [], []
    if run == "i2v":
        settings["image"] = sampling["image"].numpy()

    def follow(pipe, step, timestep, tensors):
        steps.append((pipe.scheduler.timestep_to_t(timestep), tensors["logits"]))
        return {"latents": states[step + 1]}

    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs), with_kwargs=True
    )
    output = pipe(
        **settings | SIZE | {"generator": seeded(settings["generator"])},
        negative_prompt=NEGATIVE,
        num_inference_steps=6,
        output_type="latent",
        return_trajectory=True,
        callback_on_step_end=follow,
        callback_on_step_end_tensor_inputs=["latents", "logits"],
    )
    hook.remove()
    assert torch.equal(output.trajectory.noised_samples, recorded["x_t"])  # the first is drawn, and conditioned
    assert torch.equal(inputs[0]["input_ids"], recorded["input_ids_step0"])
    assert torch.equal(inputs[0]["position_ids"][0], recorded["rope_pos"])
    assert [t for t, _ in steps] == recorded["t"].tolist()
    logits = torch.stack([logits for _, logits in steps])
    if len(recorded["step_logits"]) == 3:
        logits = logits[[0, 2, 5]]
    torch.testing.assert_close(logits, recorded["step_logits"], atol=1e-3, rtol=0)
    assert torch.equal(output.images, recorded["final"])
    frames = pipe.vae.decode_ids(output.images).sample
    torch.testing.assert_close(frames, recorded["decoded"], atol=1e-5, rtol=0)
    # The reference cuts fractions of a gray level off, where diffusers' processor rounds
    pixels = (recorded["decoded"] * 127.5 + 127.5).clamp(0, 255).permute(0, 2, 3, 4, 1)
    decoded = pipe.decode(output.images.flatten(1), RUNS[run]["latent_shape"], output_type="np")
    assert np.abs(decoded.reshape(pixels.shape) * 255 - pixels.numpy()).max() < 1e-2


@pytest.mark.parametrize("run", RUNS)
def test_transitions_follow_from_the_references_draws(pipe, sampling, run):
    recorded = {name.removeprefix(f"{run}."): value for name, value in sampling.items() if name.startswith(f"{run}.")}
    pipe.scheduler.set_timesteps(6)
    for step in range(5):
        x_t, x_1, t = recorded["x_t"][step], recorded["x1"][step], pipe.scheduler.timestep_to_t(step)
        rates = pipe.scheduler.velocity(x_t, x_1, t)
        step_size = pipe.scheduler.timestep_to_t(step + 1) - t
        jump_prob = -torch.expm1(-step_size * rates.sum(dim=-1))
        torch.testing.assert_close(jump_prob, recorded["jump_prob"][step], atol=1e-5, rtol=0)
        is_jumping, target = recorded["u"][step] < jump_prob, recorded["target"][step]
        assert torch.equal(is_jumping, target >= 0)
        assert (rates.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1) > 0)[is_jumping].all()
        assert torch.equal(torch.where(is_jumping, target, x_t), recorded["x_t"][step + 1])
    assert torch.equal(recorded["x1"][5], recorded["final"].flatten(1))


def test_each_frame_has_its_own_time(pipe, video_dir):
    oracle = load_file(video_dir / "forward_noise.safetensors")
    for case in ("drawn", "i2v_like", "synchronous"):
        x_1, t = oracle[f"{case}.x1"], oracle[f"{case}.t"]
        torch.testing.assert_close(pipe.scheduler.probabilities(x_1, t), oracle[f"{case}.prob"], atol=1e-6, rtol=0)
        for noised_samples in (pipe.scheduler.add_noise(x_1, t, seeded()), oracle[f"{case}.x_t"]):
            assert pipe.scheduler.probabilities(x_1, t).gather(-1, noised_samples.unsqueeze(-1)).min() > 0
    sigma = 1 - 0.999 * oracle["drawn.uniform_draw"]
    torch.testing.assert_close(1 - 2 * sigma / (1 + sigma), oracle["drawn.t"].flatten(), atol=1e-6, rtol=0)
    clean_first = torch.tensor([[1.0, 0.0, 0.0]])
    noised_samples = pipe.scheduler.add_noise(oracle["i2v_like.x1"], clean_first, seeded())
    assert torch.equal(noised_samples[:, 0], oracle["i2v_like.x1"][:, 0])
    assert not torch.equal(noised_samples[:, 1], oracle["i2v_like.x1"][:, 1])


@pytest.mark.parametrize("run", ["train_async", "train_sync"])
def test_loss_and_gradients_of_videos_are_the_references(loaded, video_dir, run):
    oracle = load_file(video_dir / "forward_noise.safetensors")
    recorded = json.loads((video_dir / "forward_noise.json").read_text(encoding="utf-8"))[run]
    oracle = {name.removeprefix(f"{run}."): value for name, value in oracle.items() if name.startswith(f"{run}.")}
    x_1, input_ids = oracle["x1"], oracle["input_ids"]
    prompt_ids, noised_samples = input_ids[:, :24], input_ids[:, 25:] - loaded.transformer.config.text_vocab_size
    rows = (prompt_ids, torch.ones_like(prompt_ids), noised_samples, tuple(x_1.shape[1:]), x_1.flatten(1))
    inputs = loaded.prepare_denoiser_inputs(*rows)
    assert torch.equal(inputs["input_ids"], input_ids)
    assert torch.equal(inputs["position_ids"], oracle["rope_pos"])
    assert torch.equal(inputs["shift_labels"], oracle["labels"].roll(-1, dims=1))
    t = oracle["t"].view(2, -1).expand(2, 3)  # of each frame
    table = loaded.scheduler.probabilities(x_1, t).flatten(1, 3)
    assert table.gather(-1, noised_samples.unsqueeze(-1)).min() > 0  # what was drawn can be drawn

    network = copy.deepcopy(loaded.transformer)
    logps, _, _ = loaded.score_with_kl(network, None, *rows, t.repeat_interleave(16, dim=1))
    loss = -logps.mean()
    loss.backward()
    assert loss.item() == pytest.approx(recorded["loss"], abs=1e-5)
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    norms = {name: gradient.norm().item() for name, gradient in gradients.items()}
    norms["__total__"] = math.hypot(*norms.values())
    assert norms == pytest.approx(recorded["grad_norm"], abs=1e-6 * norms["__total__"])
    torch.testing.assert_close(gradients["model.norm.weight"], oracle["grad.model.norm.weight"], atol=1e-6, rtol=0)


def test_conditions_start_as_the_references(pipe, i2v):
    image, cond_latents = i2v["image"], i2v["init.cond_latents"]
    cases = {
        "image": (80, {"image": image.numpy()}),
        "cond_latents2": (83, {"cond_latents": cond_latents[:, :2]}),
        "indices0_2": (84, {"cond_latents": cond_latents, "cond_indices": [0, 2]}),
    }
    for case, (seed, condition) in cases.items():
        state = initial_state(pipe, generator=seeded(seed), **condition)
        assert torch.equal(state, i2v[f"init.{case}.latents"])
    latents = i2v["init.image.initial_random"]
    before = latents.clone()
    assert torch.equal(initial_state(pipe, latents=latents, image=image.numpy()), i2v["init.image.latents"])
    assert torch.equal(latents, before)
    tokens = pipe.vae.encode_to_ids((image.float() - 127.5).div(127.5).permute(2, 0, 1).unsqueeze(0))
    assert torch.equal(tokens, i2v["image_ids"][0].long())


def test_noise_of_a_condition_is_that_of_the_reference(pipe, i2v):
    image = i2v["image"].numpy()
    tokens = i2v["image_ids"].long()
    table = pipe.scheduler.probabilities(tokens, 0.7)
    torch.testing.assert_close(table, i2v["cond_prob_t0.7"], atol=1e-6, rtol=0)
    state = initial_state(pipe, generator=seeded(81), image=image, cond_noise_scale=0.3)
    assert torch.equal(state[:, 1:], i2v["init.image_noise0.3.latents"][:, 1:])  # drawn before the noise
    assert torch.equal(state[0, 0], state[1, 0])  # noised once for all samples
    assert not torch.equal(state[:1, :1], tokens)
    counts = torch.zeros(200)
    for seed in range(60):
        state = initial_state(pipe, prompt="", generator=seeded(seed), image=image, cond_noise_scale=0.3)
        counts += torch.bincount(state[0, 0].flatten(), minlength=200)
    expected = table.flatten(0, -2).sum(dim=0)
    assert (counts / 60 - expected).abs().max() < 0.5
    assert torch.equal(initial_state(pipe, image=image, cond_noise_scale=1e-6)[:, :1], tokens.expand(2, -1, -1, -1))


# What is kept


@pytest.mark.parametrize("cond_noise_scale", [0.0, 0.5])
def test_clamped_frames_stay_and_redrawn_ones_do_not(pipe, i2v, cond_noise_scale):
    settings = {"image": i2v["image"].numpy(), "num_inference_steps": 6, "cond_noise_scale": cond_noise_scale}
    tokens = i2v["image_ids"].long().flatten()
    output = pipe(PROMPTS, num_frames=9, **SIZE, **settings, output_type="latent", return_trajectory=True)
    assert torch.equal(output.images[:, 0].flatten(1), tokens.expand(2, -1))
    trajectory = output.trajectory
    shown = trajectory.noised_samples[:, :, :24]
    assert torch.equal(shown, shown[:1].expand(6, -1, -1))
    assert torch.equal(shown[0, 0], tokens) == (cond_noise_scale == 0)
    assert torch.equal(trajectory.pred_original_samples[:, :, :24], tokens.expand(6, 2, -1))
    assert torch.equal(trajectory.pred_original_samples[-1], output.images.flatten(1))
    assert len(trajectory.noised_samples[:, 0, 24:].unique(dim=0)) > 2
    redrawn = draw(pipe, PROMPTS, **settings, condition="redraw")
    assert (redrawn[:, 0].flatten(1) == tokens).float().mean() < 0.5


def test_continuation_keeps_the_frames_of_the_video(pipe):
    clip = draw(pipe, num_frames=9, output_type="np")[0]
    tokens = pipe.vae.encode_to_ids(torch.from_numpy(clip[:5]).permute(3, 0, 1, 2).unsqueeze(0) * 2 - 1)
    kinds = [clip[:5], torch.from_numpy(clip[:5]).permute(0, 3, 1, 2), list(clip[:5])]
    samples = [draw(pipe, video=frames) for frames in kinds]
    for sample in samples:
        assert torch.equal(sample[:, :2], tokens)
        assert torch.equal(sample, samples[0])
    frames = [Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in clip[:5]]
    batch = draw(pipe, PROMPTS, video=[frames, frames[::-1]])
    assert batch.shape == (2, 3, 4, 6)
    assert not torch.equal(batch[0, :2], batch[1, :2])


def test_conditions_are_those_of_their_prompts(pipe, i2v):
    images = np.stack([i2v["image"].numpy(), 255 - i2v["image"].numpy()])
    tokens = torch.cat([draw(pipe, image=image)[:, 0] for image in images])
    assert not torch.equal(*tokens)
    for several in (images, list(images), list(map(Image.fromarray, images))):
        samples = draw(pipe, PROMPTS, image=several, num_images_per_prompt=2)
        assert torch.equal(samples[:, 0], tokens[[0, 0, 1, 1]])
    shared = draw(pipe, PROMPTS, image=images[0], num_images_per_prompt=2)
    assert torch.equal(shared[:, 0], tokens[[0, 0, 0, 0]])


def test_each_sample_is_what_its_generator_alone_gives(pipe, i2v):
    settings = {"image": i2v["image"].numpy(), "cond_noise_scale": 0.5, "num_inference_steps": 2}
    together = draw(pipe, PROMPTS, generator=[seeded(1), seeded(2)], **settings)
    for sample, prompt, seed in zip(together, PROMPTS, (1, 2), strict=True):
        assert torch.equal(draw(pipe, prompt, generator=[seeded(seed)], **settings)[0], sample)


def test_frames_of_every_kind_are_one_tensor():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 16, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(3, 0, 1, 2).unsqueeze(0) / 127.5 - 1
    channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    kinds = [list(map(Image.fromarray, pixels)), pixels, pixels / np.float32(255), channels_first]
    flipped = [frame[:, ::-1].copy()[:, ::-1] for frame in pixels]
    for frames in [*kinds, channels_first / 255, torch.from_numpy(pixels), flipped]:
        torch.testing.assert_close(read_frames("video", [frames], 8, 16), expected, atol=1e-6, rtol=0)
    assert read_frames("video", [pixels, pixels], 8, 16).shape == (2, 3, 3, 8, 16)


# The time grid


def test_flow_shift_is_that_of_one_call(pipe):
    before = dict(pipe.scheduler.config)
    of_scheduler = draw(pipe, num_inference_steps=4)
    times = []

    def record(pipe, step, timestep, tensors):
        times.append(pipe.scheduler.timestep_to_t(timestep))
        return {}

    shifted = draw(pipe, num_inference_steps=4, flow_shift=5.0, callback_on_step_end=record)
    assert times == [0.0, *(1 - 5 * s / (1 + 4 * s) for s in (0.75, 0.5, 0.25))]
    assert not torch.equal(shifted, of_scheduler)
    assert dict(pipe.scheduler.config) == before
    assert torch.equal(draw(pipe, num_inference_steps=4), of_scheduler)
    assert torch.equal(draw(pipe, num_inference_steps=4, flow_shift=2.0), of_scheduler)

    def fail(*args):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        draw(pipe, flow_shift=5.0, callback_on_step_end=fail)
    assert dict(pipe.scheduler.config) == before


# Output


def test_output_types_of_videos_have_their_shapes_and_ranges(pipe):
    settings = {"num_frames": 5, "num_inference_steps": 2, "num_images_per_prompt": 2, **SIZE}
    outputs = {
        name: pipe(PROMPTS, generator=seeded(), output_type=name, **settings) for name in ("pil", "np", "pt", "latent")
    }
    videos = outputs["pil"].frames
    assert videos is outputs["pil"].images
    assert [len(frames) for frames in videos] == [5] * 4
    assert all(isinstance(frame, Image.Image) and frame.size == (48, 32) for frames in videos for frame in frames)
    assert outputs["np"].frames.shape == (4, 5, 32, 48, 3)
    tensor = outputs["pt"].frames
    assert tensor.shape == (4, 5, 3, 32, 48)
    assert 0 <= tensor.min() < tensor.max() <= 1
    assert np.array_equal(tensor.permute(0, 1, 3, 4, 2).numpy(), outputs["np"].frames)
    assert outputs["latent"].frames.shape == (4, 2, 4, 6)
    assert torch.equal(pipe.decode(outputs["latent"].frames.flatten(1), (2, 4, 6), output_type="pt"), tensor)
    image = pipe(PROMPTS[0], generator=seeded(), num_inference_steps=2, **SIZE).images[0]
    assert image.size == (48, 32)


def test_videos_are_exported_as_gif(pipe, tmp_path):
    path = export_to_gif(draw(pipe, output_type="pil")[0], str(tmp_path / "clip.gif"))
    with Image.open(path) as clip:
        assert (clip.n_frames, clip.size) == (9, (48, 32))


@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_videos_are_exported_as_mp4(pipe, tmp_path, output_type):
    pytest.importorskip("imageio_ffmpeg", reason="imageio is not installed: `pip install imageio[ffmpeg]`")
    export_to_video(draw(pipe, output_type=output_type)[0], str(tmp_path / "clip.mp4"), fps=12)
    assert (tmp_path / "clip.mp4").stat().st_size > 0


# Saving and loading


@torch.no_grad()
def test_saved_videos_are_the_same(pipe, i2v, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = URSAPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    state = torch.randint(200, (2, 48), generator=seeded())
    logits = [each.denoise(*each.encode_prompt(PROMPTS), state, (2, 4, 6)) for each in (pipe, loaded)]
    assert torch.equal(*logits)
    image = i2v["image"].numpy()
    clip = draw(pipe, output_type="np", num_frames=5)[0]
    for condition in ({}, {"image": image}, {"video": clip}, {"image": image, "condition": "redraw"}):
        videos = [draw(each, output_type="np", guidance_scale=3.0, **condition) for each in (pipe, loaded)]
        assert np.array_equal(*videos)
    assert loaded.config.vae_temporal_scale_factor == 4
    assert isinstance(loaded.vae, AutoencoderVQCosmos3D)


def test_without_a_tokenizer_of_videos_the_tokens_are_the_same(pipe, i2v, video_dir, tmp_path):
    pipe.save_pretrained(tmp_path)
    condition = {"cond_latents": i2v["init.cond_latents"][:, :1]}
    expected = draw(pipe, **condition)
    for folder in (tmp_path, video_dir / "tiny-ursa-video"):
        without = URSAPipeline.from_pretrained(folder, vae=None, max_prompt_length=24)
        without.set_progress_bar_config(disable=True)
        assert torch.equal(draw(without, **condition), expected)
        with pytest.raises(ValueError, match="The pipeline has no `vae`"):
            draw(without, image=i2v["image"].numpy())
    without.save_pretrained(tmp_path / "without")
    assert URSAPipeline.from_pretrained(tmp_path / "without").latent_shape(32, 48, 9) == (3, 4, 6)


def test_pipeline_without_weights_is_one_of_videos(pipe, video_dir, tmp_path):
    pipe.save_pretrained(tmp_path)
    for folder in (tmp_path, video_dir / "tiny-ursa-video"):
        planned = URSAPipeline.from_configs(folder)
        assert planned.latent_shape(32, 48, 9) == (3, 4, 6)
        assert planned.scheduler.config.codebook_dim == 8  # of its own codes, not the 3 of the tokenizer's
        assert {name: x.shape for name, x in planned.vae.state_dict().items()} == {
            name: x.shape for name, x in pipe.vae.state_dict().items()
        }


def test_videos_are_drawn_in_lower_precision(video_dir, i2v):
    pipe = URSAPipeline.from_pretrained(video_dir / "tiny-ursa-video", dtype=torch.bfloat16, max_prompt_length=24)
    pipe.set_progress_bar_config(disable=True)
    video = draw(pipe, image=i2v["image"].numpy(), output_type="pt")
    assert video.shape == (1, 9, 3, 32, 48)
    assert video.isfinite().all()


# Refusals


IMAGE = np.zeros((32, 48, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 48}, "`num_frames` must be 1 more than a multiple of 4, got 48: the video tokenizer does not"),
        ({"num_frames": 6}, "Try 5."),
        ({"num_frames": 0}, "Try 1."),
        ({"height": 36}, "`height` must be a positive multiple of 8, got 36. Try 32."),
        (
            {"image": np.zeros((36, 52, 3), np.uint8)},
            "`image` must have the size of the output, 32 pixels high and 48",
        ),
        ({"image": np.zeros((32, 48, 4), np.uint8)}, "and 3 channels, got shape (32, 48, 4)."),
        ({"image": Image.new("RGBA", (48, 32))}, "`image` must be RGB, got mode 'RGBA'. Pass `image.convert('RGB')`."),
        ({"video": [Image.new("L", (48, 32))]}, "`video` must be RGB, got mode 'L'."),
        ({"image": IMAGE.astype(np.float32) + 200}, "`image` must be `uint8`, or floats in [0, 1], got torch.float32"),
        ({"image": IMAGE.astype(np.int64)}, "`image` must be `uint8`, or floats in [0, 1], got torch.int64"),
        ({"image": [IMAGE] * 3}, "`image` must be one condition, or one for each of the 2 prompts, got 3."),
        ({"video": [[IMAGE] * 5, [IMAGE]]}, "`video` must have one number of frames for all samples, got [1, 5]."),
        ({"video": [IMAGE] * 6}, "The number of frames of `video` must be 1 more than a multiple of 4, and at most 9"),
        ({"video": [IMAGE] * 13}, "and at most 9, got 13: the video tokenizer"),
        ({"video": []}, "`video` must be frames, in a list or along the first axis, got list."),
        ({"video": IMAGE}, "`video` must be frames, in a list or along the first axis, got ndarray."),
        ({"video": [[]]}, "`video` must have one number of frames for all samples, got [0]."),
        ({"image": IMAGE, "video": [IMAGE]}, "are one condition: give one of them, got ['image', 'video']."),
        ({"image": IMAGE, "num_frames": 1}, "`num_frames` must be above 1 with this condition"),
        (
            {"video": [IMAGE] * 9},
            "all frames, so that none is left to draw. Try 13, or `condition='redraw'`.",
        ),
        ({"image": IMAGE, "cond_indices": []}, "must be a list of latent frames of the condition, in [0, 1), got []"),
        (
            {"image": IMAGE, "cond_indices": [1]},
            "must be a list of latent frames of the condition, in [0, 1), got [1]",
        ),
        ({"image": IMAGE, "cond_indices": [-1]}, "of the condition, in [0, 1), got [-1]. Leave it out to take all"),
        ({"image": IMAGE, "cond_indices": 0}, "must be a list of latent frames of the condition, in [0, 1), got 0."),
        ({"image": IMAGE, "cond_indices": [True]}, "of the condition, in [0, 1), got [True]."),
        ({"cond_indices": [0]}, "`cond_indices` must be None without a condition, got [0]."),
        ({"image": IMAGE, "cond_noise_scale": 1.5}, "`cond_noise_scale` must be in [0, 1], got 1.5. Try 1.0."),
        ({"image": IMAGE, "cond_noise_scale": -0.5}, "`cond_noise_scale` must be in [0, 1], got -0.5. Try 0.0."),
        ({"cond_noise_scale": 0.5}, "`cond_noise_scale` must be 0 without a condition, got 0.5."),
        ({"image": IMAGE, "condition": "keep"}, "`condition` must be 'clamp' or 'redraw', got 'keep'."),
        ({"motion_score": 11}, "`motion_score` must be in [1, 10], got 11. Try 10.0."),
        ({"motion_score": 0.0}, "`motion_score` must be in [1, 10], got 0.0. Try 1.0."),
        ({"flow_shift": 0.0}, "`flow_shift` must be a number > 0, and None for a scheduler without `shift`, got 0.0"),
        ({"flow_shift": float("inf")}, "got inf for `KineticOptimalScheduler`."),
        (
            {"cond_latents": torch.zeros(1, 4, 4, 6, dtype=torch.long)},
            "`cond_latents` must be a `torch.long` tensor of shape (batch_size, num_latent_frames, 4, 6), with at",
        ),
        ({"cond_latents": torch.zeros(1, 1, 4, 7, dtype=torch.long)}, "got torch.int64 of shape (1, 1, 4, 7)."),
        ({"cond_latents": torch.zeros(1, 1, 4, 6)}, "as the output, got torch.float32 of shape (1, 1, 4, 6)."),
        ({"cond_latents": torch.zeros(3, 1, 4, 6, dtype=torch.long)}, "for each of the 2 prompts, got 3."),
        ({"cond_latents": torch.full((1, 1, 4, 6), 200)}, "must have ids in [0, 200), got ids from 200 to 200."),
        ({"image": IMAGE, "num_inference_steps": 0}, "`num_inference_steps` must be > 0, got 0."),
        ({"image": IMAGE, "num_images_per_prompt": 1.5}, "`num_images_per_prompt` must be > 0, got 1.5."),
        ({"image": IMAGE, "guidance_trunc": 2}, "`guidance_trunc` must be in [0, 1], got 2."),
        ({"image": IMAGE, "negative_prompt": ["a"]}, "`negative_prompt` must have one entry for each prompt (2), got"),
        ({"image": IMAGE, "latents": torch.zeros(2, 7, dtype=torch.long)}, "`latents` must have shape (2, 72)"),
        ({"image": IMAGE, "generator": [seeded()] * 3}, "`generator`"),
        (
            {"image": IMAGE, "callback_on_step_end_tensor_inputs": ["x"]},
            "`callback_on_step_end_tensor_inputs` has to be in",
        ),
    ],
)
def test_bad_arguments_of_videos_are_refused_before_any_compute(pipe, changes, message):
    calls = []
    networks = (pipe.transformer, pipe.vae.encoder)
    hooks = [network.register_forward_pre_hook(lambda *args: calls.append(1)) for network in networks]
    with pytest.raises(ValueError, match=re.escape(message)):
        draw(pipe, **{"prompt": PROMPTS} | changes)
    for hook in hooks:
        hook.remove()
    assert calls == []


def test_conditions_that_do_not_fit_the_batch_are_refused(pipe):
    with pytest.raises(
        ValueError, match=re.escape("`condition` must have shape (C, 72), with C a divisor of 3, got (2")
    ):
        encoded = pipe.encode_prompt(["", "", ""])
        pipe.sample_tokens(*encoded, (3, 4, 6), 2, condition=torch.full((2, 72), -1))


def test_frames_of_no_known_type_are_refused(pipe):
    with pytest.raises(TypeError, match="`image` must be made of PIL images, arrays or tensors, got str."):
        draw(pipe, image="image.png")


def test_a_scheduler_without_shift_takes_no_flow_shift(pipe):
    pipe.scheduler = UniformDDIMScheduler(codebook_size=200)
    with pytest.raises(ValueError, match="got 2.0 for `UniformDDIMScheduler`."):
        draw(pipe, flow_shift=2.0)
    assert draw(pipe, image=IMAGE).shape == (1, 3, 4, 6)


def test_frames_that_the_originals_windows_lose_are_refused(pipe):
    pipe.vae = AutoencoderVQCosmos3D.from_config(pipe.vae.config, temporal_tiling="original", sample_frames=17)
    assert pipe.latent_shape(32, 48, 17) == (5, 4, 6)
    with pytest.raises(ValueError, match="and at most 17, got 49: the video tokenizer .* Try 17."):
        pipe.latent_shape(32, 48, 49)


def test_strides_that_are_not_inverted_are_refused(loaded):
    vae = AutoencoderVQCosmos3D.from_config(loaded.vae.config, spatial_stride=4, temporal_stride=8)
    message = "got (4, 8) pixels and frames a token in the encoder, and (8, 8) in the decoder."
    with pytest.raises(ValueError, match=re.escape(message)):
        URSAPipeline(**{**loaded.components, "vae": vae})


def test_image_models_take_no_frames(oracle_dir):
    pipe = URSAPipeline.from_pretrained(oracle_dir / "tiny-ursa")
    with pytest.raises(ValueError, match="`num_frames` must be 1, got 5: the tokenizer is one of images. Try 1."):
        pipe("a cat", num_frames=5)
    with pytest.raises(ValueError, match="`image` must be None, got one: the pipeline draws images. Load a model of"):
        pipe("a cat", image=np.zeros((32, 32, 3), np.uint8))
