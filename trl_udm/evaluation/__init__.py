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

"""Evaluation: draws and scores a benchmark's images, writes reports, compares a model before and after training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .images import evaluate as evaluate
    from .images import generate_images as generate_images
    from .images import score_images as score_images
    from .images import summarize as summarize
    from .report import write_report as write_report

__all__ = ["evaluate", "generate_images", "score_images", "summarize", "write_report"]


def __getattr__(name: str) -> Any:  # imported when first asked for, as in `trl_udm`
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".report" if name == "write_report" else ".images", __name__), name)
