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

"""Loading of FUDOKI's original layout, that of Janus before it was in transformers, and of its released adapters."""

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from peft.utils import CONFIG_NAME
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.janus import JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, JanusVQVAE

from ..models.modeling_fudoki import FUDOKIForImageGeneration
from ..schedulers.scheduling_kinetic_optimal import KineticOptimalScheduler
from ..weights import check_state_dict, find_file, load_embedding, load_state_dict, read_shapes
from .lora import PREFIX, Adapter, read_adapter
from .original_checkpoint import find_folder, is_original_fudoki, load_json
from .pipeline_udm import HUB_KWARGS, UDMPipeline


_WEIGHTS_NAME = "model"
_RENAMES = {
    "transformer": {
        r"language_model\.model\.": "model.language_model.",
        r"gen_embed\.": "model.generation_embeddings.",
        r"gen_aligner\.layers\.0\.": "model.generation_aligner.fc1.",
        r"gen_aligner\.layers\.2\.": "model.generation_aligner.hidden_layers.0.",
        r"gen_head\.output_mlp_projector\.": "model.generation_head.proj_out.",
        r"gen_head\.vision_head\.": "model.generation_head.vision_head.",
    },
    "vae": {
        r"gen_vision_model\.(encoder|decoder)\.(conv_in|norm_out|conv_out)\.": r"\1.\2.",
        r"gen_vision_model\.(encoder|decoder)\.mid\.0\.": r"\1.mid.block_1.",
        r"gen_vision_model\.(encoder|decoder)\.mid\.1\.": r"\1.mid.attn_1.",
        r"gen_vision_model\.(encoder|decoder)\.mid\.2\.": r"\1.mid.block_2.",
        r"gen_vision_model\.encoder\.conv_blocks\.(\d+)\.res\.": r"encoder.down.\1.block.",
        r"gen_vision_model\.encoder\.conv_blocks\.(\d+)\.(attn|downsample)\.": r"encoder.down.\1.\2.",
        r"gen_vision_model\.decoder\.conv_blocks\.(\d+)\.res\.": r"decoder.up.\1.block.",
        r"gen_vision_model\.decoder\.conv_blocks\.(\d+)\.(attn|upsample)\.": r"decoder.up.\1.\2.",
        r"gen_vision_model\.(quant_conv|post_quant_conv|quantize\.embedding)\.": r"\1.",
    },
    "reader": {
        r"language_model\.lm_head\.": "lm_head.",
        r"aligner\.layers\.0\.": "model.aligner.fc1.",
        r"aligner\.layers\.2\.": "model.aligner.hidden_layers.0.",
        r"vision_model\.vision_tower\.pos_embed$": "model.vision_model.embeddings.position_embedding.weight",
        r"vision_model\.vision_tower\.patch_embed\.proj\.": "model.vision_model.embeddings.patch_embedding.",
        r"vision_model\.vision_tower\.norm\.": "model.vision_model.post_layernorm.",
        r"vision_model\.vision_tower\.blocks\.(\d+)\.mlp\.": r"model.vision_model.encoder.layers.\1.mlp.",
        r"vision_model\.vision_tower\.blocks\.(\d+)\.norm(\d)\.": (
            r"model.vision_model.encoder.layers.\1.layer_norm\2."
        ),
        r"vision_model\.vision_tower\.blocks\.(\d+)\.attn\.proj\.": (
            r"model.vision_model.encoder.layers.\1.self_attn.projection_layer."
        ),
        r"vision_model\.vision_tower\.blocks\.(\d+)\.attn\.qkv\.": (
            r"model.vision_model.encoder.layers.\1.self_attn.{}_proj."
        ),
    },
}
"""Names of weights in the original layout, by component, and here. The reader is what only reading images needs."""

_ADAPTED_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""In the order of the original's parameters, and so of the tensors in `ema_state.pt`."""


def rename_weights(weights: Mapping[str, Any], component: str) -> dict[str, Any]:
    """
    Selects the weights of one component, under the names that they have here.

    Args:
        weights (`Mapping[str, Any]`):
            Original weights, or their shapes, by name.
        component (`str`):
            `"transformer"`, `"vae"` or `"reader"`.

    Returns:
        `dict[str, Any]`: Those of the component.
    """
    renamed = {}
    for name, weight in weights.items():
        for pattern, replacement in _RENAMES[component].items():
            if re.match(pattern, name):
                renamed[re.sub(f"^{pattern}", replacement, name)] = weight
    return renamed


def convert_config(config: dict[str, Any], shapes: Mapping[str, torch.Size]) -> JanusConfig:
    """
    Converts the configuration. That of the image tokenizer is read from the shapes of its weights.

    Args:
        config (`dict[str, Any]`):
            Original `config.json`.
        shapes (`Mapping[str, torch.Size]`):
            Shapes of the original weights.

    Returns:
        [`~transformers.JanusConfig`]: The configuration of both components.

    Raises:
        ValueError: If a part is missing.
    """
    vae_shapes = rename_weights(shapes, "vae")
    try:
        blocks = [name for name in vae_shapes if re.match(r"encoder\.down\.\d+\.block\.0\.conv1\.weight", name)]
        first_level = [name for name in vae_shapes if re.match(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", name)]
        base_channels = vae_shapes["encoder.conv_in.weight"][0]
        num_embeddings, embed_dim = vae_shapes["quantize.embedding.weight"]
        hidden_size = config["language_config"]["hidden_size"]
        return JanusConfig(
            text_config={"model_type": "llama", **config["language_config"]},
            vision_config={"image_size": config["vision_config"]["params"]["image_size"]},
            vq_config={
                "embed_dim": embed_dim,
                "num_embeddings": num_embeddings,
                "latent_channels": vae_shapes["post_quant_conv.weight"][0],
                "base_channels": base_channels,
                "channel_multiplier": [vae_shapes[name][0] // base_channels for name in sorted(blocks)],
                "num_res_blocks": len(first_level),
                "projection_dim": hidden_size,
                "image_token_embed_dim": hidden_size,
            },
            tie_word_embeddings=False,
        )
    except KeyError as error:
        raise ValueError(f"The checkpoint is not one of FUDOKI: it has no {error}.") from error


def convert_reader(
    weights: Mapping[str, torch.Tensor], config: JanusConfig, num_vision_heads: int
) -> tuple[dict[str, torch.Tensor], JanusVisionConfig]:
    """
    Converts what reads images. The configuration is read from the shapes of the weights.

    Args:
        weights (`Mapping[str, torch.Tensor]`):
            Original weights, by name.
        config ([`~transformers.JanusConfig`]):
            From `convert_config`.
        num_vision_heads (`int`):
            Number of attention heads of the vision encoder.

    Returns:
        `tuple`: The weights of the reader, and the configuration of the vision encoder.

    Raises:
        ValueError: If a weight is missing from which a size is read.
    """
    reader: dict[str, torch.Tensor] = {}
    for name, weight in rename_weights(weights, "reader").items():
        # A matrix each for queries, keys and values
        parts = zip("qkv", weight.chunk(3), strict=True) if "{}" in name else [("", weight)]
        reader |= {name.format(letter): part for letter, part in parts}
    prefix = "model.vision_model."
    layers = {name.split(".")[4] for name in reader if name.startswith(f"{prefix}encoder.layers.")}
    try:
        hidden_size, _, patch_size, _ = reader[f"{prefix}embeddings.patch_embedding.weight"].shape
        mlp_size = len(reader[f"{prefix}encoder.layers.0.mlp.fc1.bias"])
        positions = f"{prefix}embeddings.position_embedding.weight"
        reader[positions] = reader[positions].flatten(0, 1)
    except KeyError as error:
        raise ValueError(f"The checkpoint cannot read images: it has no {error}.") from error
    vision_config = JanusVisionConfig(
        hidden_size=hidden_size,
        num_hidden_layers=len(layers),
        num_attention_heads=num_vision_heads,
        mlp_ratio=mlp_size / hidden_size,
        image_size=config.vision_config.image_size,
        patch_size=patch_size,
        num_image_tokens=len(reader[positions]),
        projection_dim=config.text_config.hidden_size,
    )
    return reader, vision_config


class OriginalFUDOKIMixin(UDMPipeline):
    """Loading of a pipeline and of adapters in the original layout, beside this library's own."""

    _original_options: ClassVar[dict[str, Any]] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        """
        Loads a pipeline from a folder or a Hub repository, in this library's layout or in the original one.

        No code of the original is run, and of its pickles only the table of an embedding is read.

        Args:
            pretrained_model_name_or_path (`str` or `Path`):
                A folder, or a repository such as `"LucasJinWang/FUDOKI"`.
            kwargs:
                As in [`~diffusers.DiffusionPipeline.from_pretrained`], with `use_safetensors=True` by default. The
                original layout takes `dtype`, `cache_dir`, `revision`, `token`, `local_files_only`, `force_download`
                and components. [`FUDOKIPipeline`] also takes `max_prompt_length` and `uncond_token_id` there,
                [`FUDOKIUnderstandingPipeline`] `num_vision_heads`: the number of attention heads of the vision
                encoder, which no file of that layout names. The published one has 16, which is the default.

        Returns:
            The pipeline, in evaluation mode.

        Raises:
            OSError: If a part is missing.
            ValueError: If a part is damaged, lacks a weight, has the wrong shape, or holds more than it should.
        """
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        if not is_original_fudoki(pretrained_model_name_or_path, **hub_kwargs):
            kwargs = {name: value for name, value in kwargs.items() if name not in cls._original_options}
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        options = {**cls._original_options, **kwargs}
        pipeline = cls(**load_original_fudoki(pretrained_model_name_or_path, **options))
        # As `DiffusionPipeline.from_pretrained` does, for `name_or_path`
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipeline

    @classmethod
    def read_adapter(cls, source: Any, subfolder: str | None = None, **kwargs: Any) -> Adapter:
        """As in [`UDMPipeline`]. It may also be one that dFlowGRPO has released, by its folder or repository."""
        return read_fudoki_adapter(source, subfolder, **kwargs)


def load_original_fudoki(
    pretrained_model_name_or_path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    torch_dtype: torch.dtype | None = None,
    num_vision_heads: int | None = None,
    **kwargs,
) -> dict[str, Any]:
    """
    Loads the components of [`FUDOKIPipeline`], or of [`FUDOKIUnderstandingPipeline`], from the original layout.

    Args:
        pretrained_model_name_or_path (`str` or `Path`):
            Folder or Hub repository.
        dtype (`torch.dtype`, *optional*):
            Dtype of transformer and VQ autoencoder. Defaults to float32. The scheduler's codebook is always float32.
        torch_dtype (`torch.dtype`, *optional*):
            Former name of `dtype`.
        num_vision_heads (`int`, *optional*):
            Number of attention heads of the vision encoder. Without it, the components are those that draw images.
        kwargs:
            Hub options, components to use instead of the stored ones, and for [`FUDOKIPipeline`] `max_prompt_length`
            and `uncond_token_id`.

    Returns:
        `dict[str, Any]`: Arguments of the pipeline.

    Raises:
        OSError: If a part is missing.
        TypeError: If an argument is unknown.
        ValueError: If a part is damaged, lacks a weight, has the wrong shape, or holds more than it should.
    """
    names, embedding = ["transformer", "scheduler", "tokenizer"], "text_embedding.pt"
    if num_vision_heads is None:
        names += ["vae", "max_prompt_length", "uncond_token_id"]
        embedding = "image_embedding.pt"
    unknown = sorted(set(kwargs) - {*HUB_KWARGS, *names})
    if unknown:
        raise TypeError(f"Arguments not supported for checkpoints in the original layout: {unknown}.")
    dtype = dtype or torch_dtype or torch.float32
    components = {name: value for name, value in kwargs.items() if name not in HUB_KWARGS}
    hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
    folder = find_folder(pretrained_model_name_or_path, ["*.json", "*.safetensors", embedding], **hub_kwargs)
    state_dict = load_state_dict(folder, _WEIGHTS_NAME)
    shapes = {name: tensor.shape for name, tensor in state_dict.items()}
    config = convert_config(load_json(folder / "config.json"), shapes)
    transformer, vae = rename_weights(state_dict, "transformer"), rename_weights(state_dict, "vae")
    # transformers normalizes codes when it decodes, but not when it encodes
    codes = torch.nn.functional.normalize(vae["quantize.embedding.weight"].float(), dim=-1)
    vae["quantize.embedding.weight"] = codes
    if "transformer" not in components:
        model_class: Any = FUDOKIForImageGeneration
        if num_vision_heads is not None:
            model_class = JanusForConditionalGeneration
            reader, config.vision_config = convert_reader(state_dict, config, num_vision_heads)
            transformer |= reader | {f"model.vqmodel.{name}": weight for name, weight in vae.items()}
        components["transformer"] = _load_model(model_class, config, transformer, folder, dtype)
    if "vae" not in components and num_vision_heads is None:
        components["vae"] = _load_model(JanusVQVAE, config.vq_config, vae, folder, dtype)
    if "scheduler" not in components:
        components["scheduler"] = KineticOptimalScheduler(metric_power=4.0)
        components["scheduler"].set_codebook(load_embedding(find_file(folder, [embedding])))
    if "tokenizer" not in components:
        components["tokenizer"] = load_original_tokenizer(folder)
    return components


def _load_model(
    model_class: Any, config: Any, weights: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype
) -> PreTrainedModel:
    with torch.device("meta"):
        check_state_dict(weights, model_class(config).state_dict(), folder)
    return model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def load_original_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer as `tokenizer.json` has it. By the class that is named there, transformers would build another."""
    find_file(folder, ["tokenizer.json"])
    return PreTrainedTokenizerFast.from_pretrained(folder)


def read_original_config(folder: Path) -> JanusConfig:
    """The configuration of a folder in the original layout, for which no weight is read."""
    return convert_config(load_json(folder / "config.json"), read_shapes(folder, _WEIGHTS_NAME))


def read_fudoki_adapter(
    source: str | os.PathLike | dict[str, torch.Tensor] | Adapter, subfolder: str | None = None, **kwargs: Any
) -> Adapter:
    """
    Reads an adapter, as [`~trl_udm.pipelines.lora.read_adapter`] does, also one that dFlowGRPO has released.

    A release has a folder `lora_adapter_ema`, or `lora_adapter` and beside it `ema_state.pt`, whose tensors are used
    instead. Its names are those of a language model alone, which is a part of the transformer here.

    Args:
        source (`str`, `os.PathLike`, `dict[str, torch.Tensor]` or `Adapter`):
            As in `read_adapter`, or the folder or repository of a release.
        subfolder (`str`, *optional*):
            Folder of the adapter or of the release.
        kwargs:
            Further arguments of `read_adapter`.

    Returns:
        `Adapter`: The adapter, under the names of the transformer here.

    Raises:
        ValueError: If it is damaged, or has weights of other modules beside it.
    """
    ema_file = None
    if isinstance(source, (str, os.PathLike)):
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}

        def find(*names: str) -> Path | None:
            try:
                return find_file(source, list(names), subfolder, **hub_kwargs)
            except FileNotFoundError:
                return None

        config_file = find(CONFIG_NAME, f"lora_adapter_ema/{CONFIG_NAME}", f"lora_adapter/{CONFIG_NAME}")
        folder = None if config_file is None else config_file.parent
        if folder is not None and folder.name in ("lora_adapter_ema", "lora_adapter") and find(CONFIG_NAME) is None:
            if find("gen_modules_state.pt") is not None:
                raise ValueError(
                    f"{source} has `gen_modules_state.pt`, weights of other modules than the adapter's, which an "
                    f"adapter cannot hold. Give its `subfolder={folder.name!r}` to load the adapter alone."
                )
            ema_file = find("ema_state.pt") if folder.name == "lora_adapter" else None
            subfolder = "/".join([*filter(None, [subfolder]), folder.name])
    adapter = read_adapter(source, subfolder, **kwargs)
    if not any(name.startswith(f"{PREFIX}model.layers.") for name in adapter.weights):
        return adapter
    weights = {
        name.replace(f"{PREFIX}model.", f"{PREFIX}model.language_model.", 1): weight
        for name, weight in adapter.weights.items()
    }
    if ema_file is not None:
        weights = _replace_weights(weights, ema_file)
    config: Any = copy.copy(adapter.config)
    # Suffixes such as `q_proj` may be those of other modules too
    config.target_modules = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in weights}
    return Adapter(weights, config, adapter.label, adapter.base_sample)


def _replace_weights(weights: dict[str, torch.Tensor], ema_file: Path) -> dict[str, torch.Tensor]:
    def place(name: str) -> tuple[int, int, str]:
        _, layer, module, side = re.split(r"\.layers\.(\d+)\.\w+\.(\w+)\.", name)
        return int(layer), _ADAPTED_MODULES.index(module), side

    try:
        average = torch.load(ema_file, map_location="cpu", weights_only=True)["ema_parameters"]
        replaced = dict(zip(sorted(weights, key=place), average, strict=True))
    except Exception as error:
        raise ValueError(
            f"{ema_file} must hold one tensor for each of the adapter's {len(weights)}: {error}"
        ) from error
    unfit = [name for name, tensor in replaced.items() if tensor.shape != weights[name].shape]
    if unfit:
        raise ValueError(f"{ema_file} has tensors of another shape than the adapter: {unfit}.")
    return replaced
