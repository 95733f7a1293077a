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

"""Masked diffusion through the pipeline and the trainers."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import EuroBertForMaskedLM

from trl_udm import (
    DFlowGRPOConfig,
    DFlowGRPOTrainer,
    MaskedDDIMScheduler,
    TextUDMPipeline,
    UDMGRPOConfig,
    UDMGRPOTrainer,
    UDMPipeline,
    UDMSFTConfig,
    UDMSFTTrainer,
)

from ..pipelines.text_families import NUM_TOKENS, build_text_pipeline, build_tokenizer


PROMPTS = Dataset.from_dict({"prompt": ["ab", "abcab", "c", "ba"], "completion": ["a", "bab", "c", ""]})


class RotaryNetwork(EuroBertForMaskedLM):
    """A network whose `forward` takes no positions, as LLaDA's."""

    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


def build_pipeline(architecture="bert", **kwargs):
    tokenizer = build_tokenizer([*"abc ", "<mask>"])
    tokenizer.mask_token = "<mask>"
    pipeline = build_text_pipeline(architecture, tokenizer)
    scheduler = MaskedDDIMScheduler(len(tokenizer), tokenizer.mask_token_id, **kwargs)
    return TextUDMPipeline(pipeline.transformer, scheduler, tokenizer, NUM_TOKENS)


def count_a(completions, **kwargs):
    return [completion.count("a") / NUM_TOKENS for completion in completions]


def build_trainer(output_dir, pipeline=None, algorithm=UDMGRPOTrainer, **kwargs):
    settings = {
        "num_generations": 4,
        "num_train_timesteps": 3,
        "per_device_train_batch_size": 48,
        "num_inference_steps": 5,
        "num_inference_steps_eval": 5,
        "learning_rate": 1e-2,
        "max_steps": 1,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    config = UDMGRPOConfig if algorithm is UDMGRPOTrainer else DFlowGRPOConfig
    args = config(str(output_dir), **{**settings, **kwargs})
    return algorithm(pipeline or build_pipeline(), count_a, args, train_dataset=PROMPTS)


# --- The pipeline ---


def test_a_saved_pipeline_loads_and_no_mask_is_left(tmp_path):
    pipeline = build_pipeline()
    pipeline.save_pretrained(tmp_path)
    loaded = TextUDMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is MaskedDDIMScheduler
    assert loaded.scheduler.config.mask_token_id == loaded.tokenizer.mask_token_id == 6
    outputs = [
        each(
            PROMPTS["prompt"],
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            return_trajectory=True,
        )
        for each in (pipeline, loaded)
    ]
    assert torch.equal(outputs[0].texts, outputs[1].texts)
    assert (outputs[0].texts != 6).all()
    states = outputs[0].trajectory.noised_samples
    assert (states[0] == 6).all() and 0 < (states[2] == 6).float().mean() < 1


def test_a_network_without_positions_sees_a_prompt_without_its_padding():
    pipeline = build_pipeline("eurobert")
    network = RotaryNetwork(pipeline.transformer.config).eval()
    network.load_state_dict(pipeline.transformer.state_dict())
    bare = TextUDMPipeline(network, pipeline.scheduler, pipeline.tokenizer, NUM_TOKENS)
    state = torch.tensor([[2, 6, 3, 6, 6, 6]])
    with torch.no_grad():
        logits = bare.denoise(*bare.encode_prompt(PROMPTS["prompt"]), state.expand(4, -1), (NUM_TOKENS,))
        expected = pipeline.denoise(*pipeline.encode_prompt(["c"]), state, (NUM_TOKENS,))
    torch.testing.assert_close(logits[2:3], expected, rtol=1e-5, atol=1e-5)


def test_the_mask_tokens_must_agree():
    pipeline = build_pipeline()
    components = {**pipeline.components, "scheduler": MaskedDDIMScheduler(7, mask_token_id=5)}
    with pytest.raises(ValueError, match="`scheduler.config.mask_token_id` must be `tokenizer.mask_token_id`, 6, got"):
        TextUDMPipeline(**components)


# --- What is scored ---


def test_a_score_is_the_mean_of_masked_tokens_and_of_certain_ones(tmp_path):
    trainer = build_trainer(tmp_path)
    pipeline = trainer.pipeline
    prompt_ids, prompt_mask = pipeline.encode_prompt(["ab", "c"])
    clean = torch.tensor([[2, 3, 2, 4, 3, 1], [2, 1, 0, 0, 0, 0]])
    state = torch.tensor([[2, 6, 6, 4, 6, 1], [6, 1, 6, 0, 6, 6]])
    t = torch.tensor([0.5, 0.2])
    ids = torch.cat([prompt_ids, state, clean], dim=1)
    counts = pipeline.completion_mask(clean)
    mask = torch.cat([prompt_mask, t.unsqueeze(1).expand_as(clean), counts], dim=1)
    logits = pipeline.denoise(prompt_ids, prompt_mask, state, (NUM_TOKENS,))[..., :6]  # the mask token is never drawn
    logps = logits.log_softmax(dim=-1).gather(-1, clean.unsqueeze(-1)).squeeze(-1)
    logps = logps * (state == 6)
    scores = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, NUM_TOKENS)[0].squeeze(1)
    torch.testing.assert_close(scores, torch.stack([logps[0, [1, 2, 4]].sum() / 6, logps[1, 0] / 2]))
    row = (prompt_ids, prompt_mask, state, (NUM_TOKENS,), clean, t)
    for score in (UDMPipeline.score, TextUDMPipeline.score):
        torch.testing.assert_close(score(pipeline, trainer.model, *row)[0], logps)
    trainer.args.timestep_weighting = "elbo"
    scores = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, NUM_TOKENS)[0].squeeze(1)
    expected = torch.stack([logps[0, [1, 2, 4]].sum() / 6 / 0.5, logps[1, 0] / 2 / 0.8])
    torch.testing.assert_close(scores, expected)


# --- Training ---


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1, "num_iterations": 2, "max_steps": 2, "negative_bound_power": 1.5, "antithetic_noise": True},
        {
            "timestep_weighting": "elbo",
            "shared_noise": True,
            "loss_type": "dapo",
            "importance_sampling_level": "token",
        },
        {"trajectory": "backward", "action": "intermediate", "remasking": "low_confidence", "kl_estimator": "full"},
    ],
)
def test_udm_grpo_takes_a_step(tmp_path, options):
    scheduler_options = {"remasking": options.pop("remasking")} if "remasking" in options else {}
    trainer = build_trainer(tmp_path, build_pipeline(**scheduler_options), **options)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    logs = trainer.state.log_history[0]
    assert all(math.isfinite(value) for value in logs.values()) and logs["grad_norm"] > 0
    assert logs.get("kl", 0.0) == pytest.approx(0, abs=1e-6)
    assert any(not torch.equal(*pair) for pair in zip(before, trainer.model.parameters(), strict=True))


def test_dflow_grpo_takes_a_step_whose_ratio_is_one(tmp_path):
    trainer = build_trainer(
        tmp_path,
        algorithm=DFlowGRPOTrainer,
        num_draws=1,
        changed_only=True,
        timestep_window=[0, 2],
        max_steps=2,
        old_policy_steps=2,
    )
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["ratio"] == pytest.approx(1, abs=1e-6) and first["grad_norm"] > 0
    assert second["ratio"] != pytest.approx(1, abs=1e-6) and math.isfinite(second["ratio"])


def test_supervised_training_learns_masked_tokens(tmp_path):
    args = UDMSFTConfig(
        str(tmp_path), max_steps=20, learning_rate=2e-3, report_to="none", save_strategy="no", disable_tqdm=True
    )
    trainer = UDMSFTTrainer(build_pipeline(), args, PROMPTS, PROMPTS)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.6 * before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leave_one_out": True}, "`leave_one_out` must be False with a MaskedDDIMScheduler"),
        ({"action": "intermediate"}, "`action` must be 'clean' with `trajectory='forward'` and a MaskedDDIM"),
        ({"algorithm": DFlowGRPOTrainer, "average_rates": True}, "`average_rates` must be False with a `MaskedDDIM"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build_trainer(tmp_path, **options)


def test_steps_of_dependent_tokens_have_no_ratio(tmp_path):
    pipeline = build_pipeline(remasking="low_confidence")
    with pytest.raises(ValueError, match="`remasking` of the scheduler must be 'random', got 'low_confidence'"):
        build_trainer(tmp_path, pipeline, DFlowGRPOTrainer)
