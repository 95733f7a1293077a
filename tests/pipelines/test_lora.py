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

"""Adapters of a pipeline, under the names of diffusers' LoRA methods."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    OSFConfig,
    PeftModel,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from trl_udm import URSAPipeline
from trl_udm.cli import main
from trl_udm.pipelines.lora import has_adapters
from trl_udm.worlds import words
from trl_udm.worlds.shapes import CHECKPOINT_PATH

from ..trainer.toy_text_family import build_toy_text_pipeline


LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]
CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, init_lora_weights=False),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=LINEAR, init_lora_weights=False),
    "adalora": AdaLoraConfig(total_step=10, target_modules=LINEAR, init_lora_weights=False),
    "vera": VeraConfig(r=4, target_modules=LINEAR, init_weights=False),
    "pissa": LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="pissa"),
    "olora": LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="olora"),
    "bias": LoraConfig(r=4, target_modules=LINEAR, bias="all", init_lora_weights=False),
    "modules_to_save": LoraConfig(r=4, target_modules=LINEAR, modules_to_save=["embed_tokens"]),
    "embeddings": LoraConfig(r=4, target_modules=[*LINEAR, "embed_tokens"], init_lora_weights=False),
}


def build_pipeline(seed=0, with_biases=False):
    pipeline = build_toy_text_pipeline(seed)
    if with_biases:
        config = pipeline.transformer.config
        config.attention_bias = True
        pipeline.transformer = type(pipeline.transformer)(config)
    pipeline.transformer.eval()
    return pipeline


def predict(pipeline):
    prompt_ids, prompt_mask = pipeline.encode_prompt(["ab", "cd"])
    with torch.no_grad():
        return pipeline.denoise(prompt_ids, prompt_mask, torch.arange(12).view(2, 6) % 10, (6,))


def copy_state(pipeline):
    """Everything that an adapter could change: names, values and `requires_grad`."""
    return {
        name: (parameter.detach().clone(), parameter.requires_grad)
        for name, parameter in pipeline.transformer.named_parameters()
    }


def assert_same_state(pipeline, state):
    now = copy_state(pipeline)
    assert now.keys() == state.keys()
    for name, (value, requires_grad) in state.items():
        assert torch.equal(now[name][0], value) and now[name][1] == requires_grad, name


def save_adapter(folder, config=CONFIGS["lora"], seed=1, **kwargs):
    """Saves an adapter with random weights as PEFT does, and returns its predictions."""
    pipeline = build_pipeline(**kwargs)
    torch.manual_seed(seed)
    model = get_peft_model(pipeline.transformer, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    model.eval().save_pretrained(str(folder))
    return predict(pipeline)


# --- Load ---


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_saves_loads_and_unloads(tmp_path, name):
    kwargs = {"with_biases": name == "bias"}
    expected = save_adapter(tmp_path, CONFIGS[name], **kwargs)
    pipeline = build_pipeline(**kwargs)
    before, state = predict(pipeline), copy_state(pipeline)
    assert (expected - before).abs().max() > 1e-2
    for _ in range(2):
        pipeline.load_lora_weights(tmp_path)
        torch.testing.assert_close(predict(pipeline), expected, atol=1e-5, rtol=1e-5)
        assert not any(parameter.requires_grad for parameter in pipeline.transformer.parameters())
        assert not any(module.training for module in pipeline.transformer.modules())
        pipeline.unload_lora_weights()
        assert_same_state(pipeline, state)
        assert not has_adapters(pipeline.transformer) and not hasattr(pipeline.transformer, "peft_config")
        assert torch.equal(predict(pipeline), before)


def test_a_folder_a_subfolder_a_named_file_and_a_dictionary_load_alike(tmp_path):
    expected = save_adapter(tmp_path / "repository" / "lora")
    file = tmp_path / "repository" / "lora" / "adapter_model.safetensors"
    weights = load_file(file)
    file.rename(file.with_name("mine.safetensors"))
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
    pipeline = build_pipeline()
    for source, kwargs in (
        (tmp_path / "repository", {"subfolder": "lora", "weight_name": "mine.safetensors"}),
        (weights, {"peft_config": CONFIGS["lora"]}),
        (bare, {"peft_config": CONFIGS["lora"]}),
        ({f"transformer.{name}": tensor for name, tensor in bare.items()}, {"peft_config": CONFIGS["lora"]}),
    ):
        pipeline.load_lora_weights(source, **kwargs)
        torch.testing.assert_close(predict(pipeline), expected)
        pipeline.unload_lora_weights()


def test_a_dictionary_tells_its_ranks(tmp_path):
    config = LoraConfig(r=4, lora_alpha=4, target_modules=LINEAR, init_lora_weights=False, use_dora=True)
    config.rank_pattern, config.alpha_pattern = {"q_proj": 2}, {"q_proj": 2}
    expected = save_adapter(tmp_path, config)
    pipeline = build_pipeline()
    pipeline.load_lora_weights(load_file(tmp_path / "adapter_model.safetensors"))
    torch.testing.assert_close(predict(pipeline), expected)
    with pytest.raises(ValueError, match="no `adapter_config.json` and no weights of a LoRA. Give `peft_config`"):
        build_pipeline().load_lora_weights({"a": torch.zeros(1)})


def break_nan(weights):
    next(iter(weights.values()))[0, 0] = torch.nan


def break_missing(weights):
    weights.pop(sorted(weights)[0])


def break_unexpected(weights):
    weights["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)


def break_shape(weights):
    name = sorted(weights)[-1]
    weights[name] = weights[name][:, :-1].contiguous()


@pytest.mark.parametrize("loaded", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("init", [False, "olora"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_nan, "NaN or infinite, so it is not loaded"),
        (break_missing, "does not fit the transformer"),
        (break_unexpected, "does not fit the transformer"),
        (break_shape, "does not fit the transformer"),
    ],
)
def test_a_refused_adapter_leaves_the_pipeline_as_it_was(tmp_path, loaded, init, damage, message):
    save_adapter(tmp_path / "good")
    save_adapter(tmp_path / "bad", LoraConfig(r=4, target_modules=LINEAR, init_lora_weights=init))
    weights = load_file(tmp_path / "bad" / "adapter_model.safetensors")
    damage(weights)
    save_file(weights, tmp_path / "bad" / "adapter_model.safetensors")
    pipeline = build_pipeline()
    if loaded:
        pipeline.load_lora_weights(tmp_path / "good")
        message = f"{message}|cannot lie beside"
    before, state, listed = predict(pipeline), copy_state(pipeline), pipeline.get_list_adapters()
    with pytest.raises(ValueError, match=message):
        pipeline.load_lora_weights(tmp_path / "bad", adapter_name="other")
    assert_same_state(pipeline, state)
    assert torch.equal(predict(pipeline), before)
    assert pipeline.get_list_adapters() == listed


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PrefixTuningConfig(num_virtual_tokens=2), "type PREFIX_TUNING needs a text model's prompt or call"),
        (LoraConfig(init_lora_weights="pissa_niter_4"), "changes the weights under it by numbers that are not saved"),
        (LoraConfig(alora_invocation_tokens=[1]), "without it the adapter does nothing"),
        (LoraConfig(layer_replication=[(0, 2), (0, 2)]), "changes the model's layers"),
    ],
)
def test_what_a_denoiser_cannot_have_is_refused(config, message):
    pipeline = build_pipeline()
    with pytest.raises(ValueError, match=message):
        pipeline.load_lora_weights({"a": torch.zeros(1)}, peft_config=config)
    assert not has_adapters(pipeline.transformer)


@pytest.fixture
def diffusers_log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    return caplog


def test_an_adapter_of_another_base_is_warned_of(tmp_path, diffusers_log):
    save_adapter(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "someone/words"}))
    for name, is_warned in (("someone/words", False), ("someone/shapes", True)):
        diffusers_log.clear()
        pipeline = build_pipeline()
        pipeline.register_to_config(_name_or_path=name)
        pipeline.load_lora_weights(tmp_path)
        assert ("was trained on someone/words, and the pipeline is someone/shapes" in diffusers_log.text) is is_warned


@pytest.mark.parametrize("name", ["lora", "pissa", "bias"])
def test_an_adapter_knows_its_base_by_the_weights(tmp_path, diffusers_log, name):
    """In any dtype, whether a trainer or a pipeline has saved it, and whatever it does to the weights under it."""
    save_adapter(tmp_path / "peft", CONFIGS[name])
    pipeline = build_pipeline()
    pipeline.load_lora_weights(tmp_path / "peft")  # PEFT's own file tells nothing
    pipeline.save_lora_weights(tmp_path / "a")
    again = build_pipeline()
    again.load_lora_weights(tmp_path / "a")
    again.save_lora_weights(tmp_path / "b")
    for folder, dtype in ((tmp_path / "a", torch.bfloat16), (tmp_path / "a", torch.float16), (tmp_path / "b", None)):
        pipeline = build_pipeline().to(dtype=dtype)
        pipeline.register_to_config(_name_or_path="a/copy")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "the/original"}))
        pipeline.load_lora_weights(folder)
    assert not diffusers_log.records
    build_pipeline(seed=1).load_lora_weights(tmp_path / "b")
    messages = [record.message for record in diffusers_log.records]
    assert len(messages) == 1 and "was trained on other weights than the pipeline has" in messages[0]


# --- Several ---


def test_adapters_lie_beside_one_another_with_weights(tmp_path):
    pipeline = build_pipeline()
    base = pipeline.transformer.model.layers[0].mlp.up_proj.weight.clone()
    save_adapter(tmp_path / "a", seed=1)
    save_adapter(tmp_path / "b", seed=2)
    before, state = predict(pipeline), copy_state(pipeline)
    pipeline.load_lora_weights(tmp_path / "a", adapter_name="a")
    alone = predict(pipeline)
    pipeline.load_lora_weights(tmp_path / "b", adapter_name="b")
    assert pipeline.get_list_adapters() == {"transformer": ["a", "b"]}
    assert pipeline.get_active_adapters() == ["b"]

    layer = pipeline.transformer.model.layers[0].mlp.up_proj
    deltas = {
        name: 2
        * load_file(tmp_path / name / "adapter_model.safetensors")[f"{key}.lora_B.weight"]
        @ load_file(tmp_path / name / "adapter_model.safetensors")[f"{key}.lora_A.weight"]
        for name in "ab"
        for key in ["base_model.model.model.layers.0.mlp.up_proj"]
    }
    for weights in ([0.5, 2.0], [0.3, 0.0], 0.7, None):
        pipeline.set_adapters(["a", "b"], weights)
        a, b = weights if isinstance(weights, list) else [1.0 if weights is None else weights] * 2
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(
                layer(x), x @ (base + a * deltas["a"] + b * deltas["b"]).T, atol=1e-5, rtol=1e-5
            )
        assert pipeline.get_active_adapters() == ["a", "b"]
    pipeline.set_adapters("a")
    assert torch.equal(predict(pipeline), alone)

    pipeline.set_adapters(["a", "b"])
    pipeline.delete_adapters("b")
    assert pipeline.get_list_adapters() == {"transformer": ["a"]} and pipeline.get_active_adapters() == ["a"]
    assert torch.equal(predict(pipeline), alone)
    pipeline.delete_adapters(["a"])
    assert pipeline.get_list_adapters() == {} and pipeline.get_active_adapters() == []
    assert_same_state(pipeline, state)
    assert torch.equal(predict(pipeline), before)


def test_what_cannot_lie_beside_another_is_refused(tmp_path):
    save_adapter(tmp_path / "a")
    save_adapter(tmp_path / "vera", CONFIGS["vera"])
    save_adapter(tmp_path / "pissa", CONFIGS["pissa"])
    save_adapter(tmp_path / "osf", OSFConfig(target_modules=LINEAR))
    pipeline = build_pipeline()
    pipeline.load_lora_weights(tmp_path / "a")
    with pytest.raises(ValueError, match="is of type VERA, and the transformer has adapters of type LORA"):
        pipeline.load_lora_weights(tmp_path / "vera", adapter_name="b")
    with pytest.raises(ValueError, match=r"cannot lie beside \['default'\]"):
        pipeline.load_lora_weights(tmp_path / "pissa", adapter_name="b")
    pipeline.unload_lora_weights()
    for name in "ab":
        pipeline.load_lora_weights(tmp_path / "osf", adapter_name=name)
    with pytest.raises(ValueError, match="of type OSF are used one at a time, got"):
        pipeline.set_adapters(["a", "b"])


def test_bad_names_and_weights_are_refused(tmp_path):
    save_adapter(tmp_path / "a")
    save_adapter(tmp_path / "ia3", IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]))
    pipeline = build_pipeline()
    for method in (pipeline.delete_adapters, pipeline.set_adapters, pipeline.unload_lora_weights):
        with pytest.raises(ValueError, match="No adapter loaded"):
            method("a")
    pipeline.load_lora_weights(tmp_path / "a", adapter_name="a")
    with pytest.raises(ValueError, match=r"Adapters must be among \['a'\], got \['b'\]"):
        pipeline.set_adapters(["a", "b"])
    with pytest.raises(ValueError, match="must be as many as `adapter_names`, got 2 for 1"):
        pipeline.set_adapters("a", [1.0, 2.0])
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(tmp_path / "ia3")
    with pytest.raises(ValueError, match=r"of type IA3 take no weights, got \[0.5\]"):
        pipeline.set_adapters("default", 0.5)


# --- Fuse ---


@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "vera", "pissa", "embeddings"])
def test_fusing_keeps_the_policy_and_unfusing_is_exact(tmp_path, name):
    save_adapter(tmp_path, CONFIGS[name])
    pipeline = build_pipeline()
    base = copy_state(pipeline)
    pipeline.load_lora_weights(tmp_path)
    adapted, state = predict(pipeline), copy_state(pipeline)
    pipeline.fuse_lora()
    torch.testing.assert_close(predict(pipeline), adapted, atol=1e-4, rtol=1e-4)
    for refused in (
        pipeline.fuse_lora,
        lambda: pipeline.set_adapters("default"),
        lambda: pipeline.load_lora_weights({}),
    ):
        with pytest.raises(ValueError, match="The adapters are fused: call `unfuse_lora` before|already exists"):
            refused()
    pipeline.unfuse_lora()
    assert_same_state(pipeline, state)
    assert torch.equal(predict(pipeline), adapted)
    with pytest.raises(ValueError, match="No adapter is fused"):
        pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    assert_same_state(pipeline, base)


def test_the_scale_of_fusing_is_the_weight_of_the_adapter(tmp_path):
    save_adapter(tmp_path)
    pipeline = build_pipeline()
    pipeline.load_lora_weights(tmp_path)
    adapted = predict(pipeline)
    pipeline.set_adapters("default", 0.3)
    weighted = predict(pipeline)
    pipeline.set_adapters("default")
    pipeline.fuse_lora(lora_scale=0.3)
    torch.testing.assert_close(predict(pipeline), weighted, atol=1e-5, rtol=1e-5)
    pipeline.unfuse_lora()
    assert torch.equal(predict(pipeline), adapted)
    save_adapter(tmp_path / "ia3", IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    pipeline = build_pipeline()
    pipeline.load_lora_weights(tmp_path / "ia3")
    with pytest.raises(ValueError, match="`lora_scale` must be 1.0 for adapters of type IA3, got 0.3: .* Leave"):
        pipeline.fuse_lora(lora_scale=0.3)
    pipeline.fuse_lora()


def test_what_is_no_sum_is_not_fused(tmp_path):
    save_adapter(tmp_path / "modules", CONFIGS["modules_to_save"])
    save_adapter(tmp_path / "bias", LoraConfig(r=4, target_modules=LINEAR, lora_bias=True))
    for folder, message in (("modules", "replace whole modules"), ("bias", "the base layer has no bias")):
        pipeline = build_pipeline()
        pipeline.load_lora_weights(tmp_path / folder)
        state = copy_state(pipeline)
        with pytest.raises(ValueError, match=f"cannot be fused: .*{message}"):
            pipeline.fuse_lora()
        assert_same_state(pipeline, state)


# --- Save ---


def test_a_pipeline_with_adapters_is_not_saved_as_one_without(tmp_path):
    expected = save_adapter(tmp_path / "a")
    pipeline = build_pipeline()
    for attach in (
        lambda: pipeline.load_lora_weights(tmp_path / "a"),
        lambda: PeftModel.from_pretrained(pipeline.transformer, str(tmp_path / "a")),
        lambda: setattr(pipeline, "transformer", PeftModel.from_pretrained(pipeline.transformer, str(tmp_path / "a"))),
    ):
        attach()
        with pytest.raises(ValueError, match="The pipeline has adapters, and a folder of a pipeline holds none"):
            pipeline.save_pretrained(tmp_path / "pipeline")
        assert not (tmp_path / "pipeline").exists()
        pipeline.unload_lora_weights()
    # The two ways that the message names
    pipeline.load_lora_weights(tmp_path / "a", adapter_name="mine")
    pipeline.save_lora_weights(tmp_path / "b")
    other = build_pipeline()
    other.load_lora_weights(tmp_path / "b")
    assert torch.equal(predict(other), predict(pipeline))
    PeftModel.from_pretrained((peft_pipeline := build_pipeline()).transformer, str(tmp_path / "b"))
    assert torch.equal(predict(peft_pipeline), predict(pipeline))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(predict(pipeline), expected, atol=1e-5, rtol=1e-5)
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = type(pipeline.transformer).from_pretrained(tmp_path / "pipeline" / "transformer")
    assert all(
        torch.equal(value, pipeline.transformer.state_dict()[key]) for key, value in loaded.state_dict().items()
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_pipeline_saves_loads_in_peft(tmp_path, name):
    save_adapter(tmp_path / "a", CONFIGS[name])
    pipeline = build_pipeline()
    pipeline.load_lora_weights(tmp_path / "a", adapter_name="mine")
    pipeline.save_lora_weights(tmp_path / "b")
    other = build_pipeline()
    PeftModel.from_pretrained(other.transformer, str(tmp_path / "b")).eval()
    torch.testing.assert_close(predict(other), predict(pipeline), atol=1e-5, rtol=1e-5)


# --- Adapters that others put there ---


def test_a_peft_model_is_a_transformer(tmp_path):
    expected = save_adapter(tmp_path)
    pipeline = build_pipeline()
    before, state = predict(pipeline), copy_state(pipeline)
    pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, str(tmp_path))
    assert pipeline.get_active_adapters() == ["default"]
    assert torch.equal(predict(pipeline), expected)
    pipeline.load_lora_weights(tmp_path, adapter_name="b")
    pipeline.delete_adapters("b")
    pipeline.fuse_lora()
    pipeline.unfuse_lora()
    assert torch.equal(predict(pipeline), expected)
    pipeline.unload_lora_weights()
    assert_same_state(pipeline, state)
    assert torch.equal(predict(pipeline), before)


def test_layers_of_unknown_origin_are_named_and_can_be_taken_off(tmp_path):
    save_adapter(tmp_path)
    pipeline = build_pipeline()
    state = copy_state(pipeline)
    PeftModel.from_pretrained(pipeline.transformer, str(tmp_path))
    for method in (
        lambda: pipeline.load_lora_weights(tmp_path, "b"),
        pipeline.get_active_adapters,
        pipeline.fuse_lora,
    ):
        with pytest.raises(ValueError, match="has layers of an adapter that the pipeline did not load. Hand in"):
            method()
    pipeline.unload_lora_weights()
    assert_same_state(pipeline, state)


# --- The command line ---


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "a photo of a ring", "--num_inference_steps", "1"],
        ["evaluate", "--benchmark", "shapes", "--num_inference_steps", "1", "--prompts", "prompts.jsonl"],
        ["merge"],
    ],
)
def test_each_verb_warns_once_of_an_adapter_of_another_world(tmp_path, monkeypatch, diffusers_log, argv):
    monkeypatch.chdir(tmp_path)
    row = {"tag": "colors", "include": [{"class": "ring", "count": 1}], "prompt": "a photo of a ring"}
    Path("prompts.jsonl").write_text(json.dumps(row))
    for world, path in (("shapes", CHECKPOINT_PATH), ("words", words.CHECKPOINT_PATH)):
        pipeline = URSAPipeline.from_pretrained(path)
        config, name = pipeline.transformer.config, "model.layers.0.mlp.up_proj"
        shapes = {"lora_A": (1, config.hidden_size), "lora_B": (config.intermediate_size, 1)}
        pipeline.load_lora_weights({f"{name}.{key}.weight": torch.zeros(shape) for key, shape in shapes.items()})
        pipeline.save_lora_weights(world)
        main([*argv, "--model", "shapes", "--adapter", world, "--output_dir", f"of_{world}"])
        warnings = [record.message for record in diffusers_log.records if "was trained on" in record.message]
        assert len(warnings) == (world == "words")


@pytest.fixture
def shapes_adapter(tmp_path):
    """A saved adapter of the model of shapes, with random weights."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=1, target_modules=LINEAR, init_lora_weights=False)
    transformer = URSAPipeline.from_pretrained(CHECKPOINT_PATH).transformer
    get_peft_model(transformer, config).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_merge_takes_weights_without_the_prefix_of_peft(tmp_path, shapes_adapter, prefix):
    argv = ["merge", "--model", "shapes", "--adapter", str(shapes_adapter), "--output_dir"]
    main([*argv, str(tmp_path / "expected")])
    weights = load_file(shapes_adapter / "adapter_model.safetensors")
    bare = {prefix + name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
    save_file(bare, shapes_adapter / "adapter_model.safetensors")
    main([*argv, str(tmp_path / "merged")])
    folders = (tmp_path / "expected", tmp_path / "merged", CHECKPOINT_PATH)
    expected, merged, base = (load_file(Path(folder) / "transformer" / "model.safetensors") for folder in folders)
    assert expected.keys() == merged.keys() == base.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    assert sum(not torch.equal(merged[name], tensor.float()) for name, tensor in base.items()) == len(weights) / 2


def test_merge_refuses_what_peft_cannot_merge(tmp_path, capsys):
    transformer = URSAPipeline.from_pretrained(CHECKPOINT_PATH).transformer
    config = LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True)
    get_peft_model(transformer, config).save_pretrained(str(tmp_path / "adapter"))
    argv = ["merge", "--model", "shapes", "--adapter", str(tmp_path / "adapter"), "--output_dir"]
    with pytest.raises(SystemExit, match="2"):
        main([*argv, str(tmp_path / "merged")])
    assert re.search("PEFT cannot merge the adapter in .* Use it as it is", capsys.readouterr().err)
    assert not (tmp_path / "merged").exists()
