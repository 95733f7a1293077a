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
The console command `trl-udm`: one verb a file.

A verb is a module with a dataclass `Arguments` and a function `run`. Its docstring describes the verb. It is imported
when the verb is given, so that `trl-udm --help` is quick and needs no extra.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any


VERBS = {
    "evaluate": "draw images of a benchmark's prompts, score them, and write a report",
    "generate": "draw images of prompts",
    "merge": "add a LoRA to the weights of its base model",
    "memory": "compute the memory that training needs on a GPU",
    "serve-reward": "compute a reward for other processes, over HTTP",
    "env": "print versions, for bug reports",
}


def main(argv: Sequence[str] | None = None) -> None:
    """
    Runs the command.

    Args:
        argv (`Sequence[str]`, *optional*):
            Verb and flags. By default those of the process.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="trl-udm", description="Reinforcement learning for uniform discrete diffusion models."
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    for verb, text in VERBS.items():
        verbs.add_parser(verb, help=text, add_help=False)
    verb = parser.parse_args(argv[:1]).verb
    module = import_module(f".{verb.replace('-', '_')}", __name__)
    module.run(parse_arguments(verb, module.Arguments, argv[1:]))


def parse_arguments(verb: str, arguments_class: type, argv: Sequence[str]) -> Any:
    """
    Parses the flags of a verb with TRL's parser, which also reads them from a YAML file given as `--config`.

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
    """
    from trl.scripts.utils import TrlParser

    description = sys.modules[arguments_class.__module__].__doc__
    epilog = "`--config file.yaml` reads arguments from a YAML file. Flags override the file."
    parser = TrlParser(arguments_class, prog=f"trl-udm {verb}", description=description, epilog=epilog)
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
    return arguments


def _parse_json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"""must be a JSON object such as '{{"mode": "dense"}}', got {text!r}""")
    return value
