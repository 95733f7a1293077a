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

"""
The memory that DiffusionGemma-26B-A4B needs to train a LoRA, for docs/diffusion_gemma.md.

    python benchmarks/diffusion_gemma_memory.py

Nothing is run at the real size. Weights and adapter are counted on PyTorch's "meta" device. What a rollout holds for
each logit is measured on a small network, as the bytes that PyTorch's CPU allocator hands out. All else is arithmetic,
which a comment explains. Sizes are those of the published configuration, as public copies of it have them.
"""

import math

import torch
from memory_estimate import peak_allocated
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
    Gemma4VisionConfig,
    PreTrainedTokenizerFast,
)

from trl_udm import DiffusionGemmaUDMPipeline, UniformDDIMScheduler
from trl_udm.pipelines.pipeline_diffusion_gemma import LORA_TARGET_MODULES, UNQUANTIZED_MODULES


PUBLISHED_TEXT = {
    "vocab_size": 262_144,
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "moe_intermediate_size": 704,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 2,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_experts": 128,
    "top_k_experts": 8,
    "sliding_window": 1024,
}
PUBLISHED_VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "standardize": True,
}
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
SMALL |= {"num_key_value_heads": 2}
BITS_16, NF4, NF4_DOUBLE = 2.0, 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a number: in bfloat16, and in 4 bits with a float32 scale, or one of 8 bits, for each 64 numbers."""
CANVAS_LENGTH, NUM_CANVASES, NUM_PROMPT_TOKENS = 256, 2, 256
GIB = 2**30


def build_model(text: dict[str, int], vision: dict[str, int], canvas_length: int) -> DiffusionGemmaForBlockDiffusion:
    config = DiffusionGemmaConfig(
        text_config=DiffusionGemmaTextConfig(**text),
        vision_config=Gemma4VisionConfig(**vision),
        canvas_length=canvas_length,
    )
    return DiffusionGemmaForBlockDiffusion(config).to(torch.bfloat16)


def count_weights(model: DiffusionGemmaForBlockDiffusion) -> dict[str, int]:
    """Numbers of the weights, by how they may be quantized."""
    tied = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
    counts = dict.fromkeys(("experts", "attention and dense layers", "linear layers that are not tied", "others"), 0)
    modules = dict(model.named_modules())
    for name, weight in model.named_parameters():
        owner = name.rpartition(".")[0]
        is_linear = isinstance(modules[owner], nn.Linear)
        if ".experts." in name:
            kind = "experts"
        elif is_linear and not any(skipped in name for skipped in UNQUANTIZED_MODULES):
            kind = "attention and dense layers"
        else:
            kind = "linear layers that are not tied" if is_linear and owner not in tied else "others"
        counts[kind] += weight.numel()
    return counts


def measure_bytes_per_logit(vocab_size: int = 16_384, batch_size: int = 2, canvas_length: int = 64) -> float:
    """The peak of a rollout of a network in which the logits are all that is large."""
    model = build_model({**SMALL, "vocab_size": vocab_size, "global_head_dim": 16, "num_experts": 2,
                         "top_k_experts": 1, "moe_intermediate_size": 16}, SMALL, canvas_length).eval()  # fmt: skip
    backend = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    pipeline = DiffusionGemmaUDMPipeline(model, UniformDDIMScheduler(vocab_size), tokenizer)
    prompt_ids = torch.ones(batch_size, 4, dtype=torch.long)
    peak = peak_allocated(
        lambda: pipeline.sample_tokens(prompt_ids, torch.ones_like(prompt_ids), (NUM_CANVASES, canvas_length), 3)
    )
    return peak / (batch_size * canvas_length * vocab_size)


def main() -> None:
    with torch.device("meta"):
        model = build_model(PUBLISHED_TEXT, PUBLISHED_VISION, CANVAS_LENGTH)
    model.tie_weights()
    counts = count_weights(model)
    total = sum(counts.values())
    print("| weights | billions |\n|---|---|")
    for kind, count in counts.items():
        print(f"| {kind} | {count / 1e9:.2f} |")
    experts, dense, untied, _ = counts.values()
    weights = {
        "bfloat16": BITS_16 * total,
        "4 bits, by transformers alone": BITS_16 * (total - untied) + NF4 * untied,
        "4 bits, without experts": BITS_16 * (total - dense) + NF4 * dense,
        "4 bits": BITS_16 * (total - dense - experts) + NF4 * (dense + experts),
        "4 bits, double quantization": BITS_16 * (total - dense - experts) + NF4_DOUBLE * (dense + experts),
    }

    adapter = get_peft_model(model, LoraConfig(r=16, target_modules=LORA_TARGET_MODULES))
    num_trained = sum(weight.numel() for weight in adapter.parameters() if weight.requires_grad)
    states = 4 * 4 * num_trained  # float32: weights, gradients, and two moments of AdamW
    config = model.config.get_text_config()
    # Keys and values of a token in bfloat16
    cache = sum(
        2 * 2 * layer.num_key_value_heads * layer.head_dim
        for layer in (config.per_layer_config[kind] for kind in config.layer_types)
    )
    # The experts of one layer, of which the rollout and the recomputation hold one at a time in bfloat16
    layer_of_experts = BITS_16 * experts / config.num_hidden_layers
    num_tokens = NUM_PROMPT_TOKENS + NUM_CANVASES * CANVAS_LENGTH
    bytes_per_logit = measure_bytes_per_logit()
    # Inputs of checkpointed layers for the canvases of a row, keys and values of their contexts, the layer that is
    # computed again (some ten tensors like the inputs of each token's experts), and a tile of the head
    canvas_tokens = NUM_CANVASES * CANVAS_LENGTH
    hidden_states = canvas_tokens * config.hidden_size * BITS_16
    update = config.num_hidden_layers * hidden_states + NUM_CANVASES * num_tokens * cache
    update += 10 * config.top_k_experts * hidden_states + 4 * 4096 * 32_768
    print(f"\nThe adapter has {num_trained / 1e6:.1f} million numbers.")
    print(f"A rollout takes {bytes_per_logit:.1f} bytes for each logit.")
    print("\n| weights | weights, GiB | adapter | rollout of 8 | of 32 | update of a row | peak, of 8 | of 32 |")
    print("|---|---|---|---|---|---|---|---|")
    for name, size in weights.items():
        extra = layer_of_experts if name.startswith("4 bits") and "experts" not in name and "alone" not in name else 0
        rollouts = [
            batch_size * (CANVAS_LENGTH * config.vocab_size * bytes_per_logit + num_tokens * cache) + extra
            for batch_size in (8, 32)
        ]
        peaks = [size + states + max(rollout, update + extra) for rollout in rollouts]
        cells = [size, states, *rollouts, update + extra, *peaks]
        print(f"| {name} | " + " | ".join(f"{cell / GIB:.1f}" for cell in cells) + " |")
    assert math.isclose(total, 25.8e9, rel_tol=0.01)  # as the name says


if __name__ == "__main__":
    main()
