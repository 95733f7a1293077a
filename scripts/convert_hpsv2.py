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
Converts HPS v2 or v2.1 from its authors' open_clip file to a folder that `HPSv2Reward` loads.

    hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir .
    python scripts/convert_hpsv2.py HPS_v2.1_compressed.pt hpsv2.1

HPS v2 is a fine-tuned `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`. The configuration, the tokenizer and the image
processor are those of that model. No code in the file is executed.
"""

import argparse
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer


# From prefixes of names in open_clip to those in transformers.
PREFIXES = {
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
}

# The same for parts of a block.
BLOCK_PARTS = {
    ".ln_1.": ".layer_norm1.",
    ".attn.": ".self_attn.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def convert_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Renames the weights of open_clip's `CLIP` to those of transformers' `CLIPModel`.

    open_clip has one matrix for the query, key and value projections of an attention; transformers has three.
    open_clip multiplies by the last projection of each tower from the right; transformers has a linear layer, whose
    weight is the transpose. Unknown names stay as they are.
    """
    converted = {}
    for name, tensor in state_dict.items():
        for old, new in PREFIXES.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        for old, new in BLOCK_PARTS.items():
            name = name.replace(old, new)

        if ".in_proj_" in name:
            for projection, part in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                converted[name.replace("in_proj_", f"{projection}.")] = part
        elif name in ("visual_projection.weight", "text_projection.weight"):
            converted[name] = tensor.T
        else:
            converted[name] = tensor
    return converted


def convert(checkpoint: Path, output_dir: Path, base_model: str) -> None:
    """
    Converts a file.

    Args:
        checkpoint (`Path`):
            The authors' file: a dict with the weights under `"state_dict"`.
        output_dir (`Path`):
            The folder to write.
        base_model (`str`):
            The model of transformers that was fine-tuned.

    Raises:
        UnpicklingError: If the file holds code to run.
        ValueError: If its weights are not under `"state_dict"`, or do not fit the architecture of `base_model`.
    """
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if "state_dict" not in content:
        raise ValueError(f"{checkpoint} must have its weights under 'state_dict', got {sorted(content)[:10]}.")

    model = CLIPModel(CLIPConfig.from_pretrained(base_model))
    state_dict = convert_state_dict(content["state_dict"])
    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - state_dict.keys()), sorted(state_dict.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(f"{checkpoint} misses {missing or 'nothing'} and has unexpected {unexpected or 'none'}.")
    model.load_state_dict(state_dict)

    model.save_pretrained(output_dir)
    CLIPTokenizer.from_pretrained(base_model).save_pretrained(output_dir)
    CLIPImageProcessorPil.from_pretrained(base_model).save_pretrained(output_dir)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Converts HPS v2 from open_clip to transformers.")
    parser.add_argument("checkpoint", type=Path, help="The authors' file, as HPS_v2.1_compressed.pt.")
    parser.add_argument("output_dir", type=Path, help="The folder to write.")
    parser.add_argument(
        "--base_model",
        default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        help="The model of transformers that was fine-tuned: a Hub repository or a folder.",
    )
    arguments = parser.parse_args(args)
    convert(arguments.checkpoint, arguments.output_dir, arguments.base_model)
    print(f"Wrote {arguments.output_dir}.")


if __name__ == "__main__":
    main()
