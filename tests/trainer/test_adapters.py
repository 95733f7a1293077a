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
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from trl_udm.trainer.adapters import can_merge, merged_adapter

from .test_udm_grpo_trainer import LORA, build_trainer


def randomize(model):
    """Adapters as they are after training."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)


def test_a_merged_rollout_is_that_of_the_adapter_and_leaves_the_weights_as_they_were(tmp_path):
    samples, weights = [], []
    for merge_adapter in (False, True):
        torch.manual_seed(0)
        trainer = build_trainer(tmp_path, peft_config=LORA, merge_adapter=merge_adapter)
        randomize(trainer.model)
        torch.manual_seed(1)
        samples.append(trainer._rollout(["ab", "c"] * 8, "train").output.clean_samples)
        weights.append({name: parameter.clone() for name, parameter in trainer.model.named_parameters()})
    assert torch.equal(samples[0], samples[1])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_within_the_context_the_weights_are_merged_and_the_adapter_is_idle(tmp_path):
    trainer = build_trainer(tmp_path, peft_config=LORA)
    randomize(trainer.model)
    inputs = {"input_ids": torch.arange(8)[None], "attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool)}
    projection = trainer.model.base_model.model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        expected = trainer.model(**inputs).logits
        base, delta = projection.weight.clone(), projection.get_delta_weight("default")
        with pytest.raises(KeyError), merged_adapter(trainer.model):
            torch.testing.assert_close(projection.weight, base + delta)
            projection.lora_A["default"].weight.fill_(torch.nan)  # of no consequence: it is not used
            torch.testing.assert_close(trainer.model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
            raise KeyError  # the weights are restored on the way out of an error too
    assert torch.equal(projection.weight, base)
    assert not projection.merged


def test_only_what_stays_the_same_policy_is_merged_unasked(tmp_path):
    assert build_trainer(tmp_path, peft_config=LORA).merge_adapter
    assert not build_trainer(tmp_path).merge_adapter
    assert not build_trainer(tmp_path, peft_config=LORA, bf16=True, use_cpu=True).merge_adapter
    assert build_trainer(tmp_path, peft_config=LORA, bf16=True, use_cpu=True, merge_adapter=True).merge_adapter
    config = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    for tied, dtype, expected in (
        (False, torch.float32, True),
        (True, torch.float32, False),
        (False, torch.bfloat16, False),
    ):
        model = Qwen3ForCausalLM(
            Qwen3Config(**config, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied)
        )
        lora = LoraConfig(r=2, target_modules=["lm_head"], ensure_weight_tying=False)
        assert can_merge(get_peft_model(model.to(dtype), lora)) == expected


def test_without_an_adapter_there_is_nothing_to_merge(tmp_path):
    with pytest.raises(ValueError, match="`merge_adapter` must be False or None, got True: there is no adapter"):
        build_trainer(tmp_path, merge_adapter=True)
