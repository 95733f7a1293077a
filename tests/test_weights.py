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

import json

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

from trl_udm.weights import (
    check_state_dict,
    compute_checksum,
    find_file,
    load_every_weight,
    load_state_dict,
    load_tensors,
    save_tensors,
)


TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}


def assert_equal(tensors, expected):
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_what_is_saved_loads(tmp_path):
    file = tmp_path / "new" / "folder" / "x.safetensors"
    save_tensors({**TENSORS, "a": TENSORS["a"].T}, file)  # not contiguous
    assert_equal(load_tensors(file), {**TENSORS, "a": TENSORS["a"].T})
    assert_equal(load_tensors(file, names=["b"]), {"b": TENSORS["b"]})


def test_a_pickle_of_tensors_loads(tmp_path):
    torch.save({**TENSORS, "step": 3}, tmp_path / "x.bin")
    assert_equal(load_tensors(tmp_path / "x.bin", names=["a", "b"]), TENSORS)
    with pytest.raises(ValueError, match=r"x\.bin must hold a dictionary of tensors and nothing else"):
        load_tensors(tmp_path / "x.bin")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_checksum_tells_weights_apart_and_copies_none_of_them(dtype):
    weights = [torch.randn(3000, 1001, generator=torch.manual_seed(0)).to(dtype), torch.ones((), dtype=dtype)]
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        checksum = compute_checksum(weights)
    # The sum of a whole weight, which PyTorch copies into int64 for it
    assert checksum == sum(i * int(x.view(integers).sum(dtype=torch.int64)) for i, x in enumerate(weights, start=1))
    assert checksum not in (compute_checksum(weights[::-1]), compute_checksum([weights[0], -weights[1]]))
    allocations = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(allocations, default=0) <= 8 * 2**20


@pytest.mark.parametrize("content", [TENSORS, TENSORS["a"], [1], {"c": 1.0}])
def test_a_missing_tensor_is_named(content, tmp_path):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"Cannot read .*x\.bin: it has no tensor `c`"):
        load_tensors(tmp_path / "x.bin", names=["c"])


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_a_damaged_file_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=f"{name} is damaged, or holds more than tensors"):
        load_tensors(tmp_path / name)


def test_shards_are_preferred_to_safetensors_and_these_to_a_pickle(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no `x\.safetensors` or `x\.bin` in"):
        load_state_dict(tmp_path, "x")
    for content, file in enumerate(["x.bin", "x.safetensors", "x-1.safetensors"]):
        expected = {"a": torch.tensor(content)}
        if file == "x.bin":
            torch.save(expected, tmp_path / file)
        else:
            save_file(expected, tmp_path / file)
        if file == "x-1.safetensors":
            save_file({"b": torch.tensor(9)}, tmp_path / "x-2.safetensors")
            expected["b"] = torch.tensor(9)
            weight_map = {"a": "x-1.safetensors", "b": "x-2.safetensors"}
            (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert_equal(load_state_dict(tmp_path, "x"), expected)
    (tmp_path / "x-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*x-2\.safetensors, which x\.safetensors\.index\.json lists"):
        load_state_dict(tmp_path, "x")


def test_the_first_file_that_exists_is_found(tmp_path):
    (tmp_path / "second").touch()
    assert find_file(tmp_path, ["first", "second"]) == tmp_path / "second"
    (tmp_path / "first").touch()
    assert find_file(tmp_path, ["first", "second"]) == tmp_path / "first"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": None}, r"in here miss \['b'\] and have unexpected none"),
        ({"c": torch.ones(1)}, r"in here miss nothing and have unexpected \['c'\]"),
        ({"b": torch.ones(3)}, r"`b` in here must have shape \(2,\) by its config.json, got \(3,\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message):
    state_dict = {name: tensor for name, tensor in {**TENSORS, **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        check_state_dict(state_dict, TENSORS, "here")
    check_state_dict(TENSORS, TENSORS, "here")


def test_every_weight_of_a_model_is_loaded_or_named(tmp_path):
    VQModel(block_out_channels=[4], norm_num_groups=2, num_vq_embeddings=4, latent_channels=2).save_pretrained(
        tmp_path
    )
    model, info = load_every_weight(VQModel.from_pretrained, tmp_path, output_loading_info=True)
    assert info["missing_keys"] == []
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "quantize.embedding.weight": torch.ones(3)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"another shape .*quantize\.embedding\.weight"):
        load_every_weight(VQModel.from_pretrained, tmp_path)
    save_file({**tensors, "extra": torch.ones(3)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"some that the model of its config.json does not have: \['extra'\]"):
        load_every_weight(VQModel.from_pretrained, tmp_path)
    tensors.pop("quantize.embedding.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"miss, or have .*quantize\.embedding\.weight"):
        load_every_weight(VQModel.from_pretrained, tmp_path)
