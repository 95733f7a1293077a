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

import gc
import inspect
import math
import re
from pathlib import Path

import pytest
import torch
from peft import FourierFTConfig, IA3Config, LoraConfig, OSFConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import safe_open
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from trl_udm import UDMGRPOTrainer, URSAPipeline
from trl_udm.cli import merge
from trl_udm.pipelines.lora import has_adapters
from trl_udm.trainer.adapters import can_merge, merged_adapter, try_merging
from trl_udm.worlds import shapes

from ..pipelines import tiny_diffusion_gemma
from ..pipelines.test_lora import assert_same_state, build_pipeline, copy_state, predict
from .test_udm_grpo_trainer import LORA, PROMPTS, build_args, build_trainer, count_a


DOCS = Path(__file__).parents[2] / "docs" / "checkpoints.md"
LINEAR = ["q_proj", "down_proj"]


def train(pipeline, output_dir, peft_config=None, **kwargs):
    """A run of two steps, and its KL at each."""
    args = build_args(output_dir, **{"max_steps": 2, **kwargs})
    trainer = UDMGRPOTrainer(pipeline, count_a, args, train_dataset=PROMPTS, peft_config=peft_config)
    trainer.train()
    trainer.model.eval()
    return trainer, [log["kl"] for log in trainer.state.log_history if "kl" in log]


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


def test_quantized_weights_are_not_merged():
    model = get_peft_model(build_pipeline().transformer, LORA)
    assert can_merge(model) and try_merging(model) is None
    layer = model.base_model.model.model.layers[0].mlp.up_proj.get_base_layer()
    weight = layer.weight.detach()
    layer.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)  # a subclass, as torchao's
    assert layer.weight.dtype == torch.float32
    assert not can_merge(model)
    assert try_merging(model) == "weights under them are quantized, and would be rounded anew"


def test_what_peft_cannot_merge_is_used_as_it_is(tmp_path):
    config = LoraConfig(r=4, target_modules=LINEAR, lora_bias=True)
    trainer, kl = train(build_pipeline(), tmp_path, config)
    assert not trainer.merge_adapter and kl[0] == 0 and kl[1] > 0
    with pytest.raises(ValueError, match=r"got True: PEFT cannot merge it \(.*the base layer has no bias"):
        build_trainer(tmp_path, peft_config=config, merge_adapter=True)


# --- What is trained ---


def test_two_runs_with_all_weights_on_one_pipeline_are_two_runs(tmp_path):
    pipeline = build_pipeline()
    _, first = train(pipeline, tmp_path)
    start = copy_state(pipeline)
    trainer, second = train(pipeline, tmp_path)
    assert first[0] == second[0] == 0 and second[1] > 0
    assert all(torch.equal(value, start[name][0]) for name, value in trainer.ref_model.named_parameters())


def test_a_trained_adapter_is_not_overwritten_and_is_trained_further(tmp_path):
    pipeline = build_pipeline()
    train(pipeline, tmp_path, LORA)
    trained = predict(pipeline)
    with pytest.raises(ValueError, match=r"has adapters already \(\['default'\]\): training would overwrite them"):
        train(pipeline, tmp_path, LORA)
    assert torch.equal(predict(pipeline), trained)
    trainer, kl = train(pipeline, tmp_path)
    assert kl[0] == 0 and kl[1] > 0
    pipeline.transformer.eval()
    with trainer._reference_weights():
        assert torch.equal(predict(pipeline), trained)
    assert not torch.equal(predict(pipeline), trained)
    trainer.save_model(str(tmp_path / "saved"))
    other = build_pipeline()
    other.load_lora_weights(tmp_path / "saved")
    assert torch.equal(predict(other), predict(pipeline))


@pytest.mark.parametrize("way", ["loaded", "a PeftModel", "a trainable PeftModel"])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_an_adapter_that_is_handed_in_is_trained_further(tmp_path, way, bias):
    config = LoraConfig(r=4, target_modules=LINEAR, bias=bias)
    first, _ = train(build_pipeline(with_biases=True), tmp_path, config)
    assert any("bias" in name for name, parameter in first.model.named_parameters() if parameter.requires_grad) == (
        bias != "none"
    )
    names = {name for name, parameter in first.model.named_parameters() if parameter.requires_grad}
    first.save_model(str(tmp_path / "first"))
    pipeline = build_pipeline(with_biases=True)
    if way == "loaded":
        pipeline.load_lora_weights(tmp_path / "first")
    else:
        model = PeftModel.from_pretrained(
            pipeline.transformer, str(tmp_path / "first"), is_trainable=way == "a trainable PeftModel"
        )
        pipeline.transformer = model
    given = predict(pipeline)
    torch.testing.assert_close(given, predict(first.pipeline), atol=1e-5, rtol=1e-5)
    trainer, kl = train(pipeline, tmp_path)
    assert {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad} == names
    assert kl[0] == 0 and kl[1] > 0
    with trainer._reference_weights():
        assert torch.equal(predict(pipeline), given)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_after_a_run_and_without_its_adapter_the_transformer_is_as_it_was(tmp_path, bias):
    pipeline = build_pipeline(with_biases=True)
    state = copy_state(pipeline)
    for init in (True, "pissa", "olora"):
        train(pipeline, tmp_path, LoraConfig(r=4, target_modules=LINEAR, bias=bias, init_lora_weights=init))
        pipeline.unload_lora_weights()
        assert_same_state(pipeline, state)
    trainer, kl = train(pipeline, tmp_path)
    assert sum(parameter.requires_grad for parameter in trainer.model.parameters()) == len(state)
    assert kl[0] == 0 and kl[1] > 0


def test_nothing_trained_is_an_error_before_the_first_rollout(tmp_path):
    pipeline = build_pipeline()
    pipeline.transformer.requires_grad_(False)
    with pytest.raises(ValueError, match="Nothing is trained: no weight of the model has `requires_grad`"):
        UDMGRPOTrainer(pipeline, count_a, build_args(tmp_path), train_dataset=PROMPTS)
    with pytest.raises(ValueError, match="Nothing is trained"):
        build_trainer(tmp_path, peft_config=LoraConfig(target_modules=LINEAR, inference_mode=True))


def test_adapters_of_which_none_can_be_saved_alone_are_not_trained(tmp_path):
    train(build_pipeline(), tmp_path, LORA)[0].save_model(str(tmp_path / "a"))
    pipeline = build_pipeline()
    pipeline.load_lora_weights(tmp_path / "a", adapter_name="mine")
    with pytest.raises(ValueError, match=r"has adapters \['mine'\]. One alone can be trained further"):
        train(pipeline, tmp_path)
    pipeline.load_lora_weights(tmp_path / "a")
    with pytest.raises(ValueError, match=r"has adapters \['default', 'mine'\]. One alone"):
        train(pipeline, tmp_path)
    pipeline.unload_lora_weights("mine")
    pipeline.fuse_lora()
    with pytest.raises(ValueError, match="not fused"):
        train(pipeline, tmp_path)
    fused = predict(pipeline)
    pipeline.unload_lora_weights()
    assert torch.equal(predict(pipeline), fused)
    assert train(pipeline, tmp_path)[1][0] == 0


def test_an_adapter_that_is_named_is_trained_further_and_resumes(tmp_path):
    train(build_pipeline(), tmp_path, LORA)[0].save_model(str(tmp_path / "mine"))
    given = build_pipeline()
    given.load_lora_weights(tmp_path / "mine")
    settings = {"adapter": str(tmp_path / "mine"), "save_strategy": "steps", "save_steps": 1, "ema_decay": 0.5}
    trainer, kl = train(build_pipeline(), tmp_path / "run", **settings)
    assert kl[0] == 0 and kl[1] > 0
    with trainer._reference_weights():
        assert torch.equal(predict(trainer.pipeline), predict(given))
    args = build_args(tmp_path / "run", max_steps=2, **settings)
    resumed = UDMGRPOTrainer(build_pipeline(), count_a, args, train_dataset=PROMPTS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert_same_state(resumed.pipeline, copy_state(trainer.pipeline))
    assert resumed._reference_checksum == trainer._reference_checksum
    resumed.save_model()
    assert "mine" not in (tmp_path / "run" / "README.md").read_text()
    for folder in ("", "checkpoint-1", "transformer_ema"):  # whose files tell the base that the adapter belongs to
        with safe_open(tmp_path / "run" / folder / "adapter_model.safetensors", "pt") as file:
            assert "base_sample" in file.metadata()


def test_an_adapter_is_named_alone_and_is_not_left_behind(tmp_path):
    train(build_pipeline(), tmp_path, LORA)[0].save_model(str(tmp_path / "mine"))
    pipeline = build_pipeline()
    state = copy_state(pipeline)
    for kwargs, message in (
        ({"adapter": str(tmp_path / "mine"), "peft_config": LORA}, "`adapter` must be None with a `peft_config`"),
        ({"adapter": str(tmp_path / "nowhere")}, "adapter model file not found"),
        ({"adapter": str(tmp_path / "mine"), "reward_weights": [1.0, 1.0]}, "weights"),
    ):
        with pytest.raises(ValueError, match=message):
            train(pipeline, tmp_path, **kwargs)
        assert_same_state(pipeline, state)
        assert not has_adapters(pipeline.transformer)
    pipeline.load_lora_weights(tmp_path / "mine")
    with pytest.raises(ValueError, match="and where the pipeline has an adapter already, got"):
        train(pipeline, tmp_path, adapter=str(tmp_path / "mine"))


def test_layers_that_nobody_handed_in_are_not_trained_around(tmp_path):
    train(build_pipeline(), tmp_path, LORA)[0].save_model(str(tmp_path / "a"))
    pipeline = build_pipeline()
    PeftModel.from_pretrained(pipeline.transformer, str(tmp_path / "a"))
    with pytest.raises(ValueError, match="layers of an adapter that the pipeline did not load"):
        train(pipeline, tmp_path)


def test_a_trainer_that_fails_leaves_no_adapter_behind(tmp_path):
    pipeline = build_pipeline()
    state = copy_state(pipeline)
    for config in (
        LoraConfig(target_modules=[*LINEAR, "lm_head"], init_lora_weights="olora"),
        LoraConfig(target_modules=["nowhere"]),
    ):
        with pytest.raises(ValueError, match="lm_head|nowhere"):
            UDMGRPOTrainer(pipeline, count_a, build_args(tmp_path), train_dataset=PROMPTS, peft_config=config)
        assert_same_state(pipeline, state)
        assert not has_adapters(pipeline.transformer)


def test_a_run_does_not_go_on_from_another_start_of_its_adapter(tmp_path):
    def build(r_seed):
        torch.manual_seed(r_seed)
        config = LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="gaussian")
        return get_peft_model(build_pipeline().transformer, config)

    sums = []
    for value in (0.0, 0.0, 0.1):
        pipeline = build_pipeline()
        pipeline.transformer = build(0)
        next(p for n, p in pipeline.transformer.named_parameters() if "lora_B" in n).data += value
        trainer = UDMGRPOTrainer(pipeline, count_a, build_args(tmp_path), train_dataset=PROMPTS)
        sums.append(trainer._reference_checksum)
    assert sums[0] == sums[1] != sums[2]


def build_family(name):
    if name == "toy":
        return build_pipeline(), ["ab", "cd"]
    if name == "gemma":
        return tiny_diffusion_gemma.build_pipeline(self_conditioning=True), ["What is 1+1?", "Hello"]
    return URSAPipeline.from_pretrained(shapes.CHECKPOINT_PATH), ["a photo of a ring", "a photo of a cross"]


@pytest.mark.parametrize("family", ["toy", "gemma", "shapes"])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["lm_head"]),
        IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
        LoraConfig(target_modules=r"model\.(decoder\.)?layers\.0\.mlp\.up_proj", modules_to_save=["lm_head"]),
    ],
)
def test_an_adapter_on_the_head_is_scored_as_it_samples(family, config):
    """Which TRL's fused head would leave out."""
    pipeline, prompts = build_family(family)
    add_fused_lm_head(pipeline.transformer, outputs=("log_probs", "entropy"))
    model = get_peft_model(pipeline.transformer, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    latent_shape = pipeline.latent_shape()
    generator, num_codes = torch.Generator().manual_seed(0), pipeline.scheduler.config.codebook_size
    tokens = torch.randint(3, num_codes, (2, 2, math.prod(latent_shape)), generator=generator)
    inputs = pipeline.extend_prompt(*pipeline.encode_prompt(prompts), tokens[0])

    def check():
        expected = pipeline.denoise(*inputs, tokens[0], latent_shape, t=torch.zeros(2)).log_softmax(dim=-1)
        scores = pipeline.score(model, *inputs, tokens[0], latent_shape, labels=tokens[1], t=torch.zeros(2))
        labels = expected.gather(-1, tokens[1].unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(scores[0], labels, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(scores[1], -(expected.exp() * expected).sum(dim=-1), atol=1e-4, rtol=1e-4)
        return scores[0]

    check().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    with model.disable_adapter():
        check()


# --- The types that PEFT has ---


SETTINGS = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 16},
    "CPT": {"task_type": "CAUSAL_LM"},
    "FOURIERFT": {"n_frequency": 64},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 8},
    "RANDLORA": {"r": 8},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [2, 3]},
    "VBLORA": {"vector_length": 16, "num_vectors": 16},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 64},
}
VARIANTS = {
    "LORA, `use_dora`": {"use_dora": True},
    "LORA, `init_lora_weights=False`": {"init_lora_weights": False},
    'LORA, `init_lora_weights="pissa"`': {"init_lora_weights": "pissa"},
    'LORA, `init_lora_weights="pissa_niter_4"`': {"init_lora_weights": "pissa_niter_4"},
    'LORA, `init_lora_weights="olora"`': {"init_lora_weights": "olora"},
    'LORA, `bias="all"`': {"bias": "all"},
    "LORA, `lora_bias`": {"lora_bias": True},
    "LORA, `modules_to_save`": {"modules_to_save": ["embed_tokens"]},
    "LORA, `alora_invocation_tokens`": {"alora_invocation_tokens": [1]},
    "LORA, `layer_replication`": {"layer_replication": [(0, 2), (0, 2)]},
}


def build_adapter_config(name):
    if name in VARIANTS:
        return LoraConfig(r=4, target_modules=LINEAR, **VARIANTS[name])
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)]
    fields = inspect.signature(config_class).parameters
    common = {"target_modules": LINEAR, "num_virtual_tokens": 2}
    settings = {field: value for field, value in common.items() if field in fields}
    return config_class(**{**settings, **SETTINGS.get(name, {})})


def make_cell(check):
    """What a cell of the table says of a check: that it passes, or why it is refused."""
    try:
        check()
    except ValueError as error:
        reason = re.sub(r"^.*? (?:be fused|used here|merge the adapter in \S+): ", "", str(error))
        return f"refused: {re.split(r'[.] | [(]', reason)[0]}"
    return "yes"


def make_row(name, tmp_path, tiny_ursa):
    """One row of the table in docs/checkpoints.md."""
    pipeline, config = build_pipeline(), build_adapter_config(name)
    state, base = copy_state(pipeline), predict(pipeline)
    saved, rounding = str(tmp_path / "run"), {"atol": 1e-5, "rtol": 1e-5}
    kl, trainer = [], None

    def check_training():
        nonlocal kl, trainer
        trainer, kl = train(pipeline, saved, config, save_strategy="steps", save_steps=1)

    trains = make_cell(check_training)
    if trains != "yes":
        assert_same_state(pipeline, state)
        return f"| {name} | {trains} | | | | | | |"
    assert kl[0] == pytest.approx(0, abs=1e-7) and kl[1] != 0
    trained, trained_state = predict(pipeline), copy_state(pipeline)
    assert (trained - base).abs().max() > 1e-4
    trainer.save_model()

    def check_loading():
        with_peft, again = build_pipeline(), build_pipeline()
        PeftModel.from_pretrained(with_peft.transformer, saved)
        loaded.save_lora_weights(tmp_path / "again")
        again.load_lora_weights(tmp_path / "again")
        for one in (with_peft, loaded, again):
            torch.testing.assert_close(predict(one), trained, **rounding)

    def check_fusing():
        loaded.fuse_lora()
        torch.testing.assert_close(predict(loaded), trained, atol=1e-4, rtol=1e-4)
        loaded.unfuse_lora()

    def check_resume():
        resumed = UDMGRPOTrainer(build_pipeline(), count_a, trainer.args, train_dataset=PROMPTS, peft_config=config)
        resumed.train(resume_from_checkpoint=f"{saved}/checkpoint-1")
        assert_same_state(resumed.pipeline, trained_state)

    def check_further_training():
        further, kl = train(loaded, tmp_path / "further", max_steps=1)
        assert kl[0] == pytest.approx(0, abs=1e-7) and not torch.equal(predict(loaded), trained)

    loaded = build_pipeline()
    loaded.load_lora_weights(saved)
    adapted = copy_state(loaded)
    cells = [make_cell(check_loading), make_cell(check_fusing)]
    assert_same_state(loaded, adapted)
    cells += [make_cell(lambda: check_merge(config, tmp_path, tiny_ursa))]
    cells += [make_cell(check_resume), make_cell(check_further_training)]
    for one in (pipeline, loaded):
        one.unload_lora_weights()
        assert_same_state(one, state)
    return f"| {name} | yes | 0 | {' | '.join(cells)} |"


def check_merge(config, tmp_path, tiny_ursa):
    """The verb `merge`, on a model that it can load."""
    pipeline = URSAPipeline.from_pretrained(tiny_ursa)
    model = get_peft_model(pipeline.transformer, config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    merge.run(merge.Arguments(model=tiny_ursa, adapter=str(tmp_path / "adapter"), output_dir=tmp_path / "merged"))
    merged = URSAPipeline.from_pretrained(tmp_path / "merged")
    inputs = (*pipeline.encode_prompt(["a ring"]), torch.arange(16).view(1, 16), (1, 4, 4))
    with torch.no_grad():
        torch.testing.assert_close(merged.denoise(*inputs), pipeline.denoise(*inputs), atol=1e-4, rtol=1e-4)


@pytest.fixture
def fast_collection():
    """Garbage collection, which `Trainer` calls for, does not go through all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("name", [*sorted(peft_type.value for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING), *VARIANTS])
def test_the_table_of_adapter_types(tmp_path, fast_collection, oracle_dir, name):
    if name == "ADAMSS":
        pytest.importorskip("sklearn")
    row = make_row(name, tmp_path, str(oracle_dir / "tiny-ursa"))
    assert row in DOCS.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    "config", [FourierFTConfig(n_frequency=64, target_modules=LINEAR), OSFConfig(target_modules=LINEAR)]
)
def test_the_reference_of_an_adapter_that_is_not_the_base_at_the_start_is_that_start(tmp_path, config):
    trainer = build_trainer(tmp_path, peft_config=config)
    trainer.model.eval()
    start, state = predict(trainer.pipeline), copy_state(trainer.pipeline)
    for parameter in trainer.initial_weights:
        parameter.data += 0.1
    moved = predict(trainer.pipeline)
    with pytest.raises(KeyError), trainer._reference_weights():
        assert torch.equal(predict(trainer.pipeline), start)
        assert_same_state(trainer.pipeline, state)
        raise KeyError  # the weights come back on the way out of an error too
    assert torch.equal(predict(trainer.pipeline), moved)
