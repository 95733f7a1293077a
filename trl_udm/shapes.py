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

"""The old name of [`trl_udm.worlds.shapes`], until version 0.3."""

import sys
import warnings

from .worlds.shapes import CHECKPOINT_PATH, detector, prompts, world


warnings.warn("`trl_udm.shapes` is now `trl_udm.worlds.shapes`.", FutureWarning, stacklevel=2)
sys.modules |= {
    f"{__name__}.{name}": module for name, module in {"detector": detector, "prompts": prompts, "world": world}.items()
}

__all__ = ["CHECKPOINT_PATH", "detector", "prompts", "world"]
