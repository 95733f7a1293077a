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

"""The numbers come from an independent run of the public reference code, WanZhengyan/dFlowGRPO at commit aa81e50."""

import json
import pickle
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from trl.trainer.utils import add_fused_lm_head

from trl_udm import FUDOKIPipeline, UDMGRPOConfig, UDMGRPOTrainer, estimate_memory
from trl_udm.cli import main, memory
from trl_udm.weights import load_embedding


PROMPTS = ["a photo of a red car", "two dogs left of a bench, in the rain"]
SHAPE = (4, 4)
LATENT = {"output_type": "latent", "num_inference_steps": 4}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def load(folder, **kwargs):
    pipe = FUDOKIPipeline.from_pretrained(folder, uncond_token_id=342, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def predict(pipe, prompts=PROMPTS, seed=3):
    """Logits for given prompts and a seeded state."""
    state = torch.randint(64, (len(prompts), 16), generator=seeded(seed))
    return pipe.denoise(*pipe.encode_prompt(prompts), state, SHAPE)


@pytest.fixture(scope="module")
def oracle(oracle_dir):
    return oracle_dir / "fudoki"


@pytest.fixture
def pipe(oracle):
    return load(oracle / "tiny-fudoki")


@pytest.fixture
def original_dir(oracle, tmp_path):
    """A copy of the original layout, to be changed."""
    return shutil.copytree(oracle / "tiny-fudoki", tmp_path / "original")


def edit(folder, change):
    """Changes the configuration and the weights of a folder in the original layout."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    change(config, weights)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# Against the reference


def test_prompts_become_the_references_ids(pipe, oracle):
    cases = json.loads((oracle / "a_tokenization.json").read_text(encoding="utf-8"))["generation"]
    prompt_ids, prompt_mask = pipe.encode_prompt([case["prompt"] for case in cases])
    for ids, mask, case in zip(prompt_ids, prompt_mask.bool(), cases, strict=True):
        *expected, end_of_image = case["input_ids_without_image"]
        assert ids[mask].tolist() == expected and pipe.end_token_id == end_of_image
        state = torch.zeros(1, 16, dtype=torch.long)
        inputs = pipe.prepare_denoiser_inputs(ids[None], mask[None].long(), state, SHAPE)
        text = inputs["input_ids"][inputs["attention_mask"].bool() & (inputs["input_ids"] < 384)]
        assert text.tolist() == case["input_ids_without_image"]


def test_a_tokenizer_with_a_bos_of_its_own_gets_no_second_one(pipe):
    expected = pipe.encode_prompt(PROMPTS)[0]
    bos = (pipe.tokenizer.bos_token, pipe.tokenizer.bos_token_id)
    pipe.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    assert pipe.tokenizer("a")["input_ids"][0] == bos[1]
    assert torch.equal(pipe.encode_prompt(PROMPTS)[0], expected)


@torch.no_grad()
def test_denoiser_and_guidance_say_what_the_references_do(pipe, oracle):
    recorded = load_file(oracle / "a_logits.safetensors")
    is_image = recorded["image_token_mask"].bool()

    def of_image(name):
        return recorded[name][is_image].view(2, 16, 64)

    ids, mask = pipe.encode_prompt([*PROMPTS, "", ""])
    logits = pipe.denoise(ids[:2], mask[:2], recorded["codes"], SHAPE)
    torch.testing.assert_close(logits, of_image("image_logits"), atol=1e-4, rtol=0)
    negatives = pipe._complete_negatives(ids[:2], mask[:2], ids[2:], mask[2:])
    uncond = pipe.denoise(*negatives, recorded["codes"], SHAPE)
    torch.testing.assert_close(uncond, of_image("uncond_image_logits"), atol=1e-4, rtol=0)
    for scale in (0.0, 2.5, 5.0):
        seen = []

        def keep(pipe, step, timestep, tensors, seen=seen):
            seen.append(tensors["logits"])
            return {}

        pipe(
            PROMPTS,
            guidance_scale=1 + scale,
            latents=recorded["codes"],
            callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=["logits"],
            **LATENT,
        )
        probabilities = seen[0].softmax(dim=-1)
        torch.testing.assert_close(probabilities, of_image(f"guided_probs.s{scale}"), atol=1e-5, rtol=0)


def test_images_are_the_references(pipe, oracle):
    recorded = load_file(oracle / "c_vq.safetensors")
    images = pipe.decode(recorded["ids"], SHAPE, output_type="pt")
    torch.testing.assert_close(images, (recorded["decoded"] / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    with torch.no_grad():
        assert torch.equal(pipe.vae.encode(recorded["encode.x"]).image_tokens, recorded["encode.ids"].flatten())


def test_sampler_along_the_references_states_takes_its_steps(pipe, oracle):
    recorded = load_file(oracle / "d_sampling.safetensors")
    states, clean, t = recorded["x_t"], recorded["x_1"], recorded["t"]
    seen = []

    def follow(pipe, step, timestep, tensors):
        seen.append((pipe.scheduler.timestep_to_t(timestep), tensors["logits"].softmax(dim=-1)))
        return {"latents": states[step + 1]} if step < 5 else {}

    options = {"callback_on_step_end": follow, "callback_on_step_end_tensor_inputs": ["latents", "logits"], **LATENT}
    pipe(PROMPTS, **{**options, "num_inference_steps": 6}, guidance_scale=6.0, latents=states[0])
    assert [t for t, _ in seen] == pytest.approx(t.tolist(), abs=1e-7)
    for step, (_, probabilities) in enumerate(seen):
        torch.testing.assert_close(probabilities, recorded["p1"][step], atol=1e-5, rtol=0)
    assert torch.equal(clean[5], recorded["final"])
    for step in range(5):
        rates = pipe.scheduler.velocity(states[step], clean[step], t[step])
        is_jumping = recorded["uniform"][step] < -torch.expm1(-rates.sum(dim=-1) / 6)
        assert torch.equal(is_jumping, states[step + 1] != states[step]), step
        if step > 0:
            expected = recorded[f"rate_of_jumping_tokens.step{step}"]
            torch.testing.assert_close(rates[is_jumping], expected, atol=1e-5 * expected.max().item(), rtol=1e-5)
    assert not recorded["moved"][0].any()


@pytest.mark.parametrize("num_inference_steps", [1, 49, 98])
def test_a_call_takes_as_many_steps_as_it_is_asked_for(pipe, num_inference_steps):
    # The original takes one more for 49, 98, 103, ...
    pipe.scheduler.set_timesteps(num_inference_steps)
    assert len(pipe.scheduler.timesteps) == num_inference_steps


# Inputs


def test_padding_changes_nothing(pipe):
    alone, together = predict(pipe, PROMPTS[:1]), predict(pipe, [PROMPTS[0], "a long prompt " * 10])
    torch.testing.assert_close(together[0], alone[0], atol=1e-5, rtol=1e-5)


def test_the_network_reads_the_whole_image_without_padding(pipe):
    # Where no mask is needed, attention must not become causal
    ids, mask = pipe.encode_prompt(PROMPTS[:1])
    states = torch.zeros(2, 16, dtype=torch.long)
    states[1, -1] = 5
    with torch.no_grad():
        first, second = pipe.denoise(ids.expand(2, -1), mask.expand(2, -1), states, SHAPE)
    assert (first[0] - second[0]).abs().max() > 1e-3


def test_long_prompts_are_cut_before_the_end_of_the_template(oracle, caplog):
    pipe = load(oracle / "tiny-fudoki", max_prompt_length=20)
    long, short = "a photo of " * 20, "a photo"
    (ids, _), mask = pipe.encode_prompt([long, short])
    assert mask[0].all() and len(ids) == 20 and mask.sum(dim=1)[1] < 20
    whole = load(oracle / "tiny-fudoki").encode_prompt([long])[0][0].tolist()
    assert ids.tolist() == whole[:15] + whole[-5:]
    assert pipe.tokenizer.decode(ids[-5:]) == "\n\nAssistant:<begin_of_image>"
    assert "1 of 2 prompts are longer than" in caplog.text
    with pytest.raises(ValueError, match="`max_prompt_length` must be at least 7, got 3"):
        load(oracle / "tiny-fudoki", max_prompt_length=3)


def test_a_negative_prompt_takes_the_place_of_the_unconditional_input(pipe):
    options = {"guidance_scale": 6.0, **LATENT}
    uncond = pipe(PROMPTS, generator=seeded(), **options).images
    assert torch.equal(pipe(PROMPTS, negative_prompt="", generator=seeded(), **options).images, uncond)
    mixed = pipe(PROMPTS, negative_prompt=["a car", ""], generator=[seeded(1), seeded(2)], **options).images
    plain = pipe(PROMPTS, generator=[seeded(1), seeded(2)], **options).images
    assert not torch.equal(mixed[0], plain[0]) and torch.equal(mixed[1], plain[1])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"height": 32}, "`height` must be 64, the one size of the model's images, got 32"),
        ({"width": 128}, "`width` must be 64"),
        ({"prompt": []}, r"`prompt` must be a string or a non-empty list of strings, got \[\]"),
        ({"output_type": "pdf"}, "`output_type` must be 'pil', 'np', 'pt' or 'latent', got 'pdf'"),
    ],
)
def test_bad_arguments_are_refused(pipe, kwargs, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a car", **kwargs})


# Files


def test_what_is_saved_loads_again(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(predict(loaded), predict(pipe))
    options = {"generator": seeded(), "output_type": "pt", "num_inference_steps": 3}
    assert torch.equal(loaded(PROMPTS, **options).images, pipe(PROMPTS, **{**options, "generator": seeded()}).images)
    assert loaded.scheduler.config.metric_power == 4.0
    weights = load_file(tmp_path / "vae" / "model.safetensors")
    save_file({name: weights[name] for name in list(weights)[1:]}, tmp_path / "vae" / "model.safetensors")
    with pytest.raises(ValueError, match="miss"):
        load(tmp_path)


def test_files_may_be_float16_and_in_shards(original_dir, pipe):
    weights = load_file(original_dir / "model.safetensors")
    names = sorted(weights)
    weight_map = {name: f"model-{1 + 2 * place // len(names)}.safetensors" for place, name in enumerate(names)}
    for file in set(weight_map.values()):
        shard = {name: weights[name].half() for name in names if weight_map[name] == file}
        save_file(shard, original_dir / file, metadata={"format": "pt"})
    (original_dir / "model.safetensors").unlink()
    (original_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    half = load(original_dir)
    assert half.transformer.dtype == half.vae.dtype == torch.float32
    torch.testing.assert_close(predict(half), predict(pipe), atol=2e-2, rtol=0)
    assert not torch.equal(predict(half), predict(pipe))
    codes = half.vae.quantize.embedding.weight
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(64), atol=1e-6, rtol=0)
    planned = FUDOKIPipeline.from_configs(original_dir)
    for name in ("transformer", "vae"):
        shapes = [{key: x.shape for key, x in getattr(one, name).state_dict().items()} for one in (planned, half)]
        assert shapes[0] == shapes[1]
    bfloat16 = load(original_dir, dtype=torch.bfloat16)
    assert bfloat16.transformer.dtype == bfloat16.vae.dtype == torch.bfloat16
    assert bfloat16.scheduler.codebook.dtype == torch.float32
    assert len(bfloat16(PROMPTS, num_inference_steps=2).images) == 2


def test_grouped_queries_are_those_of_repeated_heads(original_dir):
    def group(config, weights):
        config["language_config"]["num_key_value_heads"] = 2
        for name in list(weights):
            if "k_proj" in name or "v_proj" in name:
                weights[name] = weights[name][:32].clone()

    edit(original_dir, group)
    grouped = predict(load(original_dir))

    def repeat(config, weights):
        config["language_config"]["num_key_value_heads"] = 4
        for name in list(weights):
            if "k_proj" in name or "v_proj" in name:
                weights[name] = weights[name].view(2, 16, 64).repeat_interleave(2, dim=0).flatten(0, 1)

    edit(original_dir, repeat)
    torch.testing.assert_close(grouped, predict(load(original_dir)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["gen_head.vision_head.weight", "gen_vision_model.quant_conv.bias", "gen_embed.weight"]
)
def test_a_missing_weight_is_named(original_dir, name):
    edit(original_dir, lambda config, weights: weights.pop(name))
    with pytest.raises(
        ValueError, match=name.rpartition(".")[0].split(".")[-1].replace("gen_embed", "generation_embeddings")
    ):
        load(original_dir)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit",))


@pytest.mark.parametrize("content", [Evil(), torch.nn.Linear(2, 2), {"weight": torch.ones(2, 2)}, "text"])
def test_only_an_embedding_is_unpickled(original_dir, content):
    torch.save(content, original_dir / "image_embedding.pt")
    with pytest.raises(ValueError, match="image_embedding.pt is damaged, or is no embedding"):
        load(original_dir)
    (original_dir / "image_embedding.pt").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="image_embedding.pt is damaged, or is no embedding"):
        load_embedding(original_dir / "image_embedding.pt")


def test_the_codes_of_the_path_are_those_of_the_pickle(pipe, oracle):
    codes = load_file(oracle / "b_path.safetensors")["image.embedding"]
    expected = torch.nn.functional.normalize(codes, dim=-1)
    torch.testing.assert_close(pipe.scheduler.codebook, expected)
    assert not torch.allclose(pipe.vae.quantize.embedding.weight, expected, atol=1e-2)


# Adapters


@pytest.mark.parametrize("folder", ["", "lora_adapter_ema", "lora_adapter"])
def test_released_adapters_load_and_load_again(pipe, oracle, tmp_path, folder):
    before = predict(pipe)
    pipe.load_lora_weights(oracle / "release_layout" / folder)
    source = "lora_adapter" if folder == "lora_adapter" else "lora_adapter_ema"
    released = load_file(oracle / "release_layout" / source / "adapter_model.safetensors")
    own = {name: weight for name, weight in pipe.transformer.named_parameters() if "lora_" in name}
    assert len(own) == len(released) == 28 and all(name.startswith("model.language_model.") for name in own)
    for name, weight in own.items():
        name = name.removeprefix("model.language_model.").replace(".default", "")
        assert torch.equal(weight, released[f"base_model.model.model.{name}"])
    adapted = predict(pipe)
    assert (adapted - before).abs().max() > 0.1
    pipe.save_lora_weights(tmp_path / "saved")
    again = load(oracle / "tiny-fudoki")
    again.load_lora_weights(tmp_path / "saved")
    assert torch.equal(predict(again), adapted)
    wrapped = load(oracle / "tiny-fudoki")
    wrapped.transformer = PeftModel.from_pretrained(wrapped.transformer, tmp_path / "saved")
    assert torch.equal(predict(wrapped), adapted)
    pipe.unload_lora_weights()
    assert torch.equal(predict(pipe), before)


def test_an_average_takes_the_place_of_the_last_weights(pipe, oracle, tmp_path):
    release = shutil.copytree(oracle / "release_layout", tmp_path / "release")
    expected = load(oracle / "tiny-fudoki")
    expected.load_lora_weights(release)
    shutil.rmtree(release / "lora_adapter_ema")
    pipe.load_lora_weights(tmp_path, subfolder="release")
    assert torch.equal(predict(pipe), predict(expected))
    pipe.unload_lora_weights()
    state = torch.load(release / "ema_state.pt", weights_only=True)
    for average, message in (
        (state["ema_parameters"][:-1], "must hold one tensor for each of the adapter's 28"),
        (state["ema_parameters"][::-1], "has tensors of another shape than the adapter"),
        ([Evil()], "must hold one tensor"),
    ):
        torch.save({"decay": 0.9, "ema_parameters": average}, release / "ema_state.pt")
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(release)
    torch.save({}, release / "gen_modules_state.pt")
    with pytest.raises(ValueError, match="has `gen_modules_state.pt`, weights of other modules"):
        pipe.load_lora_weights(release)


# Training


def test_scores_are_those_of_the_logits(pipe):
    ids, mask = pipe.encode_prompt(PROMPTS)
    state, labels = torch.randint(64, (2, 2, 16), generator=seeded())
    expected = pipe.denoise(ids, mask, state, SHAPE).log_softmax(dim=-1)
    entropies = -(expected.exp() * expected).sum(dim=-1)
    expected = expected.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    add_fused_lm_head(pipe.transformer, outputs=("entropy",))
    rows = (ids, mask, state, SHAPE, labels)
    for scores in (pipe.score(pipe.transformer, *rows), pipe.score_with_kl(pipe.transformer, None, *rows)[:2]):
        for score, value in zip(scores, (expected, entropies), strict=True):
            torch.testing.assert_close(score, value, atol=1e-5, rtol=1e-5)
    head = LoraConfig(target_modules=["vision_head"], init_lora_weights=False)
    adapted = PeftModel(pipe.transformer, head)
    logits = pipe.denoise(ids, mask, state, SHAPE)
    expected = logits.log_softmax(dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(pipe.score(adapted, *rows)[0], expected, atol=1e-5, rtol=1e-5)


LORA = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])


@pytest.mark.parametrize(
    "peft_config", [None, LORA, LoraConfig(target_modules="all-linear")], ids=["full", "lora", "all"]
)
def test_a_step_of_training_is_saved_and_loads_again(oracle, tmp_path, peft_config):
    pipe = load(oracle / "tiny-fudoki")
    before = predict(pipe)
    args = UDMGRPOConfig(
        str(tmp_path),
        per_device_train_batch_size=12,
        num_generations=4,
        num_inference_steps=4,
        timestep_window=[0, 1],
        guidance_scale=3.0,
        learning_rate=1e-3,
        max_steps=2,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )

    def redness(completions, **kwargs):
        return [float(image.resize((1, 1)).getpixel((0, 0))[0]) for image in completions]

    trainer = UDMGRPOTrainer(pipe, redness, args, Dataset.from_dict({"prompt": PROMPTS * 2}), peft_config=peft_config)
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    start = {name: weight.detach().clone() for name, weight in trained.items()}
    trainer.train()
    unused = {name for name, weight in trained.items() if torch.equal(weight, start[name])}
    assert all("embed" in name for name in unused), unused
    trainer.save_model()
    if peft_config is None:
        loaded = load(tmp_path)
    else:
        loaded = load(oracle / "tiny-fudoki")
        loaded.load_lora_weights(tmp_path)
    after = predict(pipe)
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(predict(loaded), after, atol=0 if peft_config is None else 1e-5, rtol=0)


# The command line


def test_memory_is_computed_from_configurations(oracle, tmp_path, pipe):
    pipe.save_pretrained(tmp_path)
    published = memory.build_pipeline("LucasJinWang/FUDOKI", torch.bfloat16)
    assert published.latent_shape() == (24, 24) and published.config.uncond_token_id == 100015
    assert published.transformer.num_parameters() == 1_485_053_952
    assert published.scheduler.config.metric_power == 4.0
    args = UDMGRPOConfig(str(tmp_path), use_cpu=True, guidance_scale=3.0, report_to="none")
    estimates = [
        estimate_memory(memory.build_pipeline(path, torch.float32), args)
        for path in (oracle / "tiny-fudoki", tmp_path)
    ]
    assert estimates[0] == estimates[1]
    assert estimates[0].trained_weights == sum(weight.nbytes for weight in pipe.transformer.parameters())


def test_the_command_line_draws_evaluates_and_merges(oracle, tmp_path, capsys):
    tiny, adapter, merged = (
        str(path) for path in (oracle / "tiny-fudoki", oracle / "release_layout", tmp_path / "merged")
    )
    main(["merge", "--model", tiny, "--adapter", adapter, "--output_dir", merged])
    for model, folder in (([tiny, "--adapter", adapter], "adapted"), ([merged], "merged"), ([tiny], "base")):
        flags = ["--num_inference_steps", "8", "--guidance_scale", "6", "--output_dir", str(tmp_path / folder)]
        main(["generate", *PROMPTS, "--model", *model, *flags])
    images = {
        name: [(tmp_path / name / f"0000{i}.png").read_bytes() for i in range(2)]
        for name in ("adapted", "merged", "base")
    }
    assert images["adapted"] == images["merged"] != images["base"]
    flags = [
        "--benchmark",
        "shapes",
        "--num_inference_steps",
        "2",
        "--num_images_per_prompt",
        "1",
        "--batch_size",
        "64",
    ]
    capsys.readouterr()
    with pytest.raises(SystemExit):  # what it has drawn is not of this world
        main(["evaluate", "--model", tiny, *flags, "--output_dir", str(tmp_path / "evaluation")])
    assert "Images must be 32 x 32 pixels, got (64, 64)" in capsys.readouterr().err
