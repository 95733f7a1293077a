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

"""The parser of flags and of files of flags, and checks of their values."""

import argparse
import dataclasses
import inspect
import json
import math
import os
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from trl.scripts.utils import TrlParser

from .mistakes import ArgumentParser


class Parser(ArgumentParser, TrlParser):
    """TRL's parser, which also reads `--config file.yaml`. What is wrong is raised as a `ValueError`."""

    def parse_args_and_config(self, args: Sequence[str], **kwargs: Any) -> tuple[Any, ...]:
        args = list(args)
        if args[-1:] == ["--config"]:
            self.error("argument --config: expected one argument")
        try:
            return super().parse_args_and_config(args, **kwargs)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"The file of `--config` is not valid YAML: {error}") from error


def parse_arguments(verb: str, arguments_class: type, argv: Sequence[str]) -> Any:
    """
    Parses the flags of a verb.

    TRL's parser leaves out the fields of a dataclass that have `init=False`. Here they are the positional arguments.

    Args:
        verb (`str`):
            The verb.
        arguments_class (`type`):
            Its dataclass.
        argv (`Sequence[str]`):
            The flags.

    Returns:
        `arguments_class`: The parsed arguments.

    Raises:
        ValueError: If a flag is unknown, missing or has a wrong value.
    """
    description = sys.modules[arguments_class.__module__].__doc__
    epilog = "`--config file.yaml` reads arguments from a YAML file. Flags override the file."
    parser = Parser(arguments_class, prog=f"trl-udm {verb}", description=description, epilog=epilog)
    parser.register("type", dict, _parse_json_object)
    positional = [field for field in dataclasses.fields(arguments_class) if not field.init]
    for field in positional:
        parser.add_argument(field.name, **field.metadata)
    for field in dataclasses.fields(arguments_class):
        if field.type == bool | None:  # TRL's parser adds the `--no` form only to what is `True` by default
            off = {"action": "store_false", "default": argparse.SUPPRESS, "help": f"The opposite of --{field.name}."}
            parser.add_argument(f"--no-{field.name}", dest=field.name, **off)
    arguments, *namespace, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    for field in positional:
        setattr(arguments, field.name, getattr(namespace[0], field.name))
    _check_types(arguments)
    return arguments


def check_range(arguments: Any, **ranges: tuple[float, float]) -> None:
    """
    Checks that arguments are in their ranges, where they are given.

    Args:
        arguments (`Any`):
            Dataclass with the arguments.
        ranges (`tuple[float, float]`):
            The least and the greatest value of each.

    Raises:
        ValueError: If one is not.
    """
    for name, (least, greatest) in ranges.items():
        value = getattr(arguments, name)
        is_infinite = value in (-math.inf, math.inf)
        if value is not None and (is_infinite or not least <= value <= greatest):  # NaN is in no range
            limits = f">= {least}" if greatest == math.inf else f"in [{least}, {greatest}]"
            raise ValueError(f"`--{name}` must be {limits}, got {value}.")


def check_output_dir(output_dir: Path) -> None:
    """Raises an `OSError` if a folder cannot be made or written to. It is not made yet."""
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"`--output_dir` must be a folder, got {output_dir}: {existing} is a file.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"`--output_dir` must be writable, got {output_dir}: {existing} is not.")


def _check_types(arguments: Any) -> None:
    for name, annotation in typing.get_type_hints(type(arguments)).items():
        value = getattr(arguments, name)
        if not _fits(value, annotation):  # can only come from a YAML file, whose values the parser does not check
            expected = inspect.formatannotation(annotation).replace("typing.", "")
            raise ValueError(f"`{name}` must be {expected}, got {value!r}.")


def _fits(value: Any, annotation: Any) -> bool:
    options = typing.get_args(annotation)
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in options)
    if typing.get_origin(annotation) is typing.Literal:
        return value in options
    if typing.get_origin(annotation) is list:
        return isinstance(value, list) and all(_fits(item, options[0]) for item in value)
    if isinstance(value, bool):
        return annotation is bool
    return isinstance(value, (int, float) if annotation is float else annotation)


def _parse_json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"""must be a JSON object such as '{{"mode": "dense"}}', got {text!r}""")
    return value
