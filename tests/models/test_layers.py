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
from torch import nn
from torch._dynamo.utils import counters
from transformers.modeling_layers import GradientCheckpointingLayer

from trl_udm.models.layers import compile_layers, without_checkpointing

from ..trainer.test_udm_grpo_trainer import LORA, build_trainer


def layers(trainer):
    return [module for module in trainer.model.modules() if isinstance(module, GradientCheckpointingLayer)]


def train(tmp_path, watch=lambda trainer: None, **kwargs):
    """After two steps: the trainer, its metrics, and its weights."""
    torch.manual_seed(0)
    trainer = build_trainer(tmp_path, max_steps=2, **kwargs)
    watch(trainer)
    trainer.train()
    names = ("loss", "reward", "kl", "grad_norm", "entropy")
    metrics = [[log[name] for name in names] for log in trainer.state.log_history if "reward" in log]
    return trainer, torch.tensor(metrics), list(trainer.model.parameters())


# --- Checkpointing of activations ---


@pytest.mark.parametrize("peft_config", [None, LORA])
def test_every_second_layer_is_checkpointed_after_a_rollout_too(tmp_path, peft_config):
    calls = []

    def watch(trainer):
        """Notes the layers that run in updates."""
        for i, layer in enumerate(layers(trainer)):
            layer.self_attn.register_forward_hook(
                lambda *args, i=i: calls.append(i) if torch.is_grad_enabled() else None
            )

    _, metrics, weights = train(tmp_path, watch, peft_config=peft_config)
    assert sorted(calls) == [0, 0, 1, 1]
    calls.clear()
    trainer, other_metrics, other_weights = train(
        tmp_path,
        watch,
        peft_config=peft_config,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"every_n_layers": 2},
    )
    assert [layer.gradient_checkpointing for layer in layers(trainer)] == [True, False]
    assert sorted(calls) == [0, 0, 0, 0, 1, 1]  # one that is checkpointed runs again in the backward pass
    assert torch.equal(metrics, other_metrics)
    assert all(torch.equal(weight, other) for weight, other in zip(weights, other_weights, strict=True))


def test_nothing_is_checkpointed_within_and_all_is_as_before_after_an_error(tmp_path):
    trainer = build_trainer(tmp_path)
    trainer.model.activation_checkpointing_enable(every_n_layers=2)
    function = layers(trainer)[0]._gradient_checkpointing_func
    with pytest.raises(KeyError), without_checkpointing(trainer.model):
        assert not trainer.model.is_activation_checkpointing
        raise KeyError
    assert [layer.gradient_checkpointing for layer in layers(trainer)] == [True, False]
    assert layers(trainer)[0]._gradient_checkpointing_func is function


# --- Compilation ---


@pytest.mark.parametrize(
    "settings",
    [
        {"activation_checkpointing": True},
        {"peft_config": LORA, "merge_adapter": False, "num_iterations": 2, "rollout_batch_size": 3},
    ],
)
def test_compiled_layers_are_what_rollouts_and_updates_run(tmp_path, settings):
    _, metrics, weights = train(tmp_path, **settings)
    torch.compiler.reset()
    counters.clear()
    trainer, compiled_metrics, compiled_weights = train(tmp_path, torch_compile_backend="aot_eager", **settings)
    # The layers share what is compiled, once for each case, and nothing runs beside it
    assert 0 < counters["frames"]["total"] == counters["frames"]["ok"] < 16
    assert not counters["graph_break"]
    torch.testing.assert_close(compiled_metrics, metrics, atol=1e-5, rtol=1e-4)
    for weight, compiled_weight in zip(weights, compiled_weights, strict=True):
        torch.testing.assert_close(compiled_weight, weight, atol=1e-5, rtol=1e-4)
    assert not any("_orig_mod" in name for name, _ in trainer.model.named_parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "reduce-overhead"}, "`torch_compile_mode` must not record CUDA graphs, got 'reduce-overhead'"),
        ({"mode": "max-autotune"}, "`torch_compile_mode` must not record CUDA graphs, got 'max-autotune'"),
        ({"backend": "cudagraphs"}, "`torch_compile_backend` must not record CUDA graphs, got 'cudagraphs'"),
    ],
)
def test_cuda_graphs_of_single_layers_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        compile_layers(nn.Linear(2, 2), **{"backend": "inductor", **settings})


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="`torch_compile` must be False, got True: Linear has no layers"):
        compile_layers(nn.Linear(2, 2), "inductor")
