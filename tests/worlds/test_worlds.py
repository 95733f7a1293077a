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

import subprocess
import sys
from pathlib import Path

import pytest

from trl_udm import worlds
from trl_udm.evaluation.benchmarks import BENCHMARKS
from trl_udm.rewards.geneval import GenEvalReward
from trl_udm.worlds import VISUAL_WORLDS, WORLDS


def test_every_folder_is_a_registered_world():
    folders = {path.parent.name for path in Path(worlds.__file__).parent.glob("*/__init__.py")}
    assert folders == set(WORLDS)
    assert [name for name in WORLDS if name not in VISUAL_WORLDS] == ["countdown", "sudoku", "sums"]


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_a_world_has_a_checkpoint_a_reward_and_prompts(world):
    assert (world.checkpoint_path / "model_index.json").is_file()
    assert world.checkpoint_path.parent.name == world.name
    assert callable(world.make_reward())
    rows = world.load_eval_rows()
    assert rows and all(row["prompt"] for row in rows)


@pytest.mark.parametrize("name", VISUAL_WORLDS)
def test_a_visual_world_is_a_benchmark(name, tmp_path):
    benchmark = BENCHMARKS[name]
    rows = benchmark.load_rows()
    assert rows == WORLDS[name].load_eval_rows()
    assert benchmark.make_reward(benchmark.reward_options).__name__ == WORLDS[name].make_reward().__name__
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a card with the word "SUN"\n')
    columns = {"moving": {}, "words": {"target_text": "SUN"}}
    if name in columns:
        assert benchmark.load_rows(str(prompts)) == [{"prompt": 'a card with the word "SUN"', **columns[name]}]
    else:
        with pytest.raises(ValueError, match="Row 0 .* `tag` must be one of"):
            benchmark.load_rows(str(prompts))


def test_options_reach_the_reward():
    reward = WORLDS["shapes"].make_reward(mode="dense", clamp=False)
    assert isinstance(reward, GenEvalReward) and (reward.mode, reward.clamp) == ("dense", False)
    assert BENCHMARKS["pickscore"].reward_options == {"normalize": False}


def test_a_benchmark_without_prompts_of_its_own_asks_for_them():
    with pytest.raises(ValueError, match="`--prompts` is needed for geneval: a file or a dataset on the Hub."):
        BENCHMARKS["geneval"].load_rows()


def test_the_registry_loads_no_world():
    code = """
import sys
import trl_udm.worlds
assert trl_udm.worlds.WORLDS["shapes"].checkpoint_path.is_dir()
print(*sorted({"torch", "numpy", "PIL", "trl_udm.worlds.words"} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
