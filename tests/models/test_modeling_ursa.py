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

"""The numbers come from an independent run of the public reference code, Yovecent/UDM-GRPO at commit d1bec49."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, DynamicCache, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

from trl_udm import URSAConfig, URSAForImageGeneration, URSAPipeline
from trl_udm.models.modeling_ursa import URSAModel, URSARotaryEmbedding


TINY = {
    "text_vocab_size": 40,
    "codebook_size": 24,
    "bov_token_id": 39,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
GRIDS = ["1x32x32.shift320", "1x8x8.shift16", "3x4x6.shift16", "8x8.shift16"]


def tiny_model(**changes):
    torch.manual_seed(0)
    return URSAForImageGeneration(URSAConfig(**TINY | changes)).eval()


def tiny_inputs(latent_shape=(1, 3, 4), num_text_tokens=5, batch_size=2):
    generator = torch.Generator().manual_seed(1)
    num_tokens = num_text_tokens + 1 + torch.Size(latent_shape).numel()
    position_ids = URSAPipeline.prepare_position_ids(num_text_tokens, latent_shape)
    return {
        "input_ids": torch.randint(64, (batch_size, num_tokens), generator=generator),
        "position_ids": position_ids.expand(batch_size, -1, -1),
    }


def rotary_angles(position_ids, head_dim, base):
    """The angles (L, D/2), written out frequency by frequency."""
    num_interleaved = 3 * (head_dim // 8)
    angles = torch.empty(len(position_ids), head_dim // 2)
    for j in range(head_dim // 2):
        axis = j % 3 if j < num_interleaved else 1 + (j - num_interleaved) % 2
        angles[:, j] = position_ids[:, axis].float() * base ** (-2 * j / head_dim)
    return angles


@pytest.fixture(scope="module")
def oracle(oracle_dir):
    return load_file(oracle_dir / "logits.safetensors")


@pytest.fixture
def oracle_inputs(oracle):
    return {
        "input_ids": oracle["image.input_ids"],
        "position_ids": oracle["image.rope_pos"].expand(2, -1, -1),
    }


@pytest.fixture
def oracle_model(oracle_dir):
    return URSAPipeline.from_pretrained(oracle_dir / "tiny-ursa").transformer


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_logits_and_hidden_states_are_the_references(oracle_model, oracle_inputs, oracle, attn_implementation):
    oracle_model.set_attn_implementation(attn_implementation)
    blocks = []
    for layer in oracle_model.model.layers:
        layer.register_forward_hook(lambda layer, args, output: blocks.append(output))
    output = oracle_model(**oracle_inputs, output_hidden_states=True)
    torch.testing.assert_close(output.logits, oracle["image.logits"], atol=1e-4, rtol=0)
    for block, name in zip(blocks, ["layer0", "layer1"], strict=True):
        torch.testing.assert_close(block, oracle[f"image.hidden.{name}"], atol=1e-4, rtol=0)
    embeddings, first_block, last = output.hidden_states
    assert torch.equal(embeddings, oracle_model.get_input_embeddings()(oracle_inputs["input_ids"]))
    assert torch.equal(first_block, blocks[0])
    torch.testing.assert_close(last, oracle["image.hidden.norm"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_flex_attention_gives_the_references_logits(oracle_model, oracle_inputs, oracle):
    oracle_model.set_attn_implementation("flex_attention")
    # Compiling its kernel takes half a minute and a C++ compiler; uncompiled, the same code runs eagerly
    with torch.compiler.set_stance("force_eager"):
        logits = oracle_model(**oracle_inputs).logits
    torch.testing.assert_close(logits, oracle["image.logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_rotary_tables_are_the_references(oracle_dir, head_dim):
    tables = load_file(oracle_dir / "rope.safetensors")
    position_ids = tables[f"dim{head_dim}.pos"]
    base = 1e6 if head_dim == 128 else 1e4
    config = URSAConfig(
        **TINY | {"head_dim": head_dim, "rope_parameters": {"rope_type": "default", "rope_theta": base}}
    )
    cos, sin = URSARotaryEmbedding(config)(torch.zeros(1), position_ids.unsqueeze(0))
    assert cos.shape == sin.shape == (1, len(position_ids), head_dim)
    for table, name in ((cos, "cos"), (sin, "sin")):
        first, second = table[0].chunk(2, dim=-1)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, tables[f"dim{head_dim}.{name}"], atol=1e-4, rtol=0)
    angles = rotary_angles(position_ids, head_dim, base)
    torch.testing.assert_close(angles.cos(), tables[f"dim{head_dim}.cos"], atol=1e-4, rtol=0)
    torch.testing.assert_close(angles.sin(), tables[f"dim{head_dim}.sin"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_positions_are_the_references(oracle_dir, grid):
    recorded = load_file(oracle_dir / "rope.safetensors")
    sizes, shift = grid.split(".shift")
    latent_shape = tuple(int(size) for size in sizes.split("x"))
    latent_shape = (1,) * (3 - len(latent_shape)) + latent_shape
    num_text_tokens = int(shift)
    position_ids = URSAPipeline.prepare_position_ids(num_text_tokens, latent_shape)
    assert position_ids.dtype == torch.long
    assert torch.equal(
        position_ids[:num_text_tokens], torch.arange(num_text_tokens).unsqueeze(-1).expand(num_text_tokens, 3)
    )
    assert torch.equal(position_ids[num_text_tokens:], recorded[f"pos.{grid}"][0])
    # Without BOV the image begins where BOV would stand
    without_bov = position_ids[num_text_tokens + 1 :] - torch.tensor([1, 0, 0])
    assert torch.equal(without_bov, recorded[f"pos.{grid}.nobov"][0].long())


@pytest.mark.parametrize("latent_shape", [(1, 8, 8), (3, 4, 6)])
@torch.no_grad()
def test_logits_are_those_of_plain_qwen3_layers(oracle_model, latent_shape):
    inputs = tiny_inputs(latent_shape, num_text_tokens=16)
    config, weights = oracle_model.config, oracle_model.state_dict()
    qwen3_config = Qwen3Config(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=128,
        rms_norm_eps=1e-6,
        num_hidden_layers=2,
        attn_implementation="eager",
    )
    angles = rotary_angles(inputs["position_ids"][0], 128, 1e6).repeat(1, 2).unsqueeze(0)
    hidden_states = weights["model.embed_tokens.weight"][inputs["input_ids"]]
    num_tokens = hidden_states.size(1)
    everything_is_seen = torch.zeros(2, 1, num_tokens, num_tokens)
    for index in range(2):
        layer = Qwen3DecoderLayer(qwen3_config, index)
        prefix = f"model.layers.{index}."
        layer.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        hidden_states = layer(
            hidden_states, attention_mask=everything_is_seen, position_embeddings=(angles.cos(), angles.sin())
        )
    hidden_states = nn.functional.rms_norm(hidden_states, (64,), weights["model.norm.weight"], eps=1e-6)
    expected = hidden_states @ weights["lm_head.weight"].T
    torch.testing.assert_close(oracle_model(**inputs).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_attention_is_bidirectional(attn_implementation):
    model, inputs = tiny_model(attn_implementation=attn_implementation), tiny_inputs()
    logits = model(**inputs).logits
    inputs["input_ids"][:, -1] = (inputs["input_ids"][:, -1] + 1) % 64
    change = (model(**inputs).logits - logits).abs().amax(dim=(0, 2))
    assert (change > 1e-6).all()


@torch.no_grad()
def test_padding_is_visible_unless_masked():
    model, inputs = tiny_model(), tiny_inputs()
    attention_mask = torch.ones_like(inputs["input_ids"])
    attention_mask[:, :2] = 0
    visible, masked = model(**inputs).logits, model(**inputs, attention_mask=attention_mask).logits
    assert not torch.allclose(visible, masked, atol=1e-4)
    inputs["input_ids"][:, :2] = (inputs["input_ids"][:, :2] + 1) % 64
    still_masked = model(**inputs, attention_mask=attention_mask).logits
    torch.testing.assert_close(still_masked[:, 2:], masked[:, 2:], atol=1e-6, rtol=0)


@torch.no_grad()
def test_embeddings_stand_in_for_ids():
    model, inputs = tiny_model(), tiny_inputs()
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    output = model(inputs_embeds=embeddings, position_ids=inputs["position_ids"])
    assert torch.equal(output.logits, model(**inputs).logits)


def test_gradient_checkpointing_leaves_gradients_alone():
    gradients, num_calls = [], []
    for is_checkpointed in (False, True):
        model = tiny_model().train()
        if is_checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        calls = []
        model.model.layers[0].self_attn.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        model(**tiny_inputs()).logits.logsumexp(dim=-1).mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        num_calls.append(len(calls))
    assert num_calls == [1, 2]  # computed again in the backward pass
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, gradients[1][name]), name


@torch.no_grad()
def test_logits_to_keep_are_the_last():
    model, inputs = tiny_model(), tiny_inputs()
    logits = model(**inputs).logits
    assert logits.shape == (2, 18, 24)
    assert torch.equal(model(**inputs, logits_to_keep=0).logits, logits)
    kept = model(**inputs, logits_to_keep=13).logits
    assert kept.shape == (2, 13, 24)
    torch.testing.assert_close(kept, logits[:, -13:], atol=1e-6, rtol=0)


@torch.no_grad()
def test_return_dict_false_gives_a_tuple():
    model, inputs = tiny_model(), tiny_inputs()
    (logits,) = model(**inputs, return_dict=False)
    assert torch.equal(logits, model(**inputs).logits)


@torch.no_grad()
def test_saved_model_loads_through_its_class_and_the_auto_classes(tmp_path):
    model, inputs = tiny_model(), tiny_inputs()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    logits, last_hidden_state = model(**inputs).logits, model.model(**inputs).last_hidden_state

    assert torch.equal(URSAForImageGeneration.from_pretrained(tmp_path)(**inputs).logits, logits)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, URSAConfig)
    assert config.to_diff_dict().items() >= TINY.items()
    whole = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert isinstance(whole, URSAForImageGeneration)
    assert torch.equal(whole(**inputs).logits, logits)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert isinstance(backbone, URSAModel)
    assert torch.equal(backbone(**inputs).last_hidden_state, last_hidden_state)


def test_loading_info_is_returned_on_request(tmp_path):
    tiny_model().model.save_pretrained(tmp_path)
    model, info = URSAForImageGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, URSAForImageGeneration)
    assert info["missing_keys"] == {"lm_head.weight"}


def test_another_codebook_size_is_refused_unless_asked_for(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"in another shape.*lm_head\.weight \(as torch\.Size\(\[24, 32\]\)\)"):
        URSAForImageGeneration.from_pretrained(tmp_path, codebook_size=30)
    model = URSAForImageGeneration.from_pretrained(tmp_path, codebook_size=30, ignore_mismatched_sizes=True)
    assert model.lm_head.weight.shape == (30, 32)


def test_a_backbone_alone_is_no_image_generator(tmp_path):
    tiny_model().model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"The weights in {tmp_path} miss.*lm_head\.weight"):
        URSAForImageGeneration.from_pretrained(tmp_path)


def test_input_and_output_embeddings_have_their_widths():
    model = tiny_model()
    assert model.config.vocab_size == 64
    assert model.get_input_embeddings().weight.shape == (64, 32)
    assert model.get_output_embeddings().weight.shape == (24, 32)


def test_defaults_are_those_of_the_released_model():
    config = URSAConfig()
    assert config.vocab_size == 282741 == config.text_vocab_size + config.codebook_size
    assert (config.head_dim, config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (128, 1e-6, 1e6)


@pytest.mark.parametrize("bov_token_id", [-1, 40])
def test_bov_outside_the_text_vocabulary_is_refused(bov_token_id):
    with pytest.raises(ValueError, match=rf"`bov_token_id` must be a text token, in \[0, 40\), got {bov_token_id}\."):
        URSAConfig(**TINY | {"bov_token_id": bov_token_id})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"use_sliding_window": True}, "`use_sliding_window` must be False"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "`use_sliding_window` must be"),
        ({"tie_word_embeddings": True}, "`tie_word_embeddings` must be False"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "`partial_rotary_factor` must be 1.0",
        ),
    ],
)
def test_settings_of_qwen3_that_do_not_fit_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        URSAConfig(**TINY, **setting)


@pytest.mark.parametrize(
    "rope_parameters",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
        {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_scaled_rotary_embeddings_are_those_of_transformers_on_text(rope_parameters):
    rope_parameters = {"rope_theta": 1e4, "original_max_position_embeddings": 8, **rope_parameters}
    config = URSAConfig(**TINY, max_position_embeddings=8, rope_parameters=rope_parameters)
    rotary, reference = URSARotaryEmbedding(config), Qwen3RotaryEmbedding(config)
    plain = URSARotaryEmbedding(URSAConfig(**TINY, rope_parameters={"rope_type": "default", "rope_theta": 1e4}))
    for length in (20, 5, 30):  # beyond the original length, within it, and beyond it again
        positions, x = torch.arange(length).unsqueeze(0), torch.zeros(1)
        embeddings = rotary(x, positions.unsqueeze(-1).expand(-1, -1, 3))
        torch.testing.assert_close(embeddings, reference(x, positions), rtol=0, atol=0)
        if length > 8:
            assert (embeddings[0] - plain(x, positions.unsqueeze(-1).expand(-1, -1, 3))[0]).abs().max() > 0.1


def test_the_loss_of_labels_is_that_of_the_logits_before_them():
    model, inputs = tiny_model(), tiny_inputs()
    labels = torch.full((2, 18), -100)
    labels[:, 6:] = torch.randint(24, (2, 12), generator=torch.Generator().manual_seed(2))
    output = model(**inputs, labels=labels)
    expected = nn.functional.cross_entropy(output.logits[:, 5:-1].flatten(0, 1), labels[:, 6:].flatten())
    torch.testing.assert_close(output.loss, expected)
    scores = model(**inputs, shift_labels=nn.functional.pad(labels[:, 1:], (0, 1), value=-100)).log_probs
    torch.testing.assert_close(output.loss, -scores.sum() / 24)
    torch.testing.assert_close(model(**inputs, labels=labels, logits_to_keep=13).loss, expected)
    torch.testing.assert_close(model(**inputs, labels=labels, return_dict=False)[0], expected)
    with pytest.raises(ValueError, match=r"`labels` must be image codes in \[0, 24\), .* got labels up to 63"):
        model(**inputs, labels=torch.full((2, 18), 63))


def test_embeddings_keep_their_size():
    model = tiny_model()
    assert model.resize_token_embeddings(64) is model.get_input_embeddings()
    with pytest.raises(ValueError, match="`new_num_tokens` must be 64, got 70: image codes follow the text tokens"):
        model.resize_token_embeddings(70)
    with pytest.raises(ValueError, match="`new_num_tokens` must be 64, got 70"):
        model.model.resize_token_embeddings(70)


@pytest.mark.parametrize(
    ("position_ids", "shape"),
    [(None, "None"), (torch.zeros(2, 18, dtype=torch.long), r"\(2, 18\)"), (torch.zeros(2, 18, 2), r"\(2, 18, 2\)")],
)
def test_positions_of_another_shape_are_refused(position_ids, shape):
    inputs = tiny_inputs() | {"position_ids": position_ids}
    message = rf"`position_ids` must have shape \(batch_size, sequence_length, 3\), got {shape}\."
    with pytest.raises(ValueError, match=message):
        tiny_model()(**inputs)


def test_a_cache_is_refused():
    with pytest.raises(ValueError, match="`use_cache` must be False"):
        tiny_model()(**tiny_inputs(), use_cache=True)
    with pytest.raises(ValueError, match="`use_cache` must be False, without a cache"):
        tiny_model()(**tiny_inputs(), past_key_values=DynamicCache())


def test_ids_and_embeddings_together_or_neither_are_refused():
    inputs = tiny_inputs()
    message = "exactly one of `input_ids` or `inputs_embeds`"
    with pytest.raises(ValueError, match=message):
        tiny_model()(**inputs, inputs_embeds=torch.zeros(2, 18, 32))
    with pytest.raises(ValueError, match=message):
        tiny_model()(position_ids=inputs["position_ids"])
