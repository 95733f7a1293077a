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

"""The snippet of a model card runs, for every family, with and without an adapter."""

import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from trl_udm import UDMGRPOConfig, UDMGRPOTrainer, URSAPipeline
from trl_udm.pipelines.pipeline_diffusion_gemma import LORA_TARGET_MODULES

from ..pipelines.text_families import build_text_pipeline
from ..pipelines.tiny_diffusion_gemma import build_pipeline as build_diffusion_gemma_pipeline
from .toy_text_family import build_toy_text_pipeline


# By family: the prompt, and options of the pipeline
FAMILIES = {
    "ursa": ("a sign", {"height": 32, "width": 32}),
    "ursa-video": ("a sign", {"height": 32, "width": 32, "num_frames": 5}),
    "ursa-video-of-one-frame": ("a sign", {"height": 32, "width": 32}),
    "text": ("ab", {}),
    "text-messages": ([{"role": "user", "content": "ab"}], {"max_completion_length": 4}),
    "diffusion-gemma": ("1+1=", {"gen_length": 16}),
    "diffusion-gemma-messages": ([{"role": "user", "content": "1+1="}], {"gen_length": 8}),
    "toy": ("ab", {}),
}


def build_pipeline(family, oracle_dir):
    if family == "ursa":
        return URSAPipeline.from_pretrained(oracle_dir / "tiny-ursa", max_prompt_length=16)
    if family.startswith("ursa-video"):
        return URSAPipeline.from_pretrained(oracle_dir / "video" / "tiny-ursa-video", max_prompt_length=16)
    if family == "toy":
        return build_toy_text_pipeline()
    return build_text_pipeline() if family.startswith("text") else build_diffusion_gemma_pipeline()


@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_snippet_draws_what_the_trained_model_draws(tmp_path, monkeypatch, oracle_dir, family, is_lora):
    monkeypatch.chdir(tmp_path)
    (prompt, options), pipeline = FAMILIES[family], build_pipeline(family, oracle_dir)
    pipeline.save_pretrained("base")
    targets = LORA_TARGET_MODULES if family.startswith("diffusion-gemma") else "all-linear"
    args = UDMGRPOConfig(
        "model",
        per_device_train_batch_size=12,
        num_generations=4,
        num_inference_steps_eval=6,
        pipeline_kwargs=options,
        bf16=False,
        report_to="none",
    )
    trainer = UDMGRPOTrainer(
        pipeline,
        lambda completions, **kwargs: [0.0] * len(completions),
        args,
        Dataset.from_dict({"prompt": [prompt] * 4}),
        peft_config=LoraConfig(r=4, target_modules=targets, init_lora_weights=False) if is_lora else None,
    )
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    trainer.save_model()
    trainer.create_model_card()

    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall("```python\n(.*?)```", card, flags=re.DOTALL)
    snippet = snippet.replace("path/to/the/base/model", "base")
    variables = {}
    exec(snippet, variables)

    trainer.model.eval()
    generator = torch.Generator().manual_seed(0)
    if not family.startswith("diffusion-gemma"):
        options = {**options, "guidance_scale": 1.0}
    output = pipeline(prompt, num_inference_steps=6, generator=generator, **options)
    if family == "ursa-video":
        assert np.array_equal(np.stack(variables["video"]), np.stack(output.frames[0]))
        assert (tmp_path / "video.gif").exists()
        assert "pipeline_tag: text-to-video" in card
    elif family.startswith("ursa"):
        assert np.array_equal(variables["image"], output.images[0]) and (tmp_path / "image.png").exists()
        assert "pipeline_tag: text-to-image" in card
    else:
        assert variables["text"] == output.texts[0]
