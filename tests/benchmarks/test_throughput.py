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


import argparse
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode


THROUGHPUT = Path(__file__).resolve().parents[2] / "benchmarks" / "throughput.py"


@pytest.fixture(scope="module")
def module():
    return runpy.run_path(str(THROUGHPUT))


@pytest.fixture
def run_program(monkeypatch, capsys):
    """Runs the program in this process, and returns what it prints. It measures in processes of its own."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(THROUGHPUT), *arguments])
        runpy.run_path(str(THROUGHPUT), run_name="__main__")
        return capsys.readouterr().out

    return run


def settings(tmp_path, **kwargs):
    defaults = {
        "batch_size": 2,
        "micro_batch_size": None,
        "num_train_timesteps": 3,
        "num_threads": 1,
        "lora": False,
        "bf16": False,
        "activation_checkpointing": False,
        "torch_compile": False,
        "output_dir": tmp_path,
    }
    return argparse.Namespace(**{**defaults, **kwargs})


@pytest.mark.parametrize("codebook_size", [256, 1000])
def test_the_naive_scoring_is_the_librarys(tmp_path, module, codebook_size):
    """Log-probabilities, entropies and gradients, in float32, with a head of one tile and of several."""
    size = module["replace"](module["SIZES"]["tiny"], codebook_size=codebook_size)
    outcomes = []
    for naive in (False, True):
        trainer = module["build_trainer"](size, settings(tmp_path), naive)
        torch.manual_seed(1)
        text = torch.zeros(6, size.num_text_tokens, dtype=torch.long)
        tokens = torch.randint(size.codebook_size, (6, 2 * size.num_tokens))
        input_ids = torch.cat([text, tokens], dim=1)
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, input_ids, torch.ones_like(input_ids), size.num_tokens, compute_entropy=True
        )
        logps.sum().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
        outcomes.append((logps, entropies, gradient))
    (logps, entropies, gradient), (naive_logps, naive_entropies, naive_gradient) = outcomes
    torch.testing.assert_close(logps, naive_logps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, naive_entropies, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, naive_gradient, atol=1e-5, rtol=1e-4)


def test_the_naive_sampler_draws_from_the_librarys_distribution(tmp_path, module):
    """Marginals of two samples of 4,096 tokens each, by rollouts of a network that ignores its input."""
    size = module["replace"](module["SIZES"]["tiny"], codebook_size=16)
    counts = []
    for naive in (False, True):
        trainer = module["build_trainer"](size, settings(tmp_path), naive)
        with torch.no_grad():
            for parameter in trainer.model.model.layers.parameters():
                parameter.zero_()
            trainer.model.lm_head.weight.mul_(15)
        torch.manual_seed(2)
        samples = trainer._rollout(["a"] * 64, "train").output.clean_samples
        counts.append(torch.bincount(samples.flatten(), minlength=16).double())
    ours, naive = counts
    # Two counts of the same size: the statistic has 15 degrees of freedom, and exceeds 37.7 once in a thousand
    statistic = ((ours - naive).square() / (ours + naive).clamp(min=1)).sum()
    assert statistic < 37.7
    assert ours.std() > 30  # they are not merely uniform


def test_flops_are_those_that_pytorch_counts(tmp_path, module):
    size, args = module["SIZES"]["tiny"], settings(tmp_path)
    trainer = module["build_trainer"](size, args, False)
    trainer.model.set_attn_implementation("eager")  # PyTorch does not count its own attention kernel on a CPU
    run = module["build_stage"](trainer, "scoring", size, args)
    with FlopCounterMode(display=False) as counter:
        run()
    # PyTorch counts the head at the text's positions too, which a CPU computes
    counted = counter.get_total_flops()
    estimated = module["count_flops"]("scoring", size, args)
    assert estimated < counted < estimated * 1.05


@pytest.mark.parametrize(("stage", "num_passes"), [("rollout", 10), ("scoring", 3), ("update", 3 * 3)])
@pytest.mark.parametrize("lora", [False, True])
def test_the_limit_is_passes_of_the_same_network(tmp_path, module, stage, num_passes, lora):
    """By FLOPs: a backward pass is two forward passes. With an adapter it is one, and the adapter's own, 6 % here."""
    size, args = module["SIZES"]["tiny"], settings(tmp_path, batch_size=1, lora=lora)
    run = module["build_limit"](stage, size, args)
    with FlopCounterMode(display=False) as counter:
        run()
    forward = module["count_flops"]("scoring", size, args) / 3
    # PyTorch does not count its own attention kernel on a CPU
    forward -= size.num_layers * 4 * (size.num_text_tokens + 1 + size.num_tokens) ** 2 * size.num_heads * size.head_dim
    if not (lora and stage == "update"):
        assert counter.get_total_flops() == pytest.approx(num_passes * forward, rel=0.01)
    else:
        assert 2 * 3 * forward < counter.get_total_flops() < num_passes * forward


def test_the_exponent_is_the_slope_of_the_logarithms(module):
    assert module["exponent"]([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_the_flops_of_a_real_size_are_printed_without_a_model(run_program):
    output = run_program("--size", "ursa-1.7b-ibq512", "--flops", "--stages", "scoring")
    # 1.41 billion weights in the layers at 1,345 positions and the head at 1,024, for K = 3 rows, and the attention
    weights, attention = 1.41e9 * 1345 + 2048 * 131_072 * 1024, 28 * 2 * 1345**2 * 2048
    assert float(output.split()[1]) == pytest.approx(3 * 2 * (weights + attention) / 1e12, rel=0.01)


def test_growth_is_drawn_as_wide_as_a_page(tmp_path, module):
    curves = {"seconds": [1.0, 2.1], "extra_mib": [30.0, 30.0]}
    stages = {"rollout": curves, "update": curves}
    results = {
        "tokens": {"values": [64, 256], "stages": stages},
        "num_train_timesteps": {"values": [1, 2], "stages": {"update": curves}},
    }
    module["save_growth"](tmp_path / "growth.png", results)
    with Image.open(tmp_path / "growth.png") as image:
        assert image.width == 2 * 830


def test_the_program_writes_what_it_measured(tmp_path, run_program):
    arguments = ["--size", "tiny", "--batch_size", "2", "--output_dir", str(tmp_path)]
    arguments += ["--stages", "update", "--skip_naive", "--num_threads", "1", "--num_repeats", "1"]
    output = run_program(*arguments)
    results = json.loads((tmp_path / "stages_tiny_full.json").read_text())["results"]["update"]
    result, limit = results["ours"], results["limit"]
    assert 0 < result["seconds"] < 60 and result["extra_mib"] > 0 and 0 < result["mfu"] < 1
    assert math.isclose(result["mfu"], result["flops"] / result["seconds"] / result["rate"])
    cells = [f"{results[name]['seconds'] / 2:.3f}" for name in ("limit", "ours")]
    ratio = f"{result['seconds'] / limit['seconds']:.2f}"
    assert f"| update | {cells[0]} | {cells[1]} |  | {ratio} | {limit['extra_mib']:.0f} |" in output
