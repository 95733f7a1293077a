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
Writes a checkpoint of URSA's shapes with random weights, to measure with where there is no published one.

    python scripts/make_random_checkpoint.py --size ursa-1.7b-ibq512 --layout original --output_dir random-ursa

The files have the layout, the sizes and the dtypes of the published ones: bfloat16 weights in shards, a byte-level
tokenizer with as many tokens, and a codebook in float32. What such a model draws is noise.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast
from transformers.utils import logging

from trl_udm import AutoencoderVQ, KineticOptimalScheduler, URSAConfig, URSAPipeline
from trl_udm.pipelines.ursa_sizes import PUBLISHED_SIZES, URSASize


SIZES = {
    "tiny": URSASize(64, 128, 2, 2, 1, 128, 256, 16, 4, (32, 32, 64), codebook_dim=8, text_vocab_size=320),
    **{
        name.split("/")[1].lower(): size for name, size in PUBLISHED_SIZES.items() if "BAAI/" in name and "IBQ" in name
    },
}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>")


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with `vocab_size` tokens: bytes, then pairs of bytes, then pairs of those and bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = itertools.product(letters, letters)
    merges = list(itertools.islice(pairs, vocab_size - len(letters) - len(SPECIAL_TOKENS)))
    words = itertools.product(map("".join, itertools.product(letters, letters)), letters)
    merges += itertools.islice(words, vocab_size - len(letters) - len(SPECIAL_TOKENS) - len(merges))
    vocab = {token: i for i, token in enumerate([*letters, *map("".join, merges)])}
    backend = Tokenizer(BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=SPECIAL_TOKENS[0], eos_token=SPECIAL_TOKENS[2])


def original_configs(size: URSASize) -> dict[str, dict]:
    """The configurations of a size as the original repositories write them."""
    transformer = {
        "_class_name": "URSATransformer3DModel",
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_key_value_heads,
        "rope_theta": 1_000_000,
        "lm_vocab_size": size.text_vocab_size,
        "lm_head_size": size.codebook_size,
        "vocab_size": size.text_vocab_size + size.codebook_size,
        "bov_token_id": size.text_vocab_size - 1,
    }
    vae = {
        "_class_name": "AutoencoderVQ",
        "_quantizer_name": "VQuantizer",
        "block_out_channels": list(size.block_out_channels),
        "layers_per_block": 2,
        "latent_channels": size.codebook_dim,
        "vq_embed_dim": size.codebook_dim,
        "num_vq_embeddings": size.codebook_size,
        "norm_num_groups": 32,
        "sample_size": size.side * 2 ** (len(size.block_out_channels) - 1),
    }
    scheduler = {"_class_name": "KineticOptimalScheduler", "alpha": 0.9, "c": 3, "shift": 2.0, "eps": 1e-5}
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler}


def write_original(
    folder: Path, pipeline: URSAPipeline, codes: torch.Tensor, configs: dict[str, dict], max_shard_size: str
) -> None:
    """Writes a pipeline, with its codes before normalization, in the layout of the original repositories."""
    modules = {
        "transformer": ("diffnext.models.transformers.transformer_ursa", "URSATransformer3DModel", "config.json"),
        "vae": ("diffnext.models.autoencoders.autoencoder_vq", "AutoencoderVQ", "config.json"),
        "scheduler": ("diffnext.schedulers.scheduling_dfm", "KineticOptimalScheduler", "scheduler_config.json"),
    }
    index = {name: [module, class_name] for name, (module, class_name, _) in modules.items()}
    index |= {"_class_name": "URSAPipeline", "tokenizer": ["transformers", "Qwen2TokenizerFast"]}
    for name, (_, _, config_name) in modules.items():
        (folder / name).mkdir(parents=True)
        (folder / name / config_name).write_text(json.dumps(configs[name], indent=2))
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    torch.save({"path.emb": codes}, folder / "scheduler" / "scheduler_model.pth")
    vae = {name.replace("quantize.", "quantizer."): tensor for name, tensor in pipeline.vae.state_dict().items()}
    for name, state_dict in {"transformer": pipeline.transformer.state_dict(), "vae": vae}.items():
        save_torch_state_dict(
            state_dict,
            folder / name,
            filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="ursa-1.7b-ibq512")
    parser.add_argument("--layout", choices=["original", "ours"], default="ours")
    parser.add_argument("--output_dir", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--max_shard_size", default="2GB")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output_dir.exists():
        parser.error(f"`--output_dir` must not exist yet, got {args.output_dir}.")
    logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    size = SIZES[args.size]
    configs = original_configs(size)
    # In its dtype from the start, which halves the memory
    config = URSAConfig.from_original_config(configs["transformer"])
    transformer = AutoModelForMaskedLM.from_config(config, dtype=torch.bfloat16)
    vae = AutoencoderVQ.from_original_config(configs["vae"])
    scheduler = KineticOptimalScheduler.from_config(configs["scheduler"])
    codes = torch.nn.init.normal_(vae.codebook.detach()).clone()
    scheduler.set_codebook(codes)
    torch.nn.Module.to(vae, torch.bfloat16)  # that of diffusers warns of a cast
    tokenizer = build_tokenizer(size.text_vocab_size)
    pipeline = URSAPipeline(transformer, scheduler, tokenizer, vae, max_prompt_length=size.num_text_tokens)
    if args.layout == "original":
        write_original(args.output_dir, pipeline, codes, configs, args.max_shard_size)
    else:
        pipeline.save_pretrained(args.output_dir, max_shard_size=args.max_shard_size)
    num_bytes = sum(path.stat().st_size for path in args.output_dir.rglob("*") if path.is_file())
    print(f"{args.output_dir}: {transformer.num_parameters():,} weights of the network, {num_bytes / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
