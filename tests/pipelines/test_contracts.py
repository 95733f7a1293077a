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

"""What a user of diffusers' pipelines relies on, for the families of images and of text."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from trl.trainer.utils import add_fused_lm_head

from trl_udm import FUDOKIPipeline, KineticOptimalScheduler, TextUDMPipeline, URSAPipeline

from .text_families import NUM_TOKENS, build_text_pipeline


FAMILIES = ["ursa", "fudoki", "text", "kinetic-text"]
IMAGE_PROMPTS, TEXT_PROMPTS = ["a photo of a red car", "a sign"], ["ab c", "b"]
PROMPTS = {"ursa": IMAGE_PROMPTS, "fudoki": IMAGE_PROMPTS, "text": TEXT_PROMPTS, "kinetic-text": TEXT_PROMPTS}
LATENT = {"output_type": "latent", "num_inference_steps": 4}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def build(family, oracle_dir):
    if family == "ursa":
        pipe = URSAPipeline.from_pretrained(oracle_dir / "tiny-ursa", max_prompt_length=16)
    elif family == "fudoki":
        pipe = FUDOKIPipeline.from_pretrained(oracle_dir / "fudoki" / "tiny-fudoki")
    else:
        pipe = build_text_pipeline("bert")
        if family == "kinetic-text":
            pipe.scheduler = KineticOptimalScheduler(alpha=None, codebook_size=pipe.scheduler.config.codebook_size)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def pipe(family, oracle_dir):
    return build(family, oracle_dir)


def test_each_sample_is_what_its_generator_alone_gives(pipe, family):
    num = "num_images_per_prompt" if PROMPTS[family] is IMAGE_PROMPTS else "num_completions_per_prompt"
    options = {**LATENT, "guidance_scale": 3.0}
    together = pipe(PROMPTS[family], **{num: 2}, generator=[seeded(seed) for seed in range(4)], **options)[0]
    for i, sample in enumerate(together):
        alone = pipe(PROMPTS[family][i // 2], generator=[seeded(i)], **options)[0][0]
        assert torch.equal(sample, alone)
        assert torch.equal(sample, pipe(PROMPTS[family][i // 2], generator=seeded(i), **options)[0][0])
    assert len({tuple(sample.flatten().tolist()) for sample in together}) > 1


def test_another_number_of_generators_is_refused(pipe, family):
    message = "`generator` must be one generator or a list of one for each of the 2 samples, got a list of 3"
    with pytest.raises(ValueError, match=message):
        pipe(PROMPTS[family], generator=[seeded()] * 3)
    with pytest.raises(TypeError, match="`generator` must be a `torch.Generator`, or a list of them, got 3"):
        pipe(PROMPTS[family], generator=3)


def test_noise_of_each_sample_is_what_its_generator_alone_gives(pipe):
    clean, t = torch.randint(8, (3, 5), generator=seeded()), torch.tensor([0.2, 0.5, 0.8])
    together = pipe.scheduler.add_noise(clean, t, generator=[seeded(seed) for seed in range(3)])
    for i in range(3):
        assert torch.equal(together[i], pipe.scheduler.add_noise(clean[i : i + 1], t[i : i + 1], seeded(i))[0])
    with pytest.raises(ValueError, match="one for each of the 3 samples, got a list of 2"):
        pipe.scheduler.add_noise(clean, t, generator=[seeded()] * 2)


def test_a_callback_interrupts(pipe, family):
    states = []

    def interrupt(pipe, step, timestep, tensors):
        states.append(tensors["latents"])
        pipe._interrupt = step == 1
        return tensors

    output = pipe(
        PROMPTS[family], generator=seeded(), callback_on_step_end=interrupt, return_trajectory=True, **LATENT
    )
    assert pipe.interrupt and pipe.num_timesteps == 4
    assert len(states) == 2 and torch.equal(output[0].flatten(1), states[1])
    assert output.trajectory.timesteps.tolist() == [0, 1] and len(output.trajectory.noised_samples) == 2
    assert len(pipe(PROMPTS[family], return_trajectory=True, **LATENT).trajectory.timesteps) == 4
    assert not pipe.interrupt
    with pytest.raises(TypeError, match="`callback_on_step_end` must return a dictionary, .* got None"):
        pipe(PROMPTS[family], callback_on_step_end=lambda *args: None)


@pytest.mark.parametrize("initial", [1.0, 5.0])
@torch.no_grad()
def test_a_callback_changes_the_guidance_of_the_next_step(pipe, family, initial):
    assert (pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.num_timesteps) == (1.0, False, 0)
    (prompt, negative), seen = PROMPTS[family], []

    def change(pipe, step, timestep, tensors):
        seen.append((pipe.guidance_scale, pipe.do_classifier_free_guidance, tensors["logits"]))
        pipe._guidance_scale = 3.0
        return {"latents": torch.full_like(tensors["latents"], 2)}

    tensors = ["latents", "logits"]
    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": tensors, **LATENT}
    pipe(prompt, negative_prompt=negative, guidance_scale=initial, **options)
    assert [scale for scale, _, _ in seen] == [initial, 3.0, 3.0, 3.0]
    assert [is_guided for _, is_guided, _ in seen] == [initial != 1.0, True, True, True]
    latent_shape = pipe.latent_shape()
    ids, mask = pipe.encode_prompt([prompt, negative])
    state = torch.full((2, torch.Size(latent_shape).numel()), 2)
    conditional, unconditional = pipe.denoise(ids, mask, state, latent_shape, t=torch.full((2,), 0.25))
    expected = unconditional + 3.0 * (conditional - unconditional)
    torch.testing.assert_close(seen[1][2][0], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_several_labels_of_a_token_have_the_scores_that_they_have_alone(pipe, family):
    latent_shape, model = pipe.latent_shape(), pipe.transformer
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    size = (2, torch.Size(latent_shape).numel())
    state, labels = (torch.randint(8, shape, generator=seeded()) for shape in (size, (*size, 3)))
    inputs = (*pipe.encode_prompt(PROMPTS[family]), state, latent_shape)
    log_probs, entropies = pipe.score(model, *inputs, labels, torch.full((2,), 0.5))
    for i in range(3):
        one, expected_entropies = pipe.score(model, *inputs, labels[..., i], torch.full((2,), 0.5))
        torch.testing.assert_close(log_probs[..., i], one, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropies, expected_entropies, atol=1e-5, rtol=1e-5)


def test_ddp_finds_all_weights_that_scores_use(pipe, family, tmp_path):
    """Also those of a head that is applied after the network's `forward`."""
    latent_shape = pipe.latent_shape()
    state, labels = torch.randint(8, (2, 2, torch.Size(latent_shape).numel()), generator=seeded())
    rows = (*pipe.encode_prompt(PROMPTS[family]), state, latent_shape, labels, torch.tensor([0.2, 0.7]))
    with torch.no_grad():
        reference = pipe.predict_tokens(pipe.transformer, *rows)
    reference = (reference[0].roll(1, dims=0), reference[1])  # of the other sample, so that there is a divergence
    parameters = [parameter for parameter in pipe.transformer.parameters() if parameter.requires_grad]
    gradients = []
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(pipe.transformer, find_unused_parameters=True)
        for model in (pipe.transformer, wrapped):
            pipe.transformer.zero_grad()
            logps, _, kl = pipe.score_with_kl(model, reference, *rows)
            (logps + kl).sum().backward()
            gradients.append([parameter.grad.clone() for parameter in parameters if parameter.grad is not None])
    finally:
        torch.distributed.destroy_process_group()
    assert len(gradients[0]) > 10 and sum(gradient.norm() for gradient in gradients[0]) > 1
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)


def test_guidance_without_negative_prompts_is_refused(pipe, family):
    with pytest.raises(ValueError, match="`guidance_scale` must be 1.0 without `negative_prompt_ids`, got 2.0"):
        pipe.sample_tokens(*pipe.encode_prompt(PROMPTS[family]), pipe.latent_shape(), 2, guidance_scale=2.0)


def test_latents_that_a_call_returns_are_those_that_it_takes(pipe, family):
    latents = pipe(PROMPTS[family], generator=seeded(), **LATENT)[0]
    kept = latents.clone()
    output = pipe(PROMPTS[family], latents=latents, generator=seeded(), return_trajectory=True, **LATENT)
    assert torch.equal(output.trajectory.noised_samples[0], kept.flatten(1)) and torch.equal(latents, kept)
    assert output[0].shape == latents.shape
    with pytest.raises(TypeError, match="`latents` must be a `torch.long` tensor of token ids, got torch.float32"):
        pipe(PROMPTS[family], latents=latents.float())


def test_tuples_have_what_dictionaries_have(pipe, family):
    options = {**LATENT, "return_trajectory": True}
    samples, trajectory = pipe(PROMPTS[family], generator=seeded(), return_dict=False, **options)
    output = pipe(PROMPTS[family], generator=seeded(), **options)
    assert torch.equal(samples, output[0])
    assert torch.equal(trajectory.noised_samples, output.trajectory.noised_samples)
    assert len(pipe(PROMPTS[family], return_dict=False, **LATENT)) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pipelines_draw_in_lower_precision(pipe, family, dtype):
    pipe.to(dtype)
    assert pipe.transformer.dtype == dtype
    assert len(pipe(PROMPTS[family], num_inference_steps=2)[0]) == 2


def test_texts_are_the_decoded_latents():
    pipe = build_text_pipeline()
    latents = pipe(PROMPTS["text"], generator=seeded(), **LATENT).texts
    assert latents.shape == (2, NUM_TOKENS)
    options = {"num_inference_steps": 4, "generator": seeded()}
    assert pipe(PROMPTS["text"], **options).texts == pipe.decode(latents, (NUM_TOKENS,))


def test_the_empty_text_is_the_default_negative_prompt():
    pipe = build_text_pipeline()
    options = {"guidance_scale": 4.0, **LATENT}
    default = pipe(PROMPTS["text"], generator=seeded(), **options).texts
    assert torch.equal(pipe(PROMPTS["text"], negative_prompt="", generator=seeded(), **options).texts, default)
    for negative in ("ccc", ["c", "a"], [{"role": "user", "content": "ab"}]):
        other = pipe(PROMPTS["text"], negative_prompt=negative, generator=seeded(), **options).texts
        assert other.shape == default.shape and not torch.equal(other, default)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, r"`prompt` must be a text, messages, or a non-empty list of them, got \[\]"),
        ({"prompt": None}, r"`prompt` must be .*, got None"),
        ({"negative_prompt": ["a"]}, r"`negative_prompt` must have one entry for each prompt \(2\), got 1"),
        ({"num_inference_steps": 2.5}, "`num_inference_steps` must be > 0, got 2.5"),
        ({"num_completions_per_prompt": 0}, "`num_completions_per_prompt` must be > 0, got 0"),
        ({"guidance_trunc": 2.0}, r"`guidance_trunc` must be in \[0, 1\], got 2.0"),
        ({"output_type": "pil"}, "`output_type` must be 'text' or 'latent', got 'pil'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"has to be in \['latents', 'logits'\], but found"),
        (
            {"latents": torch.zeros(2, 3, dtype=torch.long)},
            r"`latents` must have shape \(2, 6\) .* got shape \(2, 3\)",
        ),
    ],
)
def test_bad_arguments_of_text_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build_text_pipeline()(**{"prompt": PROMPTS["text"], **changes})


def test_without_an_image_tokenizer_a_pipeline_draws_the_same_tokens(tmp_path, oracle_dir):
    pipe = build("ursa", oracle_dir)
    folder, options = oracle_dir / "tiny-ursa", {"height": 32, "width": 32, **LATENT}
    expected = pipe(PROMPTS["ursa"], generator=seeded(), **options).images
    pipe.save_pretrained(tmp_path / "whole")
    pipes = [
        URSAPipeline.from_pretrained(path, vae=None, max_prompt_length=16) for path in (folder, tmp_path / "whole")
    ]
    pipes[0].save_pretrained(tmp_path / "without")
    for each in (*pipes, URSAPipeline.from_pretrained(tmp_path / "without")):
        assert each.vae is None
        assert torch.equal(each(PROMPTS["ursa"], generator=seeded(), **options).images, expected)
        with pytest.raises(
            ValueError, match="has no `vae` to decode images with. Pass one, or `output_type='latent'`"
        ):
            each(PROMPTS["ursa"], height=32, width=32)
        with pytest.raises(ValueError, match="`height` and `width` must be given without a `vae`, got None and 32"):
            each(PROMPTS["ursa"], width=32, **LATENT)
    with pytest.raises(ValueError, match="has no `vae`"):
        pipes[0].decode(expected.flatten(1), (1, 8, 8))
    assert torch.equal(
        pipe.decode(expected.flatten(1), (1, 8, 8), "pt"),
        pipe(PROMPTS["ursa"], height=32, width=32, num_inference_steps=4, generator=seeded(), output_type="pt").images,
    )


def test_text_has_every_weight_and_no_other(tmp_path):
    pipe = build_text_pipeline()
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "transformer" / "model.safetensors"
    weights, name = load_file(file), "bert.encoder.layer.0.intermediate.dense.weight"
    lacking = {key: tensor for key, tensor in weights.items() if key != name}
    for changed, message in ((lacking, f"miss, .*'{name}'"), ({**weights, "extra": torch.ones(1)}, r"\['extra'\]")):
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            TextUDMPipeline.from_pretrained(tmp_path)
        assert TextUDMPipeline.from_pretrained(tmp_path, transformer=pipe.transformer).transformer is pipe.transformer
