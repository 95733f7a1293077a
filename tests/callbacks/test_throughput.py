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
from torch.utils.flop_counter import FlopCounterMode

from trl_udm import ThroughputCallback, URSAPipeline
from trl_udm.throughput import count_forward_flops, count_weights

from ..trainer.test_udm_grpo_trainer import LORA, build_trainer, count_a


def test_the_formula_gives_the_flops_that_pytorch_counts(oracle_dir):
    pipeline = URSAPipeline.from_pretrained(oracle_dir / "tiny-ursa", max_prompt_length=16)
    model = pipeline.transformer
    model.set_attn_implementation("eager")  # PyTorch does not count its own attention kernel on a CPU
    prompt_ids, prompt_mask = pipeline.encode_prompt(["a red circle"])
    shape = pipeline.latent_shape(height=32, width=32)
    samples = torch.zeros(1, torch.Size(shape).numel(), dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pipeline.denoise(prompt_ids, prompt_mask, samples, shape)
    length, num_tokens = prompt_ids.size(1) + samples.size(1), samples.size(1)
    counted = counter.get_total_flops()
    assert count_forward_flops(model, count_weights(model), length, num_tokens) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_a_run_logs_its_samples_per_second_and_on_a_known_device_its_utilization(tmp_path, peft_config):
    trainer = build_trainer(tmp_path, count_a, peft_config=peft_config, num_iterations=2, max_steps=2)
    callback = trainer.pop_callback(ThroughputCallback)  # which every trainer has
    assert callback.peak_flops is None  # a CPU
    trainer.add_callback(callback)
    trainer.train()
    log = trainer.state.log_history[0]
    # 24 rows are 8 samples, each of which two steps share
    assert log["samples_per_second"] == pytest.approx(4 / log["step_time"], rel=0.5) and "mfu" not in log

    callback.peak_flops = 1e9
    callback.log_step(seconds=0.5)
    model, rows = trainer.pipeline.transformer, trainer._buffered_inputs[0]
    length, num_tokens = rows["prompt_ids"].size(1), rows["completion_ids"].size(1)
    forward = count_forward_flops(model, count_weights(model), length, num_tokens)
    # 4 samples in 5 passes; 12 rows (of the rollout's 24) scored for both policies; 24 rows trained
    expected = forward * (4 * 5 + 12 * 2 + 24 * (2 if peft_config else 3))
    assert trainer._metrics["train"]["mfu"] == [pytest.approx(expected / 0.5 / 1e9)]
    assert trainer._metrics["train"]["samples_per_second"] == [8.0]


def test_weights_of_the_layers_and_of_the_head_are_counted_once(oracle_dir):
    model = URSAPipeline.from_pretrained(oracle_dir / "tiny-ursa").transformer
    config = model.config
    width, key_width = (count * config.head_dim for count in (config.num_attention_heads, config.num_key_value_heads))
    layer = config.hidden_size * (2 * width + 2 * key_width + 3 * config.intermediate_size)
    assert count_weights(model) == (config.num_hidden_layers * layer, config.hidden_size * config.codebook_size)
