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

"""The numbers come from an independent run of the public reference code, Yovecent/UDM-GRPO at commit d1bec49."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from diffusers.utils import logging
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from trl.trainer.utils import add_fused_lm_head

from trl_udm import URSAConfig, URSAForImageGeneration, URSAPipeline
from trl_udm.models.autoencoder_vq import AutoencoderVQ
from trl_udm.models.token_scores import TILE_WIDTH
from trl_udm.pipelines.pipeline_output import UDMSamplerOutput, UDMTrajectory, URSAPipelineOutput
from trl_udm.schedulers.scheduling_kinetic_optimal import KineticOptimalScheduler
from trl_udm.schedulers.scheduling_uniform_ddim import UniformDDIMScheduler
from trl_udm.worlds.words import CHECKPOINT_PATH as WORDS_CHECKPOINT_PATH


PROMPTS = ["a photo of a red car", 'a sign that says "hello"']
ORIGINAL_WEIGHTS = "diffusion_pytorch_model.safetensors"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def load(folder, **kwargs):
    pipe = URSAPipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def predict(pipe, prompts=PROMPTS, seed=3):
    """Logits for given prompts and a seeded state."""
    prompt_ids, prompt_mask = pipe.encode_prompt(prompts)
    state = torch.randint(256, (len(prompts), 64), generator=seeded(seed))
    return pipe.denoise(prompt_ids, prompt_mask, state, (1, 8, 8))


def draw(pipe, prompt=PROMPTS[0], **kwargs):
    """A short call that returns token ids."""
    settings = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent", "generator": seeded()}
    return pipe(prompt, **settings | kwargs).images


def edit_weights(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def original_dir(oracle_dir):
    return oracle_dir / "tiny-ursa"


@pytest.fixture(scope="module")
def sampling(oracle_dir):
    return load_file(oracle_dir / "sampling.safetensors")


@pytest.fixture
def pipe(original_dir):
    return load(original_dir, max_prompt_length=16)


@pytest.fixture(params=["original", "own"])
def saved_dir(request, original_dir, tmp_path):
    """A folder in either format, to be damaged."""
    folder = tmp_path / "saved"
    if request.param == "original":
        shutil.copytree(original_dir, folder)
    else:
        load(original_dir, max_prompt_length=16).save_pretrained(folder)
    return folder


def weights_of(folder, component):
    (path,) = (folder / component).glob("*.safetensors")
    return path


# Against the reference


def test_prompts_become_the_references_ids(pipe, oracle_dir):
    recorded = json.loads((oracle_dir / "tokenization.json").read_text(encoding="utf-8"))
    prompts = list(recorded["ids"])
    prompt_ids, prompt_mask = pipe.encode_prompt(prompts)
    assert prompt_ids.tolist() == list(recorded["ids"].values())
    lengths = [min(len(ids), 16) for ids in recorded["unpadded"].values()]
    assert prompt_mask.tolist() == [[0] * (16 - length) + [1] * length for length in lengths]


@pytest.mark.parametrize("step", [0, 4, 9])
@torch.no_grad()
def test_denoiser_sees_and_says_what_the_references_does(pipe, sampling, step):
    prompt_ids, prompt_mask = pipe.encode_prompt(PROMPTS)
    state = sampling[f"cfg1.step{step}.x_t"]
    inputs = pipe.prepare_denoiser_inputs(prompt_ids, prompt_mask, state, (1, 8, 8))
    assert torch.equal(inputs["input_ids"], sampling[f"cfg1.step{step}.input_ids"])
    recorded = sampling[f"cfg1.step{step}.raw_logits"]
    torch.testing.assert_close(pipe.transformer(**inputs).logits, recorded, atol=1e-4, rtol=0)
    logits = pipe.denoise(prompt_ids, prompt_mask, state, (1, 8, 8))
    torch.testing.assert_close(logits, recorded[:, -65:-1], atol=1e-4, rtol=0)


def test_sampler_along_the_references_states_gives_its_logits(pipe, sampling):
    states, steps = sampling["cfg1.x_t_all_steps"], []

    def follow(pipe, step, timestep, tensors):
        steps.append((step, timestep, pipe.scheduler.timestep_to_t(timestep), tensors["logits"]))
        return {"latents": states[step + 1]} if step < 9 else {}

    pipe(
        PROMPTS,
        num_inference_steps=10,
        guidance_scale=1.0,
        latents=states[0],
        callback_on_step_end=follow,
        callback_on_step_end_tensor_inputs=["latents", "logits"],
    )
    assert [step for step, *_ in steps] == [timestep for _, timestep, *_ in steps] == list(range(10))
    times = torch.tensor([t for _, _, t, _ in steps], dtype=torch.float64)
    torch.testing.assert_close(times, sampling["cfg1.t"], atol=1e-7, rtol=0)
    for step in (0, 4, 9):
        recorded = sampling[f"cfg1.step{step}.raw_logits"][:, -65:-1]
        torch.testing.assert_close(steps[step][-1], recorded, atol=1e-4, rtol=0)


# Inputs of the network


def test_labels_stand_where_the_network_predicts_them(pipe):
    prompt_ids, prompt_mask = pipe.encode_prompt(PROMPTS)
    state = torch.randint(256, (2, 64), generator=seeded(1))
    labels = torch.randint(256, (2, 64), generator=seeded(2))
    inputs = pipe.prepare_denoiser_inputs(prompt_ids, prompt_mask, state, (1, 8, 8), labels=labels)
    shift_labels = inputs["shift_labels"]
    assert shift_labels.shape == inputs["input_ids"].shape == inputs["position_ids"].shape[:2] == (2, 81)
    assert torch.equal(shift_labels[:, 16:80], labels)
    assert (shift_labels[:, :16] == -100).all()
    assert (shift_labels[:, 80:] == -100).all()
    assert "shift_labels" not in pipe.prepare_denoiser_inputs(prompt_ids, prompt_mask, state, (1, 8, 8))


# Guidance


@pytest.mark.parametrize("codebook_size", [TILE_WIDTH, TILE_WIDTH + 1])
def test_large_codebooks_are_scored_by_the_network_on_a_cpu_and_others_by_trl(pipe, codebook_size):
    torch.manual_seed(0)
    config = URSAConfig.from_dict({**pipe.transformer.config.to_dict(), "codebook_size": codebook_size})
    transformer = URSAForImageGeneration(config)
    add_fused_lm_head(transformer, outputs=("log_probs", "entropy"))
    scheduler = KineticOptimalScheduler(alpha=None, codebook_size=codebook_size)
    vae = AutoencoderVQ(num_vq_embeddings=codebook_size)
    pipe = URSAPipeline(transformer, scheduler, pipe.tokenizer, vae, max_prompt_length=8)
    calls = []

    def watch(**inputs):
        calls.append("fused_lm_head" in inputs)
        return transformer(**inputs)

    encoded = pipe.encode_prompt(PROMPTS)
    noised_samples, labels = torch.randint(codebook_size, (2, 2, 16), generator=seeded())
    log_probs, entropies = pipe.score(watch, *encoded, noised_samples, (1, 4, 4), labels)
    assert calls == [codebook_size == TILE_WIDTH]
    expected = pipe.denoise(*encoded, noised_samples, (1, 4, 4)).log_softmax(dim=-1)
    torch.testing.assert_close(log_probs, expected.gather(-1, labels.unsqueeze(-1)).squeeze(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, -(expected.exp() * expected).sum(dim=-1), atol=1e-5, rtol=1e-5)


def test_guidance_is_the_formula_until_it_is_cut_off(pipe):
    seen, batch_sizes = [], []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: batch_sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )

    def record(pipe, step, timestep, tensors):
        seen.append((pipe.scheduler.timestep_to_t(timestep), tensors["logits"]))
        return {}

    trajectory = pipe(
        PROMPTS,
        negative_prompt="blurry, low quality",
        num_inference_steps=10,
        guidance_scale=3.0,
        guidance_trunc=0.5,
        generator=seeded(),
        return_trajectory=True,
        callback_on_step_end=record,
        callback_on_step_end_tensor_inputs=["logits"],
    ).trajectory
    assert batch_sizes == [4] * 7 + [2] * 3  # the eighth step is at t = 0.538
    condition, negative = pipe.encode_prompt(PROMPTS), pipe.encode_prompt(["blurry, low quality"] * 2)
    with torch.no_grad():
        for (t, logits), state in zip(seen, trajectory.noised_samples, strict=True):
            expected = pipe.denoise(*condition, state, (1, 8, 8))
            if t < 0.5:
                unconditional = pipe.denoise(*negative, state, (1, 8, 8))
                expected = unconditional + 3.0 * (expected - unconditional)
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_time_of_truncation_is_itself_without_guidance(pipe):
    batch_sizes = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: batch_sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    draw(pipe, num_inference_steps=10, guidance_scale=2.0, guidance_trunc=0.25)  # the fifth step is at t = 0.25
    assert batch_sizes == [2] * 3 + [1] * 6  # the first step moves no token
    batch_sizes.clear()
    draw(pipe, num_inference_steps=10, guidance_scale=1.0, guidance_trunc=1.0)
    assert batch_sizes == [1] * 9


def test_samples_do_not_depend_on_what_else_is_asked_for(pipe):
    num_passes, steps = [], []
    pipe.transformer.register_forward_pre_hook(lambda *args: num_passes.append(1))

    def record(pipe, step, timestep, tensors):
        steps.append((step, *tensors))
        return {}

    settings = [
        {},
        {"callback_on_step_end": record},
        {"callback_on_step_end": record, "callback_on_step_end_tensor_inputs": ["logits"]},
        {"return_trajectory": True},
    ]
    samples, counts = [], []
    for kwargs in settings:
        num_passes.clear()
        samples.append(draw(pipe, num_inference_steps=4, generator=seeded(), **kwargs))
        counts.append(len(num_passes))
    assert all(torch.equal(sample, samples[0]) for sample in samples)
    assert counts == [3, 3, 4, 4]
    assert steps == [(step, name) for name in ("latents", "logits") for step in range(4)]


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_logits_that_never_exist_whole_give_the_same_samples(pipe, guidance_scale):
    head_calls, samples = [], []
    pipe.transformer.lm_head.register_forward_hook(lambda *args: head_calls.append(1))
    pipe.scheduler.max_chunk_elements = 40 * 256
    for max_untiled_codes, num_calls in ((256, 5), (0, 0)):
        pipe.scheduler.max_untiled_codes = max_untiled_codes
        head_calls.clear()
        samples.append(draw(pipe, PROMPTS, num_inference_steps=6, guidance_scale=guidance_scale))
        assert len(head_calls) == num_calls
    assert torch.equal(*samples)
    # A head with an adapter is called as a module
    pipe.transformer.add_adapter(LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    assert not torch.equal(draw(pipe, PROMPTS, num_inference_steps=6, guidance_scale=guidance_scale), samples[0])


def test_negative_prompt_is_empty_by_default_and_may_differ_by_prompt(pipe):
    settings = {"guidance_scale": 5.0, "guidance_trunc": 1.0}
    by_default = draw(pipe, PROMPTS, **settings)
    assert torch.equal(by_default, draw(pipe, PROMPTS, negative_prompt="", **settings))
    assert torch.equal(by_default, draw(pipe, PROMPTS, negative_prompt=["", ""], **settings))
    of_second = draw(pipe, PROMPTS, negative_prompt=["", "blurry, low quality"], **settings)
    assert torch.equal(by_default[0], of_second[0])
    assert not torch.equal(by_default[1], of_second[1])


# Output


def test_output_types_have_their_shapes_and_ranges(pipe):
    settings = {"num_inference_steps": 2, "height": 16, "width": 24, "num_images_per_prompt": 2}
    images = {name: pipe(PROMPTS, generator=seeded(), output_type=name, **settings).images for name in ("pil", "np")}
    assert len(images["pil"]) == 4
    assert all(isinstance(image, Image.Image) and image.size == (24, 16) for image in images["pil"])
    assert images["np"].shape == (4, 16, 24, 3)
    assert images["np"].dtype == np.float32
    tensor = pipe(PROMPTS, generator=seeded(), output_type="pt", **settings).images
    assert tensor.shape == (4, 3, 16, 24)
    assert 0 <= tensor.min() < tensor.max() <= 1
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), images["np"])
    assert np.array_equal(np.stack(images["pil"]), (images["np"] * 255).round().astype(np.uint8))
    latents = pipe(PROMPTS, generator=seeded(), output_type="latent", **settings).images
    assert latents.shape == (4, 1, 4, 6)
    assert latents.dtype == torch.long
    assert 0 <= latents.min() < latents.max() < 256
    assert torch.equal(pipe.decode(latents.flatten(1), (1, 4, 6), output_type="pt"), tensor)


def test_images_are_the_references_to_a_gray_level(pipe, oracle_dir):
    # The reference cuts fractions of a gray level off, where diffusers' image processor rounds
    oracle = load_file(oracle_dir / "vq.safetensors")
    images = np.stack(pipe.decode(oracle["image.ids"].flatten(1), (1, 8, 8))).astype(int)
    assert np.abs(images - oracle["image.decoded_uint8"].numpy()).max() <= 1


def test_size_defaults_to_that_of_the_tokenizer(pipe):
    assert pipe.latent_shape() == (1, 8, 8)
    assert pipe.latent_shape(height=12) == (1, 3, 8)
    assert pipe.latent_shape(width=12) == (1, 8, 3)
    assert URSAPipeline.from_pretrained(WORDS_CHECKPOINT_PATH).latent_shape(height=16) == (1, 2, 12)


def test_return_dict_false_gives_a_tuple(pipe):
    settings = {"num_inference_steps": 2, "output_type": "latent", "return_dict": False}
    (images,) = pipe(PROMPTS, generator=seeded(), **settings)
    images_again, trajectory = pipe(PROMPTS, generator=seeded(), return_trajectory=True, **settings)
    assert torch.equal(images, images_again)
    assert isinstance(trajectory, UDMTrajectory)


def test_images_come_prompt_by_prompt(pipe):
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][:, :16]), with_kwargs=True
    )
    images = draw(pipe, PROMPTS, num_images_per_prompt=3, num_inference_steps=1)
    prompt_ids, _ = pipe.encode_prompt(PROMPTS)
    assert images.shape == (6, 1, 8, 8)
    assert torch.equal(seen[0], prompt_ids[[0, 0, 0, 1, 1, 1]])


# Randomness


def test_generator_determines_the_images_and_leaves_the_global_one_alone(pipe):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(pipe, PROMPTS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(draw(pipe, PROMPTS), first)
    assert not torch.equal(draw(pipe, PROMPTS, generator=seeded(1)), first)


def test_without_a_generator_the_global_one_is_used(pipe):
    torch.manual_seed(1)
    first = draw(pipe, generator=None)
    second = draw(pipe, generator=None)
    torch.manual_seed(1)
    assert torch.equal(draw(pipe, generator=None), first)
    assert not torch.equal(first, second)


def test_latents_are_where_sampling_starts(pipe):
    latents = torch.arange(64).unsqueeze(0)
    before = latents.clone()
    output = pipe(PROMPTS[0], latents=latents, num_inference_steps=3, return_trajectory=True, generator=seeded())
    assert torch.equal(output.trajectory.noised_samples[0], before)
    assert torch.equal(latents, before)


# Trajectory and callback


def test_trajectory_is_the_way_from_noise_to_sample(pipe):
    ends = []

    def record(pipe, step, timestep, tensors):
        assert list(tensors) == ["latents"]
        ends.append(tensors["latents"])
        return tensors

    output = pipe(
        PROMPTS,
        num_inference_steps=5,
        output_type="latent",
        generator=seeded(),
        return_trajectory=True,
        callback_on_step_end=record,
    )
    assert isinstance(output, URSAPipelineOutput)
    trajectory = output.trajectory
    assert torch.equal(trajectory.timesteps, torch.arange(5))
    assert trajectory.noised_samples.shape == trajectory.pred_original_samples.shape == (5, 2, 64)
    assert torch.equal(trajectory.noised_samples[0], torch.randint(256, (2, 64), generator=seeded()))
    assert torch.equal(trajectory.noised_samples[1:], torch.stack(ends[:-1]))
    assert torch.equal(trajectory.pred_original_samples[-1], ends[-1])
    assert torch.equal(ends[-1].view(2, 1, 8, 8), output.images)
    assert pipe(PROMPTS, num_inference_steps=1).trajectory is None


def test_outputs_join_along_the_batch(pipe):
    condition = pipe.encode_prompt(PROMPTS)
    outputs = [
        pipe.sample_tokens(*condition, (1, 8, 8), 3, generator=seeded(seed), return_trajectory=True)
        for seed in range(2)
    ]
    joined = UDMSamplerOutput.cat(outputs)
    assert joined.clean_samples.shape == (4, 64)
    assert joined.trajectory.noised_samples.shape == (3, 4, 64)
    for part, output in zip(joined.clean_samples.split(2), outputs, strict=True):
        assert torch.equal(part, output.clean_samples)
    states = joined.trajectory.pred_original_samples.split(2, dim=1)
    for part, output in zip(states, outputs, strict=True):
        assert torch.equal(part, output.trajectory.pred_original_samples)
    assert torch.equal(joined.trajectory.timesteps, torch.arange(3))


def test_latents_from_the_callback_replace_the_state(pipe):
    def replace(pipe, step, timestep, tensors):
        return {"latents": torch.full_like(tensors["latents"], step)}

    output = pipe(
        PROMPTS, num_inference_steps=3, output_type="latent", return_trajectory=True, callback_on_step_end=replace
    )
    assert output.trajectory.noised_samples[1:].unique(dim=0).flatten(1)[:, 0].tolist() == [0, 1]
    assert (output.images == 2).all()


def test_diffusers_callbacks_say_which_tensors_they_take(pipe):
    class Restart(PipelineCallback):
        tensor_inputs = ["logits", "latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            assert callback_kwargs["logits"].shape == (1, 64, 256)
            return {"latents": torch.zeros_like(callback_kwargs["latents"])}

    assert (draw(pipe, callback_on_step_end=Restart(cutoff_step_ratio=None, cutoff_step_index=1)) == 0).all()


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "`prompt` must be a string or a non-empty list of strings, got None."),
        ({"prompt": []}, "`prompt` must be a string or a non-empty list of strings, got []."),
        ({"prompt": ["a", 1]}, "`prompt` must be a string or a non-empty list of strings, got ['a', 1]."),
        ({"negative_prompt": ["a"]}, "`negative_prompt` must have one entry for each prompt (2), got 1."),
        ({"negative_prompt": 3}, "`negative_prompt` must be a string or a list of strings, got 3."),
        (
            {"negative_prompt": ["a", None]},
            "`negative_prompt` must be a string or a list of strings, got ['a', None].",
        ),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be > 0, got 0."),
        ({"guidance_trunc": 1.5}, "`guidance_trunc` must be in [0, 1], got 1.5."),
        ({"guidance_trunc": -0.1}, "`guidance_trunc` must be in [0, 1], got -0.1."),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be > 0, got 0."),
        ({"output_type": "jpeg"}, "`output_type` must be 'pil', 'np', 'pt' or 'latent', got 'jpeg'."),
        (
            {"callback_on_step_end_tensor_inputs": ["latents", "noise"]},
            "`callback_on_step_end_tensor_inputs` has to be in ['latents', 'logits'], but found ['noise'].",
        ),
        ({"height": 30}, "`height` must be a positive multiple of 4, got 30. Try 32."),
        ({"height": 29}, "`height` must be a positive multiple of 4, got 29. Try 28."),
        ({"width": 33}, "`width` must be a positive multiple of 4, got 33. Try 32."),
        ({"width": 1}, "`width` must be a positive multiple of 4, got 1. Try 4."),
        ({"width": 0}, "`width` must be a positive multiple of 4, got 0. Try 4."),
        (
            {"latents": torch.zeros(2, 8, 8, dtype=torch.long)},
            "`latents` must have shape (2, 64) and ids in [0, 256), got shape (2, 8, 8) and ids in [0, 0].",
        ),
        (
            {"latents": torch.zeros(2, 64, dtype=torch.long), "num_images_per_prompt": 2},
            "`latents` must have shape (4, 64) and ids in [0, 256), got shape (2, 64) and ids in [0, 0].",
        ),
        (
            {"latents": torch.arange(-1, 127).view(2, 64)},
            "`latents` must have shape (2, 64) and ids in [0, 256), got shape (2, 64) and ids in [-1, 126].",
        ),
        (
            {"latents": torch.full((2, 64), 256)},
            "`latents` must have shape (2, 64) and ids in [0, 256), got shape (2, 64) and ids in [256, 256].",
        ),
    ],
)
def test_bad_arguments_are_refused(pipe, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe(**{"prompt": PROMPTS} | changes)


def test_videos_are_not_decoded_as_images(pipe):
    with pytest.raises(ValueError, match="`decode` takes images, of one frame, got 2 frames."):
        pipe.decode(torch.zeros(1, 128, dtype=torch.long), (2, 8, 8))


def test_components_of_different_codebooks_are_refused(pipe, original_dir):
    config = json.loads((original_dir / "vae" / "config.json").read_text(encoding="utf-8"))
    components = dict(pipe.components) | {
        "vae": AutoencoderVQ.from_original_config(config | {"num_vq_embeddings": 128})
    }
    message = (
        "The components must share one codebook, got sizes {'transformer.config.codebook_size': 256, "
        "'scheduler.config.codebook_size': 256, 'vae.config.num_vq_embeddings': 128}."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        URSAPipeline(**components)
    scheduler = KineticOptimalScheduler()
    scheduler.set_codebook(torch.randn(128, 8, generator=seeded()))
    with pytest.raises(ValueError, match="'scheduler.config.codebook_size': 128"):
        URSAPipeline(**dict(pipe.components) | {"scheduler": scheduler})


# Saving and loading


def test_original_folder_saves_and_loads_in_our_format(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    names = ["transformer/model", f"vae/{ORIGINAL_WEIGHTS[:-12]}", "scheduler/diffusion_pytorch_model"]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")) == sorted(
        f"{name}.safetensors" for name in names
    )
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pth", ".pt")]
    loaded = load(tmp_path)
    assert loaded.config.max_prompt_length == 16
    assert torch.equal(predict(loaded), predict(pipe))
    settings = {"num_inference_steps": 4, "output_type": "np"}
    images = pipe(PROMPTS, generator=seeded(), **settings).images
    assert np.array_equal(loaded(PROMPTS, generator=seeded(), **settings).images, images)
    assert not loaded.transformer.training
    assert not loaded.vae.training


def test_pipeline_without_weights_is_that_of_the_folder(saved_dir):
    expected = load(saved_dir)
    for path in [*saved_dir.rglob("*.safetensors"), *saved_dir.rglob("*.bin"), *saved_dir.rglob("*.pth")]:
        path.unlink()
    pipe = URSAPipeline.from_configs(saved_dir, dtype=torch.bfloat16)
    for name in ("transformer", "vae"):
        tensors, expected_tensors = (getattr(p, name).state_dict() for p in (pipe, expected))
        assert {key: tensor.shape for key, tensor in tensors.items()} == {
            key: tensor.shape for key, tensor in expected_tensors.items()
        }
        assert all(tensor.is_meta and tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    for name in ("codebook_size", "codebook_dim", "shift"):
        assert pipe.scheduler.config[name] == expected.scheduler.config[name]
    assert pipe.config.max_prompt_length == expected.config.max_prompt_length
    assert pipe.latent_shape() == expected.latent_shape()


def test_pipeline_without_weights_takes_no_components(original_dir):
    with pytest.raises(TypeError, match=re.escape("Arguments not supported without weights: ['vae'].")):
        URSAPipeline.from_configs(original_dir, vae=None)


def test_original_folder_takes_components_and_refuses_unknown_arguments(pipe, original_dir):
    loaded = load(original_dir, transformer=pipe.transformer, vae=pipe.vae)
    assert loaded.transformer is pipe.transformer
    assert loaded.config.max_prompt_length == 320
    message = "Arguments not supported for checkpoints in the original format: ['device_map', 'variant']."
    with pytest.raises(TypeError, match=re.escape(message)):
        load(original_dir, variant="fp16", device_map="auto")


def test_loading_the_original_format_is_silent(original_dir, caplog):
    logging.enable_propagation()
    try:
        load(original_dir)
    finally:
        logging.disable_propagation()
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
def test_dtype_is_that_of_the_networks_and_not_of_the_codes(saved_dir, pipe, argument):
    loaded = load(saved_dir, **{argument: torch.bfloat16})
    assert {parameter.dtype for parameter in loaded.transformer.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in loaded.vae.parameters()} == {torch.bfloat16}
    assert loaded.scheduler.codebook.dtype == torch.float32
    assert torch.equal(loaded.scheduler.codebook, pipe.scheduler.codebook)
    image = loaded(PROMPTS[0], num_inference_steps=2, output_type="pt").images
    assert image.dtype == torch.float32
    assert image.isfinite().all()
    assert load(saved_dir).transformer.dtype == load(saved_dir).vae.dtype == torch.float32


def test_sharded_original_weights_load(pipe, original_dir, tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(original_dir, folder)
    path = folder / "transformer" / ORIGINAL_WEIGHTS
    tensors = load_file(path)
    path.unlink()
    weight_map = {}
    for shard, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        shard_name = f"diffusion_pytorch_model-0000{shard}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, path.with_name(shard_name))
        weight_map |= dict.fromkeys(names, shard_name)
    path.with_name(f"{ORIGINAL_WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(predict(load(folder, max_prompt_length=16)), predict(pipe))

    path.with_name(shard_name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no .*{shard_name}, which {ORIGINAL_WEIGHTS}\.index\.json lists"):
        load(folder)


def test_pickled_tensors_of_the_original_format_load(pipe, original_dir, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(original_dir, folder)
    for component in ("transformer", "vae"):
        path = folder / component / ORIGINAL_WEIGHTS
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    loaded = load(folder, max_prompt_length=16)
    assert torch.equal(predict(loaded), predict(pipe))
    assert torch.equal(draw(loaded), draw(pipe))


def test_lookup_free_codebook_need_not_be_stored(original_dir, tmp_path):
    folder = tmp_path / "lookup-free"
    shutil.copytree(original_dir, folder)
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_quantizer_name": "LFQuantizer"}))
    edit_weights(folder / "vae" / ORIGINAL_WEIGHTS, lambda tensors: tensors.pop("quantizer.embedding.weight"))
    codebook = load(folder).vae.codebook
    assert codebook.shape == (256, 8)
    assert torch.equal(codebook[5], torch.tensor([-1.0, -1, -1, -1, -1, 1, -1, 1]))


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_pickle_with_code_is_refused_and_does_not_run(original_dir, tmp_path, component):
    folder, trace = tmp_path / "malicious", tmp_path / "trace"
    shutil.copytree(original_dir, folder)
    path = folder / component / ORIGINAL_WEIGHTS
    tensors = load_file(path)
    path.unlink()
    torch.save(tensors | {"model": Malicious(trace)}, path.with_suffix(".bin"))
    with pytest.raises(ValueError, match=rf"{component}/diffusion_pytorch_model\.bin .*holds more than tensors"):
        load(folder)
    assert not trace.exists()
    torch.load(path.with_suffix(".bin"), weights_only=False)
    assert trace.exists()  # so the file was as harmful as it should be


def test_pickled_codebook_with_code_is_refused_and_does_not_run(original_dir, tmp_path):
    folder, trace = tmp_path / "malicious", tmp_path / "trace"
    shutil.copytree(original_dir, folder)
    torch.save({"path.emb": Malicious(trace)}, folder / "scheduler" / "scheduler_model.pth")
    with pytest.raises(ValueError, match=r"scheduler/scheduler_model\.pth"):
        load(folder)
    assert not trace.exists()


def test_pickles_are_not_opened_in_our_format(pipe, tmp_path):
    folder, trace = tmp_path / "malicious", tmp_path / "trace"
    pipe.save_pretrained(folder)
    (folder / "transformer" / "model.safetensors").unlink()
    torch.save({"model": Malicious(trace)}, folder / "transformer" / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no file named model\.safetensors .*transformer"):
        load(folder)
    assert not trace.exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"model.norm.weight": 3}])
def test_pickle_of_other_things_is_refused(original_dir, tmp_path, content):
    folder = tmp_path / "other"
    shutil.copytree(original_dir, folder)
    path = folder / "transformer" / ORIGINAL_WEIGHTS
    path.unlink()
    torch.save(content, path.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin must hold a dictionary of tensors"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"not a pickle", None])
def test_damaged_pickle_is_refused(original_dir, tmp_path, content):
    folder = tmp_path / "damaged"
    shutil.copytree(original_dir, folder)
    path = folder / "transformer" / ORIGINAL_WEIGHTS
    pickled = path.with_suffix(".bin")
    torch.save(load_file(path), pickled)
    path.unlink()
    whole = pickled.read_bytes()
    pickled.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin is damaged"):
        load(folder)


@pytest.mark.parametrize("component", ["transformer", "vae", "scheduler", "tokenizer"])
def test_missing_component_is_named(saved_dir, component):
    shutil.rmtree(saved_dir / component)
    with pytest.raises(OSError, match=component):
        load(saved_dir)


@pytest.mark.parametrize(
    "pattern",
    [
        "model_index.json",
        "transformer/config.json",
        "transformer/*.safetensors",
        "vae/config.json",
        "vae/*.safetensors",
        "scheduler/scheduler_config.json",
        "scheduler/*_model.*",
        "tokenizer/tokenizer_config.json",
    ],
)
def test_missing_file_is_named(saved_dir, pattern):
    (path,) = saved_dir.glob(pattern)
    path.unlink()
    with pytest.raises(OSError, match=f"{path.name}|{path.with_suffix('.safetensors').name}") as caught:
        load(saved_dir)
    assert str(path.parent) in str(caught.value)


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_missing_weight_is_refused_and_named(saved_dir, component):
    path = weights_of(saved_dir, component)
    name = sorted(load_file(path))[-1]
    edit_weights(path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"{path.parent} miss.*{name.replace('quantizer', 'quantize')}"):
        load(saved_dir)


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_weight_of_another_shape_is_refused_and_named(saved_dir, component):
    path = weights_of(saved_dir, component)
    name = sorted(load_file(path))[-1]
    edit_weights(path, lambda tensors: tensors.update({name: torch.zeros(7)}))
    with pytest.raises(ValueError, match=name.replace("quantizer", "quantize")) as caught:
        load(saved_dir)
    assert str(path.parent) in str(caught.value)


def test_codebook_of_another_shape_is_refused_and_named(saved_dir):
    (path,) = saved_dir.glob("scheduler/*_model.*")
    if path.suffix == ".pth":
        torch.save({"path.emb": torch.zeros(7)}, path)
    else:
        save_file({"codebook": torch.zeros(7)}, path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load(saved_dir)


def test_weight_that_nothing_reads_is_refused_in_the_original_format(original_dir, tmp_path):
    folder = tmp_path / "unexpected"
    shutil.copytree(original_dir, folder)
    edit_weights(folder / "vae" / ORIGINAL_WEIGHTS, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(ValueError, match=rf"{folder / 'vae'} miss nothing and have unexpected \['extra'\]"):
        load(folder)


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_truncated_weights_are_refused_and_named(saved_dir, component):
    path = weights_of(saved_dir, component)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises((ValueError, OSError)) as caught:
        load(saved_dir)
    assert str(path.parent) in str(caught.value)


def test_config_that_is_no_json_is_named(saved_dir):
    path = saved_dir / "transformer" / "config.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises((ValueError, OSError), match=re.escape(str(path))):
        load(saved_dir)


@pytest.mark.parametrize("swap", ["kinetic", "mixture", "uniform"])
def test_a_scheduler_made_from_the_pipelines_own_is_used_saved_and_loaded(saved_dir, tmp_path, swap):
    pipe = load(saved_dir)
    codes = pipe.scheduler.codebook.clone()
    if swap == "uniform":
        scheduler = UniformDDIMScheduler.from_config(pipe.scheduler.config)
    else:
        alpha = 0.9 if swap == "kinetic" else None
        scheduler = KineticOptimalScheduler.from_config(pipe.scheduler.config, shift=3.0, alpha=alpha)
    before = draw(pipe)
    pipe.scheduler = scheduler
    after = draw(pipe)
    assert not torch.equal(before, after)
    pipe.save_pretrained(tmp_path / "swapped")
    given = load(saved_dir, scheduler=type(scheduler).from_config(scheduler.config))
    for loaded in (load(tmp_path / "swapped"), given):
        assert type(loaded.scheduler) is type(scheduler)
        assert torch.equal(draw(loaded), after)
        if swap != "uniform":
            assert torch.equal(loaded.scheduler.codebook, codes)
            assert loaded.scheduler.config.shift == 3.0


# Adapters


@pytest.fixture
def adapter(original_dir, tmp_path):
    """A saved adapter with random weights, and the PEFT model that it came from."""
    torch.manual_seed(0)
    base = load(original_dir, max_prompt_length=16)
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    base.transformer = get_peft_model(base.transformer, config).eval()
    base.transformer.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


def test_adapter_changes_logits_as_peft_does_and_unloads(pipe, adapter):
    peft_pipe, folder = adapter
    with torch.no_grad():
        prompt_ids, prompt_mask = pipe.encode_prompt(PROMPTS)
        state = torch.randint(256, (2, 64), generator=seeded(3))
        inputs = pipe.prepare_denoiser_inputs(prompt_ids, prompt_mask, state, (1, 8, 8))
        adapted = peft_pipe.transformer(**inputs).logits[:, 16:-1]
    before = predict(pipe)
    assert (adapted - before).abs().max() > 0.1
    for name in ("default", "second"):
        pipe.load_lora_weights(folder, adapter_name=name)
        torch.testing.assert_close(predict(pipe), adapted, atol=1e-6, rtol=0)
        pipe.unload_lora_weights(name)
        torch.testing.assert_close(predict(pipe), before, atol=0, rtol=0)
    reloaded = PeftModel.from_pretrained(pipe.transformer, folder)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**inputs).logits[:, 16:-1], adapted, atol=1e-6, rtol=0)


def test_name_of_a_loaded_adapter_is_taken(pipe, adapter):
    _, folder = adapter
    pipe.load_lora_weights(folder)
    adapted = predict(pipe)
    with pytest.raises(ValueError, match="Adapter with name default already exists"):
        pipe.load_lora_weights(folder)
    assert torch.equal(predict(pipe), adapted)


def test_incomplete_adapter_is_refused_and_leaves_the_model_alone(pipe, adapter):
    _, folder = adapter
    before = predict(pipe)
    edit_weights(folder / "adapter_model.safetensors", lambda tensors: tensors.pop(sorted(tensors)[0]))
    with pytest.raises(
        ValueError, match=rf"The adapter in {folder} does not fit the transformer: \['model\.layers\.0"
    ):
        pipe.load_lora_weights(folder)
    assert torch.equal(predict(pipe), before)


def test_adapter_of_another_model_is_refused_and_leaves_the_model_alone(pipe, tmp_path):
    config = URSAConfig(
        text_vocab_size=320,
        codebook_size=256,
        bov_token_id=315,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    lora_config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(URSAForImageGeneration(config), lora_config).save_pretrained(tmp_path)
    before = predict(pipe)
    with pytest.raises(ValueError, match="does not fit the transformer"):
        pipe.load_lora_weights(tmp_path)
    assert torch.equal(predict(pipe), before)


def test_missing_adapter_is_an_error(pipe, tmp_path):
    with pytest.raises(ValueError, match=f"adapter model file not found in {tmp_path}"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="No adapter loaded"):
        pipe.unload_lora_weights()
