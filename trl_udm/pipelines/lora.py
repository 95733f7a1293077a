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

"""Adapters of a pipeline: what PEFT loads, through PEFT's own loader, by the names of diffusers' LoRA methods."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import load
from torch import nn

from ..weights import find_file, load_tensors, save_tensors


logger = logging.get_logger(__name__)

PREFIX = "base_model.model."
"""What PEFT puts before the name of a weight of the transformer."""

OWN_CALL_TYPES = (PeftType.XLORA, PeftType.POLY, PeftType.SHADOW)
"""Types that need a model's call to be theirs."""

BASE_SAMPLE = "base_sample"
"""Where the metadata of a file of weights has a sample of the weights under the adapter. PEFT does not look there."""

BASE_CHANGING_INITS = ("pissa", "olora")
"""Values of `init_lora_weights` with which an adapter takes its start from the weights under it."""

SINGLE_TYPES = (PeftType.C3A, PeftType.LN_TUNING, PeftType.OSF)
"""Types of which a forward pass uses one adapter."""

LORA_INITS = (True, False, None, "gaussian", "orthogonal", "pissa", "olora")
"""Values of `init_lora_weights` with which the saved adapter says what the weights under it are."""


class LoraMixin:
    """
    Adapters of a pipeline's transformer, under the names of diffusers' LoRA methods, for each type that PEFT has.

    The layers of an adapter lie in `transformer` itself. Needs `transformer`, `transformer_name` and `name_or_path`.
    """

    _attached: PeftModel | None = None
    _base_weights: "BaseWeights | None" = None
    _unfused: dict[nn.Parameter, torch.Tensor] | None = None
    _scalings: dict[str, dict[BaseTunerLayer, float]] | None = None

    @property
    def peft_model(self) -> PeftModel | None:
        """[`~peft.PeftModel`] or `None`: The model that holds the adapters, where the transformer has some."""
        if isinstance(self.transformer, PeftModel):
            return self.transformer
        if not has_adapters(self.transformer):
            return None
        if self._attached is None or self._attached.get_base_model() is not self.transformer:
            raise ValueError(
                "The transformer has layers of an adapter that the pipeline did not load. Hand in the model that "
                "holds it, `pipe.transformer = peft_model`, or take it off with `pipe.unload_lora_weights()` and load "
                "it with `pipe.load_lora_weights(...)`."
            )
        return self._attached

    @property
    def is_fused(self) -> bool:
        """`bool`: Whether adapters are added to the weights under them."""
        return self._unfused is not None and has_adapters(self.transformer)

    @contextlib.contextmanager
    def keep_base_weights(self, peft_config: PeftConfig | None) -> Iterator["BaseWeights"]:
        """A context in which someone puts an adapter into the transformer. On an error it is taken off again."""
        base_weights, had_adapters = BaseWeights(self.transformer, peft_config), has_adapters(self.transformer)
        try:
            yield base_weights
        except BaseException:
            if has_adapters(self.transformer) and not had_adapters:
                remove_adapters(self.transformer)
                base_weights.restore()
            raise

    def attach_adapters(self, model: PeftModel, base_weights: "BaseWeights") -> None:
        """Takes over the model that someone has put around the transformer, whose weights were `base_weights`."""
        base_weights.forget_unchanged()
        self._attached, self._base_weights = model, base_weights
        self._unfused, self._scalings = None, {}

    @classmethod
    def read_adapter(cls, source: Any, subfolder: str | None = None, **kwargs: Any) -> "Adapter":
        """Reads what `load_lora_weights` loads, with its arguments. A family may take further layouts."""
        return read_adapter(source, subfolder, **kwargs)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str = "default",
        *,
        subfolder: str | None = None,
        weight_name: str | None = None,
        peft_config: PeftConfig | None = None,
        **hub_kwargs: Any,
    ) -> None:
        """
        Loads a PEFT adapter, such as a LoRA run of [`UDMGRPOTrainer`] saves, into the transformer, and uses it alone.

        An adapter that is refused leaves the transformer as it was.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict[str, torch.Tensor]`):
                Folder or Hub repository with the adapter's weights and `adapter_config.json`, or just the weights.
            adapter_name (`str`, *optional*, defaults to `"default"`):
                Name to refer to it by.
            subfolder (`str`, *optional*):
                Folder of it in the folder or repository.
            weight_name (`str`, *optional*):
                Name of the file. By default `adapter_model.safetensors`, or else `adapter_model.bin`.
            peft_config ([`~peft.PeftConfig`], *optional*):
                Its configuration, instead of `adapter_config.json`. For weights without one, that of a LoRA is read
                from their names and shapes, with `lora_alpha` equal to the rank.
            hub_kwargs:
                `cache_dir`, `force_download`, `local_files_only`, `token` and `revision`.

        Raises:
            ValueError: If the name is taken, or the adapter is damaged, lacks a weight, or is of another model.
        """
        model = self.peft_model
        self._check_not_fused("load another adapter")
        if model is not None and adapter_name in model.peft_config:
            raise ValueError(
                f"Adapter with name {adapter_name} already exists. Give another `adapter_name`, or remove that one "
                f"with `unload_lora_weights({adapter_name!r})`."
            )
        options = {"weight_name": weight_name, "peft_config": peft_config, **hub_kwargs}
        adapter = self.read_adapter(pretrained_model_name_or_path_or_dict, subfolder, **options)
        tuned = self.transformer if model is None else model
        if model is not None and model.peft_config and adapter.config.peft_type != model.peft_type:
            raise ValueError(
                f"The adapter in {adapter.label} is of type {adapter.config.peft_type.value}, and the transformer has "
                f"adapters of type {model.peft_type.value}, beside which PEFT takes no other. Unload them first."
            )
        if model is not None and (
            adapter.config.to_dict().get("init_lora_weights") in BASE_CHANGING_INITS
            or (self._base_weights is not None and self._base_weights.has_changed)
        ):
            raise ValueError(
                f"The adapter in {adapter.label} cannot lie beside {list(model.peft_config)}: one of them starts from "
                f"the weights under it (`init_lora_weights` in {BASE_CHANGING_INITS}). Unload the others first."
            )
        _attach(_copy_structure(tuned, adapter.config), adapter, adapter_name)  # refuses what does not fit
        is_training = self.transformer.training
        base_weights = self._base_weights
        if model is None:
            base_weights = BaseWeights(self.transformer, adapter.config)
        elif base_weights is not None:
            base_weights.keep(adapter.config)
        self._warn_of_another_base(adapter, base_weights)
        attached = _attach(tuned, adapter, adapter_name).train(is_training)
        attached.requires_grad_(False)
        if model is None:
            self.attach_adapters(attached, base_weights)
        elif base_weights is not None:
            base_weights.forget_unchanged()
        self.set_adapters(adapter_name)

    def get_active_adapters(self) -> list[str]:
        """
        Tells which adapters are used.

        Returns:
            `list[str]`: Their names, none where there is no adapter.
        """
        model = self.peft_model
        return [] if model is None else list(model.active_adapters)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """
        Tells which adapters are loaded.

        Returns:
            `dict[str, list[str]]`: Their names, under the transformer's. Empty where there is none.
        """
        model = self.peft_model
        return {} if model is None else {self.transformer_name: list(model.peft_config)}

    def set_adapters(self, adapter_names: str | list[str], adapter_weights: float | list[float] | None = None) -> None:
        """
        Activates adapters, and only these. They are added.

        Args:
            adapter_names (`str` or `list[str]`):
                Their names.
            adapter_weights (`float` or `list[float]`, *optional*):
                Their weights, of each its own or of all the same. By default 1.

        Raises:
            ValueError: If an adapter is not loaded, the numbers differ, or the type of the adapters takes no weight.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = adapter_weights if isinstance(adapter_weights, list) else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise ValueError(
                f"`adapter_weights` must be as many as `adapter_names`, got {len(weights)} for {len(names)}."
            )
        model = self._check_loaded(names)
        self._check_not_fused("activate another adapter")
        if len(names) > 1 and model.peft_type in SINGLE_TYPES:
            raise ValueError(f"Adapters of type {model.peft_type.value} are used one at a time, got {names}.")
        weights = [1.0 if weight is None else weight for weight in weights]
        layers = scaled_layers(model)
        if not layers and any(weight != 1.0 for weight in weights):
            raise ValueError(
                f"Adapters of type {model.peft_type.value} take no weights, got {weights}. Leave them out."
            )
        active = model.active_adapters
        try:
            model.base_model.set_adapter(names, inference_mode=True)
        except ValueError as error:
            model.base_model.set_adapter(active, inference_mode=True)
            raise ValueError(f"PEFT cannot use {names} at a time: {error}") from error
        scalings = self._scalings = self._scalings or {}
        for name, weight in zip(names, weights, strict=True):
            if weight != 1.0 and name not in scalings:
                scalings[name] = {layer: layer.scaling[name] for layer in layers if name in layer.scaling}
            for layer, scaling in scalings.get(name, {}).items():
                layer.scaling[name] = scaling * weight

    def delete_adapters(self, adapter_names: str | list[str]) -> None:
        """
        Removes adapters. With the last one the transformer is as it was before the first.

        Args:
            adapter_names (`str` or `list[str]`):
                Their names.

        Raises:
            ValueError: If one is not loaded.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        model = self._check_loaded(names)
        if set(names) == set(model.peft_config):
            return self.unload_lora_weights()
        self._check_not_fused("remove an adapter")
        if self._base_weights is not None and self._base_weights.has_changed:
            raise ValueError(
                f"{names} cannot be removed alone: an adapter of {list(model.peft_config)} has changed the weights "
                "under it. Remove all of them with `unload_lora_weights()`."
            )
        active = [name for name in model.active_adapters if name not in names]
        for name in names:
            model.delete_adapter(name)
            (self._scalings or {}).pop(name, None)
        if active:
            model.base_model.set_adapter(active, inference_mode=True)

    def unload_lora_weights(self, adapter_name: str | None = None) -> None:
        """
        Removes adapters. Without them the transformer has the layers, names, weights and `requires_grad` that it had
        before the first. After `fuse_lora` the fused weights stay, as in diffusers.

        Args:
            adapter_name (`str`, *optional*):
                The adapter. By default all of them.

        Raises:
            ValueError: If it is not loaded, or none is.
        """
        if adapter_name is not None:
            return self.delete_adapters(adapter_name)
        is_wrapped = isinstance(self.transformer, PeftModel)
        transformer = self.transformer.get_base_model() if is_wrapped else self.transformer
        if not has_adapters(transformer):
            raise ValueError("No adapter loaded. `load_lora_weights` loads one.")
        remove_adapters(transformer)
        if self._base_weights is not None and self._base_weights.transformer is transformer:
            self._base_weights.restore(with_values=self._unfused is None)
        else:
            transformer.requires_grad_(True)  # as `from_pretrained` leaves it
        setattr(self, self.transformer_name, transformer)
        self._attached = self._base_weights = self._unfused = self._scalings = None

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = True, adapter_names: list[str] | None = None
    ) -> None:
        """
        Adds adapters to the weights under them, so that sampling takes no longer than without. The original weights
        are kept, and `unfuse_lora` puts them back exactly. To keep the fused weights for good, call
        `unload_lora_weights`.

        Args:
            lora_scale (`float`, *optional*, defaults to `1.0`):
                Factor of the adapters, which those of LoRA can have.
            safe_fusing (`bool`, *optional*, defaults to `True`):
                Whether to refuse adapters that make a weight infinite or NaN.
            adapter_names (`list[str]`, *optional*):
                The adapters. By default the active ones.

        Raises:
            ValueError: If they cannot be added to the weights.
        """
        names = self.get_active_adapters() if adapter_names is None else adapter_names
        model = self._check_loaded(names)
        self._check_not_fused("fuse again")
        reason = reason_against_merging(model)
        if reason is not None:
            raise ValueError(
                f"The adapters {names} cannot be fused: {reason}. Use them as they are, or load them into a pipeline "
                "without `quantization_config` where weights are quantized."
            )
        if lora_scale != 1.0 and not any(isinstance(layer, LoraLayer) for layer in tuner_layers(model)):
            raise ValueError(
                f"`lora_scale` must be 1.0 for adapters of type {model.peft_type.value}, got {lora_scale}: PEFT "
                "scales layers of LoRA only. Leave it out."
            )
        originals = {parameter: parameter.data for parameter in base_parameters(model)}
        try:
            with rescale_adapter_scale(model, lora_scale) if lora_scale != 1.0 else contextlib.nullcontext():
                merge(model, names, is_checked=safe_fusing)
        except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
            unmerge(model, originals)
            reason = str(error).rstrip(".")
            raise ValueError(f"The adapters {names} cannot be fused: {reason}. Use them as they are.") from error
        self._unfused = originals

    def unfuse_lora(self) -> None:
        """
        Puts the weights back that `fuse_lora` has changed, bit by bit.

        Raises:
            ValueError: If no adapter is fused.
        """
        if self._unfused is None:
            raise ValueError("No adapter is fused. `fuse_lora` fuses one.")
        unmerge(self.peft_model, self._unfused)
        self._unfused = None

    def save_lora_weights(self, save_directory: str | os.PathLike, adapter_name: str | None = None) -> None:
        """
        Saves an adapter as PEFT's two files, for `load_lora_weights` and `PeftModel.from_pretrained`.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder.
            adapter_name (`str`, *optional*):
                The adapter. By default the active one.

        Raises:
            ValueError: If it is not loaded, or several are active.
        """
        names = self.get_active_adapters() if adapter_name is None else [adapter_name]
        model = self._check_loaded(names)
        if len(names) != 1:
            raise ValueError(f"`adapter_name` must be given where several adapters are active, got {names}.")
        state_dict = get_peft_model_state_dict(model, adapter_name=names[0], save_embedding_layers=False)
        state_dict = {name: tensor.detach().clone() for name, tensor in state_dict.items()}  # some share memory
        save_tensors(state_dict, Path(save_directory, SAFETENSORS_WEIGHTS_NAME))
        self.save_base_sample(save_directory)
        config = copy.copy(model.peft_config[names[0]])
        config.inference_mode = True
        config.save_pretrained(str(save_directory))

    def save_base_sample(self, save_directory: str | os.PathLike) -> None:
        """Adds to a saved adapter a few values of the weights under it, by which `load_lora_weights` knows them."""
        file = Path(save_directory, SAFETENSORS_WEIGHTS_NAME)
        if self._base_weights is not None and file.exists():
            save_tensors(load(file.read_bytes()), file, {BASE_SAMPLE: json.dumps(self._base_weights.sample)})

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """
        Saves the pipeline, as [`~diffusers.DiffusionPipeline.save_pretrained`] does.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder.
            args, kwargs:
                As in [`~diffusers.DiffusionPipeline.save_pretrained`].

        Raises:
            ValueError: If the transformer has adapters, whose layers `from_pretrained` does not know, or its weights
                are quantized.
        """
        if isinstance(self.transformer, PeftModel) or has_adapters(self.transformer):
            raise ValueError(
                "The pipeline has adapters, and a folder of a pipeline holds none. Save the adapter alone with "
                "`pipe.save_lora_weights(folder)`. Or add it to the weights and save those: `pipe.fuse_lora()`, "
                "`pipe.unload_lora_weights()`, and again `pipe.save_pretrained(folder)`."
            )
        if any(is_quantized(parameter) for parameter in self.transformer.parameters()):
            raise ValueError(
                "The transformer has quantized weights, whose folder would not load again. Load the pipeline without "
                "`quantization_config` to save it. An adapter is saved with `pipe.save_lora_weights(folder)`."
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    def _check_loaded(self, names: list[str]) -> PeftModel:
        model = self.peft_model
        if model is None:
            raise ValueError("No adapter loaded. `load_lora_weights` loads one.")
        unknown = [name for name in names if name not in model.peft_config]
        if unknown or not names:
            raise ValueError(f"Adapters must be among {list(model.peft_config)}, got {unknown or 'none'}.")
        return model

    def _check_not_fused(self, action: str) -> None:
        if self.is_fused:
            raise ValueError(f"The adapters are fused: call `unfuse_lora` before you {action}.")

    def _warn_of_another_base(self, adapter: "Adapter", base_weights: "BaseWeights | None") -> None:
        base = adapter.config.base_model_name_or_path
        names = {str(name) for name in (self.name_or_path, getattr(self.transformer, "name_or_path", None)) if name}
        names |= {os.path.join(name, self.transformer_name) for name in names}
        paths = {os.path.realpath(name) for name in names}
        reason = None
        if base and names and base not in names and os.path.realpath(base) not in paths:
            reason = f"{base}, and the pipeline is {self.name_or_path}"
        is_same = None if base_weights is None else base_weights.is_sampled_by(adapter.base_sample)
        if is_same is not None:  # which tells more than names
            reason = None if is_same else reason or "other weights than the pipeline has"
        if reason is not None:
            logger.warning(
                f"The adapter in {adapter.label} was trained on {reason}. It fits by the shapes of its weights, but "
                "is of use only where the base weights are the same."
            )


@dataclasses.dataclass
class Adapter:
    """An adapter before it is in a model."""

    weights: dict[str, torch.Tensor]  # under PEFT's names
    config: PeftConfig
    label: str  # where it comes from
    base_sample: dict[str, list[float]]  # `sample_weights` of its base, or empty where it does not tell


class BaseWeights:
    """The weights of a transformer before it has adapters, some of which change them, so that they can be put back."""

    def __init__(self, transformer: nn.Module, peft_config: PeftConfig | None):
        self.transformer = transformer
        self._parameters = dict(transformer.named_parameters())
        self.sample = sample_weights(self._parameters)
        self._requires_grad = {parameter: parameter.requires_grad for parameter in self._parameters.values()}
        self._values = {parameter: parameter.data for parameter in self._parameters.values()}
        self._trained: set[nn.Parameter] = set()
        self.keep(peft_config)

    @property
    def has_changed(self) -> bool:
        """`bool`: Whether an adapter has changed a weight, once `forget_unchanged` was called."""
        return bool(self._values)

    def is_sampled_by(self, sample: dict[str, list[float]]) -> bool | None:
        """Whether `sample_weights` gave this for the same weights in some dtype, or `None` if there is no telling."""
        own = sample_weights({name: weight for name, weight in self._parameters.items() if name in sample})
        pairs = [(torch.tensor(values), torch.tensor(sample[name])) for name, values in own.items()]
        # Half precision rounds
        return all(x.shape == y.shape and torch.allclose(x, y, 1e-2, 1e-6) for x, y in pairs) if pairs else None

    def keep(self, peft_config: PeftConfig | None) -> None:
        """Keeps the values of the weights that an adapter changes in place."""
        for parameter in self._requires_grad:
            if changes_in_place(peft_config, parameter):
                self._values.setdefault(parameter, parameter.data)
                parameter.data = parameter.data.clone()
                self._trained |= {parameter} if parameter.dim() == 1 else set()  # biases

    def forget_unchanged(self) -> None:
        """Lets go of the values of the weights that adapters have left as they were, and do not train."""
        self._values = {
            parameter: value
            for parameter, value in self._values.items()
            if parameter in self._trained
            or parameter.data_ptr() != value.data_ptr()
            and not torch.equal(parameter.data, value.to(parameter.device, parameter.dtype))
        }

    def restore(self, with_values: bool = True) -> None:
        """Puts back `requires_grad` and, `with_values`, the values that were changed."""
        for parameter, requires_grad in self._requires_grad.items():
            parameter.requires_grad_(requires_grad)
        for parameter, value in self._values.items() if with_values else ():
            parameter.data = value.to(parameter.device, parameter.dtype)


def sample_weights(weights: dict[str, nn.Parameter]) -> dict[str, list[float]]:
    """
    At most 8 values of each of at most 8 weights, at evenly spaced places, by which the weights are known again. Those
    that are no whole matrix of floating-point numbers, such as quantized and sharded ones, are left out.
    """
    matrices = [
        name
        for name, weight in weights.items()
        if type(weight) is nn.Parameter and weight.dim() > 1 and weight.numel() > 0 and not weight.is_meta
        if weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    chosen = {name: weights[name].detach().flatten() for name in matrices[:: math.ceil(len(matrices) / 8) or 1]}
    return {name: values[:: math.ceil(len(values) / 8)].tolist() for name, values in chosen.items()}


def tuner_layers(model: nn.Module) -> Iterator[BaseTunerLayer]:
    """The layers of adapters in a model."""
    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))


def scaled_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """The layers of adapters that are multiplied by a number."""
    return [layer for layer in tuner_layers(model) if isinstance(getattr(layer, "scaling", None), dict)]


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has layers of an adapter, whoever put them there."""
    return any(isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in model.modules())


def base_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters under the adapters of a model."""
    layers = [layer.get_base_layer() for layer in tuner_layers(model)]
    return list(dict.fromkeys(parameter for layer in layers for parameter in layer.parameters(recurse=False)))


def changes_in_place(peft_config: PeftConfig | None, parameter: nn.Parameter) -> bool:
    """Whether an adapter, when it starts, is loaded or is trained, changes the memory of a parameter under it."""
    fields = {} if peft_config is None else peft_config.to_dict()
    if parameter.dim() == 1:
        return fields.get("bias", "none") != "none"
    return isinstance(fields.get("init_lora_weights"), str)


def check_peft_config(config: PeftConfig, is_trained: bool = False) -> None:
    """Raises a `ValueError` with the reason if a denoiser cannot have an adapter, or not train it."""
    fields = config.to_dict()
    reason = None
    if config.is_prompt_learning or config.is_adaption_prompt or config.peft_type in OWN_CALL_TYPES:
        reason = f"type {config.peft_type.value} needs a text model's prompt or call, which a denoiser does not have"
    elif is_trained and config.peft_type == PeftType.PVERA:
        reason = "type PVERA draws its weights anew at each call, so that a sample has no one log-probability"
    elif fields.get("alora_invocation_tokens") is not None:
        reason = "`alora_invocation_tokens` needs a text model's prompt, and without it the adapter does nothing"
    elif fields.get("layer_replication") is not None:
        reason = "`layer_replication` changes the model's layers, which are not put back"
    elif fields.get("init_lora_weights") not in LORA_INITS:
        reason = (
            f"`init_lora_weights={fields['init_lora_weights']!r}` changes the weights under it by numbers that are "
            f"not saved, so that it would not load again. Give one of {LORA_INITS}"
        )
    if reason is not None:
        raise ValueError(f"The adapter cannot be used here: {reason}. A `LoraConfig` that names layers can.")


def unfreeze_adapter(model: PeftModel) -> PeftModel:
    """Makes the adapter of a model trainable, or raises a `ValueError` if it is not one alone that can be."""
    is_merged = any(layer.merged for layer in tuner_layers(model))
    if list(model.peft_config) != ["default"] or model.active_adapters != ["default"] or is_merged:
        raise ValueError(
            f"The pipeline has adapters {sorted(model.peft_config)}. One alone can be trained further, not fused and "
            'named "default". Unload the others, or fuse them and call `unload_lora_weights()` to train all weights.'
        )
    check_peft_config(model.peft_config["default"], is_trained=True)
    model.set_adapter("default")
    bias = model.peft_config["default"].to_dict().get("bias", "none")
    layers = [model] if bias == "all" else list(tuner_layers(model)) if bias != "none" else []
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if name.endswith("bias"):
                parameter.requires_grad_(True)
    return model


def remove_adapters(transformer: nn.Module) -> None:
    """Takes the layers of adapters off a transformer, whoever put them there, and leaves the modules under them."""
    for module in list(transformer.modules()):
        for name, child in list(module.named_children()):
            while isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                is_layer = isinstance(child, BaseTunerLayer)
                child = child.get_base_layer() if is_layer else child.original_module
                setattr(module, name, child)
    if hasattr(transformer, "peft_config"):  # PEFT would take its adapters for loaded ones
        del transformer.peft_config
    if getattr(transformer, "_hf_peft_config_loaded", False):
        transformer._hf_peft_config_loaded = False


def is_quantized(parameter: nn.Parameter) -> bool:
    """Whether a weight has fewer bits than the numbers that are computed with it."""
    return torch.utils._python_dispatch.is_traceable_wrapper_subclass(parameter) or not parameter.is_floating_point()


def reason_against_merging(model: nn.Module) -> str | None:
    """Why the adapters of a model cannot be added to the weights under them, or `None` where they can."""
    if any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules()):
        return "they replace whole modules (`modules_to_save`), which is no sum"
    for parameter in base_parameters(model):
        if is_quantized(parameter):
            return "weights under them are quantized, and would be rounded anew"
    return None


def merge(model: PeftModel, adapter_names: list[str] | None = None, is_checked: bool = True) -> None:
    """Adds adapters to copies of the weights under them. `unmerge` with the original ones is the exact inverse."""
    parameters = base_parameters(model)
    for parameter in parameters:
        parameter.data = parameter.data.clone()  # to which PEFT adds in place
    model.merge_adapter(adapter_names=adapter_names)
    if is_checked and not all(parameter.isfinite().all() for parameter in parameters):
        raise ValueError("weights would become NaN or infinite")


def unmerge(model: PeftModel, originals: dict[nn.Parameter, torch.Tensor]) -> None:
    """Puts the weights under the adapters back, as they were before `merge`."""
    with warnings.catch_warnings(), contextlib.suppress(NotImplementedError):
        warnings.simplefilter("ignore")  # PEFT's about layers that are not merged
        model.unmerge_adapter()  # which subtracts, and so rounds
    for layer in tuner_layers(model):
        layer.merged_adapters.clear()  # some types cannot subtract, and would stay merged
    for parameter, original in originals.items():
        parameter.data = original.to(parameter.device, parameter.dtype)


def starts_at_zero(model: PeftModel, trained: dict[str, nn.Parameter]) -> bool:
    """Whether the policy with a new adapter off is the policy as it is, whatever the trained weights become."""
    return model.peft_type == PeftType.LORA and all(
        not weight.any() if "lora_B" in name or "lora_embedding_B" in name else "lora_" in name
        for name, weight in trained.items()
        if "modules_to_save" not in name  # copies of the modules that are used where the adapter is off
    )


def can_merge(model: PeftModel) -> bool:
    """
    Whether merging the adapter leaves the policy as it is, up to float32 rounding. Narrower weights would round a
    small adapter away. Of two modules that share a weight, only one has the adapter.
    """
    uses = Counter(parameter for module in model.modules() for parameter in module.parameters(recurse=False))
    parameters = base_parameters(model)
    return reason_against_merging(model) is None and all(
        parameter.dtype == torch.float32 and uses[parameter] == 1 for parameter in parameters
    )


def try_merging(model: PeftModel) -> str | None:
    """Merges the adapter once. Returns why that fails, or `None`."""
    reason = reason_against_merging(model)
    if reason is None:
        try:
            with merged_adapter(model):
                pass
        except Exception as error:  # PEFT's types raise many kinds; samples are then drawn with the adapter as it is
            reason = f"PEFT cannot merge it ({error})"
    return reason


@contextlib.contextmanager
def merged_adapter(model: PeftModel) -> Iterator[None]:
    """
    A context in which the adapter is merged into the weights under it, so that forward passes skip its small products.

    Subtracting the adapter again would round. So the original tensors are kept meanwhile, and put back exactly.
    """
    originals = {parameter: parameter.data for parameter in base_parameters(model)}
    try:
        merge(model)
        yield
    finally:
        unmerge(model, originals)


def read_adapter(
    source: "str | os.PathLike | dict[str, torch.Tensor] | Adapter",
    subfolder: str | None = None,
    weight_name: str | None = None,
    peft_config: PeftConfig | None = None,
    **hub_kwargs: Any,
) -> Adapter:
    """
    Reads an adapter, with the arguments of [`LoraMixin.load_lora_weights`]. Raises a `ValueError` if there are no
    weights, or they are damaged or not finite.
    """
    if isinstance(source, Adapter):
        return source
    label, base_sample = "the dictionary", {}
    if isinstance(source, dict):
        tensors = source
    else:
        label, settings = str(source), {"subfolder": subfolder, **hub_kwargs}
        names = [weight_name] if weight_name else [SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME]
        try:
            file = find_file(source, names, **settings)
        except FileNotFoundError as error:
            raise ValueError(f"adapter model file not found in {source}: {error}") from error
        tensors = load_tensors(file)
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                base_sample = json.loads((opened.metadata() or {}).get(BASE_SAMPLE, "{}"))
        if peft_config is None:
            with contextlib.suppress(FileNotFoundError):
                peft_config = read_config(source, **settings)
    infinite = sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all())
    if infinite:
        raise ValueError(
            f"The adapter in {label} has weights that are NaN or infinite, so it is not loaded: {infinite}."
        )
    weights = {  # those of other programs lack PEFT's prefix
        name if name.startswith("base_model.") else PREFIX + name.removeprefix("transformer."): tensor
        for name, tensor in tensors.items()
    }
    config = copy.deepcopy(peft_config) if peft_config is not None else infer_lora_config(weights, label)
    if peft_config is None and not isinstance(source, dict):
        logger.warning(f"{source} has no `adapter_config.json`: it is read as a LoRA, with its rank as `alpha`.")
    check_peft_config(config)
    config.task_type = None  # PEFT's task classes wrap `generate`, which a denoiser does not have
    config.inference_mode = True
    return Adapter(weights, config, label, base_sample)


def read_config(source: str | os.PathLike, **hub_kwargs: Any) -> PeftConfig:
    """Reads the `adapter_config.json` of a folder or a Hub repository, of any type that PEFT has."""
    file = find_file(source, [CONFIG_NAME], **hub_kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about fields of other versions
        try:
            return PeftConfig.from_pretrained(str(file.parent))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is not a configuration that PEFT knows: {error}.") from error


def infer_lora_config(state_dict: dict[str, torch.Tensor], label: str) -> LoraConfig:
    """The configuration of a LoRA, from the names and shapes of its weights."""
    suffix = ".lora_A.weight"
    ranks = {
        name.removeprefix(PREFIX).removesuffix(suffix): tensor.size(0)
        for name, tensor in state_dict.items()
        if name.endswith(suffix)
    }
    if not ranks:
        raise ValueError(f"{label} has no `adapter_config.json` and no weights of a LoRA. Give `peft_config`.")
    (rank, _), *_ = Counter(ranks.values()).most_common(1)
    patterns = {f"^{name}$".replace(".", r"\."): other for name, other in ranks.items() if other != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(ranks),
        rank_pattern=patterns,
        alpha_pattern=patterns,
        use_dora=any("lora_magnitude_vector" in name for name in state_dict),
    )


def _attach(model: nn.Module, adapter: Adapter, adapter_name: str) -> PeftModel:
    """Puts an adapter into a transformer, or beside others, and loads its weights."""
    config = copy.deepcopy(adapter.config)
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
        else:
            model = PeftModel(model, config, adapter_name=adapter_name)
        expected, own = (
            get_peft_model_state_dict(model, None, adapter_name, save_embedding_layers=False),
            model.state_dict(),
        )
        extra = [
            name for name in adapter.weights.keys() - expected.keys() if _is_own(name, adapter.weights[name], own)
        ]
        weights = {name: tensor for name, tensor in adapter.weights.items() if name not in extra}
        unfit = expected.keys() ^ weights.keys()
        if not unfit:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT's about shapes, which are an error below
                set_peft_model_state_dict(model, weights, adapter_name=adapter_name, ignore_mismatched_sizes=True)
            loaded = get_peft_model_state_dict(model, None, adapter_name, save_embedding_layers=False)
            unfit = {name for name, tensor in loaded.items() if tensor.shape != weights[name].shape}
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise ValueError(f"The adapter in {adapter.label} does not fit the transformer: {error}") from error
    if unfit:
        names = sorted(name.removeprefix(PREFIX) for name in unfit)
        raise ValueError(
            f"The adapter in {adapter.label} does not fit the transformer: {names} are missing, unexpected, or of "
            "another shape."
        )
    return model


def _is_own(name: str, tensor: torch.Tensor, own: dict[str, torch.Tensor]) -> bool:
    """Whether a weight is the model's own, such as the embeddings that PEFT saves beside an adapter."""
    if name not in own or own[name].shape != tensor.shape:
        return False
    return own[name].is_meta or torch.allclose(own[name].cpu().float(), tensor.cpu().float(), rtol=1e-2, atol=1e-3)


def _copy_structure(model: nn.Module, config: PeftConfig) -> nn.Module:
    """A copy to try an adapter on. Its weights are other parameters with the same values, and share their memory."""
    memo = {}
    for parameter in model.parameters():
        is_plain = type(parameter) is nn.Parameter  # quantized ones are not changed
        data = parameter.data.clone() if changes_in_place(config, parameter) else parameter.data
        memo[id(parameter)] = nn.Parameter(data, parameter.requires_grad) if is_plain else parameter
    return copy.deepcopy(model, memo)
