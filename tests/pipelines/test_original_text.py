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

"""Files in the layouts of Duo, UDLM and GIDD, tiny and with random weights, against networks written out anew here."""

import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from trl_udm import (
    DuoConfig,
    DuoForMaskedLM,
    GiddConfig,
    GiddForMaskedLM,
    TextUDMPipeline,
    UDMGRPOConfig,
    UDMGRPOTrainer,
)


FAMILIES = ["duo", "udlm", "gidd"]
VOCABULARY, WIDTH, HEADS, LAYERS, TIME_WIDTH = 12, 16, 2, 2, 6
HEAD_WIDTH = WIDTH // HEADS
NUM_TOKENS = 5
PROMPTS = ["ab", "abcab", "c", ""]

CONFIGS = {
    # As the configuration classes beside the published weights write them
    "duo": {
        "architectures": ["DUO"],
        "auto_map": {"AutoConfig": "config.DUOConfig", "AutoModelForMaskedLM": "model.DUO"},
        "causal": False,
        "cond_dim": TIME_WIDTH,
        "dropout": 0.1,
        "hidden_dim": WIDTH,
        "model_length": 64,
        "model_type": "DUO",
        "n_blocks": LAYERS,
        "n_heads": HEADS,
        "torch_dtype": "float32",
        "var_min": False,
        "vocab_size": VOCABULARY,
    },
    "udlm": {
        "architectures": ["UDLM"],
        "cfg": False,
        "cfg_num_classes": -1,
        "cond_dim": TIME_WIDTH,
        "dropout": 0.1,
        "hidden_dim": WIDTH,
        "model_length": 64,
        "model_type": "udlm",
        "n_blocks": LAYERS,
        "n_heads": HEADS,
        "time_conditioning": True,
        "vocab_size": VOCABULARY,
    },
    "gidd": {
        "architectures": ["GiddForDiffusionLM"],
        "attention_bias": True,
        "attn_performer": "eager",
        "attn_soft_cap": 2.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": HEAD_WIDTH,
        "head_scaling": 0.5,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "is_causal": False,
        "max_log_snr": 9.0,
        "max_position_embeddings": 64,
        "min_log_snr": -9.0,
        "mlp_bias": True,
        "model_type": "gidd",
        "noise_type": 1000.0,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "resid_scale": 4.0,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "use_qk_norm": True,
        "vocab_size": VOCABULARY,
        "weight_scaling": 1.0,
    },
}


def list_shapes(family, vocabulary=VOCABULARY, width=WIDTH, heads=HEADS, layers=LAYERS, time_width=TIME_WIDTH):
    """Names and shapes of the weights in the authors' files."""
    if family == "gidd":
        shapes = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
        shapes["lm_head.weight"] = (vocabulary, width)
        for index in range(layers):
            layer = f"model.layers.{index}"
            shapes |= {f"{layer}.self_attn.{letter}_proj.weight": (width, width) for letter in "qkvo"}
            shapes |= {f"{layer}.self_attn.{letter}_norm.weight": (width,) for letter in "qk"}
            shapes |= {f"{layer}.self_attn.{letter}_bias": (heads, width // heads) for letter in "kv"}
            shapes |= {f"{layer}.{name}_layernorm.weight": (width,) for name in ("attn", "mlp")}
            shapes |= {f"{layer}.mlp.up_proj.weight": (4 * width, width), f"{layer}.mlp.up_proj.bias": (4 * width,)}
            shapes |= {f"{layer}.mlp.down_proj.weight": (width, 4 * width), f"{layer}.mlp.down_proj.bias": (width,)}
        return shapes

    def linear(name, outputs, inputs):
        return {f"backbone.{name}.weight": (outputs, inputs), f"backbone.{name}.bias": (outputs,)}

    shapes = {"backbone.vocab_embed.embedding": (vocabulary, width)}
    shapes |= linear("sigma_map.mlp.0", time_width, 256) | linear("sigma_map.mlp.2", time_width, time_width)
    shapes["backbone.rotary_emb.inv_freq"] = (width // heads // 2,)
    for index in range(layers):
        block = f"blocks.{index}"
        shapes |= {f"backbone.{block}.norm{number}.weight": (width,) for number in (1, 2)}
        shapes[f"backbone.{block}.attn_qkv.weight"] = (3 * width, width)
        shapes[f"backbone.{block}.attn_out.weight"] = (width, width)
        shapes |= linear(f"{block}.mlp.0", 4 * width, width) | linear(f"{block}.mlp.2", width, 4 * width)
        shapes |= linear(f"{block}.adaLN_modulation", 6 * width, time_width)
    shapes["backbone.output_layer.norm_final.weight"] = (width,)
    shapes |= linear("output_layer.linear", vocabulary, width)
    return shapes | linear("output_layer.adaLN_modulation", 2 * width, time_width)


def rotate(x):
    """Rotary positions of queries or keys of shape (H, L, D / H)."""
    frequencies = 10000.0 ** (-torch.arange(0, HEAD_WIDTH, 2) / HEAD_WIDTH)
    angles = torch.arange(x.shape[1])[:, None] * frequencies
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def split(x):
    return x.view(len(x), HEADS, HEAD_WIDTH).transpose(0, 1)


def compute_duo_logits(weights, ids, sigma):
    """The network of Duo and UDLM on one sequence, from the authors' names."""

    def linear(name, x):
        return x @ weights[f"backbone.{name}.weight"].T + weights.get(f"backbone.{name}.bias", 0)

    def norm(name, x):
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"backbone.{name}.weight"]

    angles = sigma * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = F.silu(linear("sigma_map.mlp.0", torch.cat([angles.cos(), angles.sin()])))
    time = F.silu(linear("sigma_map.mlp.2", time))
    x = weights["backbone.vocab_embed.embedding"][ids]
    for index in range(LAYERS):
        block = f"blocks.{index}"
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = linear(f"{block}.adaLN_modulation", time).view(6, WIDTH)
        q, k, v = linear(f"{block}.attn_qkv", norm(f"{block}.norm1", x) * (1 + scale) + shift).chunk(3, dim=-1)
        scores = rotate(split(q)) @ rotate(split(k)).transpose(1, 2) / math.sqrt(HEAD_WIDTH)
        mixed = (scores.softmax(-1) @ split(v)).transpose(0, 1).reshape(len(ids), WIDTH)
        x = x + gate * linear(f"{block}.attn_out", mixed)
        inner = linear(f"{block}.mlp.0", norm(f"{block}.norm2", x) * (1 + mlp_scale) + mlp_shift)
        x = x + mlp_gate * linear(f"{block}.mlp.2", F.gelu(inner, approximate="tanh"))
    shift, scale = linear("output_layer.adaLN_modulation", time).view(2, WIDTH)
    return linear("output_layer.linear", norm("output_layer.norm_final", x) * (1 + scale) + shift)


def compute_gidd_logits(weights, ids, num_prompt_tokens):
    """The network of GIDD on one sequence, from the authors' names."""

    def norm(name, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weights[f"{name}.weight"])

    is_canvas = torch.arange(len(ids)) >= num_prompt_tokens
    is_seen = F.pad(is_canvas[:, None] >= is_canvas[None, :], (1, 0), value=True)
    x = weights["model.embed_tokens.weight"][ids]
    for index in range(LAYERS):
        layer, attention = f"model.layers.{index}", f"model.layers.{index}.self_attn"
        inputs = norm(f"{layer}.attn_layernorm", x)
        q, k, v = (inputs @ weights[f"{attention}.{letter}_proj.weight"].T for letter in "qkv")
        q, k = rotate(split(norm(f"{attention}.q_norm", q))), rotate(split(norm(f"{attention}.k_norm", k)))
        k = torch.cat([weights[f"{attention}.k_bias"][:, None], k], dim=1)
        v = torch.cat([weights[f"{attention}.v_bias"][:, None], split(v)], dim=1)
        scores = 2.0 * torch.tanh(q @ k.transpose(1, 2) / math.sqrt(HEAD_WIDTH) / 2.0)
        mixed = scores.masked_fill(~is_seen, -math.inf).softmax(-1) @ v
        mixed = mixed.transpose(0, 1).reshape(len(ids), WIDTH)
        x = x + 4.0 / LAYERS * mixed @ weights[f"{attention}.o_proj.weight"].T
        inner = norm(f"{layer}.mlp_layernorm", x) @ weights[f"{layer}.mlp.up_proj.weight"].T
        inner = (inner + weights[f"{layer}.mlp.up_proj.bias"]).relu().square()
        x = x + 4.0 / LAYERS * (
            inner @ weights[f"{layer}.mlp.down_proj.weight"].T + weights[f"{layer}.mlp.down_proj.bias"]
        )
    return norm("model.norm", x) @ weights["lm_head.weight"].T * 0.5


def build_tokenizer(family):
    """As the models were trained with: GPT-2's without padding, BERT's by its classes of tokens, and GIDD's."""
    special_tokens = {
        "duo": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
        "udlm": {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"},
        "gidd": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"},
    }[family]
    tokens = list(dict.fromkeys(special_tokens.values()))
    size = VOCABULARY - 1 if family == "duo" else VOCABULARY
    vocabulary = {token: index for index, token in enumerate([*tokens, *"abcdefghijklm"][:size])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=tokens[0]))
    backend.pre_tokenizer = Split("", behavior="isolated")
    backend.decoder = Fuse()
    if family != "duo":
        begin, end = tokens[:2] if family == "gidd" else tokens[1:3]
        backend.post_processor = TemplateProcessing(
            single=[begin, "$A", end], special_tokens=[(token, vocabulary[token]) for token in (begin, end)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens)


def save_original(folder, family, with_tokenizer=True, **config):
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in list_shapes(family).items():
        weights[name] = 0.3 * torch.randn(shape, generator=generator)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIGS[family] | config), encoding="utf-8")
    if with_tokenizer:
        build_tokenizer(family).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return save_original(tmp_path_factory.mktemp("original") / family, family)


def test_logits_are_those_of_the_authors_network(folder, family):
    pipeline = TextUDMPipeline.from_pretrained(folder)
    config, tokenizer = pipeline.transformer.config, pipeline.tokenizer
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(config, name) == getattr(tokenizer, name)
    weights = load_file(folder / "model.safetensors")
    prompt_ids, prompt_mask = pipeline.encode_prompt(PROMPTS)
    begin = {"duo": 0, "udlm": 1, "gidd": 0}[family]  # and no end
    assert [ids[mask.bool()][0] for ids, mask in zip(prompt_ids, prompt_mask, strict=True)] == [begin] * 4
    assert prompt_mask.sum(dim=1).tolist() == [3, 6, 2, 1]
    canvas = torch.randint(VOCABULARY, (4, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.0, 0.001, 0.3, 1.0])
    with torch.no_grad():
        logits = pipeline.denoise(prompt_ids, prompt_mask, canvas, (NUM_TOKENS,), t=t)
    sigmas = [-math.log(0.001), -math.log(0.001), -math.log(0.3), 0.0]
    for row, sigma in enumerate(sigmas):
        prompt = prompt_ids[row][prompt_mask[row].bool()]
        ids = torch.cat([prompt, canvas[row]])
        if family == "gidd":
            expected = compute_gidd_logits(weights, ids, len(prompt))
            expected[:, 3] = -1e6  # the mask
        else:
            expected = compute_duo_logits(weights, ids, sigma)
        torch.testing.assert_close(logits[row], expected[-NUM_TOKENS:], rtol=1e-5, atol=1e-5)


def test_what_is_saved_loads_again_and_generates_the_same(folder, family, tmp_path):
    pipeline = TextUDMPipeline.from_pretrained(str(folder), max_completion_length=NUM_TOKENS)
    assert not pipeline.transformer.training and pipeline.transformer.dtype == torch.float32
    assert pipeline.config._name_or_path == str(folder)
    pipeline.save_pretrained(tmp_path)
    loaded = TextUDMPipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is (GiddForMaskedLM if family == "gidd" else DuoForMaskedLM)
    options = {"num_inference_steps": 4, "num_completions_per_prompt": 3}
    texts = [each(PROMPTS, generator=torch.Generator().manual_seed(0), **options).texts for each in (pipeline, loaded)]
    assert texts[0] == texts[1] and len(set(texts[0])) > 3
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(loaded.transformer.state_dict()[name], tensor), name
    assert TextUDMPipeline.from_pretrained(folder, dtype=torch.bfloat16)("a", num_inference_steps=1).texts


@pytest.mark.parametrize(
    "family, peft_config", [("duo", None), ("gidd", LoraConfig(r=2, target_modules="all-linear"))]
)
def test_a_step_of_training_is_saved_and_loads_again(tmp_path, family, peft_config):
    folder = save_original(tmp_path / family, family)
    pipeline = TextUDMPipeline.from_pretrained(folder, max_completion_length=NUM_TOKENS)
    args = UDMGRPOConfig(
        str(tmp_path / "trained"),
        num_generations=4,
        per_device_train_batch_size=48,
        num_inference_steps=5,
        learning_rate=1e-2,
        weight_decay=0.0,
        max_steps=1,
        bf16=False,
        activation_checkpointing=True,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )

    def count_letters(completions, **kwargs):
        return [float(len(set(completion))) for completion in completions]

    dataset = Dataset.from_dict({"prompt": PROMPTS})
    trainer = UDMGRPOTrainer(pipeline, count_letters, args, dataset, peft_config=peft_config)
    initial = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["kl"] == pytest.approx(0, abs=1e-6) and math.isfinite(log["entropy"]) and log["grad_norm"] > 1e-3
    for name, parameter in trainer.model.named_parameters():
        # The other matrix of a new LoRA is 0, and so is the first gradient of this one
        assert torch.equal(parameter, initial[name]) == (not parameter.requires_grad or "lora_A" in name), name
    trainer.save_model()
    loaded = TextUDMPipeline.from_pretrained(tmp_path / "trained" if peft_config is None else folder)
    if peft_config is not None:
        loaded.load_lora_weights(tmp_path / "trained")
    inputs = (*loaded.encode_prompt(["ab"]), torch.tensor([[4, 5, 6]]), (3,), torch.tensor([0.4]))
    with torch.no_grad():
        torch.testing.assert_close(loaded.denoise(*inputs), trainer.pipeline.denoise(*inputs))


def test_a_network_may_not_see_the_time(tmp_path):
    folder = save_original(tmp_path / "udlm", "udlm", time_conditioning=False)
    pipeline = TextUDMPipeline.from_pretrained(folder)
    ids, weights = torch.tensor([4, 5, 6]), load_file(folder / "model.safetensors")
    with torch.no_grad():
        logits = pipeline.transformer(ids[None], torch.tensor([0.2])).logits[0]
    torch.testing.assert_close(logits, compute_duo_logits(weights, ids, 0.0), rtol=1e-5, atol=1e-5)


def test_a_tokenizer_of_ones_own_is_not_changed(tmp_path):
    folder = save_original(tmp_path / "duo", "duo", with_tokenizer=False)
    with pytest.raises(FileNotFoundError, match=r"no `tokenizer.json` .*from_pretrained\('openai-community/gpt2'\)"):
        TextUDMPipeline.from_pretrained(folder)
    tokenizer = build_tokenizer("duo")
    pipeline = TextUDMPipeline.from_pretrained(folder, tokenizer=tokenizer)
    assert pipeline.tokenizer.pad_token_id == VOCABULARY - 1 and tokenizer.pad_token is None
    assert pipeline.tokenizer("ab")["input_ids"] == [0, 1, 2] and tokenizer("ab")["input_ids"] == [1, 2]
    tokenizer.add_tokens(["one", "more"])
    with pytest.raises(ValueError, match="at most the network's 12 tokens, got 14"):
        TextUDMPipeline.from_pretrained(folder, tokenizer=tokenizer)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="with a `bos_token` or a `cls_token`, got "):
        TextUDMPipeline.from_pretrained(folder, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "family, config, message",
    [
        ("duo", {"causal": True}, "`causal` in the original `config.json` must be false, got true: an autoregressive"),
        ("udlm", {"cfg": True}, "`cfg` in the original `config.json` must be false, got true: a network that takes a"),
        ("gidd", {"noise_type": -1000.0}, "`noise_type` .* such as 1000, got -1000.0: .* has mask tokens"),
        ("gidd", {"use_qk_norm": False}, "`use_qk_norm` in the original `config.json` must be True, got False"),
        ("duo", {"cond_dim": 7}, r"`time_embedding.linear_1.weight` .* shape \(7, 256\) .* got \(6, 256\)"),
        ("duo", {"n_blocks": 1}, "have unexpected .'layers.1.input_layernorm.weight'"),
        ("gidd", {"num_hidden_layers": 3}, "miss .'model.layers.2.attn_layernorm.weight'"),
    ],
)
def test_other_models_are_refused(tmp_path, family, config, message):
    folder = save_original(tmp_path / family, family, **config)
    with pytest.raises(ValueError, match=message):
        TextUDMPipeline.from_pretrained(folder)


def test_a_configuration_and_arguments_are_checked(tmp_path):
    folder = save_original(tmp_path / "duo", "duo")
    with pytest.raises(TypeError, match=r"not supported for checkpoints in the original layout: \['variant'\]"):
        TextUDMPipeline.from_pretrained(folder, variant="fp16")
    config = {key: value for key, value in CONFIGS["duo"].items() if key != "n_heads"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="config.json has no 'n_heads'"):
        TextUDMPipeline.from_pretrained(folder)


def test_the_published_sizes_are_those_of_their_files():
    # 169,627,250 says the card of kekchpek/idlm-duo, which was distilled from s-sahoo/duo into the same network. 32 of
    # these are frequencies of the rotary positions, which are no weights here.
    sizes = {"vocabulary": 50258, "width": 768, "heads": 12, "layers": 12, "time_width": 128}
    assert sum(math.prod(shape) for shape in list_shapes("duo", **sizes).values()) == 169_627_250
    # The authors' notebook converts 269 tensors of gidd-unif-3b
    shapes = list_shapes("gidd", vocabulary=131_072, width=3072, heads=24, layers=19)
    assert len(shapes) == 269
    with torch.device("meta"):
        assert DuoForMaskedLM(DuoConfig()).num_parameters() == 169_627_250 - 32
        weights = GiddForMaskedLM(GiddConfig()).state_dict()
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == shapes
