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

import itertools
import re

import pytest

from tests.trainer.test_udm_grpo_trainer import build_args


def is_valid(num_processes, batch_size, num_steps, num_generations, num_timesteps):
    """The rule, from the samples' side: whole samples a process, whole groups over all of them."""
    num_rows = batch_size * num_steps
    num_samples, num_cut_rows = divmod(num_rows, num_timesteps)
    return num_cut_rows == 0 and (num_samples * num_processes) % num_generations == 0


@pytest.mark.parametrize("num_processes", [2, 3])
def test_a_geometry_is_accepted_wherever_the_arithmetic_can_be_met(tmp_path, monkeypatch, num_processes):
    args = build_args(tmp_path)
    args.generation_batch_size = None
    monkeypatch.setenv("WORLD_SIZE", str(num_processes))
    num_accepted = num_refused = 0
    for batch_size, num_steps, num_generations, num_timesteps in itertools.product(
        range(1, 19), (1, 2), (2, 3, 4, 6), (1, 2, 3)
    ):
        args.per_device_train_batch_size, args.steps_per_generation = batch_size, num_steps
        args.num_generations, args.num_train_timesteps = num_generations, num_timesteps
        if is_valid(num_processes, batch_size, num_steps, num_generations, num_timesteps):
            args._check_batch_geometry()
            num_accepted += 1
            continue
        num_refused += 1
        with pytest.raises(ValueError, match="must hold whole groups") as refusal:
            args._check_batch_geometry()
        sizes, groups = re.search(
            r"`per_device_train_batch_size`: (.*); nearest valid `num_generations`: (.*)\.", str(refusal.value)
        ).groups()
        valid_sizes = [
            size for size in range(1, 200) if is_valid(num_processes, size, num_steps, num_generations, num_timesteps)
        ]
        smaller = [size for size in valid_sizes if size < batch_size]
        larger = [size for size in valid_sizes if size > batch_size]
        assert sizes == " or ".join(str(size) for size in (*smaller[-1:], *larger[:1]))
        for size in re.findall(r"\d+", groups):
            assert is_valid(num_processes, batch_size, num_steps, int(size), num_timesteps)
    assert num_accepted > 100 and num_refused > 100


@pytest.mark.parametrize(
    ("num_processes", "batch_size", "num_generations", "message"),
    [
        (
            2,
            8,
            4,
            r"16 rows .* 8 \* 1 steps \* 2 processes.* Nearest .*: 6 or 12; nearest valid `num_generations`: none",
        ),
        (
            3,
            12,
            5,
            r"36 rows .* 12 \* 1 steps \* 3 processes.* Nearest .*: 15; nearest valid `num_generations`: 4 or 6",
        ),
    ],
)
def test_a_refused_geometry_names_the_nearest_valid_settings(
    tmp_path, monkeypatch, num_processes, batch_size, num_generations, message
):
    args = build_args(tmp_path)
    args.generation_batch_size = None
    args.per_device_train_batch_size, args.num_generations = batch_size, num_generations
    monkeypatch.setenv("WORLD_SIZE", str(num_processes))
    with pytest.raises(ValueError, match=message):
        args._check_batch_geometry()
