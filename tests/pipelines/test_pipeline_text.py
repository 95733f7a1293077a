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

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl.rewards import get_soft_overlong_punishment, think_format_reward

from trl_udm import (
    DiagnosticsCallback,
    TextUDMPipeline,
    UDMGRPOConfig,
    UDMGRPOTrainer,
    UDMPipeline,
    UniformDDIMScheduler,
)

from .text_families import NUM_TOKENS, build_text_pipeline, build_tokenizer


ARCHITECTURES = ["bert", "modernbert", "eurobert", "timed"]
PROMPTS = ["ab", "abcab", "c", "ba"]
MESSAGES = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def count_a(completions, **kwargs):
    return [completion.count("a") / NUM_TOKENS for completion in completions]


def build_trainer(output_dir, pipeline, reward_funcs=count_a, prompts=PROMPTS, peft_config=None, **kwargs):
    settings = {
        "num_generations": 4,
        "per_device_train_batch_size": 48,
        "num_inference_steps": 5,
        "num_inference_steps_eval": 7,
        "learning_rate": 1e-2,
        "max_steps": 1,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    dataset = Dataset.from_dict({"prompt": prompts})
    args = UDMGRPOConfig(str(output_dir), **{**settings, **kwargs})
    return UDMGRPOTrainer(pipeline, reward_funcs, args, dataset, eval_dataset=dataset, peft_config=peft_config)


def generate_batch(trainer):
    """One generation batch, as the training loop would ask for it, and what `_compute_loss` makes of its tensors."""
    trainer.model.train()
    batch = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return batch, input_ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)


# --- The pipeline ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_of_prompts_makes_no_difference(architecture):
    pipeline = build_text_pipeline(architecture)
    canvas = torch.randint(len(pipeline.tokenizer), (len(PROMPTS), NUM_TOKENS), generator=generator(0))
    t = torch.tensor([0.0, 0.2, 0.4, 0.8])
    with torch.no_grad():
        together = pipeline.denoise(*pipeline.encode_prompt(PROMPTS), canvas, (NUM_TOKENS,), t=t)
        for i, prompt in enumerate(PROMPTS):
            rows = slice(i, i + 1)
            alone = pipeline.denoise(*pipeline.encode_prompt([prompt]), canvas[rows], (NUM_TOKENS,), t=t[rows])
            torch.testing.assert_close(together[rows], alone, rtol=1e-5, atol=1e-5)
    assert together.shape == (len(PROMPTS), NUM_TOKENS, len(pipeline.tokenizer))


def test_inputs_show_prompt_canvas_and_time():
    pipeline = build_text_pipeline("timed")
    prompt_ids, prompt_mask = pipeline.encode_prompt(["ab", "c", ""])
    assert prompt_ids.tolist() == [[4, 5], [0, 6], [0, 0]]
    assert prompt_mask.tolist() == [[1, 1], [0, 1], [0, 0]]
    canvas, labels = torch.full((3, 3), 7), torch.arange(9).view(3, 3)
    inputs = pipeline.prepare_denoiser_inputs(
        prompt_ids, prompt_mask, canvas, (3,), labels=labels, t=torch.tensor([0.1, 0.2, 0.3])
    )
    assert inputs["input_ids"].tolist()[1] == [0, 6, 7, 7, 7]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3], [0, 0, 0, 1, 2]]
    assert inputs["token_type_ids"].tolist() == [[0, 0, 1, 1, 1]] * 3
    assert inputs["shift_labels"].tolist()[2] == [-100, -100, 6, 7, 8]
    assert inputs["timesteps"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    modern = build_text_pipeline("modernbert").prepare_denoiser_inputs(prompt_ids, prompt_mask, canvas, (3,))
    assert set(modern) == {"input_ids", "attention_mask", "position_ids"}


def test_messages_are_written_by_the_chat_template():
    pipeline = build_text_pipeline()
    conversation = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    ids, mask = pipeline.encode_prompt([conversation, "b"])
    assert ids.tolist() == [[4, 5, 7, 6, 7, 4], [0, 0, 0, 0, 0, 5]]  # "ab c a"
    assert mask.sum(dim=1).tolist() == [6, 1]


def test_a_completion_ends_with_the_first_end_token():
    pipeline = build_text_pipeline()
    end, a, b = 1, 4, 5
    samples = torch.tensor([[a, b, end, a, end, b], [a, a, a, b, b, b], [end, a, a, a, a, a], [a, 0, b, end, 0, 0]])
    assert pipeline.completion_mask(samples).tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
    ]
    assert pipeline.decode(samples, (6,)) == ["ab", "aaabbb", "", "ab"]


def test_the_separator_ends_a_completion_where_there_is_no_end_token():
    tokenizer = build_tokenizer()
    tokenizer.eos_token, tokenizer.sep_token = None, "<eos>"
    assert build_text_pipeline(tokenizer=tokenizer).end_token_id == 1


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "eurobert"])
def test_a_saved_pipeline_loads_and_generates_the_same(tmp_path, architecture):
    pipeline = build_text_pipeline(architecture)
    pipeline.save_pretrained(tmp_path)
    loaded = TextUDMPipeline.from_pretrained(str(tmp_path))
    assert type(loaded.transformer) is type(pipeline.transformer)
    assert loaded.latent_shape() == (NUM_TOKENS,) and loaded.config.time_argument is None
    texts = [
        each(PROMPTS, num_inference_steps=5, num_completions_per_prompt=2, generator=generator(0)).texts
        for each in (pipeline, loaded)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 8 and len(set(texts[0])) > 4


def test_calls_take_one_prompt_messages_a_length_and_return_the_trajectory():
    pipeline = build_text_pipeline()
    output = pipeline("ab", max_completion_length=3, num_inference_steps=4, return_trajectory=True)
    assert len(output.texts) == 1 and output.trajectory.noised_samples.shape == (4, 1, 3)
    assert len(pipeline(MESSAGES, num_inference_steps=2).texts) == len(MESSAGES)
    assert len(pipeline(MESSAGES[0], num_inference_steps=2).texts) == 1


def test_rollouts_have_the_distribution_of_the_network():
    # In one step, every token comes from the network's prediction at t = 0
    pipeline = build_text_pipeline(num_tokens=1)
    vocabulary = len(pipeline.tokenizer)
    prompt_ids, prompt_mask = (x.expand(20000, -1) for x in pipeline.encode_prompt(["ab"]))
    samples = pipeline.sample_tokens(
        prompt_ids, prompt_mask, (1,), num_inference_steps=1, generator=generator(0)
    ).clean_samples
    with torch.no_grad():
        states = torch.arange(vocabulary).unsqueeze(1)
        logits = pipeline.denoise(prompt_ids[:vocabulary], prompt_mask[:vocabulary], states, (1,))
    expected = logits.softmax(dim=-1).mean(dim=(0, 1)) * 20000  # uniform over the noise that a sample starts from
    counts = samples.flatten().bincount(minlength=vocabulary)
    # Chi-square of 7 degrees of freedom is below 24.3 with probability 0.999
    assert ((counts - expected) ** 2 / expected).sum() < 24.3


def test_components_must_fit():
    pipeline = build_text_pipeline()
    message = r"`transformer.config.vocab_size` 8, got 9"
    with pytest.raises(ValueError, match=message):
        TextUDMPipeline(pipeline.transformer, UniformDDIMScheduler(9), pipeline.tokenizer)
    message = r"`time_argument` must be an argument of `BertForMaskedLM.forward`, one of \['input_ids', .*got 'time'"
    with pytest.raises(ValueError, match=message):
        TextUDMPipeline(pipeline.transformer, pipeline.scheduler, pipeline.tokenizer, time_argument="time")
    pipeline.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="`tokenizer` must have a `pad_token`, and an `eos_token` or a `sep_token`"):
        TextUDMPipeline(pipeline.transformer, pipeline.scheduler, pipeline.tokenizer)
    with pytest.raises(ValueError, match="`max_completion_length` must be > 0, got 0"):
        pipeline.latent_shape(0)


@pytest.mark.parametrize("name", ["transformer", "scheduler", "tokenizer"])
def test_a_missing_component_is_named(tmp_path, name):
    pipeline = build_text_pipeline()
    message = f"`{name}` must be given, got None: `TextUDMPipeline` does not work without it"
    with pytest.raises(ValueError, match=message):
        TextUDMPipeline(**{**pipeline.components, name: None})
    setattr(pipeline, name, None)
    with pytest.raises(ValueError, match=message):
        pipeline("abc")
    with pytest.raises(ValueError, match=message):
        build_trainer(tmp_path, pipeline)


def test_a_text_beyond_the_positions_of_the_network_is_refused():
    pipeline = build_text_pipeline()  # with positions for 64 tokens
    options = {"num_inference_steps": 1, "negative_prompt": "b"}
    pipeline("a" * (64 - NUM_TOKENS), **options)
    message = "must have at most the 64 tokens that `BertForMaskedLM` has positions for, got 59 [+] 6 tokens. Shorten"
    with pytest.raises(ValueError, match=message):
        pipeline(["b", "a" * (65 - NUM_TOKENS)], **options)
    build_text_pipeline("modernbert")("a" * 99, **options)  # rotary positions have no end


# --- Scoring ---


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probabilities_equal_a_direct_forward(tmp_path, architecture, level):
    trainer = build_trainer(tmp_path, build_text_pipeline(architecture), importance_sampling_level=level)
    batch, input_ids, attention_mask = generate_batch(trainer)
    prompt_mask, times = batch["prompt_mask"][:, :-NUM_TOKENS], batch["prompt_mask"][:, -1]
    assert (prompt_mask.sum(dim=1) < prompt_mask.size(1)).any()  # prompts of several lengths
    lengths = batch["completion_mask"].sum(dim=1)
    assert lengths.min() < NUM_TOKENS and lengths.max() > lengths.min()
    with torch.no_grad():
        scores = []
        for trainer.args.kl_estimator in ("full", "k3"):  # the second one stays
            logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, input_ids, attention_mask, NUM_TOKENS, batch_size=7, compute_entropy=True
            )
            scores.append((logps, entropies))
        torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-5)
        for i in range(len(input_ids)):
            # By the network alone: no padding, and nothing of the pipeline
            prompt = batch["prompt_ids"][i, :-NUM_TOKENS][prompt_mask[i].bool()]
            inputs = {"input_ids": torch.cat([prompt, batch["prompt_ids"][i, -NUM_TOKENS:]]).unsqueeze(0)}
            if architecture in ("bert", "timed"):
                inputs["token_type_ids"] = torch.tensor([[0] * len(prompt) + [1] * NUM_TOKENS])
            if architecture == "timed":
                inputs["timesteps"] = times[i : i + 1]
            log_probs = trainer.pipeline.transformer(**inputs).logits[0, -NUM_TOKENS:].log_softmax(dim=-1)
            expected = log_probs.gather(-1, batch["completion_ids"][i].unsqueeze(-1)).squeeze(-1)
            if level == "sequence":
                expected = expected[: lengths[i]].mean(dim=0, keepdim=True)
            torch.testing.assert_close(logps[i], expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(entropies[i], -(log_probs.exp() * log_probs).sum(dim=-1), rtol=1e-5, atol=1e-5)


def test_the_fused_head_scores_the_same_where_the_head_is_linear_and_not_where_it_is_more(tmp_path):
    differences = {}
    for architecture in ("eurobert", "bert"):
        trainer = build_trainer(tmp_path, build_text_pipeline(architecture))
        prompt_ids, prompt_mask = trainer.pipeline.encode_prompt(PROMPTS)
        noised_samples, labels = torch.randint(8, (2, 4, NUM_TOKENS), generator=generator(0))
        inputs = (trainer.model, prompt_ids, prompt_mask, noised_samples, (NUM_TOKENS,), labels)
        with torch.no_grad():
            log_probs, _ = trainer.pipeline.score(*inputs)
            fused_log_probs, _ = UDMPipeline.score(trainer.pipeline, *inputs)
        differences[architecture] = (log_probs - fused_log_probs).abs().max().item()
    assert differences["eurobert"] < 1e-5
    assert differences["bert"] > 0.1


def test_the_network_gets_one_time_in_rollouts_and_in_scoring(tmp_path):
    trainer = build_trainer(tmp_path, build_text_pipeline("timed"))
    seen = []
    trainer.pipeline.transformer.time.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten()))
    batch, input_ids, attention_mask = generate_batch(trainer)
    assert [times.unique().tolist() for times in seen] == [[pytest.approx(i / 5)] for i in range(5)]
    times = batch["prompt_mask"][:, -1]
    assert set(times.tolist()) <= {rollout_times[0].item() for rollout_times in seen}
    assert (times.view(-1, 3).diff(dim=1) - 0.2).abs().max() < 1e-6
    # An evaluation between the updates of a rollout has another grid
    trainer.evaluate()
    seen.clear()
    trainer._get_per_token_logps_and_entropies(trainer.model, input_ids, attention_mask, NUM_TOKENS)
    assert torch.equal(seen[0], times)


def test_diagnostics_score_at_the_times_of_their_states(tmp_path):
    trainer = build_trainer(tmp_path, build_text_pipeline("timed"), per_device_train_batch_size=24)
    trainer.add_callback(DiagnosticsCallback(trainer, PROMPTS))
    trainer.train()
    seen = []
    trainer.pipeline.transformer.time.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten()))
    callback = trainer.callback_handler.callbacks[-1]
    with torch.no_grad():
        measurement = callback._measure_policy()
    rollout, scored = torch.cat(seen[:5]), torch.cat(seen[5:])
    assert torch.equal(scored, rollout.repeat(2))  # forward states and backward states
    assert len(measurement["log_prob_variance"]["forward"]) == 5


def test_tokens_after_the_end_have_no_part_in_the_loss(tmp_path):
    trainer = build_trainer(tmp_path, build_text_pipeline(), beta=0.0)
    batch = generate_batch(trainer)[0]
    trainer.current_gradient_accumulation_steps = 1
    losses = []
    for _ in range(2):
        trainer._metrics["train"].clear()
        batch["old_per_token_logps"] = torch.full((48, 1), -2.0)
        losses.append(trainer._compute_loss(trainer.model, batch).item())
        is_tail = batch["completion_mask"] == 0
        assert is_tail.any()
        batch["completion_ids"] = torch.where(is_tail, 7 - batch["completion_ids"], batch["completion_ids"])
    assert losses[0] == losses[1]
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum() < 48 * NUM_TOKENS


# --- Training ---


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_a_step_changes_the_network_and_not_the_reference(tmp_path, architecture):
    trainer = build_trainer(tmp_path, build_text_pipeline(architecture), max_steps=2, activation_checkpointing=True)
    initial = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert not torch.equal(parameter, initial[name]), name
    for name, tensor in trainer.ref_model.state_dict().items():
        assert torch.equal(tensor, initial[name]), name
    trainer.save_model()
    loaded = TextUDMPipeline.from_pretrained(str(tmp_path))
    trained = trainer.model.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in loaded.transformer.state_dict().items())


def test_lora_trains_the_adapter_alone(tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear")
    trainer = build_trainer(tmp_path, build_text_pipeline(), peft_config=lora, max_steps=2)
    initial = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, initial[name])}
    assert changed and all("lora_" in name for name in changed)


def test_a_conversational_model_learns_from_a_reward_of_trl(tmp_path):
    # Of five tokens, three make the format by chance in 1 of 15 samples
    pipeline = build_text_pipeline(tokenizer=build_tokenizer(("<think>", "</think>", "a")), num_tokens=3)
    messages = [[{"role": "user", "content": "a"}]] * 8
    trainer = build_trainer(
        tmp_path,
        pipeline,
        think_format_reward,
        messages,
        per_device_train_batch_size=192,
        num_generations=8,
        max_steps=30,
        learning_rate=1e-2,
        beta=0.0,
        log_completions=True,
    )
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert rewards[0] < 0.25 and sum(rewards[-3:]) / 3 > 0.6


def test_rewards_of_trl_see_lengths_and_messages(tmp_path):
    seen = {}

    def record(prompts, completions, completion_ids, **kwargs):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [0.0] * len(completions)

    overlong = get_soft_overlong_punishment(max_completion_len=NUM_TOKENS, soft_punish_cache=NUM_TOKENS)
    trainer = build_trainer(tmp_path, build_text_pipeline(), [overlong, record])
    batch = generate_batch(trainer)[0]
    lengths = batch["completion_mask"].sum(dim=1)[::3]
    assert [len(ids) for ids in seen["completion_ids"]] == lengths.tolist()
    assert all(isinstance(completion, str) for completion in seen["completions"])
    mean = trainer._metrics["train"]["rewards/soft_overlong_punishment_reward/mean"][0]
    assert mean == pytest.approx(-(lengths / NUM_TOKENS).mean().item())

    trainer = build_trainer(tmp_path, build_text_pipeline(), record, MESSAGES)
    generate_batch(trainer)
    assert seen["prompts"][0][0]["role"] == "user"
    assert [set(message) for (message,) in seen["completions"]] == [{"role", "content"}] * 16
    assert {message["role"] for (message,) in seen["completions"]} == {"assistant"}


def test_answers_are_checked_by_trl(tmp_path):
    pytest.importorskip("math_verify")
    from trl.rewards import accuracy_reward

    trainer = build_trainer(tmp_path, build_text_pipeline(), accuracy_reward, MESSAGES)
    trainer.train_dataset = trainer.train_dataset.add_column("solution", ["$a$"] * len(MESSAGES))
    trainer.train()
    assert 0 <= trainer.state.log_history[0]["rewards/accuracy_reward/mean"] <= 1
