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
Downloads the wheels that a machine without network needs beside PyTorch, for `run.sh`.

    make gpu-wheels GPU_PYTHON=3.12

The packages are those of this environment, in its versions, that the library, its tests and its examples need: without
what PyTorch needs itself, without those that the machine has, and without what is of no use offline. The files are as
published. It is an error if they take more than `--max_mib`.
"""

import argparse
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


FOLDER = Path(__file__).parent / "wheels"
NEEDED = ("trl-udm[geneval]", "pytest")
# The checkout itself, fonts for Chinese labels, and downloads from the Hub
NEVER_NEEDED = {"trl-udm", "zhplot", "hf-xet"}


def find_packages(names: list[str], python: str) -> dict[str, str]:
    """The versions of packages and of all that they need, on Linux with this version of Python."""
    system = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    system |= {"python_version": python, "python_full_version": f"{python}.0"}
    packages: dict[str, str] = {}
    seen, waiting = set(), [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                packages[name] = version(name)
            except PackageNotFoundError:  # such as those of CUDA, for a PyTorch that was built for a CPU
                continue
            needed = [Requirement(text) for text in requires(name) or ()]
            waiting += [one for one in needed if one.marker is None or one.marker.evaluate({**system, "extra": extra})]
    return packages


def download(packages: dict[str, str], python: str) -> None:
    """Fills the folder with wheels of these versions, and a list of them for pip."""
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.iterdir():
        path.unlink()
    pins = FOLDER / "requirements.txt"
    pins.write_text("".join(f"{name}=={packages[name]}\n" for name in sorted(packages)))
    # pip takes the name of a platform as it is, and does not know that a later one runs wheels of an earlier one
    platforms = ["manylinux1", "manylinux2010", "manylinux2014", *(f"manylinux_2_{minor}" for minor in range(5, 36))]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += [
        "--python-version",
        python,
        "--implementation",
        "cp",
        "--dest",
        str(FOLDER),
        "--requirement",
        str(pins),
    ]
    for platform in platforms:
        command += ["--platform", f"{platform}_x86_64"]
    subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    this = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--python", default=this, help="version of Python on the machine")
    parser.add_argument("--has", nargs="*", default=[], help="packages that the machine has, beside PyTorch")
    parser.add_argument("--max_mib", type=float, default=60)
    args = parser.parse_args()
    present = find_packages(["torch", *args.has], args.python)
    packages = find_packages([*NEEDED], args.python)
    names = packages.keys() - present.keys() - NEVER_NEEDED
    download({name: packages[name] for name in names}, args.python)
    sizes = {path.name: path.stat().st_size / 2**20 for path in FOLDER.glob("*.whl")}
    total = sum(sizes.values())
    largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
    print(f"{FOLDER}: {len(sizes)} wheels for Python {args.python}, {total:.1f} MiB. The largest are")
    print("\n".join(f"{sizes[name]:6.1f} MiB  {name}" for name in largest))
    if total > args.max_mib:
        raise SystemExit(f"{total:.1f} MiB are more than the {args.max_mib:g} of `--max_mib`. Name more in `--has`.")


if __name__ == "__main__":
    main()
