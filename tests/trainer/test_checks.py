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

import dataclasses
import functools
import logging
import warnings

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig

from tests.pipelines.text_families import build_text_pipeline, build_tokenizer
from tests.pipelines.tiny_diffusion_gemma import build_pipeline as build_diffusion_gemma
from trl_udm import TextUDMPipeline, UDMGRPOConfig, UDMGRPOTrainer, UniformDDIMScheduler, URSAPipeline
from trl_udm.cut_prompts import PromptCutter
from trl_udm.pipelines.bidirectional import check_bidirectional
from trl_udm.trainer.udm_grpo_config import REFUSED_OPTIONS
from trl_udm.worlds.shapes import CHECKPOINT_PATH

from .test_udm_grpo_trainer import build_args
from .toy_text_family import build_toy_text_pipeline


# Every option of `GRPOConfig` is in one of three lists, so that an upgrade of TRL asks where its new ones belong:
# refused (`REFUSED_OPTIONS`), with an effect, or
HARMLESS = set(
    # for scripts that read them
    "do_train do_eval do_predict resume_from_checkpoint local_rank "
    # of what these methods do not have, in `GRPOTrainer` as here: predictions, labels, a length of a row
    "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics "
    "batch_eval_metrics label_names length_column_name average_tokens_across_devices "
    # the order of the prompts is that of `seed`, in `GRPOTrainer` as here
    "data_seed".split()
)
EFFECTIVE = set(
    # of `TrainingArguments`
    "output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type "
    "lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon "
    "optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 bf16_full_eval fp16_full_eval tf32 "
    "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs "
    "torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config use_cache "
    "neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size logging_strategy logging_steps "
    "logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level "
    "log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id "
    "trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start "
    "save_only_model save_strategy save_steps save_on_each_node save_total_limit push_to_hub hub_token "
    "hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end "
    "metric_for_best_model greater_is_better ignore_data_skip restore_callback_states_from_checkpoint "
    "full_determinism seed use_cpu accelerator_config parallelism_config dataloader_drop_last dataloader_num_workers "
    "dataloader_pin_memory dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
    "remove_unused_columns ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph "
    "ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics "
    # of `GRPOConfig`
    "trust_remote_code disable_dropout cast_lm_head_to_fp32 num_generations num_generations_eval "
    "ds3_gather_for_generation shuffle_dataset generation_batch_size steps_per_generation chat_template_kwargs beta "
    "num_iterations epsilon delta epsilon_high sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos "
    "vespo_k_neg vespo_lambda_neg importance_sampling_level reward_weights multi_objective_aggregation scale_rewards "
    "loss_type top_entropy_quantile entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max "
    "entropy_coef_delta entropy_target off_policy_mask_threshold use_bias_correction_kl log_completions "
    "num_completions_to_print log_unique_prompts log_completions_hub_repo".split()
)


def test_every_inherited_option_has_an_effect_or_is_refused_or_harmless():
    names = [*REFUSED_OPTIONS, *HARMLESS, *EFFECTIVE]
    assert len(names) == len(set(names))
    assert set(names) == {field.name for field in dataclasses.fields(GRPOConfig)}


@pytest.mark.parametrize("name", REFUSED_OPTIONS)
def test_options_without_effect_are_refused(tmp_path, name):
    default = GRPOConfig.__dataclass_fields__[name].default
    build_args(tmp_path, **{name: default})
    build_args(tmp_path, **{name: None})
    if isinstance(default, bool):
        value = not default
    else:
        value = default + 1 if isinstance(default, int | float) else {"a": 1}
    with pytest.raises(ValueError, match=f"`{name}` must be {default}, got .*: .*"):
        build_args(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, True), ({"activation_checkpointing": False}, False), ({"gradient_checkpointing": False}, False)],
)
def test_a_configuration_warns_of_a_former_name_only_if_it_is_given(tmp_path, options, expected):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        args = UDMGRPOConfig(str(tmp_path), bf16=False, **options)
    assert args.activation_checkpointing is args.gradient_checkpointing is expected
    assert len(caught) == ("gradient_checkpointing" in options)


def test_a_configuration_can_be_copied_with_changes(tmp_path):
    args = dataclasses.replace(build_args(tmp_path), learning_rate=1.0, generation_batch_size=None)
    assert args.learning_rate == 1.0


def count_letters(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def brightness(completions, **kwargs):
    return [0.5] * len(completions)


def build_trainer(pipeline, output_dir, reward_funcs=count_letters, eval_reward_funcs=None, **kwargs):
    rows = Dataset.from_list([{"prompt": "abc"}] * 2)
    args = build_args(output_dir, **kwargs)
    return UDMGRPOTrainer(pipeline, reward_funcs, args, rows, eval_reward_funcs=eval_reward_funcs)


def test_reward_functions_may_be_a_tuple(tmp_path):
    trainer = build_trainer(build_toy_text_pipeline(), tmp_path, (count_letters, len_of_text))
    assert trainer.reward_func_names == ["count_letters", "len_of_text"]


def len_of_text(completions, **kwargs):
    return [len(completion) for completion in completions]


def build_causal_pipeline():
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
    )
    return TextUDMPipeline(Qwen3ForCausalLM(config), UniformDDIMScheduler(len(tokenizer)), tokenizer, 6)


@pytest.fixture
def shapes():
    return URSAPipeline.from_pretrained(CHECKPOINT_PATH)


def test_a_causal_network_is_refused(tmp_path):
    message = "`pipeline.transformer` must be bidirectional, got a causal `Qwen3ForCausalLM`"
    with pytest.raises(ValueError, match=message):
        build_trainer(build_causal_pipeline(), tmp_path)
    check_bidirectional(build_causal_pipeline(), "abc", (1,))  # nothing to tell from one token


@pytest.mark.parametrize(
    "build",
    [
        *(functools.partial(build_text_pipeline, name) for name in ("bert", "modernbert", "eurobert", "timed")),
        build_toy_text_pipeline,
        build_diffusion_gemma,
    ],
    ids=["bert", "modernbert", "eurobert", "timed", "toy", "diffusion_gemma"],
)
def test_networks_of_every_family_pass(build):
    pipeline = build()
    state = torch.get_rng_state()
    *parts, length = pipeline.latent_shape()
    check_bidirectional(pipeline, "abc", (*parts, length))
    if parts:  # canvases
        check_bidirectional(pipeline, "abc", (2, length))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("argument", ["reward_funcs", "eval_reward_funcs"])
@pytest.mark.parametrize(
    ("reward", "got"), [(nn.Linear(1, 1), "a `Linear`"), ("user/reward-model", "'user/reward-model'")]
)
def test_reward_models_are_refused_for_images(tmp_path, shapes, argument, reward, got):
    rewards = {"reward_funcs": [count_letters], argument: [brightness, reward]}
    with pytest.raises(TypeError, match=f"`{argument}` must be functions where samples are images, got {got}"):
        build_trainer(shapes, tmp_path, **rewards)
    rewards[argument] = reward  # without a list
    with pytest.raises(TypeError, match=f"`{argument}` must be functions where samples are images, got {got}"):
        build_trainer(shapes, tmp_path, **rewards)


@pytest.mark.parametrize("argument", ["reward_funcs", "eval_reward_funcs"])
@pytest.mark.parametrize("reward", [0.5, {brightness}, [None]], ids=["number", "set", "none"])
def test_what_cannot_be_called_is_refused_as_a_reward(tmp_path, argument, reward):
    with pytest.raises(TypeError, match=f"`{argument}` must be a function or a list of functions, got"):
        build_trainer(build_toy_text_pipeline(), tmp_path, **{argument: reward})


def test_weights_are_of_the_training_rewards(tmp_path):
    message = r"`reward_weights` must have one weight for each of the 1 `reward_funcs`, got \[1.0, 1.0\]"
    with pytest.raises(ValueError, match=message):
        build_trainer(build_toy_text_pipeline(), tmp_path, eval_reward_funcs=[brightness], reward_weights=[1.0, 1.0])


def test_options_of_chat_templates_are_refused_where_there_is_none(tmp_path, shapes):
    with pytest.raises(ValueError, match="`chat_template_kwargs` must be None for `URSAPipeline`, got {'a': 1}"):
        build_trainer(shapes, tmp_path, chat_template_kwargs={"a": 1})


@pytest.mark.parametrize("build", [build_text_pipeline, build_diffusion_gemma])
def test_options_of_chat_templates_reach_the_template(build):
    pipeline = build()
    pipeline.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}{{ letter }}"
    messages = [{"role": "user", "content": "ab"}]
    ids, _ = pipeline.encode_prompt([messages], letter="c")
    assert pipeline.tokenizer.decode(ids[0]).replace(" ", "").endswith("abc")

    def generate(text, **kwargs):
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 4, "generator": generator, **kwargs}
        return pipeline([[{"role": "user", "content": text}]], **options).texts

    assert generate("ab", chat_template_kwargs={"letter": "c"}) == generate("abc") != generate("ab")


def test_the_trainer_passes_options_of_chat_templates(tmp_path):
    pipeline = build_text_pipeline()
    pipeline.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}{{ letter }}"
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "ab"}]}] * 2)
    args = build_args(tmp_path, chat_template_kwargs={"letter": "c"})

    def reward(prompts, completions, **kwargs):
        return [float(len(completion[0]["content"])) for completion in completions]

    trainer = UDMGRPOTrainer(pipeline, reward, args, rows)
    rollout = trainer._rollout([rows[0]["prompt"]], "train")
    assert pipeline.tokenizer.decode(rollout.prompt_ids[0]).replace(" ", "") == "abc"


def test_prompts_that_are_cut_are_told_once(shapes, caplog):
    long = ["a red circle " * 200, "a blue square " * 200]
    with caplog.at_level(logging.WARNING):
        shapes.encode_prompt(["a red circle"])
        assert caplog.text == ""
        for _ in range(2):
            shapes.encode_prompt(["a red circle", *long, *long])
    length = shapes.config.max_prompt_length
    (record,) = caplog.records
    assert record.message == (
        f"2 of 3 prompts are longer than the {length} tokens that the pipeline reads, and are cut. The first is "
        f"{long[0]!r}. Further ones are not told."
    )


def test_prompts_that_are_cut_are_counted_over_the_datasets(shapes, tmp_path, caplog):
    """Of training and evaluation, by the pipeline and a reward, before the first step."""

    class Reward(PromptCutter):
        __name__ = "reward"

        def __call__(self, prompts, **kwargs):
            self._warn_of_cut_prompts(prompts, shapes.tokenizer, 2, "the reward")
            return [0.0] * len(prompts)

    rows = ["a ring", "a ring", *(f"{'a red circle ' * 200}{word}" for word in ("", "cross", "ring"))]
    eval_rows = [*rows[:1], "a blue square " * 200]
    train, evaluation, other = (Dataset.from_dict({"prompt": x}) for x in (rows, eval_rows, ["a red ring"]))
    with caplog.at_level(logging.WARNING, logger="trl_udm.cut_prompts"):
        trainer = UDMGRPOTrainer(shapes, Reward(), build_args(tmp_path), train, {"one": evaluation, "two": other})
        assert [record.message.split(", and")[0] for record in caplog.records] == [
            f"4 of 6 prompts are longer than the {shapes.config.max_prompt_length} tokens that the pipeline reads"
        ]
        trainer._calculate_rewards([{"prompt": "a ring"}], ["a ring"], [None], [[0]])
    assert caplog.records[1].message.startswith("5 of 6 prompts are longer than the 2 tokens that the reward reads")
    assert f"The first is {rows[2]!r}" in caplog.records[0].message and len(caplog.records) == 2
