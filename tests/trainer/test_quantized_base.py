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

"""An adapter on a base of 4 bits. Tests with bitsandbytes run where it is installed, also on a CPU."""

import importlib
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import BitsAndBytesConfig
from trl import ModelConfig

from trl_udm import DiffusionGemmaUDMPipeline, TextUDMPipeline, UDMSFTConfig, UDMSFTTrainer, URSAPipeline
from trl_udm.pipelines.pipeline_diffusion_gemma import UNQUANTIZED_MODULES
from trl_udm.worlds.shapes import CHECKPOINT_PATH as SHAPES_PATH
from trl_udm.worlds.sums import CHECKPOINT_PATH as SUMS_PATH

from ..examples import load_example
from ..pipelines.test_pipeline_diffusion_gemma import TEXTS, build_trainer
from ..pipelines.tiny_diffusion_gemma import VOCAB_SIZE, build_model, build_pipeline, build_tokenizer
from .test_adapters import randomize


SIZES = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 32}  # whole blocks of 64
BENCHMARKS_DIR = Path(__file__).parents[2] / "benchmarks"
EXPERTS = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A DiffusionGemma as a repository of transformers has it."""
    folder = tmp_path_factory.mktemp("diffusion-gemma")
    build_model(global_head_dim=32, **SIZES).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def load(folder, pipeline_class=DiffusionGemmaUDMPipeline, **kwargs):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    pipeline = pipeline_class.from_pretrained(folder, quantization_config=config, dtype=torch.float32, **kwargs)
    for module in linear_layers(pipeline):
        module.support_avx512bf16_for_cpu = False
    return pipeline


def linear_layers(pipeline):
    return [module for module in pipeline.transformer.modules() if type(module).__name__ == "Linear4bit"]


def dequantize(pipeline):
    """A state dict with the numbers that a pipeline computes with."""
    import bitsandbytes

    state_dict = {}
    for name, module in pipeline.model.named_modules():
        if type(module).__name__ == "Linear4bit":
            weight = module.weight
            state_dict[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        if name.endswith(".experts"):
            state_dict |= {f"{name}.{expert}": getattr(module, expert) for expert in EXPERTS}
    return state_dict


def predict(pipeline):
    condition = pipeline.encode_prompt(TEXTS)
    noise = torch.randint(VOCAB_SIZE, (len(TEXTS), 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipeline.denoise(*condition, noise, (1, 8))


@pytest.mark.parametrize("as_folder", [False, True])
def test_attention_dense_layers_and_experts_have_four_bits_and_stay_shared(
    tmp_path, monkeypatch, repository, as_folder
):
    full, folder = DiffusionGemmaUDMPipeline.from_pretrained(repository, dtype=torch.float32), repository
    if as_folder:
        folder = tmp_path
        full.save_pretrained(folder)
    pipeline = load(folder)
    layers = zip(pipeline.model.model.encoder.language_model.layers, pipeline.model.model.decoder.layers, strict=True)
    for encoder_layer, decoder_layer in layers:
        assert encoder_layer.experts is decoder_layer.experts
        assert encoder_layer.self_attn.q_proj.weight is decoder_layer.self_attn.q_proj.weight
    quantized = {name: weight for name, weight in pipeline.model.named_parameters() if weight.dtype == torch.uint8}
    assert len(quantized) == 7 + 6 + 2 * len(EXPERTS)  # the second layer has no `v_proj`
    monkeypatch.syspath_prepend(BENCHMARKS_DIR)
    counts = importlib.import_module("diffusion_gemma_memory").count_weights(full.model)
    assert 2 * sum(weight.nbytes for weight in quantized.values()) == (
        counts["experts"] + counts["attention and dense layers"]
    )
    assert not any(skipped in name for name in quantized for skipped in UNQUANTIZED_MODULES)
    before = predict(full)
    assert not full.model.load_state_dict(dequantize(pipeline), strict=False).unexpected_keys
    torch.testing.assert_close(predict(pipeline), predict(full))
    assert (predict(full) - before).abs().max() > 0.1


def test_a_run_is_that_on_the_same_weights_in_32_bits_and_its_adapter_loads_on_any_base(tmp_path, repository):
    pipelines = [load(repository), DiffusionGemmaUDMPipeline.from_pretrained(repository, dtype=torch.float32)]
    pipelines[1].model.load_state_dict(dequantize(pipelines[0]), strict=False)
    adapters, needs_gradients = [], []
    for pipeline in pipelines:
        pipeline.model.model.encoder.register_forward_hook(
            lambda module, inputs, output: needs_gradients.append(output.last_hidden_state.requires_grad)
        )
        options = {"activation_checkpointing": True, "beta": 0.1, "max_steps": 2, "ema_decay": 0.5}
        options |= {"optim": "sgd", "learning_rate": 1.0}
        trainer = build_trainer(tmp_path, pipeline, prompts=TEXTS * 2, **options)
        trainer.train()
        kl = [log["kl"] for log in trainer.state.log_history if "kl" in log]
        assert kl[0] == 0 and kl[1] > 0
        adapters.append({name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad})
        assert all(weight.dtype == torch.float32 and weight.any() for weight in adapters[-1].values())
        if pipeline is pipelines[0]:
            trainer.save_model(str(tmp_path / "adapter"))
    for name, weight in adapters[1].items():
        # TRL rounds the start of the first to bfloat16
        assert (adapters[0][name] - weight).abs().max() < 0.02 * weight.abs().max()
    assert not any(needs_gradients)  # the encoder is not trained, and keeps no activations
    with pytest.raises(ValueError, match="cannot be fused: weights under them are quantized.*into a pipeline without"):
        pipelines[0].fuse_lora()
    trained = predict(pipelines[0])
    for again in (load(repository), DiffusionGemmaUDMPipeline.from_pretrained(repository)):
        before = predict(again)
        again.load_lora_weights(tmp_path / "adapter")
        assert (predict(again) - before).abs().max() > 1e-3
        if linear_layers(again):
            torch.testing.assert_close(predict(again), trained)


def test_an_adapter_goes_on_training_from_the_same_numbers(tmp_path, repository):
    trainer = build_trainer(tmp_path, load(repository))
    randomize(trainer.model)
    trainer.save_model(str(tmp_path / "adapter"))
    further = build_trainer(tmp_path, load(repository), peft_config=None, adapter=str(tmp_path / "adapter"), beta=0.1)
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            assert torch.equal(dict(further.model.named_parameters())[name], weight), name
    further.train()
    assert further.state.log_history[0]["kl"] == 0


def test_an_adapter_is_merged_into_the_weights_before_they_were_quantized(tmp_path):
    rows = Dataset.from_dict({"prompt": ["17+45="], "completion": ["50+12=62"]})
    args = UDMSFTConfig(str(tmp_path), max_steps=1, learning_rate=1e-2, report_to="none", use_cpu=True)
    lora = LoraConfig(r=4, target_modules="all-linear")
    trainer = UDMSFTTrainer(load(SUMS_PATH, TextUDMPipeline), args, rows, peft_config=lora)
    trainer.train()
    trainer.save_model()
    merged, base = (TextUDMPipeline.from_pretrained(SUMS_PATH) for _ in range(2))
    merged.load_lora_weights(tmp_path)
    merged.fuse_lora()
    merged.unload_lora_weights()
    deltas = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        for name, module in trainer.model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert deltas and all(delta.any() for delta in deltas.values())
    for name, delta in deltas.items():
        expected = base.transformer.get_submodule(name).weight + delta
        torch.testing.assert_close(merged.transformer.get_submodule(name).weight, expected)


@pytest.mark.parametrize("pipeline_class, path", [(URSAPipeline, SHAPES_PATH), (TextUDMPipeline, SUMS_PATH)])
def test_the_flag_of_an_example_quantizes(pipeline_class, path):
    pytest.importorskip("bitsandbytes")
    load_pipeline = load_example("common").load_pipeline
    pipeline = load_pipeline(pipeline_class, path, ModelConfig(load_in_4bit=True, dtype="bfloat16"))
    assert len(linear_layers(pipeline)) >= 12
    assert {layer.weight.quant_state.dtype for layer in linear_layers(pipeline)} == {torch.bfloat16}


def test_the_flag_of_an_example_needs_a_dtype():
    with pytest.raises(ValueError, match="`--load_in_4bit` needs the `--dtype` to compute in, such as bfloat16"):
        load_example("common").load_pipeline(URSAPipeline, SHAPES_PATH, ModelConfig(load_in_4bit=True, dtype="auto"))


# --- Without bitsandbytes, on a weight of another class ---


@pytest.fixture
def quantized():
    pipeline = build_pipeline()
    layer = pipeline.model.model.decoder.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(TwoTensor(layer.weight.detach(), layer.weight.detach()), requires_grad=False)
    pipeline.model.is_loaded_in_4bit = True  # by which TRL knows
    return pipeline


def test_the_adapter_on_a_quantized_base_is_in_32_bits(tmp_path, quantized):
    trainer = build_trainer(tmp_path, quantized)
    assert {weight.dtype for weight in trainer.model.parameters() if weight.requires_grad} == {torch.float32}
    assert not trainer.merge_adapter


def test_what_a_quantized_base_cannot_do_is_refused(tmp_path, quantized):
    with pytest.raises(
        ValueError, match="quantized weights, which are not trained. Give a `peft_config`.*or load the"
    ):
        build_trainer(tmp_path, quantized, peft_config=None)
    with pytest.raises(ValueError, match="folder would not load again. Load the pipeline without `quantization_conf"):
        quantized.save_pretrained(tmp_path)
    quantized.model.model.decoder.layers[0].mlp.up_proj.support_avx512bf16_for_cpu = True
    with pytest.raises(ValueError, match="no gradient passes them afterwards. Train on a GPU, or set `support_avx512"):
        build_trainer(tmp_path, quantized)
