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
from peft import LoraConfig, PeftModel
from transformers import GenerationConfig, TrainerCallback

from trl_udm import UDMGRPOTrainer, URSAPipeline
from trl_udm.trainer.ema import EMA_FOLDER
from trl_udm.worlds.shapes import CHECKPOINT_PATH as SHAPES_PATH

from ..pipelines.text_families import build_text_pipeline
from ..pipelines.tiny_diffusion_gemma import build_pipeline as build_gemma_pipeline
from .test_udm_grpo_trainer import LORA, PROMPTS, build_args, build_trainer, count_a
from .toy_text_family import ToyTextPipeline, build_toy_text_pipeline


TRAINER_FILES = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "rollout_state_0.pth", "trainer_state.json"}


class KeepWeights(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})


def load_checkpoint(folder, peft_config):
    """State dict of the model that a checkpoint loads as, outside of the trainer."""
    if peft_config is None:
        return ToyTextPipeline.from_pretrained(folder).transformer.state_dict()
    return PeftModel.from_pretrained(build_toy_text_pipeline().transformer, folder).state_dict()


@pytest.mark.parametrize("peft_config", [None, LORA])
def test_no_more_checkpoints_are_kept_than_asked_for_and_they_load(tmp_path, peft_config):
    trainer = build_trainer(
        tmp_path, peft_config=peft_config, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2
    )
    callback = KeepWeights()
    trainer.add_callback(callback)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    for step in (3, 4):
        loaded = load_checkpoint(tmp_path / f"checkpoint-{step}", peft_config)
        for name, tensor in callback.weights[step - 1].items():
            torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)
    assert any(not torch.equal(tensor, callback.weights[2][name]) for name, tensor in callback.weights[3].items())


@pytest.mark.parametrize("peft_config", [None, LORA])
def test_the_best_checkpoint_outlives_the_limit_and_is_the_model_at_the_end(tmp_path, peft_config):
    eval_rewards = iter([0.1, 0.9, 0.2, 0.3])

    def peaks_at_two(completions, **kwargs):
        return [next(eval_rewards)] * len(completions)

    trainer = UDMGRPOTrainer(
        build_toy_text_pipeline(),
        count_a,
        build_args(
            tmp_path,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=1,
            save_only_model=True,
            load_best_model_at_end=True,
            metric_for_best_model="eval_rewards/peaks_at_two/mean",
            per_device_eval_batch_size=8,
        ),
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS,
        peft_config=peft_config,
        eval_reward_funcs=peaks_at_two,
    )
    callback = KeepWeights()
    trainer.add_callback(callback)
    trainer.train()
    assert (tmp_path / "checkpoint-2").is_dir() and not (tmp_path / "checkpoint-1").exists()
    loaded = load_checkpoint(tmp_path / "checkpoint-2", peft_config)
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, callback.weights[1][name], rtol=0, atol=0)
        torch.testing.assert_close(tensor, loaded[name], rtol=0, atol=0)
    assert any(not torch.equal(tensor, callback.weights[3][name]) for name, tensor in callback.weights[1].items())


def test_the_best_checkpoint_is_that_of_a_watched_reward_whatever_is_trained_on(tmp_path):
    """The trained reward is of whole groups, with a weight that moves, and groups are resampled. The watched one is
    asynchronous, of whole groups, and abstains."""
    eval_rewards = iter([0.1, 0.4, 0.9, 0.8, 0.3, 0.2])  # of two prompts an evaluation

    def rank(completions, **kwargs):
        return [float(sorted(completions).index(completion)) for completion in completions]

    async def watched(completions, **kwargs):
        assert len(completions) == 2
        return [next(eval_rewards), None]

    rank.groupwise = watched.groupwise = True
    trainer = UDMGRPOTrainer(
        build_toy_text_pipeline(),
        [rank, count_a],
        build_args(
            tmp_path,
            max_steps=3,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_only_model=True,
            load_best_model_at_end=True,
            metric_for_best_model="eval_rewards/watched/mean",
            per_device_eval_batch_size=4,
            num_generations_eval=2,
            reward_weights=[1.0, 0.0],
            final_reward_weights=[0.0, 1.0],
            drop_zero_variance=True,
            resample_zero_variance=1,
        ),
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS.select(range(2)),
        eval_reward_funcs=watched,
    )
    trainer.train()
    assert trainer.state.best_metric == pytest.approx(0.85)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")


@pytest.mark.parametrize("peft_config", [None, LORA])
def test_a_checkpoint_of_the_model_only_has_no_optimizer(tmp_path, peft_config):
    names = {}
    for save_only_model in (False, True):
        output_dir = tmp_path / str(save_only_model)
        trainer = build_trainer(
            output_dir, peft_config=peft_config, save_strategy="steps", save_steps=1, save_only_model=save_only_model
        )
        trainer.train()
        names[save_only_model] = {path.name for path in (output_dir / "checkpoint-1").iterdir()}
        loaded = load_checkpoint(output_dir / "checkpoint-1", peft_config)
        for name, tensor in trainer.model.state_dict().items():
            torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)
    assert names[False] - names[True] == TRAINER_FILES - {"trainer_state.json"}
    assert names[True] < names[False]


FAMILIES = {
    "causal": build_toy_text_pipeline,
    "masked": lambda: build_text_pipeline("bert"),
    "blocks": build_gemma_pipeline,
    "images": lambda: URSAPipeline.from_pretrained(SHAPES_PATH),
}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_configs_keep_their_special_tokens(tmp_path, family, lora):
    """The tokenizer's padding token would become one whose embedding has no gradient, once it is loaded."""

    def special_tokens(config):
        return [config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")]

    pipeline = FAMILIES[family]()
    transformer = pipeline.transformer
    transformer.config.get_text_config().pad_token_id = None
    generation_config = getattr(transformer, "generation_config", GenerationConfig())
    before = [special_tokens(vars(config)) for config in (transformer.config.get_text_config(), generation_config)]
    trainer = UDMGRPOTrainer(
        pipeline,
        lambda completions, **kwargs: list(map(float, range(len(completions)))),
        build_args(tmp_path, save_strategy="steps", save_steps=1, ema_decay=0.5),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b", "c", "ab"]}),
        peft_config=LoraConfig(r=2, target_modules=r".*(layers?\.1.*mlp\.up_proj|query)") if lora else None,
    )
    trainer.train()
    trainer.save_model()
    configs = (transformer.config.get_text_config(), transformer.generation_config)
    assert [special_tokens(vars(config)) for config in configs] == before
    if not lora:  # whose folders have no config
        names = (pipeline.transformer_name, EMA_FOLDER)
        for folder in [path / name for path in (tmp_path, tmp_path / "checkpoint-1") for name in names]:
            config = json.loads((folder / "config.json").read_text())
            assert special_tokens(config.get("text_config", config)) == before[0]
            if transformer.can_generate():
                assert special_tokens(json.loads((folder / "generation_config.json").read_text())) == before[1]


def test_a_padding_token_that_is_seen_has_a_gradient_after_saving(tmp_path):
    pipeline = build_toy_text_pipeline()
    pipeline.transformer.config.pad_token_id = pipeline.transformer.model.embed_tokens.padding_idx = None
    args = build_args(tmp_path, save_strategy="steps", save_steps=1)
    UDMGRPOTrainer(pipeline, count_a, args, train_dataset=PROMPTS).train()
    transformer = ToyTextPipeline.from_pretrained(tmp_path / "checkpoint-1").transformer
    transformer(torch.zeros(1, 1, dtype=torch.long)).logits.sum().backward()
    assert transformer.model.embed_tokens.weight.grad[0].abs().sum() > 0


def test_the_token_of_the_hub_survives_a_copy_and_is_in_no_file_of_the_trainer(tmp_path):
    for peft_config in (None, LORA):
        output_dir = tmp_path / str(peft_config is None)
        trainer = build_trainer(
            output_dir, peft_config=peft_config, hub_token="hf_secret", save_strategy="steps", save_steps=1
        )
        trainer.train()
        trainer.save_model()
        assert trainer.args.hub_token == "hf_secret"
        saved = torch.load(output_dir / "training_args.bin", weights_only=False)
        assert saved.hub_token is None and saved.output_dir == str(output_dir)
    assert all(b"hf_secret" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("peft_config", [None, LORA])
def test_weights_that_are_in_shards_leave_no_dummy_file(tmp_path, caplog, peft_config):
    """`Trainer` calls `_save` so under ZeRO-3 without `stage3_gather_16bit_weights_on_model_save`."""
    trainer = build_trainer(tmp_path, peft_config=peft_config)
    trainer._save(str(tmp_path), state_dict={})
    assert f"{tmp_path} has shards only: `stage3_gather" in caplog.text
    assert list(tmp_path.rglob("*.safetensors")) == []
