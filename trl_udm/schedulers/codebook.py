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

"""The codes of a scheduler: weights of its own, which are saved, loaded and passed on to schedulers made from it."""

import os
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
from diffusers.configuration_utils import FrozenDict

from ..weights import find_file, load_tensors, save_tensors


class CodebookConfig(FrozenDict):
    """
    Config of a scheduler with codes: a dictionary of the settings, as in diffusers, with the codes as an attribute.

    `from_config` finds the codes there. They are not an item of the dictionary, so that no JSON holds them.

    Attributes:
        codebook (`torch.Tensor` of shape `(codebook_size, codebook_dim)`, *optional*):
            The codes, or `None`.
    """

    codebook: torch.Tensor | None = None

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # a setting


class CodebookMixin:
    """
    Codes as weights of a scheduler.

    Needs diffusers' `SchedulerMixin` and `ConfigMixin` after it in the list of bases, the settings `eps`,
    `codebook_size` and `codebook_dim`, and the property `needs_codebook`.

    Attributes:
        codebook (`torch.Tensor` of shape `(codebook_size, codebook_dim)`, *optional*):
            The L2-normalized codes in float32, or `None` if there are none yet.
    """

    # By this name diffusers recognizes that a folder of a repository holds weights that it can load
    weights_name = "diffusion_pytorch_model.safetensors"
    original_weights_name = "scheduler_model.pth"
    codebook: torch.Tensor | None = None

    def set_codebook(self, embeddings: torch.Tensor) -> None:
        """
        Take the codes of a codebook, L2-normalized, and register its two sizes in the config.

        Args:
            embeddings (`torch.Tensor` of shape `(codebook_size, codebook_dim)`):
                The codebook of the image tokenizer, with a code in each row. It is not changed.

        Raises:
            ValueError: If the shape is not that of a codebook or differs from the config's, or an entry is not finite.
        """
        self._register_codebook(embeddings)
        codebook = embeddings.detach().float()
        self.codebook = codebook / codebook.norm(dim=-1, keepdim=True).clamp(min=self.config.eps)

    def _register_codebook(self, codebook: torch.Tensor) -> None:
        if codebook.ndim != 2 or not codebook.isfinite().all():
            raise ValueError(
                "A codebook must be a finite matrix of shape (`codebook_size`, `codebook_dim`), got shape "
                f"{tuple(codebook.shape)}{' with NaN or infinite entries' if codebook.ndim == 2 else ''}."
            )
        sizes = dict(zip(("codebook_size", "codebook_dim"), codebook.shape, strict=True))
        for name, size in sizes.items():
            if self.config[name] not in (None, size):
                raise ValueError(f"`{name}` is {self.config[name]} in the config, got a codebook with {size}.")
        self.codebook = codebook.detach().float()
        self.register_to_config(**sizes)

    @property
    def config(self) -> CodebookConfig:
        """[`CodebookConfig`]: The settings, and the codes as an attribute."""
        config = CodebookConfig(super().config)
        config.codebook = self.codebook
        return config

    @overload
    @classmethod
    def from_config(
        cls, config: dict[str, Any], return_unused_kwargs: Literal[False] = False, **kwargs: Any
    ) -> Self: ...

    @overload
    @classmethod
    def from_config(
        cls, config: dict[str, Any], return_unused_kwargs: Literal[True], **kwargs: Any
    ) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    def from_config(cls, config: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """
        Make a scheduler from the settings of another, with a copy of its codes.

        Args:
            config ([`CodebookConfig`] or `dict[str, Any]`):
                `other.config`, or settings without codes.
            return_unused_kwargs (`bool`, *optional*, defaults to `False`):
                Whether to also return the keyword arguments that nothing consumed.
            kwargs (`dict[str, Any]`, *optional*):
                Settings that override the config's.

        Returns:
            The scheduler, or with `return_unused_kwargs=True` a tuple of it and the unused keyword arguments.

        Raises:
            ValueError: If `codebook_size` or `codebook_dim` is overridden by another size than that of the codes.
        """
        scheduler, unused_kwargs = super().from_config(config, return_unused_kwargs=True, **kwargs)
        if isinstance(config, CodebookConfig) and config.codebook is not None:
            scheduler._register_codebook(config.codebook.clone())
        return (scheduler, unused_kwargs) if return_unused_kwargs else scheduler

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str | None = None,
        return_unused_kwargs: Literal[False] = False,
        **kwargs: Any,
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str | None = None,
        *,
        return_unused_kwargs: Literal[True],
        **kwargs: Any,
    ) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        Load a scheduler from a local folder or a repository on the Hub: its config and its codebook.

        The codebook is read from `diffusion_pytorch_model.safetensors` or, where there is none, from the
        `scheduler_model.pth` of the original repositories, of which nothing but tensors is unpickled.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder, or the id of a repository on the Hub.
            subfolder (`str`, *optional*):
                Folder of the scheduler inside the repository.
            return_unused_kwargs (`bool`, *optional*, defaults to `False`):
                Whether to also return the keyword arguments that nothing consumed.
            kwargs (`dict[str, Any]`, *optional*):
                Settings that override the config's, and the Hub's `cache_dir`, `force_download`, `proxies`,
                `local_files_only`, `token` and `revision`.

        Returns:
            The scheduler, or with `return_unused_kwargs=True` a tuple of it and the unused keyword arguments.

        Raises:
            OSError: If the config is missing, or a codebook that the path needs.
            ValueError: If the codebook's file is damaged, or does not hold a codebook.
        """
        scheduler, unused_kwargs = super().from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, return_unused_kwargs=True, **kwargs
        )
        hub_names = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
        hub_kwargs = {name: kwargs[name] for name in hub_names if name in kwargs}
        scheduler._load_codebook(pretrained_model_name_or_path, subfolder=subfolder, **hub_kwargs)
        return (scheduler, unused_kwargs) if return_unused_kwargs else scheduler

    def _load_codebook(self, pretrained_model_name_or_path: str | os.PathLike, **hub_kwargs: Any) -> None:
        names = [self.weights_name, self.original_weights_name]
        try:
            file = find_file(pretrained_model_name_or_path, names, **hub_kwargs)
        except FileNotFoundError as error:
            if not self.needs_codebook and self.config.codebook_size is not None:
                return
            raise FileNotFoundError(f"The scheduler needs the codes of a codebook. {error}") from error
        is_original = file.name == self.original_weights_name
        name = "path.emb" if is_original else "codebook"
        codebook = load_tensors(file, names=[name])[name]
        try:
            # The original repositories store the codes before normalization
            register = self.set_codebook if is_original else self._register_codebook
            register(codebook)
        except ValueError as error:
            raise ValueError(f"Cannot read a codebook from {file}: {error}") from error

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """
        Save the config and the codebook, if there is one, to a folder that `from_pretrained` loads.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder to save to, created if it does not exist.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Whether to push the folder to the Hub afterwards.
            kwargs (`dict[str, Any]`, *optional*):
                As in [`~utils.PushToHubMixin.push_to_hub`].
        """
        if self.codebook is not None:
            save_tensors({"codebook": self.codebook}, os.path.join(save_directory, self.weights_name))
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
