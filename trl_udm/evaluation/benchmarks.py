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

"""The benchmarks by name: a reward, and the prompts that it is measured on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..rewards.loading import load_reward
from ..worlds import VISUAL_WORLDS, World


@dataclass(frozen=True)
class Benchmark:
    """
    A reward, and the prompts that it is measured on.

    Args:
        name (`str`):
            Its name. Without a world, it is also the reward's name in [`~trl_udm.rewards.loading.load_reward`].
        task (`str`, *optional*):
            The task of the prompts, as [`~trl_udm.data.loading.load_prompts`] takes it.
        reward_options (`dict[str, Any]`, *optional*, defaults to `{}`):
            Options of the reward's constructor.
        world ([`~trl_udm.worlds.World`], *optional*):
            The world that is measured. It has its own reward and prompts.
        has_reward (`bool`, *optional*, defaults to `True`):
            Whether it has a reward. A benchmark of prompts alone keeps all of their columns, for any reward.

    Example:

    ```python
    >>> from trl_udm.evaluation.benchmarks import BENCHMARKS

    >>> benchmark = BENCHMARKS["shapes"]
    >>> benchmark.make_reward(benchmark.reward_options).__name__
    'geneval_accuracy'
    >>> len(benchmark.load_rows())
    120
    ```
    """

    name: str
    task: str | None = None
    reward_options: dict[str, Any] = field(default_factory=dict)
    world: World | None = None
    has_reward: bool = True

    def make_reward(self, options: dict[str, Any]) -> Callable[..., list[float | None]]:
        """
        Makes the reward.

        Args:
            options (`dict[str, Any]`):
                All options of its constructor.

        Returns:
            `Callable`: A reward function in TRL's contract.
        """
        return load_reward(self.name, options) if self.world is None else self.world.make_reward(**options)

    def load_rows(self, prompts: str | None = None) -> list[dict[str, Any]]:
        """
        Loads the prompts.

        Args:
            prompts (`str`, *optional*):
                A file, or a dataset on the Hub. By default the evaluation prompts of the world.

        Returns:
            `list[dict]`: Rows with `prompt` and the columns that the reward needs.

        Raises:
            ValueError: If there are no prompts and no world, or a row is malformed.
        """
        from ..data.dpg import load_dpg
        from ..data.loading import TASK_FEATURES, load_prompts

        if prompts is not None:
            if self.name == "dpg":
                return load_dpg(prompts)
            if not self.has_reward:
                return list(load_prompts(prompts))
            options = {"task": self.task} if self.world is None else self.world.prompt_options
            return list(load_prompts(prompts, **options).select_columns([*TASK_FEATURES[options.get("task")]]))
        if self.world is None:
            raise ValueError(f"`--prompts` is needed for {self.name}: a file or a dataset on the Hub.")
        return self.world.load_eval_rows()


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("geneval", task="geneval"),
        Benchmark("ocr", task="ocr"),
        Benchmark("dpg"),
        Benchmark("prompts", has_reward=False),
        Benchmark("drawbench", has_reward=False),
        Benchmark("pickscore", reward_options={"normalize": False}),  # the score that papers report
        *(Benchmark(name, world=world) for name, world in VISUAL_WORLDS.items()),
    )
}
"""All benchmarks by name."""


def make_reward(name: str, options: dict[str, Any]) -> Callable[..., list[float | None]]:
    """
    Makes a reward, as the benchmark of its name has it if there is one.

    Args:
        name (`str`):
            Name of a benchmark with a reward, or what [`~trl_udm.rewards.loading.load_reward`] takes.
        options (`dict[str, Any]`):
            All options of its constructor.

    Returns:
        `Callable`: A reward function in TRL's contract.
    """
    if name in BENCHMARKS and BENCHMARKS[name].has_reward:
        return BENCHMARKS[name].make_reward(options)
    return load_reward(name, options)
