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

import importlib
import resource
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from trl.kernels import chunked_logprob
from trl.trainer import utils

from trl_udm import (
    AutoencoderVQ,
    KineticOptimalScheduler,
    TextUDMPipeline,
    UDMGRPOConfig,
    UDMGRPOTrainer,
    URSAConfig,
    URSAForImageGeneration,
    URSAPipeline,
    estimate_memory,
    memory,
)
from trl_udm.pipelines.ursa_sizes import PUBLISHED_SIZES
from trl_udm.worlds import shapes, sums

from .pipelines import tiny_diffusion_gemma
from .trainer.toy_text_family import build_toy_text_pipeline


@pytest.fixture(scope="module")
def tokenizer():
    return URSAPipeline.from_configs(shapes.CHECKPOINT_PATH).tokenizer


def build_pipeline(tokenizer, num_layers=2, device="cpu", codebook_size=600, **config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "text_vocab_size": 40, "bov_token_id": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": num_layers}
    with torch.device(device):
        transformer = URSAForImageGeneration(URSAConfig(codebook_size=codebook_size, **{**sizes, **config}))
        vae = AutoencoderVQ(
            block_out_channels=(32, 32),
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=8,
            vq_embed_dim=8,
            num_vq_embeddings=codebook_size,
            sample_size=16,
        )
    scheduler = KineticOptimalScheduler(codebook_size=codebook_size, codebook_dim=8)
    if device == "cpu":
        scheduler.set_codebook(torch.randn(codebook_size, 8))
    return URSAPipeline(transformer, scheduler, tokenizer, vae, max_prompt_length=24)


def build_config(tmp_path, **kwargs):
    settings = {"num_generations": 2, "per_device_train_batch_size": 6, "activation_checkpointing": False}
    return UDMGRPOConfig(
        str(tmp_path),
        **{**settings, "bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True, **kwargs},
    )


def build_adapter():
    return LoraConfig(r=4, target_modules="all-linear")


@pytest.fixture(scope="module")
def benchmark():
    """What measures, on one thread: some kernels allocate a buffer for each thread, which the estimate leaves out."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
        yield importlib.import_module("memory_estimate")
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize(
    ("num_layers", "lora", "settings"),
    [
        (2, False, {}),
        (3, False, {"per_device_train_batch_size": 12}),
        (2, True, {}),
        (3, True, {"activation_checkpointing": True, "beta": 0.0}),
        (2, False, {"bf16": True}),
        (2, False, {"gradient_accumulation_steps": 2}),
        (2, False, {"ema_decay": 0.9}),
        (2, False, {"kl_estimator": "full"}),
        (2, True, {"kl_estimator": "full", "activation_checkpointing": True}),
    ],
)
def test_the_update_is_what_the_allocator_hands_out(benchmark, tmp_path, tokenizer, num_layers, lora, settings):
    """Of the real trainer's loss, backward pass and optimizer step, in several shapes and dtypes, within 2 %."""
    args = build_config(tmp_path, **settings)
    peft_config = build_adapter() if lora else None
    estimate = estimate_memory(build_pipeline(tokenizer, num_layers), args, peft_config, device="cpu")
    trainer = UDMGRPOTrainer(
        build_pipeline(tokenizer, num_layers),
        lambda prompts, **kwargs: [0.0] * len(prompts),
        args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        peft_config=peft_config,
    )
    trainer.model.train()
    if args.activation_checkpointing:
        trainer.model.activation_checkpointing_enable()
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    trainer.create_optimizer()
    num_rows, num_tokens = args.per_device_train_batch_size, 64
    rows = {
        "prompt_ids": torch.zeros(num_rows, 24 + num_tokens, dtype=torch.long),
        "prompt_mask": torch.ones(num_rows, 24 + num_tokens),
        "completion_ids": torch.zeros(num_rows, num_tokens, dtype=torch.long),
        "completion_mask": torch.ones(num_rows, num_tokens, dtype=torch.long),
        "advantages": torch.ones(num_rows),
        "ref_per_token_logps": torch.zeros(num_rows, 1),
    }

    def update():
        for _ in range(args.gradient_accumulation_steps):
            trainer.compute_loss(trainer.model, rows).backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    # The first call makes the optimizer's states, the second needs as much beside them
    measured = benchmark.peak_allocated(lambda: [update(), update()])
    estimated = estimate.stages["update"] - estimate.resident + estimate.optimizer_states
    assert estimated == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("lora", [False, True])
def test_rollout_and_decoding_are_what_the_allocator_hands_out(benchmark, tmp_path, tokenizer, lora):
    peft_config = build_adapter() if lora else None
    args = build_config(tmp_path, rollout_batch_size=2)
    estimate = estimate_memory(build_pipeline(tokenizer), args, peft_config, device="cpu")
    pipeline = build_pipeline(tokenizer)
    trainer = UDMGRPOTrainer(
        pipeline,
        lambda prompts, **kwargs: [0.0] * len(prompts),
        args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        peft_config=peft_config,
    )
    assert trainer.merge_adapter == lora
    estimated = max(estimate.stages["rollout"], estimate.stages["decode"]) - estimate.resident
    assert estimated == pytest.approx(
        benchmark.peak_allocated(lambda: trainer._rollout(["a", "a"], "train")), rel=0.05
    )
    ids = torch.zeros(2, 64, dtype=torch.long)
    if not lora:  # while an adapter is merged, there is a copy of the weights
        measured = benchmark.peak_allocated(lambda: pipeline.decode(ids, (1, 8, 8), output_type="pt"))
        assert estimate.stages["decode"] - estimate.resident == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("bf16", "lora"), [(False, False), (True, False), (True, True)])
def test_a_rollout_in_chunks_is_what_the_allocator_hands_out(benchmark, tmp_path, tokenizer, bf16, lora):
    """Where logits are most of it, and the scheduler's steps take four chunks of 32 tokens."""

    def build():
        pipeline = build_pipeline(tokenizer, codebook_size=8192)
        pipeline.scheduler.max_chunk_elements = 32 * 8192
        return pipeline

    args, peft_config = build_config(tmp_path, rollout_batch_size=2, bf16=bf16), build_adapter() if lora else None
    estimate = estimate_memory(build(), args, peft_config, device="cpu")
    trainer = UDMGRPOTrainer(
        build(),
        lambda prompts, **kwargs: [0.0] * len(prompts),
        args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        peft_config=peft_config,
    )
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)  # as `train` does
    measured = benchmark.peak_allocated(lambda: trainer._rollout(["a", "a"], "train"))
    assert estimate.stages["rollout"] - estimate.resident == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("lora", "settings"),
    [
        (False, {}),
        (True, {}),
        (False, {"bf16": True}),
        (True, {"bf16": True, "activation_checkpointing": True}),
        (False, {"bf16": True, "cast_lm_head_to_fp32": True}),
    ],
)
def test_the_head_on_a_gpu_takes_what_that_of_trl_takes(monkeypatch, tmp_path, tokenizer, lora, settings):
    """TRL's own code, with kernels that change a tile in place, and tiles small enough for several."""
    assert memory.CODE_CHUNK_SIZE == utils._CHUNKED_LOGPROB_CHUNK_SIZE
    monkeypatch.setattr(memory, "CODE_CHUNK_SIZE", 256)
    monkeypatch.setattr(memory, "TOKEN_CHUNK_SIZE", 128)
    monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 256)
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 128)
    monkeypatch.setattr(
        utils, "_use_triton", lambda device: True
    )  # asks only whether tokens without a label are left out
    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
        monkeypatch.setattr(chunked_logprob, name, lambda *args, **kwargs: None)
    # On a CPU, URSA takes TRL's head for so small a codebook
    pipeline, args = build_pipeline(tokenizer, codebook_size=500), build_config(tmp_path, **settings)
    gpu, trl = (
        estimate_memory(pipeline, args, build_adapter() if lora else None, device=name) for name in ("cuda", "cpu")
    )
    for stage in ("scoring", "update"):
        assert gpu.stages[stage] - gpu.resident == pytest.approx(trl.stages[stage] - trl.resident, rel=0.01)


def test_an_average_of_the_weights_is_held_throughout(tmp_path, tokenizer):
    pipeline = build_pipeline(tokenizer)
    without, with_average = (
        estimate_memory(pipeline, build_config(tmp_path, ema_decay=decay)) for decay in (None, 0.99)
    )
    assert without.ema_weights == 0 and with_average.ema_weights == with_average.trained_weights
    assert with_average.resident - without.resident == with_average.ema_weights
    assert with_average.stages["rollout"] - without.stages["rollout"] == with_average.ema_weights


@pytest.mark.parametrize("lora", [False, True])
def test_weights_gradients_and_states_are_exact(tmp_path, tokenizer, lora):
    pipeline = build_pipeline(tokenizer)
    codebook = pipeline.scheduler.codebook.nbytes
    weights = sum(parameter.nbytes for parameter in pipeline.transformer.parameters())
    others = codebook + sum(tensor.nbytes for tensor in pipeline.transformer.buffers())
    others += sum(tensor.nbytes for tensor in [*pipeline.vae.parameters(), *pipeline.vae.buffers()])
    estimate = estimate_memory(pipeline, build_config(tmp_path), build_adapter() if lora else None)
    if lora:
        # r x (inputs + outputs) of each linear layer, in float32
        linears = [module for module in pipeline.transformer.model.modules() if isinstance(module, torch.nn.Linear)]
        trained = sum(4 * 4 * (linear.in_features + linear.out_features) for linear in linears)
        assert estimate.frozen_weights == weights + others
        assert estimate.reference_weights == 0
    else:
        trained = weights
        assert estimate.reference_weights == weights
    num_trained = 2 * len(linears) if lora else len(list(pipeline.transformer.parameters()))
    assert estimate.trained_weights == estimate.gradients == trained
    assert estimate.optimizer_states == 2 * trained + 4 * num_trained  # a step's number for each
    assert estimate.peak == max(estimate.stages.values()) > estimate.resident
    assert type(pipeline.transformer.lm_head.weight.data) is torch.Tensor  # the pipeline is as it was
    assert isinstance(pipeline.scheduler, KineticOptimalScheduler)


@pytest.mark.parametrize("way", ["loaded", "a PeftModel", "named"])
def test_an_adapter_that_is_trained_further_is_held_twice(tmp_path, tokenizer, way):
    """Its first weights are the reference. Else it takes what a new one takes, and the pipeline is as it was."""
    pipeline = build_pipeline(tokenizer)
    new = estimate_memory(pipeline, build_config(tmp_path), build_adapter())
    get_peft_model(build_pipeline(tokenizer).transformer, build_adapter()).save_pretrained(tmp_path)
    if way == "loaded":
        pipeline.load_lora_weights(tmp_path)
    elif way == "a PeftModel":
        pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, tmp_path)
    before = [(name, weight.requires_grad) for name, weight in pipeline.transformer.named_parameters()]
    args = build_config(tmp_path, adapter=str(tmp_path) if way == "named" else None)
    further = estimate_memory(pipeline, args)
    assert further.trained_weights == further.reference_weights == new.trained_weights
    assert (further.frozen_weights, further.optimizer_states) == (new.frozen_weights, new.optimizer_states)
    assert further.peak == pytest.approx(new.peak + further.reference_weights, rel=0.01)
    assert [(name, weight.requires_grad) for name, weight in pipeline.transformer.named_parameters()] == before
    assert estimate_memory(pipeline, build_config(tmp_path, beta=0.0, adapter=args.adapter)).reference_weights == 0
    with pytest.raises(ValueError, match="has adapters already|`adapter` must be None with a `peft_config`"):
        estimate_memory(pipeline, args, build_adapter())


def test_nothing_is_scored_without_need(tmp_path, tokenizer):
    args = build_config(tmp_path, beta=0.0, gradient_accumulation_steps=2)
    estimate = estimate_memory(build_pipeline(tokenizer), args)
    assert estimate.stages["scoring"] == pytest.approx(estimate.resident, rel=0.01)


def test_it_grows_and_shrinks_as_it_must(tmp_path, tokenizer):
    def stages(num_layers=2, lora=False, **settings):
        pipeline = build_pipeline(tokenizer, num_layers, device="meta", hidden_size=64, intermediate_size=256)
        return estimate_memory(pipeline, build_config(tmp_path, **settings), build_adapter() if lora else None).stages

    # Each layer, and each row, takes as much as another
    shallow, base, deep = (stages(num_layers)["update"] for num_layers in (1, 2, 3))
    assert deep - base == pytest.approx(base - shallow, rel=0.01) and shallow < base
    rows = [stages(per_device_train_batch_size=size, generation_batch_size=36)["update"] for size in (6, 12, 18)]
    assert rows[2] - rows[1] == pytest.approx(rows[1] - rows[0], rel=0.01) and rows[0] < rows[1]
    every_2 = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}}
    assert stages(activation_checkpointing=True)["update"] < stages(**every_2)["update"] < base
    assert stages(lora=True)["update"] < stages(beta=0.0)["update"] < base
    rollouts = [stages(**settings)["rollout"] for settings in ({"rollout_batch_size": 1}, {}, {"guidance_scale": 7.0})]
    assert rollouts[0] < rollouts[1] < rollouts[2]


def test_the_real_size_needs_no_memory_of_its_weights(tmp_path):
    """URSA-1.7B has 8.4 GiB of them; and the process may not grow by half a GiB."""
    pipeline = PUBLISHED_SIZES["BAAI/URSA-1.7B-IBQ512"].build_pipeline()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    estimate = estimate_memory(pipeline, build_config(tmp_path, bf16=True))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024
    assert estimate.trained_weights == 4 * 2_256_899_072
    assert all(parameter.is_meta for parameter in pipeline.transformer.parameters())


@pytest.mark.parametrize(
    ("name", "hidden_size", "intermediate_size", "num_body", "num_all", "grid"),
    [
        # `num_body` is what the card of Qwen3 says without embeddings. 0.86B is what papers say of URSA-0.6B
        ("BAAI/URSA-0.6B-IBQ1024", 1024, 3072, "0.44", "0.86", (64, 64)),
        ("BAAI/URSA-1.7B-IBQ512", 2048, 6144, "1.41", "2.26", (32, 32)),
        ("BAAI/URSA-1.7B-IBQ1024", 2048, 6144, "1.41", "2.26", (64, 64)),
        ("BAAI/URSA-0.6B-FSQ320", 1024, 3072, "0.44", "0.73", (40, 64)),
        ("BAAI/URSA-1.7B-FSQ320", 2048, 6144, "1.41", "1.98", (40, 64)),
        ("Yovecents/URSA-1.7B-IBQ512-UDMGRPO-GenEval", 2048, 6144, "1.41", "2.26", (32, 32)),
        ("Yovecents/URSA-1.7B-IBQ512-UDMGRPO-PickScore", 2048, 6144, "1.41", "2.26", (32, 32)),
    ],
)
def test_a_published_model_has_its_number_of_weights(name, hidden_size, intermediate_size, num_body, num_all, grid):
    pipeline = PUBLISHED_SIZES[name].build_pipeline(torch.bfloat16)
    # Queries and outputs of 16 heads, keys and values of 8, all of 128 channels; an MLP of three matrices; norms
    layer = hidden_size * (2 * 16 + 2 * 8) * 128 + 3 * hidden_size * intermediate_size + 2 * hidden_size + 2 * 128
    body = 28 * layer + hidden_size
    num_codes = 64_000 if "FSQ" in name else 131_072
    weights = body + hidden_size * (151_669 + 2 * num_codes)  # embeddings of text tokens and codes, and the head
    assert (f"{body / 1e9:.2f}", f"{weights / 1e9:.2f}") == (num_body, num_all)
    assert pipeline.transformer.num_parameters() == weights and pipeline.transformer.dtype == torch.bfloat16
    assert pipeline.latent_shape() == (1, *grid)
    if "FSQ" in name:
        assert pipeline.latent_shape(num_frames=49) == (13, *grid)
    assert pipeline.encode_prompt(["a ring"])[0].shape == (1, 320)
    assert pipeline.scheduler.config.codebook_size == pipeline.vae.config.num_vq_embeddings == num_codes


@pytest.mark.parametrize("family", ["toy", "arithmetic"])
def test_families_of_text(tmp_path, family):
    pipeline = build_toy_text_pipeline()
    if family == "arithmetic":
        pipeline = TextUDMPipeline.from_pretrained(sums.CHECKPOINT_PATH)
    args = build_config(tmp_path)
    short, long = (estimate_memory(pipeline, args, prompt=prompt) for prompt in ("a", "1+1=" * 4))
    assert short.stages["update"] < long.stages["update"]
    assert short.trained_weights == sum(parameter.nbytes for parameter in pipeline.transformer.parameters())


def test_a_family_that_scores_from_logits_does_so_on_a_gpu_too(tmp_path):
    pipeline, args = TextUDMPipeline.from_pretrained(sums.CHECKPOINT_PATH), build_config(tmp_path)
    gpu, cpu = (estimate_memory(pipeline, args, device=device) for device in ("cuda", "cpu"))
    assert gpu == cpu


def test_an_unknown_device_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="`device` must be 'cuda' or 'cpu', got 'tpu'."):
        estimate_memory(build_pipeline(tokenizer, device="meta"), build_config(tmp_path), device="tpu")


def test_a_sampler_of_its_own_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="`pipeline` must sample as `UDMPipeline` does, got DiffusionGemmaUDMPipeline"
    ):
        estimate_memory(tiny_diffusion_gemma.build_pipeline(), build_config(tmp_path))


def test_the_benchmark_compares_with_what_a_stage_takes(benchmark, tmp_path, monkeypatch, capsys):
    """The program's own options, in its own processes."""
    options = [
        "--size",
        "tiny",
        "--batch_size",
        "2",
        "--stages",
        "scoring",
        "--num_repeats",
        "1",
        "--num_threads",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["memory_estimate.py", *options, "--output_dir", str(tmp_path)])
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "")  # which the program sets
    benchmark.main()
    cells = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert cells[0] == "| scoring" and float(cells[3]) == pytest.approx(1, abs=0.05)
