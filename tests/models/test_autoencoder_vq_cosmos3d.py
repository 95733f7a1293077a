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

"""The numbers come from an independent run of the public reference code, baaivision/URSA at commit 29284bb."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from trl_udm import AutoencoderVQCosmos3D
from trl_udm.models.frames import check_num_frames


WEIGHTS = "diffusion_pytorch_model.safetensors"
STAGES = {
    "encoder.patcher": "encoder.patch_embed",
    "encoder.conv_in": "encoder.conv_in",
    **{f"encoder.down_block{i}": f"encoder.down_blocks.{i}" for i in range(3)},
    "encoder.conv_norm_out": "encoder.norm_out",
    "encoder.conv_out": "encoder.conv_out",
    "encoder.out": "encoder",
    "post_quant_conv": "post_quant_conv",
    "decoder.conv_in": "decoder.conv_in",
    **{f"decoder.up_block{i}": f"decoder.up_blocks.{i}" for i in range(3)},
    "decoder.conv_norm_out": "decoder.norm_out",
    "decoder.conv_out": "decoder.conv_out",
    **{
        f"{part}.mid_block{name}": f"{part}.mid_block{module}"
        for part in ("encoder", "decoder")
        for name, module in {
            "": "",
            ".resnet0": ".resnets.0",
            ".spatial_attention": ".attentions.0",
            ".temporal_attention": ".temp_attentions.0",
        }.items()
    },
}
"""Modules whose outputs are recorded."""


def load(folder, **changes):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vae = AutoencoderVQCosmos3D.from_original_config(config | changes).eval()
    vae.load_state_dict(vae.convert_original_weights(load_file(folder / WEIGHTS)))
    return vae


def to_pixels(video):
    return (video.float() - 127.5).div(127.5).permute(0, 4, 1, 2, 3)


def small_vae(**settings):
    torch.manual_seed(0)
    settings = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "latent_channels": 4} | settings
    return AutoencoderVQCosmos3D(**settings).eval()


@pytest.fixture(scope="module", params=["b", "c"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def oracle(oracle_dir, name):
    return load_file(oracle_dir / "video" / f"vae_{name}.safetensors")


@pytest.fixture(scope="module")
def vae(oracle_dir, name):
    return load(oracle_dir / "video" / f"vae-{name}", temporal_tiling="original")


# Against the reference


@torch.no_grad()
def test_videos_and_images_become_the_references_ids_and_frames(vae, oracle):
    cases = sorted({key.split(".")[0] for key in oracle if key.startswith("frames")})
    assert len(cases) >= 4
    for case in cases:
        video = to_pixels(oracle[f"{case}.video"])
        torch.testing.assert_close(vae.encode(video).latents, oracle[f"{case}.z"], atol=1e-5, rtol=0)
        assert torch.equal(vae.encode_to_ids(video), oracle[f"{case}.ids"].long())
        decoded = vae.decode_ids(oracle[f"{case}.ids"]).sample
        recorded = oracle[f"{case}.decoded"]
        torch.testing.assert_close(decoded[:, :, -recorded.shape[2] :], recorded, atol=1e-5, rtol=0)
        if f"{case}.decoded_first" in oracle:
            torch.testing.assert_close(decoded[:, :, :2], oracle[f"{case}.decoded_first"], atol=1e-5, rtol=0)
            means = decoded.mean(dim=(1, 3, 4))
            torch.testing.assert_close(means, oracle[f"{case}.decoded_frame_means"], atol=1e-5, rtol=0)
    images = vae.decode_ids(oracle["image_ids3d.ids"]).sample
    torch.testing.assert_close(images, oracle["image_ids3d.decoded"], atol=1e-5, rtol=0)
    frame = to_pixels(oracle["frames1.video"])[:, :, 0]
    assert torch.equal(vae.encode_to_ids(frame), oracle["frames1.ids"].long().squeeze(1))


@torch.no_grad()
def test_latent_frames_that_fill_no_window_are_lost_as_in_the_reference(vae, oracle):
    cases = sorted({key.split(".")[0] for key in oracle if key.startswith("latents")})
    assert cases
    for case in cases:
        decoded = vae.decode_ids(oracle[f"{case}.ids"]).sample
        torch.testing.assert_close(decoded[:, :, -1], oracle[f"{case}.decoded_last"], atol=1e-5, rtol=0)
        means = decoded.mean(dim=(1, 3, 4))
        torch.testing.assert_close(means, oracle[f"{case}.decoded_frame_means"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_frames", [1, 5])
@torch.no_grad()
def test_every_stage_is_the_references(vae, oracle, num_frames):
    seen = {}
    handles = [
        vae.get_submodule(module).register_forward_hook(
            lambda module, inputs, output, stage=stage: seen.update({stage: output})
        )
        for stage, module in STAGES.items()
    ]
    case = f"frames{num_frames}"
    vae.encode(to_pixels(oracle[f"{case}.video"])[:1])
    codes = vae.quantizer.decode(oracle[f"{case}.ids"][:1])
    torch.testing.assert_close(codes, oracle[f"{case}.dequantised"], atol=1e-7, rtol=0)
    vae.decode(codes)
    for handle in handles:
        handle.remove()
    for stage, output in seen.items():
        recorded = oracle[f"{case}.{stage}"]
        torch.testing.assert_close(output, recorded, atol=1e-5 * max(1.0, recorded.abs().max().item()), rtol=0)
    assert len(seen) == len(STAGES)


def test_names_of_the_published_weights_are_diffusers(oracle_dir):
    with torch.device("meta"):
        vae = AutoencoderVQCosmos3D()
    original = json.loads((oracle_dir / "video" / "published_parameters.json").read_text(encoding="utf-8"))
    converted = vae.convert_original_weights({name: torch.empty(s, device="meta") for name, s in original.items()})
    assert {name: weight.shape for name, weight in converted.items()} == {
        name: weight.shape for name, weight in vae.state_dict().items()
    }


# Lengths


@pytest.mark.parametrize("num_frames", [1, 5, 17, 21, 33, 49])
@torch.no_grad()
def test_windows_that_overlap_give_every_number_of_frames_back(num_frames):
    vae = small_vae(sample_frames=17)
    video = torch.rand(1, 3, num_frames, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = vae.encode_to_ids(video)
    assert ids.shape == (1, 1 + (num_frames - 1) // 4, 2, 2)
    decoded = vae.decode_ids(ids).sample
    assert decoded.shape == video.shape
    # The first window is a pass of its own
    assert torch.equal(ids[:, :5], vae.encode_to_ids(video[:, :, :17]))
    torch.testing.assert_close(decoded[:, :, :17], vae.decode_ids(ids[:, :5]).sample, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("num_frames", "num_latents", "num_decoded"), [(17, 5, 17), (21, 5, 17), (33, 10, 33), (49, 15, 49), (6, 3, 9)]
)
@torch.no_grad()
def test_the_originals_windows_have_its_lengths(num_frames, num_latents, num_decoded):
    vae = small_vae(sample_frames=17, temporal_tiling="original")
    ids = vae.encode_to_ids(torch.zeros(1, 3, num_frames, 16, 16))
    assert ids.shape == (1, num_latents, 2, 2)
    assert vae.decode_ids(ids).sample.shape == (1, 3, num_decoded, 16, 16)


@torch.no_grad()
def test_a_larger_window_is_one_pass_for_all_frames(oracle_dir):
    folder = oracle_dir / "video" / "vae-b"
    video = torch.rand(1, 3, 17, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, tiled = load(folder, sample_frames=17), load(folder)
    assert whole.encode(video).latents.shape == tiled.encode(video).latents.shape
    torch.testing.assert_close(whole.encode(video).latents, whole.quant_conv(whole.encoder(video)))
    assert not torch.equal(whole.encode(video).latents, tiled.encode(video).latents)


@torch.no_grad()
def test_samples_are_worked_on_one_at_a_time():
    vae, batch_sizes = small_vae(), []
    video = torch.rand(3, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = vae.encode_to_ids(video)
    frames = vae.decode_ids(ids).sample
    vae.enable_slicing()
    for network in (vae.encoder, vae.decoder):
        network.register_forward_pre_hook(lambda module, inputs: batch_sizes.append(len(inputs[0])))
    assert torch.equal(vae.encode_to_ids(video), ids)
    torch.testing.assert_close(vae.decode_ids(ids).sample, frames, atol=1e-5, rtol=0)
    assert batch_sizes == [1] * 6


def test_strides_that_the_decoder_does_not_invert_are_known(oracle_dir):
    assert load(oracle_dir / "video" / "vae-b").decoded_strides == (4, 4)
    assert load(oracle_dir / "video" / "vae-c").decoded_strides == (8, 4)
    assert small_vae(spatial_stride=4, temporal_stride=8, sample_frames=9).decoded_strides == (8, 8)
    assert small_vae(patch_size=2, spatial_stride=8, temporal_stride=8, sample_frames=9).decoded_strides == (4, 4)


# Saving and settings


@torch.no_grad()
def test_saved_tokenizer_loads(vae, oracle, tmp_path):
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderVQCosmos3D.from_pretrained(tmp_path)
    video = to_pixels(oracle["frames5.video"])
    assert torch.equal(loaded.encode(video).latents, vae.encode(video).latents)
    ids = oracle["frames9.ids" if "frames9.ids" in oracle else "frames33.ids"]
    assert torch.equal(loaded.decode_ids(ids).sample, vae.decode_ids(ids).sample)
    (sample,) = loaded.decode_ids(ids, return_dict=False)
    assert torch.equal(sample, loaded.decode_ids(ids).sample)
    assert not loaded.training
    assert loaded.config.temporal_tiling == "original"
    assert (
        AutoencoderVQCosmos3D.from_pretrained(tmp_path, temporal_tiling="overlap", sample_frames=49).config[
            "sample_frames"
        ]
        == 49
    )


@torch.no_grad()
def test_lookup_free_codes_have_the_same_network(oracle_dir):
    folder = oracle_dir / "video" / "vae-b"
    vae = load(folder, _quantizer_name="LFQuantizer")
    assert vae.config.num_vq_embeddings == 64
    video = torch.rand(1, 3, 5, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = vae.encode_to_ids(video)
    signs = vae.encode(video).latents.sign()
    assert torch.equal(vae.quantizer.decode(ids), signs)
    assert torch.equal(vae.decode_ids(ids).sample, vae.decode(signs).sample)


@torch.no_grad()
def test_lower_precision_gives_frames():
    vae = torch.nn.Module.to(small_vae(), torch.bfloat16)
    ids = vae.encode_to_ids(torch.zeros(1, 3, 5, 16, 16, dtype=torch.bfloat16))
    sample = vae.decode_ids(ids).sample
    assert sample.dtype == torch.bfloat16
    assert sample.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 5, 36, 16), "The height of `sample` must be a multiple of 8, got 36. Try 32."),
        ((1, 3, 5, 16, 3), "The width of `sample` must be a multiple of 8, got 3. Try 8."),
        ((1, 4, 5, 16, 16), "`sample` must have shape (batch_size, 3, num_frames, height, width), got (1, 4, 5"),
        ((3, 16, 16), "`sample` must have shape (batch_size, 3, num_frames, height, width), got (3, 16, 16)."),
        ((1, 3, 6, 16, 16), "The number of frames of `sample` must be 1 more than a multiple of 4, got 6"),
    ],
)
def test_sizes_that_the_decoder_does_not_give_back_are_refused(shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small_vae().encode_to_ids(torch.zeros(shape))


def test_ids_of_another_shape_or_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"`ids` must have shape .*, got \(4, 4\)\."):
        small_vae().decode_ids(torch.zeros(4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=re.escape("`ids` must be in [0, 64000), got ids from 64000 to 64000.")):
        small_vae().decode_ids(torch.full((1, 1, 2, 2), 64_000))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temporal_tiling": "none"}, "`temporal_tiling` must be 'overlap' or 'original', got 'none'."),
        ({"sample_frames": 4}, "`sample_frames` must be above `temporal_stride`, 4, got 4. Try 5."),
        ({"spatial_stride": 6}, "`spatial_stride` must be a power of 2 that is at least `patch_size`, 4, got 6."),
        ({"temporal_stride": 2}, "`temporal_stride` must be a power of 2 that is at least `patch_size`, 4, got 2."),
        ({"levels": (8, 5, 5)}, "must be 200 and 3 for `levels` (8, 5, 5), got 64000 and 6."),
        ({"levels": None}, "must be 64 and 6 for `levels` None, got 64000 and 6."),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small_vae(**settings)


def test_quantizer_of_images_is_refused(oracle_dir):
    with pytest.raises(ValueError, match="`_quantizer_name` must be 'FSQuantizer' or 'LFQuantizer', got 'VQuantizer'"):
        load(oracle_dir / "video" / "vae-b", _quantizer_name="VQuantizer")


@pytest.mark.parametrize(
    ("num_frames", "limit", "message"),
    [
        (6, None, "must be 1 more than a multiple of 4, got 6: the video tokenizer does not give other numbers"),
        (6, None, "Try 5."),
        (48, None, "Try 49."),
        (0, None, "Try 1."),
        (-3, None, "got -3"),
        (5.0, None, "got 5.0"),
        (True, None, "got True"),
        ("5", None, "got '5'"),
        (49, 17, "must be 1 more than a multiple of 4, and at most 17, got 49"),
        (49, 17, "Try 17."),
        (18, 19, "Try 17."),
        (33, 19, "Try 17."),
    ],
)
def test_numbers_of_frames_are_refused_with_the_nearest(num_frames, limit, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_num_frames("`num_frames`", num_frames, 4, limit)
    check_num_frames("`num_frames`", 17, 4, limit)
    check_num_frames("`num_frames`", 6, 1)
