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

"""Mistakes of a user in one line, instead of a traceback."""

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import NoReturn


MISTAKES = (ValueError, TypeError, OSError, ImportError)
"""The errors that a wrong argument, file, folder or name raises."""

DEBUG_VARIABLE = "TRL_UDM_DEBUG"
"""Environment variable that lets tracebacks through, set to anything."""


@contextlib.contextmanager
def mistakes_in_one_line(program: str) -> Iterator[None]:
    """
    A context in which a mistake of the user ends the process with one line on stderr and exit code 2. Warnings of what
    will change in a library, which the user of a command cannot heed, are left out.

    Args:
        program (`str`):
            What the line begins with.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except MISTAKES as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"{program}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from error


class ArgumentParser(argparse.ArgumentParser):
    """A parser that raises what is wrong with the command line as a `ValueError`."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. `{self.prog} --help` lists the arguments.")
