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

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from .mistakes import DEBUG_VARIABLE, ArgumentParser, mistakes_in_one_line


VERBS = {
    "evaluate": "draw images of a benchmark's prompts, score them, and write a report",
    "compare": "compare two evaluations of the same prompts, and show their images side by side",
    "generate": "draw images of prompts",
    "demo": "open a page that draws prompts, with one model or two side by side",
    "merge": "add a LoRA to the weights of its base model",
    "memory": "compute the memory that training needs on a GPU",
    "serve-reward": "compute a reward for other processes, over HTTP",
    "env": "print versions, for bug reports",
}


def main(argv: Sequence[str] | None = None) -> None:
    """
    Runs the command. A mistake of the user ends it with one line on stderr and exit code 2.

    Args:
        argv (`Sequence[str]`, *optional*):
            Verb and flags. By default those of the process. `--debug` shows the traceback of a mistake.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--debug" in argv:
        argv.remove("--debug")
        os.environ[DEBUG_VARIABLE] = "1"
    if "" not in sys.path:  # a console command does not look for modules in the working folder, as `python -m` does
        sys.path.insert(0, "")
    with mistakes_in_one_line("trl-udm"):
        parser = ArgumentParser(
            prog="trl-udm",
            description="Reinforcement learning for uniform discrete diffusion models.",
            epilog="`trl-udm VERB --help` lists the flags of a verb. With `--debug` a mistake shows its traceback.",
        )
        parser.add_argument("--version", action="version", version=f"trl-udm {__version__}")
        verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
        for name, text in VERBS.items():
            verbs.add_parser(name, help=text, add_help=False)
        verb = parser.parse_args(argv[:1]).verb
    with mistakes_in_one_line(f"trl-udm {verb}"):
        from .parser import parse_arguments

        module = import_module(f".{verb.replace('-', '_')}", __name__)
        module.run(parse_arguments(verb, module.Arguments, argv[1:]))
