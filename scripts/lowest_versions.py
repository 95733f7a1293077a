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
Prints the lower bounds of pyproject.toml as constraints for pip.

    python scripts/lowest_versions.py > lowest.txt
    pip install -c lowest.txt -e ".[test]"

pip refuses a bound that another package overrules, so that each bound can be installed. PyTorch is left out: its
version depends on the machine.
"""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for lines in (project["dependencies"], *project["optional-dependencies"].values()):
        for requirement in map(Requirement, lines):
            for bound in requirement.specifier:
                if bound.operator == ">=" and requirement.name != "torch":
                    print(f"{requirement.name}=={bound.version}")
