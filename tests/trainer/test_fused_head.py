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

import pytest
import torch
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer import utils
from trl.trainer.utils import add_fused_lm_head

from trl_udm import UniformDDIMScheduler, URSAConfig, URSAForImageGeneration
from trl_udm.trainer.fused_head import TILE_WIDTH, small_tiles


def tiles(codebook_size):
    return small_tiles(UniformDDIMScheduler(codebook_size=codebook_size), torch.device("cpu"))


def score(codebook_size, context):
    """Of a head with `codebook_size` codes: tokens and tile width that TRL's kernel is given, log-probabilities, gradients."""
    torch.manual_seed(0)
    config = URSAConfig(
        text_vocab_size=10,
        codebook_size=codebook_size,
        bov_token_id=9,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = URSAForImageGeneration(config)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    calls = []
    apply = ChunkedLogProbFunction.apply

    def watched(hidden, weight, bias, targets, temperature, chunk_size, *args):
        calls.append((len(hidden), chunk_size))
        return apply(hidden, weight, bias, targets, temperature, chunk_size, *args)

    labels = torch.randint(codebook_size, (2, 12))
    labels[:, :5] = -100
    with pytest.MonkeyPatch.context() as patch, context:
        patch.setattr(ChunkedLogProbFunction, "apply", watched)
        outputs = model(
            input_ids=torch.randint(10, (2, 12)),
            position_ids=torch.arange(12).view(1, 12, 1).expand(2, 12, 3),
            shift_labels=labels,
            fused_lm_head=True,
        )
    (outputs.log_probs.sum() + outputs.entropy.sum()).backward()  # outside, as `Trainer` does
    return calls[0], outputs, [parameter.grad for parameter in model.parameters()]


def test_small_tiles_change_no_number():
    call, outputs, gradients = score(3 * TILE_WIDTH + 7, tiles(3 * TILE_WIDTH + 7))
    trl_call, trl_outputs, trl_gradients = score(3 * TILE_WIDTH + 7, tiles(1))
    assert call == (14, TILE_WIDTH) and trl_call == (24, 32768)
    torch.testing.assert_close(outputs.log_probs, trl_outputs.log_probs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.entropy, trl_outputs.entropy, atol=1e-5, rtol=1e-5)
    for gradient, trl_gradient in zip(gradients, trl_gradients, strict=True):
        torch.testing.assert_close(gradient, trl_gradient, atol=1e-5, rtol=1e-4)


def test_a_codebook_of_one_tile_is_left_to_trl():
    call, outputs, _ = score(TILE_WIDTH, tiles(TILE_WIDTH))
    _, trl_outputs, _ = score(TILE_WIDTH, tiles(1))
    assert call == (24, 32768)
    assert torch.equal(outputs.log_probs, trl_outputs.log_probs)


def test_trl_has_its_constants_back():
    before = (utils._CHUNKED_LOGPROB_CHUNK_SIZE, utils._use_triton)
    with pytest.raises(KeyError), tiles(10**6):
        assert utils._CHUNKED_LOGPROB_CHUNK_SIZE == TILE_WIDTH
        raise KeyError
    assert (utils._CHUNKED_LOGPROB_CHUNK_SIZE, utils._use_triton) == before
