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
import torch
from datasets import Dataset
from diffusers import (
    BlockRefinementScheduler,
    DiffusionGemmaPipeline,
    DiscreteDDIMScheduler,
    EntropyBoundScheduler,
)
from peft import LoraConfig, PeftModel, get_peft_model
from trl.rewards import think_format_reward
from trl.trainer.utils import add_fused_lm_head

from trl_udm import (
    DiffusionGemmaUDMPipeline,
    MaskedDDIMScheduler,
    UDMGRPOConfig,
    UDMGRPOTrainer,
    UniformDDIMScheduler,
)
from trl_udm.pipelines.pipeline_diffusion_gemma import LORA_TARGET_MODULES

from .tiny_diffusion_gemma import CANVAS_LENGTH, TURN_END_ID, VOCAB_SIZE, build_model, build_pipeline, build_tokenizer


NUM_TOKENS = 2 * CANVAS_LENGTH
TEXTS = ["1+1=", "what is 2+2?", "3*3", "x"]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGET_MODULES)


def count_digits(prompts, completions, **kwargs):
    return [sum(character.isdigit() for character in completion) for completion in completions]


def build_trainer(output_dir, pipeline=None, reward_funcs=count_digits, prompts=TEXTS, peft_config=LORA, **kwargs):
    settings = {
        "pipeline_kwargs": {"gen_length": NUM_TOKENS},
        "num_generations": 4,
        "per_device_train_batch_size": 16,
        "num_train_timesteps": 2,
        "num_inference_steps": 4,
        "num_inference_steps_eval": 4,
        "learning_rate": 1e-2,
        "max_steps": 1,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return UDMGRPOTrainer(
        build_pipeline() if pipeline is None else pipeline,
        reward_funcs,
        UDMGRPOConfig(str(output_dir), **{**settings, **kwargs}),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        peft_config=peft_config,
    )


def generate_batch(trainer):
    """One generation batch, as the training loop would ask for it."""
    trainer.model.train()
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def score_batch(trainer, batch):
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(
            trainer.model, input_ids, mask, NUM_TOKENS, batch_size=5, compute_entropy=True
        )


@torch.no_grad()
def predict_directly(model, prompt, canvas, self_conditioning=False):
    """Log-probabilities (C, V) by transformers alone: one sample, one canvas, no padding."""
    inputs = {"input_ids": prompt[None], "decoder_input_ids": canvas[None]}
    logits = model(**inputs).logits
    if self_conditioning:
        logits = model(**inputs, self_conditioning_logits=logits).logits
    return logits[0].log_softmax(dim=-1)


def draw_sample(pipeline, seed=0, num_canvases=2, texts=TEXTS, **kwargs):
    prompt_ids, prompt_mask = pipeline.encode_prompt(texts)
    generator = torch.Generator().manual_seed(seed)
    shape = (num_canvases, CANVAS_LENGTH)
    return pipeline.sample_tokens(prompt_ids, prompt_mask, shape, 4, generator=generator, **kwargs)


# --- Prompts and completions ---


def test_texts_are_messages_of_a_user_padded_on_the_left():
    pipeline = build_pipeline()
    ids, mask = pipeline.encode_prompt(["1+1=", [{"role": "user", "content": "x"}, {"role": "model", "content": "y"}]])
    assert pipeline.tokenizer.decode(ids[0]).replace("<pad>", "") == "u:1+1=<turn_end>m:"
    assert pipeline.tokenizer.decode(ids[1]).replace("<pad>", "") == "u:x<turn_end>m:y<turn_end>m:"
    assert (mask == (ids != 0).long()).all() and mask[:, -1].all() and not mask[0, 0]


def test_a_completion_ends_with_the_first_token_that_the_model_or_the_tokenizer_declares():
    pipeline = build_pipeline()
    assert pipeline.end_token_ids == [1, TURN_END_ID]
    samples = torch.full((3, NUM_TOKENS), 5)
    samples[0, 3], samples[0, 9], samples[1, 10], samples[1, 12] = TURN_END_ID, 1, 1, TURN_END_ID
    mask = pipeline.completion_mask(samples)
    assert mask.sum(dim=1).tolist() == [4, 11, 16]
    assert (mask.cumsum(dim=1) == torch.arange(1, 17).minimum(mask.sum(dim=1, keepdim=True))).all()
    assert pipeline.decode(samples, (2, 8)) == ["2" * 3, "2" * 10, "2" * 16]


def test_canvases_follow_from_the_length():
    pipeline = build_pipeline()
    assert pipeline.latent_shape() == (1, 8) and pipeline.latent_shape(gen_length=24) == (3, 8)
    for gen_length, nearest in ((0, 8), (13, 16), (3, 8)):
        with pytest.raises(
            ValueError, match=f"`gen_length` must be a positive .* got {gen_length}. The nearest is {nearest}"
        ):
            pipeline.latent_shape(gen_length=gen_length)


@pytest.mark.parametrize("is_conversational", [False, True])
def test_rewards_see_texts_for_texts_and_messages_for_messages(tmp_path, is_conversational):
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.extend(completions)
        assert all(prompt in conversations if is_conversational else prompt in TEXTS for prompt in prompts)
        return [float(index % 2) for index in range(len(completions))]

    conversations = [
        [{"role": role, "content": text} for role, text in zip(roles, TEXTS, strict=False)]
        for roles in (["user"], ["system", "user"], ["user", "assistant", "user"], ["system", "user", "model", "user"])
    ]
    prompts = conversations if is_conversational else TEXTS
    rewards = [reward, think_format_reward] if is_conversational else reward
    trainer = build_trainer(tmp_path, prompts=prompts, reward_funcs=rewards)
    generate_batch(trainer)
    assert len(seen) == 8
    if is_conversational:
        assert all(message["role"] == "assistant" and isinstance(message["content"], str) for (message,) in seen)
    else:
        assert all(isinstance(completion, str) for completion in seen)


# --- Scores ---


@pytest.mark.parametrize("self_conditioning", [False, True])
def test_the_trainers_log_probabilities_are_those_of_a_direct_forward(tmp_path, self_conditioning):
    model = build_model()
    model.generation_config.eos_token_id = list(range(40, VOCAB_SIZE))  # so that most completions end early
    trainer = build_trainer(
        tmp_path,
        build_pipeline(model=model, self_conditioning=self_conditioning),
        importance_sampling_level="token",
        per_device_train_batch_size=32,
        num_iterations=2,
    )
    batch = generate_batch(trainer)
    logps, entropies, _ = score_batch(trainer, batch)
    num_prompt_tokens = batch["prompt_ids"].size(1) - NUM_TOKENS - CANVAS_LENGTH
    prompt_lengths = batch["prompt_mask"][:, :num_prompt_tokens].sum(dim=1)
    assert len(prompt_lengths.unique()) > 1
    for row in range(len(logps)):
        mask = batch["prompt_mask"][row, :num_prompt_tokens].bool()
        context = batch["prompt_ids"][row, :num_prompt_tokens][mask]
        states = batch["prompt_ids"][row, -NUM_TOKENS:].split(CANVAS_LENGTH)
        actions = batch["completion_ids"][row].split(CANVAS_LENGTH)
        expected = []
        for state, action in zip(states, actions, strict=True):
            expected.append(predict_directly(model, context, state, self_conditioning))
            context = torch.cat([context, action])
        expected = torch.cat(expected)  # (N, V)
        expected_logps = expected.gather(-1, batch["completion_ids"][row, :, None])[:, 0]
        torch.testing.assert_close(logps[row], expected_logps, rtol=0, atol=1e-5)
        torch.testing.assert_close(entropies[row], -(expected.exp() * expected).sum(-1), rtol=0, atol=1e-5)
    trainer.args.kl_estimator = "full"  # whose scores are not those of TRL's fused head
    full_logps, full_entropies, _ = score_batch(trainer, batch)
    torch.testing.assert_close(full_logps, logps, rtol=0, atol=1e-5)
    torch.testing.assert_close(full_entropies, entropies, rtol=0, atol=1e-5)
    trainer.args.kl_estimator = "k3"
    torch.testing.assert_close(batch["old_per_token_logps"], logps, rtol=0, atol=1e-6)
    torch.testing.assert_close(batch["ref_per_token_logps"], logps, rtol=0, atol=1e-6)
    is_end = torch.isin(batch["completion_ids"], torch.tensor(trainer.pipeline.end_token_ids))
    ends = torch.where(is_end.any(dim=1), is_end.long().argmax(dim=1), NUM_TOKENS - 1)
    assert (batch["completion_mask"].sum(dim=1) == ends + 1).all() and (ends < NUM_TOKENS - 1).any()
    trainer.importance_sampling_level = "sequence"
    counted = torch.stack([row[: end + 1].mean() for row, end in zip(logps, ends, strict=True)])
    torch.testing.assert_close(score_batch(trainer, batch)[0][:, 0], counted, rtol=0, atol=1e-5)


def test_a_canvas_sees_the_clean_canvases_before_it_and_not_their_noise():
    pipeline = build_pipeline()
    add_fused_lm_head(pipeline.model)
    prompt_ids, prompt_mask = pipeline.encode_prompt(TEXTS)
    generator = torch.Generator().manual_seed(0)
    samples, noised, others = torch.randint(3, VOCAB_SIZE, (3, 4, NUM_TOKENS), generator=generator)
    first, second = slice(None, CANVAS_LENGTH), slice(CANVAS_LENGTH, None)

    @torch.no_grad()
    def score(samples, noised):
        ids, mask = pipeline.extend_prompt(prompt_ids, prompt_mask, samples)
        return pipeline.score(pipeline.model, ids, mask, noised, (2, CANVAS_LENGTH), labels=samples)[0]

    logps = score(samples, noised)
    with_other_noise = noised.clone()
    with_other_noise[:, first] = others[:, first]
    changed = score(samples, with_other_noise)
    assert torch.equal(changed[:, second], logps[:, second])
    assert (changed[:, first] - logps[:, first]).abs().mean() > 1e-3
    with_other_sample = samples.clone()
    with_other_sample[:, first] = others[:, first]
    assert (score(with_other_sample, noised)[:, second] - logps[:, second]).abs().mean() > 1e-3


def test_the_fused_head_caps_the_logits():
    scores = []
    for cap in (2.0, 0.5):
        pipeline = build_pipeline(model=build_model(final_logit_softcapping=cap))
        add_fused_lm_head(pipeline.model)
        prompt_ids, prompt_mask = pipeline.encode_prompt(TEXTS[:1])
        states, labels = torch.arange(3, 11)[None], torch.arange(20, 28)[None]
        with torch.no_grad():
            logps, _ = pipeline.score(pipeline.model, prompt_ids, prompt_mask, states, (1, 8), labels=labels)
            hidden = pipeline.model.model(input_ids=prompt_ids, decoder_input_ids=states).last_hidden_state
        logits = pipeline.model.lm_head(hidden)
        capped = (cap * (logits / cap).tanh()).log_softmax(dim=-1)
        torch.testing.assert_close(logps, capped.gather(-1, labels[..., None])[..., 0], rtol=0, atol=1e-5)
        scores.append(logps)
    assert (scores[0] - scores[1]).abs().mean() > 0.01


def test_an_intermediate_action_is_scored_after_the_final_canvases(tmp_path):
    trainer = build_trainer(tmp_path, action="intermediate", trajectory="backward")
    trainer.model.train()
    rollout = trainer._rollout(TEXTS, "train")
    prompt_ids, prompt_mask, output = rollout.prompt_ids, rollout.prompt_mask, rollout.output
    assert torch.equal(prompt_ids[:, -CANVAS_LENGTH:], output.clean_samples[:, :CANVAS_LENGTH])
    assert prompt_mask[:, -CANVAS_LENGTH:].all()
    assert output.trajectory.noised_samples.shape == (4, 4, NUM_TOKENS)
    assert torch.equal(output.trajectory.pred_original_samples[-1], output.clean_samples)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


# --- Rollouts ---


@pytest.mark.parametrize("self_conditioning", [False, True])
def test_a_rollout_is_the_samplers_own_canvas_by_canvas_without_a_cache(self_conditioning):
    pipeline = build_pipeline(self_conditioning=self_conditioning)
    output = draw_sample(pipeline, return_trajectory=True)
    generator = torch.Generator().manual_seed(0)
    contexts = [ids[mask.bool()] for ids, mask in zip(*pipeline.encode_prompt(TEXTS), strict=True)]
    for canvas in range(2):
        state = torch.randint(VOCAB_SIZE, (4, CANVAS_LENGTH), generator=generator)
        columns = slice(canvas * CANVAS_LENGTH, (canvas + 1) * CANVAS_LENGTH)
        for step in range(4):
            assert torch.equal(output.trajectory.noised_samples[step, :, columns], state)
            logits = torch.stack(
                [
                    predict_directly(pipeline.model, context, row, self_conditioning)
                    for context, row in zip(contexts, state, strict=True)
                ]
            )
            state = pipeline.scheduler.step(logits, step, state, generator=generator).prev_sample
        assert torch.equal(output.clean_samples[:, columns], state)
        contexts = [torch.cat([context, row]) for context, row in zip(contexts, state, strict=True)]


def test_rollouts_of_a_group_differ(tmp_path):
    trainer = build_trainer(tmp_path)
    trainer.model.train()
    samples = trainer._rollout(["1+1="] * 4, "train").output.clean_samples
    assert len({tuple(row) for row in samples.tolist()}) == 4


def test_given_latents_are_the_first_states():
    latents = torch.arange(4 * NUM_TOKENS).view(4, -1) % VOCAB_SIZE
    output = draw_sample(build_pipeline(), latents=latents, return_trajectory=True)
    assert torch.equal(output.trajectory.noised_samples[0], latents)


def test_rollouts_at_temperature_zero_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`temperature` must be 1.0, got 0.0: rollouts draw"):
        UDMGRPOConfig(str(tmp_path), temperature=0.0, bf16=False)


def test_guidance_is_refused():
    with pytest.raises(ValueError, match="`guidance_scale` must be 1.0 for DiffusionGemma, got 3.0"):
        draw_sample(build_pipeline(), guidance_scale=3.0)


def test_rollouts_take_a_generator_for_each_sample_and_are_interrupted():
    pipeline = build_pipeline()
    condition, shape = pipeline.encode_prompt(TEXTS), pipeline.latent_shape(NUM_TOKENS)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(TEXTS))]
    samples = pipeline.sample_tokens(*condition, shape, 3, generator=generators).clean_samples
    for seed, sample in enumerate(samples):
        rows = [tensor[seed : seed + 1] for tensor in condition]
        alone = pipeline.sample_tokens(*rows, shape, 3, generator=torch.Generator().manual_seed(seed)).clean_samples
        assert torch.equal(alone[0], sample)

    def interrupt(step, timestep, tensors):
        pipeline._interrupt = True
        return tensors

    assert pipeline.sample_tokens(*condition, shape, 3, callback=interrupt).clean_samples.shape == (4, CANVAS_LENGTH)


# --- Schedulers and `__call__` ---


def test_diffusers_ddim_becomes_the_uniform_one():
    pipeline = DiffusionGemmaUDMPipeline(
        build_model(), DiscreteDDIMScheduler(num_inference_steps=7), build_tokenizer()
    )
    assert isinstance(pipeline.scheduler, UniformDDIMScheduler)
    assert (pipeline.scheduler.config.codebook_size, pipeline.scheduler.config.num_inference_steps) == (VOCAB_SIZE, 7)


def test_a_step_gives_what_diffusers_gives():
    logits, states = torch.randn(2, 8, VOCAB_SIZE, generator=torch.manual_seed(0)), torch.arange(16).view(2, 8)
    expected = DiscreteDDIMScheduler().step(logits, 3, states, temperature=0.5, generator=torch.manual_seed(1))
    for return_dict in (True, False):
        output = UniformDDIMScheduler(VOCAB_SIZE).step(
            logits, 3, states, temperature=0.5, generator=torch.manual_seed(1), return_dict=return_dict
        )
        fields = output.to_tuple() if return_dict else output
        assert all(torch.equal(*pair) for pair in zip(fields[:-1], expected.to_tuple(), strict=True))
        assert torch.equal(fields[-1], expected.sampled_tokens)


@pytest.mark.parametrize(
    "scheduler", [BlockRefinementScheduler(), EntropyBoundScheduler(), DiscreteDDIMScheduler(corrector_steps=1)]
)
def test_other_schedulers_generate_and_have_no_rollouts(scheduler):
    pipeline = DiffusionGemmaUDMPipeline(build_model(), scheduler, build_tokenizer())
    assert pipeline.scheduler is scheduler
    assert pipeline(TEXTS, gen_length=16, num_inference_steps=4).sequences.shape == (4, 16)
    message = rf"`scheduler` must be .* got {type(scheduler).__name__}.*UniformDDIMScheduler\({VOCAB_SIZE}\)"
    with pytest.raises(ValueError, match=message):
        draw_sample(pipeline)


def test_masks_are_refused():
    pipeline = build_pipeline()
    pipeline.scheduler = MaskedDDIMScheduler(VOCAB_SIZE, mask_token_id=0)
    with pytest.raises(ValueError, match="must be a `UniformDDIMScheduler` for rollouts, got MaskedDDIMScheduler"):
        draw_sample(pipeline)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_call_is_that_of_diffusers(temperature):
    pipeline = build_pipeline()
    theirs = DiffusionGemmaPipeline(pipeline.model, DiscreteDDIMScheduler(), pipeline.processor)
    outputs = [
        pipe("1+1=", gen_length=16, num_inference_steps=5, temperature=temperature, generator=torch.manual_seed(3))
        for pipe in (pipeline, theirs)
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences) and outputs[0].texts == outputs[1].texts


def test_a_call_with_several_prompts_pads_them():
    pipeline = build_pipeline()
    prompts = [*TEXTS[:2], [{"role": "user", "content": "x"}, {"role": "model", "content": "y"}]]
    noise = torch.Generator().manual_seed(0)
    sequences = pipeline(prompts, gen_length=8, num_inference_steps=1, generator=noise).sequences
    canvases = torch.randint(VOCAB_SIZE, (3, 8), generator=noise.manual_seed(0))
    for prompt, canvas, sequence in zip(prompts, canvases, sequences, strict=True):
        ids = pipeline.encode_prompt([prompt])[0][0]
        assert torch.equal(predict_directly(pipeline.model, ids, canvas).argmax(dim=-1), sequence)


# --- Training ---


def test_the_adapter_stays_unmerged_in_rollouts_since_weights_are_tied(tmp_path):
    assert not build_trainer(tmp_path).merge_adapter


def test_a_step_changes_the_adapter_alone(tmp_path):
    trainer = build_trainer(tmp_path, activation_checkpointing=True)
    initial = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    changed = [name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, initial[name])]
    # Matrices A and B of the decoder's attention (in its second layer without values of its own) and dense layers
    assert len(changed) == 2 * (7 + 6) and all(".decoder.layers." in name and ".lora_" in name for name in changed)
    assert changed == [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert log["kl"] == pytest.approx(0, abs=1e-6) and log["clip_ratio/region_mean"] == 0.0


@pytest.mark.parametrize("train_router", [False, True])
def test_full_training_moves_the_router_only_if_asked(tmp_path, train_router):
    pipeline = build_pipeline(train_router=train_router)
    trainer = build_trainer(tmp_path, pipeline, peft_config=None, learning_rate=1e-3)
    initial = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    changed = [name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, initial[name])]
    assert any("experts" in name for name in changed)
    assert any("router.proj" in name for name in changed) == train_router
    assert any("router" in name for name in changed) == train_router


def test_self_conditioning_keeps_gradients_under_autocast():
    pipeline = build_pipeline(self_conditioning=True)
    add_fused_lm_head(pipeline.model)
    model = get_peft_model(pipeline.model, LORA)
    prompt_ids, prompt_mask = pipeline.encode_prompt(TEXTS)
    states, labels = torch.randint(3, VOCAB_SIZE, (2, 4, CANVAS_LENGTH), generator=torch.manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps, _ = pipeline.score(model, prompt_ids, prompt_mask, states, (1, CANVAS_LENGTH), labels=labels)
    logps.mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert len(gradients) == 13 and all(grad is not None and grad.abs().sum() > 0 for grad in gradients.values())


def test_digits_become_more_frequent(tmp_path):
    trainer = build_trainer(
        tmp_path,
        pipeline_kwargs={"gen_length": CANVAS_LENGTH},
        max_steps=12,
        per_device_train_batch_size=64,
        num_generations=8,
        learning_rate=3e-2,
        beta=0.0,
    )
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert sum(rewards[-3:]) > 1.3 * sum(rewards[:3])


# --- Folders ---


def read_index(folder):
    return json.loads((folder / "model_index.json").read_text())


def test_folders_of_diffusers_and_of_this_class_are_the_same(tmp_path):
    DiffusionGemmaPipeline(build_model(), DiscreteDDIMScheduler(), build_tokenizer()).save_pretrained(
        tmp_path / "theirs"
    )
    ours = DiffusionGemmaUDMPipeline.from_pretrained(tmp_path / "theirs")
    expected = draw_sample(build_pipeline()).clean_samples
    assert torch.equal(draw_sample(ours).clean_samples, expected)
    assert ours.end_token_ids == [1, TURN_END_ID]
    ours.save_pretrained(tmp_path / "ours")
    assert torch.equal(
        draw_sample(DiffusionGemmaUDMPipeline.from_pretrained(tmp_path / "ours")).clean_samples, expected
    )
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        path.name for path in (tmp_path / "theirs").iterdir()
    }
    settings = {"gen_length": 16, "num_inference_steps": 5, "temperature": 1.0}
    texts = [
        pipe("1+1=", generator=torch.manual_seed(3), **settings).texts
        for pipe in (build_pipeline(), DiffusionGemmaPipeline.from_pretrained(tmp_path / "ours"))
    ]
    assert texts[0] == texts[1]
    ours.scheduler = DiscreteDDIMScheduler()
    ours.save_pretrained(tmp_path / "plain")
    plain, theirs = read_index(tmp_path / "plain"), read_index(tmp_path / "theirs")
    assert plain["model"] == ["transformers", "DiffusionGemmaForBlockDiffusion"]
    assert all(plain[name] == theirs[name] for name in ("scheduler", "processor"))


def test_a_repository_of_transformers_loads(tmp_path):
    build_model().save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    pipeline = DiffusionGemmaUDMPipeline.from_pretrained(tmp_path, dtype=torch.float32, self_conditioning=True)
    assert pipeline.self_conditioning and pipeline.end_token_ids == [1, TURN_END_ID]
    expected = draw_sample(build_pipeline(self_conditioning=True)).clean_samples
    assert torch.equal(draw_sample(pipeline).clean_samples, expected)
    with pytest.raises(OSError, match="nowhere"):
        DiffusionGemmaUDMPipeline.from_pretrained(tmp_path / "nowhere")


def test_what_a_run_saves_loads(tmp_path):
    trainer = build_trainer(tmp_path / "full", peft_config=None)
    trainer.train()
    trainer.save_model()
    expected = draw_sample(trainer.pipeline).clean_samples
    pipeline = DiffusionGemmaUDMPipeline.from_pretrained(tmp_path / "full")
    assert torch.equal(draw_sample(pipeline).clean_samples, expected)
    assert isinstance(pipeline.scheduler, UniformDDIMScheduler)

    trainer = build_trainer(tmp_path / "lora")
    trainer.train()
    trainer.save_model()
    expected = draw_sample(trainer.pipeline).clean_samples
    pipeline = build_pipeline()
    assert not torch.equal(draw_sample(pipeline).clean_samples, expected)
    PeftModel.from_pretrained(pipeline.transformer, tmp_path / "lora")
    assert torch.equal(draw_sample(pipeline).clean_samples, expected)


def test_a_full_run_goes_on_from_its_checkpoint(tmp_path):
    trainer = build_trainer(tmp_path, peft_config=None, save_strategy="steps", save_steps=1)
    trainer.train()
    saved = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    resumed = build_trainer(tmp_path, peft_config=None, max_steps=1)
    resumed._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(tensor, saved[name]) for name, tensor in resumed.model.state_dict().items())


def test_a_tokenizer_without_padding_is_refused():
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="`processor` must have a `pad_token` and an `eos_token`"):
        DiffusionGemmaUDMPipeline(build_model(), UniformDDIMScheduler(VOCAB_SIZE), tokenizer)


def test_an_adapter_is_loaded_and_unloaded(tmp_path):
    pipeline = build_pipeline()
    get_peft_model(build_pipeline().transformer, LORA).save_pretrained(str(tmp_path))
    names = list(pipeline.transformer.state_dict())
    pipeline.load_lora_weights(tmp_path)
    assert pipeline.get_list_adapters() == {"model": ["default"]}
    pipeline.unload_lora_weights()
    assert pipeline.get_list_adapters() == {} and list(pipeline.transformer.state_dict()) == names
