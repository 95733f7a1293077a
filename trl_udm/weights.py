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
Files of weights: safetensors, sharded or not, or a pickle that holds nothing but tensors. Every file or weight that is
damaged, missing or of another shape raises an error that names it.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn


def find_file(
    pretrained_model_name_or_path: str | os.PathLike,
    names: list[str],
    subfolder: str | None = None,
    **hub_kwargs: Any,
) -> Path:
    """
    Finds a file in a folder or a repository on the Hub, by several names.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`):
            Folder, or id of a repository.
        names (`list[str]`):
            Names of the file, in order of preference.
        subfolder (`str`, *optional*):
            Folder of the file in the folder or repository.
        hub_kwargs:
            `cache_dir`, `force_download`, `local_files_only`, `token` and `revision`.

    Returns:
        `Path`: The first that exists. From the Hub it is downloaded.

    Raises:
        FileNotFoundError: If none exists, or there is no such folder or repository, or the Hub cannot be reached.
    """
    source = str(pretrained_model_name_or_path)
    if Path(source).is_dir():
        for name in names:
            file = Path(source, subfolder or "", name)
            if file.is_file():
                return file
    else:
        for name in names:
            try:
                return Path(hf_hub_download(source, name, subfolder=subfolder, **hub_kwargs))
            except RemoteEntryNotFoundError:
                continue
            except HFValidationError as error:
                reason = "its name cannot be that of a repository on the Hub"
                raise FileNotFoundError(f"There is no folder {source}, and {reason}.") from error
            except RepositoryNotFoundError as error:
                reason = "the Hub has no repository of this name that you may read. For a private one, log in first"
                raise FileNotFoundError(f"There is no folder {source}, and {reason}: `hf auth login`.") from error
            except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
                reason = "the Hub cannot be reached: there is no network, or HF_HUB_OFFLINE is set"
                raise FileNotFoundError(f"There is no folder or cached repository {source}, and {reason}.") from error
    where = source if subfolder is None else os.path.join(source, subfolder)
    raise FileNotFoundError(f"There is no {' or '.join(f'`{name}`' for name in names)} in {where}.")


def load_tensors(file: str | os.PathLike, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """
    Reads the tensors of one file, onto the CPU.

    Args:
        file (`str` or `os.PathLike`):
            A `.safetensors` file or a pickle. No code runs: only tensors and plain containers are unpickled.
        names (`Iterable[str]`, *optional*):
            Names of the tensors to read. By default all are read, and the file must hold nothing else.

    Returns:
        `dict[str, torch.Tensor]`: The tensors.

    Raises:
        ValueError: If the file is damaged, holds more than tensors, or lacks one of `names`.
    """
    try:
        if Path(file).suffix == ".safetensors":
            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, EOFError, OSError, RuntimeError) as error:
        raise ValueError(f"{file} is damaged, or holds more than tensors, so it is not loaded.") from error
    if names is None:
        if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
            raise ValueError(f"{file} must hold a dictionary of tensors and nothing else.")
        return tensors
    for name in names:
        if not isinstance(tensors, dict) or not isinstance(tensors.get(name), torch.Tensor):
            raise ValueError(f"Cannot read {file}: it has no tensor `{name}`.")
    return {name: tensors[name] for name in names}


def load_embedding(file: str | os.PathLike) -> torch.Tensor:
    """
    Reads the table of an embedding that was pickled as a module, onto the CPU.

    Args:
        file (`str` or `os.PathLike`):
            The pickle. No code of it runs: of classes, only `torch.nn.Embedding` is unpickled.

    Returns:
        `torch.Tensor` of shape `(num_embeddings, embedding_dim)`: The table.

    Raises:
        ValueError: If the file is damaged, or holds anything else.
    """
    try:
        with torch.serialization.safe_globals([nn.Embedding]):
            embedding = torch.load(file, map_location="cpu", weights_only=True)
        return embedding.get_parameter("weight").detach()
    except (UnpicklingError, EOFError, OSError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged, or is no embedding, so it is not loaded.") from error


def load_state_dict(folder: str | os.PathLike, name: str) -> dict[str, torch.Tensor]:
    """
    Reads the weights of one component. Preferred are the shards that `<name>.safetensors.index.json` lists, then
    `<name>.safetensors`, then the pickle `<name>.bin`.

    Args:
        folder (`str` or `os.PathLike`):
            The component's folder.
        name (`str`):
            Name of the file, without suffix.

    Returns:
        `dict[str, torch.Tensor]`: The tensors of all shards.

    Raises:
        FileNotFoundError: If there is no such folder or file, or a shard is missing.
        ValueError: If a file is damaged, or holds more than tensors.
    """
    state_dict = {}
    for file in find_weights(folder, name):
        state_dict.update(load_tensors(file))
    return state_dict


def find_weights(folder: str | os.PathLike, name: str) -> list[Path]:
    """The files that `load_state_dict` reads, with its arguments and errors."""
    folder = Path(folder)
    if not folder.is_dir():  # its name is not that of a repository
        raise FileNotFoundError(f"There is no folder {folder}.")
    index = folder / f"{name}.safetensors.index.json"
    if not index.is_file():
        return [find_file(folder, [f"{name}.safetensors", f"{name}.bin"])]
    shard_names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for shard_name in shard_names:
        if not (folder / shard_name).is_file():
            raise FileNotFoundError(f"There is no {folder / shard_name}, which {index.name} lists.")
    return [folder / shard_name for shard_name in shard_names]


def read_shapes(folder: str | os.PathLike, name: str) -> dict[str, torch.Size]:
    """
    Reads the shapes of a component's weights, without the weights.

    Args:
        folder (`str` or `os.PathLike`):
            The component's folder.
        name (`str`):
            Name of the file, without suffix.

    Returns:
        `dict[str, torch.Size]`: The shapes, by the names of the weights.

    Raises:
        FileNotFoundError, ValueError: As `load_state_dict`.
    """
    shapes: dict[str, torch.Size] = {}
    for file in find_weights(folder, name):
        try:
            with safe_open(file, "pt") as opened:
                shapes |= {key: torch.Size(opened.get_slice(key).get_shape()) for key in opened.keys()}
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged, or no safetensors, so its shapes are not read.") from error
    return shapes


def check_state_dict(
    state_dict: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], folder: str | os.PathLike
) -> None:
    """
    Checks that weights are those of a model, by their names and shapes.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            The weights.
        expected (`dict[str, torch.Tensor]`):
            The model's own weights, on any device.
        folder (`str` or `os.PathLike`):
            Where the weights come from, for the error message.

    Raises:
        ValueError: If a weight is missing, unexpected, or of another shape.
    """
    missing, unexpected = sorted(expected.keys() - state_dict.keys()), sorted(state_dict.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"The weights in {folder} miss {missing or 'nothing'} and have unexpected {unexpected or 'none'}."
        )
    for name, tensor in expected.items():
        if state_dict[name].shape != tensor.shape:
            raise ValueError(
                f"`{name}` in {folder} must have shape {tuple(tensor.shape)} by its config.json, got "
                f"{tuple(state_dict[name].shape)}."
            )


def compute_checksum(weights: Iterable[torch.Tensor]) -> int:
    """
    Computes a number by which weights are known again.

    Args:
        weights (`Iterable[torch.Tensor]`):
            The weights, in an order that matters.

    Returns:
        `int`: The same for the same values in the same dtypes.
    """
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    checksum = 0
    for place, weight in enumerate(weights, start=1):
        values = weight.detach().view(integers[weight.element_size()]).flatten()
        # Part by part: PyTorch copies what it sums into int64, four times the size of bfloat16
        sums = torch.stack([part.sum(dtype=torch.int64) for part in values.split(2**20)])
        checksum += place * int(sums.sum())
    return checksum


def load_every_weight(
    from_pretrained: Callable, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
) -> Any:
    """
    Calls a `from_pretrained` of transformers or diffusers, where a missing or unexpected weight is an error. The
    libraries would leave a missing one random, and warn.

    Args:
        from_pretrained (`Callable`):
            The method, of transformers' `PreTrainedModel` or diffusers' `ModelMixin`.
        pretrained_model_name_or_path (`str` or `os.PathLike`, *optional*):
            Folder, or id of a repository on the Hub.
        args, kwargs:
            As in `from_pretrained`. Weights that do not fit are no error with `ignore_mismatched_sizes=True`, or if
            `output_loading_info=True` tells the caller of them.

    Returns:
        The model, or with `output_loading_info=True` a tuple of it and its loading info.

    Raises:
        ValueError: If a weight is missing, unexpected or of another shape, or a file is damaged.
    """
    settings = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = from_pretrained(pretrained_model_name_or_path, *args, **settings)
    except SafetensorError as error:
        raise ValueError(f"The weights in {pretrained_model_name_or_path} are damaged: {error}.") from error
    if kwargs.get("output_loading_info", False):
        return model, info
    if not kwargs.get("ignore_mismatched_sizes", False):
        absent = [*info["missing_keys"], *(f"{name} (as {shape})" for name, shape, _ in info["mismatched_keys"])]
        if absent:
            raise ValueError(
                f"The weights in {pretrained_model_name_or_path} miss, or have in another shape than its config.json "
                f"says: {sorted(absent)}."
            )
        if info["unexpected_keys"]:
            raise ValueError(
                f"The weights in {pretrained_model_name_or_path} have some that the model of its config.json does not "
                f"have: {sorted(info['unexpected_keys'])}."
            )
    return model


def save_tensors(
    tensors: dict[str, torch.Tensor], file: str | os.PathLike, metadata: dict[str, str] | None = None
) -> None:
    """
    Saves tensors as safetensors.

    Args:
        tensors (`dict[str, torch.Tensor]`):
            The tensors.
        file (`str` or `os.PathLike`):
            The file. Its folder is created if it does not exist.
        metadata (`dict[str, str]`, *optional*):
            Texts that the file holds besides.
    """
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, file, metadata={"format": "pt", **(metadata or {})})
