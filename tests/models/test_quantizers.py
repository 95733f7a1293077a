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

from trl_udm.models.quantizers import FSQuantizer, LFQuantizer


LEVELS = [(8, 8, 8, 5, 5, 5), (5, 5, 5), (8, 5, 5)]


def name_of(levels):
    return "x".join(map(str, levels))


@pytest.fixture(scope="module")
def oracle(oracle_dir):
    return load_file(oracle_dir / "video" / "fsq.safetensors")


@pytest.fixture(scope="module")
def cases(oracle_dir):
    return json.loads((oracle_dir / "video" / "fsq.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("levels", LEVELS, ids=name_of)
def test_ids_and_codes_are_the_references(oracle, levels):
    quantizer = FSQuantizer(levels)
    recorded = {key.split(".")[1]: value for key, value in oracle.items() if key.startswith(f"{name_of(levels)}.")}
    torch.testing.assert_close(quantizer.bound(recorded["z"]), recorded["bounded"], atol=1e-5, rtol=0)
    for suffix in ("", "_image"):
        ids = quantizer.encode(recorded[f"z{suffix}"])
        assert torch.equal(ids, recorded[f"ids{suffix}"].long())
        codes = quantizer.decode(recorded[f"ids{suffix}"])  # of int32
        torch.testing.assert_close(codes, recorded[f"z_of_ids{suffix}"], atol=1e-7, rtol=0)
    codebook = quantizer.decode(recorded["codebook_ids"])
    torch.testing.assert_close(codebook, recorded["codebook"], atol=1e-7, rtol=0)
    assert torch.equal(quantizer.encode(recorded["codebook"]), recorded["requantised"].long())


@pytest.mark.parametrize("levels", LEVELS, ids=name_of)
def test_values_at_the_borders_get_the_references_digits(cases, levels):
    quantizer, recorded = FSQuantizer(levels), cases[name_of(levels)]
    assert (quantizer.num_codes, quantizer.num_channels) == (recorded["codes"], len(levels))
    for value, expected in recorded["same value in every channel"].items():
        z = torch.full((1, len(levels)), float(value))
        assert quantizer.encode(z).tolist() == [expected["id"]]
        torch.testing.assert_close(quantizer.bound(z)[0], torch.tensor(expected["bounded"]), atol=1e-5, rtol=0)
    for channel, borders in enumerate(recorded["digit boundaries (other channels 0)"].values()):
        for border in borders:
            z = torch.zeros(2, len(levels))
            z[:, channel] = border["z_boundary"] + torch.tensor([-1e-3, 1e-3])
            digits = quantizer.encode(z) // recorded["basis"][channel] % levels[channel]
            assert digits.tolist() == [border["digit_just_below"], border["digit_just_above"]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_in_float32(oracle, dtype):
    quantizer, z = FSQuantizer((8, 8, 8, 5, 5, 5)), oracle["8x8x8x5x5x5.z"].to(dtype)
    assert quantizer.bound(z).dtype == torch.float32
    assert torch.equal(quantizer.encode(z), quantizer.encode(z.float()))


def test_codes_of_three_and_five_levels_are_fixed_points_and_others_are_not():
    quantizer, ids = FSQuantizer((5, 3, 5)), torch.arange(75)
    assert torch.equal(quantizer.encode(quantizer.decode(ids)), ids)
    digits = FSQuantizer((8,)).encode(FSQuantizer((8,)).decode(torch.arange(8)))
    assert digits.tolist() == [1, 2, 2, 3, 4, 5, 5, 6]


def test_lookup_free_codes_are_the_signs_of_the_bits():
    quantizer = LFQuantizer(4)
    codes = quantizer.decode(torch.arange(16))
    for code in range(16):
        assert codes[code].tolist() == [1.0 if bit == "1" else -1.0 for bit in f"{code:04b}"]
    assert torch.equal(quantizer.encode(codes * 0.1), torch.arange(16))


@pytest.mark.parametrize("quantizer", [FSQuantizer((8, 5, 5)), LFQuantizer(3)], ids=["FSQ", "LFQ"])
def test_what_has_no_id_or_no_code_is_refused(quantizer):
    num_codes = quantizer.num_codes
    for ids in ([num_codes], [0, num_codes + 7], [-1]):
        message = f"`ids` must be in [0, {num_codes}), got ids from {min(ids)} to {max(ids)}."
        with pytest.raises(ValueError, match=re.escape(message)):
            quantizer.decode(torch.tensor(ids))
    with pytest.raises(TypeError, match="`ids` must be integers, got torch.float32."):
        quantizer.decode(torch.zeros(2))
    with pytest.raises(ValueError, match=re.escape("`z` must have shape (batch_size, 3, ...), with the channels")):
        quantizer.encode(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match="`z` must have no NaN"):
        quantizer.encode(torch.tensor([[0.0, float("nan"), 0.0]]))


def test_digits_of_every_level_exist():
    z = torch.tensor([[-torch.inf], [torch.inf]])
    assert all(FSQuantizer((level,)).encode(z).tolist() == [0, level - 1] for level in range(2, 1001))


@pytest.mark.parametrize("levels", [(), (8, 1), (8, 1001)])
def test_levels_out_of_range_are_refused(levels):
    with pytest.raises(ValueError, match=r"`levels` must be numbers of values, each in \[2, 1000\], got \("):
        FSQuantizer(levels)
