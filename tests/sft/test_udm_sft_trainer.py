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
from PIL import Image

from trl_udm import (
    FUDOKIPipeline,
    TextUDMPipeline,
    UDMGRPOConfig,
    UDMGRPOTrainer,
    UDMSFTConfig,
    UDMSFTTrainer,
    URSAPipeline,
)
from trl_udm.worlds.shapes import CHECKPOINT_PATH as SHAPES_PATH
from trl_udm.worlds.sums import CHECKPOINT_PATH as SUMS_PATH
from trl_udm.worlds.sums.problems import split_problems, sum_reward, work_out


LORA = LoraConfig(r=4, target_modules="all-linear")


def build_rows(num_rows=64):
    rows = split_problems()[0][:num_rows]
    terms = [map(int, row["prompt"].removesuffix("=").split("+")) for row in rows]
    return Dataset.from_list([{**row, "completion": work_out(*pair)} for row, pair in zip(rows, terms, strict=True)])


def build_trainer(output_dir, path=SUMS_PATH, dataset=None, peft_config=None, **kwargs):
    defaults = {
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 32,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    pipeline_class = TextUDMPipeline if path == SUMS_PATH else URSAPipeline
    pipeline = pipeline_class.from_pretrained(path)
    dataset = build_rows() if dataset is None else dataset
    args = UDMSFTConfig(str(output_dir), **{**defaults, **kwargs})
    return UDMSFTTrainer(pipeline, args, dataset, dataset, peft_config=peft_config)


def get_losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("peft_config", [None, LORA])
def test_a_text_model_learns_and_reinforcement_learning_goes_on_from_it(tmp_path, peft_config):
    learning_rate = 3e-3 if peft_config else 2e-4
    trainer = build_trainer(tmp_path, peft_config=peft_config, max_steps=20, learning_rate=learning_rate)
    before = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == before  # with the same noise
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.95 * before
    trainer.save_model()
    pipeline = TextUDMPipeline.from_pretrained(SUMS_PATH if peft_config else tmp_path)
    if peft_config is not None:
        pipeline.load_lora_weights(tmp_path)
        assert isinstance(pipeline.peft_model, PeftModel)
    texts = [
        each(["17+45=", "3+4="], num_inference_steps=5, generator=torch.Generator().manual_seed(0)).texts
        for each in (pipeline, trainer.pipeline)
    ]
    assert texts[0] == texts[1]
    args = UDMGRPOConfig(str(tmp_path / "rl"), max_steps=1, bf16=False, report_to="none", save_strategy="no")
    rl = UDMGRPOTrainer(trainer.pipeline, sum_reward, args, trainer.train_dataset)
    rl.train()
    assert rl.state.log_history[0]["kl"] == 0.0  # the reference is what was fine-tuned


def test_an_image_model_learns(tmp_path):
    images = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    rows = Dataset.from_dict({"prompt": ["a photo of a red circle", "a photo of a blue square"], "completion": images})
    pipeline = URSAPipeline.from_pretrained(SHAPES_PATH)
    height, width = (pipeline.config.vae_scale_factor * size for size in pipeline.latent_shape()[1:])
    rows = rows.map(lambda row: {"completion": row["completion"].resize((width, height))})
    trainer = build_trainer(tmp_path, SHAPES_PATH, rows, max_steps=8, per_device_train_batch_size=2)
    tokens = trainer.encode_rows(list(rows))["clean_samples"]
    (decoded, _) = trainer.pipeline.decode(tokens, trainer.latent_shape)
    assert torch.tensor(decoded.resize((1, 1)).getpixel((0, 0))).argmax() == 0  # red
    trainer.train()
    losses = get_losses(trainer)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("peft_config", [None, LORA])
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, peft_config):
    options = {"peft_config": peft_config, "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1}
    whole = build_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = build_trainer(tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert get_losses(resumed)[-2:] == get_losses(whole)[-2:]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


def test_the_loss_is_that_of_pretraining(tmp_path):
    trainer = build_trainer(tmp_path)
    pipeline = trainer.pipeline
    inputs = trainer.encode_rows(list(trainer.train_dataset))
    clean_samples = inputs["clean_samples"]
    assert pipeline.decode(clean_samples, (12,)) == trainer.train_dataset["completion"][:]
    torch.manual_seed(0)
    loss = trainer.compute_loss(trainer.model, inputs)
    torch.manual_seed(0)
    t = torch.rand(64)
    noised_samples = pipeline.scheduler.add_noise(clean_samples, t)
    logits = pipeline.denoise(inputs["prompt_ids"], inputs["prompt_mask"], noised_samples, (12,))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), clean_samples.flatten())
    torch.testing.assert_close(loss, expected)
    split = build_trainer(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=1)
    split.train()
    assert get_losses(split)[0] < 2 * expected  # a mean over both parts


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"`train_dataset` must have the columns 'prompt' and 'completion', got \['a'\]"
    ):
        build_trainer(tmp_path, dataset=Dataset.from_dict({"a": [1]}))
    with pytest.raises(ValueError, match="`dataloader_num_workers` must be 0, got 2"):
        UDMSFTConfig(str(tmp_path), dataloader_num_workers=2)
    with pytest.raises(ValueError, match="`remove_unused_columns` must be False"):
        UDMSFTConfig(str(tmp_path), remove_unused_columns=True)
    with pytest.raises(TypeError, match="`pipeline` must be a `UDMPipeline`, got str"):
        UDMSFTTrainer("sums")
    trainer = build_trainer(tmp_path)
    with pytest.raises(ValueError, match="A completion must have at most 12 tokens, got 13: '1234567890123'"):
        trainer.pipeline.encode_completions(["1234567890123"], (12,))
    assert trainer.pipeline.encode_completions(["123456789012"], (12,)).shape == (1, 12)


def test_saved_files_name_no_folder(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert "_name_or_path" not in json.loads((tmp_path / "transformer" / "config.json").read_text())


def test_fudoki_is_fine_tuned(tmp_path, oracle_dir):
    pipeline = FUDOKIPipeline.from_pretrained(oracle_dir / "fudoki" / "tiny-fudoki")
    tokens = torch.randint(
        pipeline.scheduler.config.codebook_size, (2, 16), generator=torch.Generator().manual_seed(0)
    )
    images = pipeline.decode(tokens, pipeline.latent_shape())
    assert pipeline.encode_completions(images, pipeline.latent_shape()).shape == (2, 16)
    with pytest.raises(ValueError, match="`completion` must have the size of the output, 64 pixels high"):
        pipeline.encode_completions([images[0].resize((32, 32))], pipeline.latent_shape())
    rows = Dataset.from_dict({"prompt": ["a cat", "a dog"], "completion": images})
    args = UDMSFTConfig(
        str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", logging_steps=1
    )
    trainer = UDMSFTTrainer(pipeline, args, rows)
    trainer.train()
    assert 0 < get_losses(trainer)[0] < 20
