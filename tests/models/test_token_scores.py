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
from peft import LoraConfig, get_peft_model
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from trl_udm import URSAConfig, URSAForImageGeneration
from trl_udm.models import token_scores
from trl_udm.models.token_scores import TILE_WIDTH, compute_kl, score_tokens


CODEBOOK_SIZE = 3 * TILE_WIDTH + 7


def build_model():
    torch.manual_seed(0)
    config = URSAConfig(
        text_vocab_size=10,
        codebook_size=CODEBOOK_SIZE,
        bov_token_id=9,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = URSAForImageGeneration(config)
    nn.init.normal_(model.lm_head.weight, std=0.5)  # far from uniform
    return model


def add_lora_to_the_head(model):
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def build_inputs():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(CODEBOOK_SIZE, (2, 12), generator=generator)
    labels[:, :5] = -100
    return {
        "input_ids": torch.randint(10, (2, 12), generator=generator),
        "position_ids": torch.arange(12).view(1, 12, 1).expand(2, 12, 3),
        "shift_labels": labels,
    }


def score_plainly(model, input_ids, position_ids, shift_labels):
    """By a softmax over the logits of all positions."""
    log_probs = model(input_ids=input_ids, position_ids=position_ids).logits.float().log_softmax(dim=-1)
    entropies = -(log_probs.exp() * log_probs).sum(dim=-1)
    is_label = shift_labels != -100
    log_probs = log_probs.gather(-1, shift_labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return log_probs * is_label, entropies * is_label


def gradients(model, log_probs, entropies):
    """Of a weighted sum of log-probabilities and entropies."""
    weights = torch.linspace(-1, 2, log_probs.numel()).view_as(log_probs)
    model.zero_grad()
    (weights * log_probs + weights.flip(0) * entropies).sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


def assert_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_bf16", [False, True])
@pytest.mark.parametrize(("has_lora", "keeps_logits"), [(False, False), (False, True), (True, False)])
def test_scores_and_gradients_are_those_of_a_softmax_over_all_logits(monkeypatch, has_lora, keeps_logits, is_bf16):
    num_logits = 2 * 7 * CODEBOOK_SIZE
    monkeypatch.setattr(token_scores, "MAX_KEPT_LOGITS", num_logits if keeps_logits else num_logits - 1)
    model = add_lora_to_the_head(build_model()) if has_lora else build_model()
    outcomes = []
    for score in (model, lambda **inputs: score_plainly(model, **inputs)):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            output = score(**build_inputs())
        scores = (output.log_probs, output.entropy) if score is model else output
        outcomes.append((scores, gradients(model, *scores)))
    (scores, grads), (plain_scores, plain_grads) = outcomes
    assert scores[0].dtype == scores[1].dtype == torch.float32
    assert_close(scores, plain_scores)
    if is_bf16:
        # The plain gradient of the logits is rounded to bfloat16
        for grad, plain_grad in zip(grads, plain_grads, strict=True):
            torch.testing.assert_close(grad, plain_grad, atol=0.02 * plain_grad.abs().max().item(), rtol=0.05)
    else:
        assert_close(grads, plain_grads)


@pytest.mark.parametrize("is_bf16", [False, True])
def test_scores_and_gradients_are_those_of_trls_fused_head(is_bf16):
    model = build_model()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    outcomes = []
    for kwargs in ({}, {"fused_lm_head": True}):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            output = model(**build_inputs(), **kwargs)
        outcomes.append(([output.log_probs, output.entropy], gradients(model, output.log_probs, output.entropy)))
    (scores, grads), (trl_scores, trl_grads) = outcomes
    assert_close(scores, trl_scores)
    if is_bf16:  # so are the gradients of a tile in TRL's kernel
        for grad, trl_grad in zip(grads, trl_grads, strict=True):
            torch.testing.assert_close(grad, trl_grad, atol=0.02 * trl_grad.abs().max().item(), rtol=0.05)
    else:
        assert_close(grads, trl_grads)


@pytest.mark.parametrize(("has_lora", "keeps_logits"), [(False, False), (False, True), (True, False)])
def test_several_labels_of_a_token_are_scored_with_one_distribution(monkeypatch, has_lora, keeps_logits):
    monkeypatch.setattr(token_scores, "MAX_KEPT_LOGITS", 2**27 if keeps_logits else 0)
    model = add_lora_to_the_head(build_model()) if has_lora else build_model()
    head = model.get_output_embeddings()
    hidden_states = torch.randn(6, 16, requires_grad=True)
    labels = torch.randint(CODEBOOK_SIZE, (6, 5))
    labels[:, 3] = labels[:, 1]  # draws repeat
    weights = torch.randn(6, 5)
    outcomes = []
    for score in (score_tokens, lambda *args: token_scores._score_chunk(*args)):
        log_probs, entropies = score(head, hidden_states, labels)
        (grad,) = torch.autograd.grad((weights * log_probs).sum() + entropies.sum(), hidden_states)
        outcomes.append((log_probs, entropies, grad))
    assert_close(*outcomes)
    one_each = [score_tokens(head, hidden_states, column)[0] for column in labels.unbind(dim=1)]
    assert torch.equal(outcomes[0][0], torch.stack(one_each, dim=1))


@pytest.mark.parametrize("used", ["log_probs", "entropy"])
def test_one_of_the_two_scores_may_be_left_unused(used):
    model = build_model()
    log_probs, entropies = score_plainly(model, **build_inputs())
    expected = gradients(model, *((log_probs, log_probs * 0) if used == "log_probs" else (entropies * 0, entropies)))
    output = model(**build_inputs())
    scores = (output.log_probs, output.log_probs.detach() * 0)
    if used == "entropy":
        scores = (output.entropy.detach() * 0, output.entropy)
    assert_close(gradients(model, *scores), expected)


@pytest.mark.parametrize("is_cast", [False, True])
def test_a_head_that_trl_casts_to_float32_is_not_rounded_by_autocast(is_cast):
    head, hidden_states, labels = nn.Linear(8, CODEBOOK_SIZE, bias=False), torch.randn(64, 8), torch.arange(64)
    expected = [scores.detach() for scores in score_tokens(head, hidden_states, labels)]
    if is_cast:
        head.forward = head.forward  # as `GRPOTrainer` replaces it with `cast_lm_head_to_fp32`
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = score_tokens(head, hidden_states, labels)
    assert all(torch.equal(*pair) == is_cast for pair in zip(scores, expected, strict=True))


@pytest.mark.parametrize("has_lora", [False, True])
def test_no_tensor_of_all_tokens_and_all_codes_is_made(has_lora, monkeypatch):
    monkeypatch.setattr(token_scores, "CHUNK_LENGTH", 16)
    head = nn.Linear(8, CODEBOOK_SIZE, bias=False)
    if has_lora:
        head = get_peft_model(nn.Sequential(head), LoraConfig(target_modules=["0"])).base_model.model[0]
    hidden_states = torch.randn(128, 8, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            output = func(*args, **(kwargs or {}))
            sizes = [tensor.numel() for tensor in torch.utils._pytree.tree_leaves(output) if torch.is_tensor(tensor)]
            largest = max([largest, *sizes])
            return output

    with Watch():
        log_probs, entropies = score_tokens(head, hidden_states, torch.randint(CODEBOOK_SIZE, (128,)))
        (log_probs.sum() + entropies.sum()).backward()
    assert largest < 128 * CODEBOOK_SIZE / 2
    assert hidden_states.grad.isfinite().all()


def test_a_head_that_is_frozen_gets_no_gradient_and_one_of_no_tokens_is_fine():
    head = nn.Linear(8, CODEBOOK_SIZE, bias=False).requires_grad_(False)
    hidden_states = torch.randn(3, 8, requires_grad=True)
    score_tokens(head, hidden_states, torch.tensor([0, 5, CODEBOOK_SIZE - 1]))[0].sum().backward()
    assert head.weight.grad is None and hidden_states.grad.any()
    log_probs, entropies = score_tokens(head, hidden_states[:0], torch.tensor([], dtype=torch.long))
    assert log_probs.shape == entropies.shape == (0,)


def test_logits_that_are_large_do_not_overflow():
    head = nn.Linear(2, CODEBOOK_SIZE, bias=False)
    with torch.no_grad():
        head.weight.zero_()[700] = 1e4
    log_probs, entropies = score_tokens(head, torch.ones(2, 2), torch.tensor([700, 3]))
    assert log_probs.tolist() == [0.0, -2e4] and entropies.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("has_lora", [False, True])
def test_divergences_and_their_gradients_are_those_of_sums_over_all_codes(monkeypatch, has_lora):
    monkeypatch.setattr(token_scores, "CHUNK_LENGTH", 3)  # does not divide the number of tokens
    model = add_lora_to_the_head(build_model()).double() if has_lora else build_model().double()
    ref_head = nn.Linear(24, CODEBOOK_SIZE, bias=False).double()
    generator = torch.Generator().manual_seed(2)
    hidden_states = torch.randn(8, 16, generator=generator, dtype=torch.double, requires_grad=True)
    ref_hidden_states = torch.randn(8, 24, generator=generator, dtype=torch.double)
    head = model.get_output_embeddings()
    p = head(hidden_states).softmax(dim=-1)
    q = ref_head(ref_hidden_states).softmax(dim=-1)
    expected = (p * (p / q).log()).sum(dim=-1)
    weights = torch.linspace(-1, 2, 8)
    inputs = [hidden_states, *(parameter for parameter in head.parameters() if parameter.requires_grad)]
    expected_grads = torch.autograd.grad((weights * expected).sum(), inputs)
    actual = compute_kl(head, hidden_states, ref_head, ref_hidden_states)
    assert actual.min() > 0.5
    torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=1e-6)
    for grad, expected_grad in zip(torch.autograd.grad((weights * actual).sum(), inputs), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=2e-5, rtol=1e-5)  # of float32 logits
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(compute_kl(head, hidden_states, ref_head, ref_hidden_states).sum(), ref_head.weight)


def test_the_divergence_from_itself_is_zero_and_has_no_gradient():
    head, hidden_states = nn.Linear(8, 40), torch.randn(5, 8, requires_grad=True)
    kl = compute_kl(head, hidden_states, head, hidden_states.detach())
    assert kl.abs().max() < 1e-6
    (grad,) = torch.autograd.grad(kl.sum(), hidden_states)
    assert grad.abs().max() < 1e-6
