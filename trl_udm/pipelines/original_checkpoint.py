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
Loading of the original URSA repositories, whose `model_index.json` names classes of the authors' package. What tells
those of FUDOKI stands here too, since it needs nothing of FUDOKI.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

from ..models.autoencoder_vq import AutoencoderVQ
from ..models.autoencoder_vq_cosmos3d import AutoencoderVQCosmos3D
from ..models.configuration_ursa import URSAConfig
from ..models.modeling_ursa import URSAForImageGeneration
from ..schedulers.scheduling_kinetic_optimal import KineticOptimalScheduler
from ..weights import check_state_dict, find_file, load_state_dict
from .pipeline_udm import HUB_KWARGS


_CONFIG_NAMES = {
    "transformer": "config.json",
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "vae": "config.json",
}
_WEIGHTS_NAME = "diffusion_pytorch_model"
_STRIDES = ("vae_scale_factor", "vae_temporal_scale_factor")


def is_original_checkpoint(pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> bool:
    """
    Whether a folder or Hub repository is in the original format. Its `model_index.json` says so by the class of the
    transformer.

    Args:
        pretrained_model_name_or_path (`str` or `Path`):
            Folder or repository.
        kwargs:
            Hub options. Others are ignored.

    Returns:
        `bool`: Whether it is in the original format.
    """
    hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
    index = load_json(find_file(pretrained_model_name_or_path, ["model_index.json"], **hub_kwargs))
    return index.get("transformer", (None, None))[1] == "URSATransformer3DModel"


def is_original_fudoki(pretrained_model_name_or_path: str | os.PathLike, **hub_kwargs: Any) -> bool:
    """
    Whether a folder or Hub repository is in the original layout, which has a `config.json` and no `model_index.json`.

    Args:
        pretrained_model_name_or_path (`str` or `Path`):
            Folder or repository.
        hub_kwargs:
            Hub options.

    Returns:
        `bool`: Whether it is.
    """
    file = find_file(pretrained_model_name_or_path, ["model_index.json", "config.json"], **hub_kwargs)
    return file.name == "config.json" and load_json(file).get("model_type") == "multi_modality"


def check_configs(folder: Path, **components) -> None:
    """
    Checks that a folder in either format has the configuration of every component. If one were missing, transformers
    would take the default configuration or an empty tokenizer.

    Args:
        folder (`Path`):
            The folder.
        components:
            The components that are not loaded from it. Others are ignored.

    Raises:
        FileNotFoundError: If a configuration is missing.
    """
    index_path = folder / "model_index.json"
    index = load_json(index_path) if index_path.is_file() else {}
    for name, config_name in _CONFIG_NAMES.items():
        path = folder / name / config_name
        is_loaded = name not in components and index.get(name, (name,))[0] is not None
        if is_loaded and not path.is_file():
            raise FileNotFoundError(f"The checkpoint has no {path}.")


def load_original_components(
    pretrained_model_name_or_path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    torch_dtype: torch.dtype | None = None,
    **kwargs,
) -> dict[str, Any]:
    """
    Loads the components of [`URSAPipeline`] from the original format.

    Args:
        pretrained_model_name_or_path (`str` or `Path`):
            Folder or Hub repository.
        dtype (`torch.dtype`, *optional*):
            Dtype of transformer and VQ autoencoder. Defaults to float32. The scheduler's codebook is always float32.
        torch_dtype (`torch.dtype`, *optional*):
            The older name of `dtype` in diffusers.
        kwargs:
            Hub options, `max_prompt_length`, and components to use instead of the stored ones.

    Returns:
        `dict[str, Any]`: Arguments of [`URSAPipeline`].

    Raises:
        OSError: If a part is missing.
        TypeError: If an argument is unknown.
        ValueError: If a part is damaged, lacks a weight, has the wrong shape, or holds more than tensors.
    """
    unknown = sorted(set(kwargs) - {*HUB_KWARGS, *_CONFIG_NAMES, "max_prompt_length", *_STRIDES})
    if unknown:
        raise TypeError(f"Arguments not supported for checkpoints in the original format: {unknown}.")
    dtype = dtype or torch_dtype or torch.float32
    hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
    patterns = [f"{name}/*" for name in _CONFIG_NAMES]
    folder = find_folder(pretrained_model_name_or_path, patterns, **hub_kwargs)

    components = {name: value for name, value in kwargs.items() if name not in HUB_KWARGS}
    check_configs(folder, **components)
    if "transformer" not in components:
        config = URSAConfig.from_original_config(load_json(folder / "transformer" / "config.json"))
        state_dict = load_state_dict(folder / "transformer", _WEIGHTS_NAME)
        with torch.device("meta"):
            check_state_dict(state_dict, URSAForImageGeneration(config).state_dict(), folder / "transformer")
        components["transformer"] = URSAForImageGeneration.from_pretrained(
            None, config=config, state_dict=state_dict, dtype=dtype
        )
    if "vae" not in components:
        vae_config = load_json(folder / "vae" / "config.json")
        vae: Any = find_vae_class(vae_config).from_original_config(vae_config)
        state_dict = vae.convert_original_weights(load_state_dict(folder / "vae", _WEIGHTS_NAME))
        check_state_dict(state_dict, vae.state_dict(), folder / "vae")
        # Not cast by diffusers' `to`, which would warn
        vae.load_state_dict({name: tensor.to(dtype) for name, tensor in state_dict.items()}, assign=True)
        components["vae"] = vae.eval()
    if "scheduler" not in components:
        components["scheduler"] = KineticOptimalScheduler.from_pretrained(folder / "scheduler")
    if "tokenizer" not in components:
        components["tokenizer"] = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return components


def find_folder(pretrained_model_name_or_path: str | os.PathLike, patterns: list[str], **hub_kwargs: Any) -> Path:
    """The folder, or that into which files of a repository are downloaded."""
    folder = Path(pretrained_model_name_or_path)
    if folder.is_dir():
        return folder
    return Path(snapshot_download(str(pretrained_model_name_or_path), allow_patterns=patterns, **hub_kwargs))


def find_vae_class(config: dict[str, Any]) -> type[AutoencoderVQ] | type[AutoencoderVQCosmos3D]:
    """
    Class of a tokenizer, by the name that it has in both formats.

    Args:
        config (`dict[str, Any]`):
            Its `config.json`.

    Returns:
        [`AutoencoderVQ`] or [`AutoencoderVQCosmos3D`]: The class.

    Raises:
        ValueError: If `_class_name` names another.
    """
    classes = {cls.__name__: cls for cls in (AutoencoderVQ, AutoencoderVQCosmos3D)}
    name = config.get("_class_name", "AutoencoderVQ")
    if name not in classes:
        raise ValueError(
            f"`_class_name` in the `config.json` of the `vae` must be one of {list(classes)}, got {name!r}."
        )
    return classes[name]


def load_json(file: Path) -> dict[str, Any]:
    """
    Reads a JSON file.

    Args:
        file (`Path`):
            The file.

    Returns:
        `dict[str, Any]`: The object in it.

    Raises:
        ValueError: If the file is not JSON, or not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # also of bytes that are no UTF-8
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, got {value!r}.")
    return value
