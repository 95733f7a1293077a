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

"""The old name of [`trl_udm.worlds.sums`], until version 0.3."""

import sys
import warnings

from .worlds import sums
from .worlds.sums import problems


warnings.warn(
    "`trl_udm.arithmetic` is now `trl_udm.worlds.sums`. The old name will be removed in version 0.3.",
    FutureWarning,
    stacklevel=2,
)
# The import system then gives the new modules to whoever imports the old names
sys.modules[__name__] = sums
sys.modules[f"{__name__}.problems"] = problems
