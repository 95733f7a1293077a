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

import json

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from safetensors.torch import load_file

from trl_udm import URSAPipeline
from trl_udm.models.autoencoder_vq import AutoencoderVQ


@pytest.fixture(scope="module")
def oracle(oracle_dir):
    return load_file(oracle_dir / "vq.safetensors")


@pytest.fixture(scope="module")
def original_config(oracle_dir):
    return json.loads((oracle_dir / "tiny-ursa" / "vae" / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def vae(oracle_dir):
    return URSAPipeline.from_pretrained(oracle_dir / "tiny-ursa").vae


def small_vae(original_config, **changes):
    torch.manual_seed(0)
    changes = {"num_vq_embeddings": 16, "vq_embed_dim": 4, "attn_down_block": False, "attn_up_block": False} | changes
    return AutoencoderVQ.from_original_config(original_config | changes).eval()


@torch.no_grad()
def test_ids_decode_to_the_references_image(vae, oracle):
    output = vae.decode_ids(oracle["image.ids"].squeeze(1))
    assert isinstance(output, DecoderOutput)
    torch.testing.assert_close(output.sample, oracle["image.decoded"], atol=1e-4, rtol=0)
    pixels = (output.sample * 127.5 + 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(pixels, oracle["image.decoded_uint8"])
    (sample,) = vae.decode_ids(oracle["image.ids"].squeeze(1), return_dict=False)
    assert torch.equal(sample, output.sample)


@torch.no_grad()
def test_image_encodes_to_the_references_ids(vae, oracle):
    latents = vae.encode(oracle["encode.x"]).latents
    recorded = oracle["encode.z"]
    torch.testing.assert_close(latents, recorded, atol=1e-4, rtol=0)
    assert torch.equal(vae.encode_to_ids(oracle["encode.x"]), oracle["encode.ids"].long())


@torch.no_grad()
def test_saved_autoencoder_loads(vae, oracle, tmp_path):
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderVQ.from_pretrained(tmp_path)
    ids = oracle["image.ids"].squeeze(1)
    assert torch.equal(loaded.decode_ids(ids).sample, vae.decode_ids(ids).sample)
    assert torch.equal(loaded.encode_to_ids(oracle["encode.x"]), vae.encode_to_ids(oracle["encode.x"]))
    assert (loaded.spatial_stride, loaded.codebook.shape) == (4, (256, 8))
    assert not loaded.training
    _, info = AutoencoderVQ.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == []


@pytest.mark.parametrize("attention", [False, True])
def test_original_config_says_where_attention_is(original_config, attention):
    vae = small_vae(original_config, attn_down_block=attention, attn_up_block=attention)
    attends = [hasattr(block, "attentions") for block in (*vae.encoder.down_blocks, *vae.decoder.up_blocks)]
    assert attends == [False, False, attention, attention, False, False]


def test_lookup_free_codebook_holds_the_signs_of_the_bits(original_config):
    vae = small_vae(original_config, _quantizer_name="LFQuantizer")
    for code in range(16):
        signs = [1.0 if bit == "1" else -1.0 for bit in f"{code:04b}"]
        assert vae.codebook[code].tolist() == signs
    assert not vae.codebook.requires_grad


@torch.no_grad()
def test_lookup_free_encoding_is_the_sign_of_each_channel(original_config):
    vae = small_vae(original_config, _quantizer_name="LFQuantizer")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = vae.encode(images).latents.permute(0, 2, 3, 1)
    ids = vae.encode_to_ids(images)
    assert ids.shape == (2, 8, 8)
    assert torch.equal(ids, ((latents > 0) * torch.tensor([8, 4, 2, 1])).sum(dim=-1))
    assert len(ids.unique()) > 1
    assert torch.equal(vae.codebook[ids], latents.sign())


@torch.no_grad()
def test_lookup_free_ids_decode_as_their_signs_and_survive_saving(original_config, tmp_path):
    vae = small_vae(original_config, _quantizer_name="LFQuantizer")
    ids = torch.arange(64).remainder(16).view(1, 8, 8)
    signs = vae.codebook[ids].permute(0, 3, 1, 2)
    assert torch.equal((vae.codebook @ vae.codebook.T).argmax(dim=-1), torch.arange(16))
    images = vae.decode_ids(ids).sample
    assert images.shape == (1, 3, 32, 32)
    assert torch.equal(images, vae.decode(signs, force_not_quantize=True).sample)
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderVQ.from_pretrained(tmp_path)
    assert torch.equal(loaded.codebook, vae.codebook)
    assert torch.equal(loaded.decode_ids(ids).sample, images)


def test_quantizer_of_the_video_tokenizers_is_refused(original_config):
    with pytest.raises(
        ValueError, match="`_quantizer_name` must be 'VQuantizer' or 'LFQuantizer', got 'FSQuantizer'."
    ):
        small_vae(original_config, _quantizer_name="FSQuantizer")
