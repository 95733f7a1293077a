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

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from trl_udm import URSAPipeline


SCRIPT = Path(__file__).parents[2] / "scripts" / "make_random_checkpoint.py"


@pytest.fixture
def run(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


def test_both_layouts_hold_the_same_model_in_shards(tmp_path, run, capsys):
    pipelines = []
    for layout in ("ours", "original"):
        run("--size", "tiny", "--layout", layout, "--output_dir", tmp_path / layout, "--max_shard_size", "100KB")
        assert len(list((tmp_path / layout / "transformer").glob("*.safetensors"))) > 1
        # The original layout does not tell the length of prompts, which is 320 for the published models
        options = {"dtype": torch.bfloat16, "max_prompt_length": 16}
        pipelines.append(URSAPipeline.from_pretrained(tmp_path / layout, **options))
    assert "201,536 weights of the network" in capsys.readouterr().out
    ours, original = (pipe("a ring", num_inference_steps=2, generator=torch.manual_seed(0)) for pipe in pipelines)
    np.testing.assert_array_equal(np.asarray(ours.images[0]), np.asarray(original.images[0]))
    assert np.asarray(ours.images[0]).std() > 10
    pipe, tokens = pipelines[0], torch.arange(16).unsqueeze(0)
    logits = pipe.denoise(*pipe.encode_prompt(["a ring"]), tokens, pipe.latent_shape())  # in bfloat16
    assert logits.isfinite().all() and 0.1 < logits.float().std() < 1
    assert len(pipelines[0].tokenizer) == pipelines[0].transformer.config.text_vocab_size
    assert {weight.dtype for weight in pipelines[1].transformer.state_dict().values()} == {torch.bfloat16}


def test_nothing_is_overwritten(tmp_path, run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--size", "tiny", "--output_dir", tmp_path)
    assert "`--output_dir` must not exist yet" in capsys.readouterr().err
