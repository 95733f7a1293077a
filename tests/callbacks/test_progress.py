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

import time

import pytest
from transformers import ProgressCallback, TrainerControl, TrainerState

from trl_udm import CompactProgressCallback
from trl_udm.callbacks.progress import format_logs

from ..trainer.test_udm_grpo_trainer import build_trainer, count_a


LOGS = {
    "loss": -1.7e-08,
    "rewards/geneval_reward/mean": 0.7747,
    "rewards/geneval_reward/std": 0.3376,
    "reward": 0.7747,
    "reward_std": 0.3376,
    "frac_reward_zero_std": 0.0,
    "geneval/colors": 0.8333,
    "geneval/counting": 0.0,
    "images/saturation": 0.0952,
    "kl": 0.0,
    "entropy": 1.522,
    "clip_ratio/low_mean": 0.0,
    "frac_skipped_steps": 0.0,
    "epoch": 0.03,
}


def test_a_log_is_a_line_and_groups_below_it():
    assert format_logs(LOGS, 3, 200, 3700.0).split("\n") == [
        "step 3/200 | reward 0.775 ± 0.338 | entropy 1.52 | 1 h 02 min left",
        "    update: loss -1.7e-08 | geneval: colors 0.833, counting 0 | images: saturation 0.0952",
    ]
    long = format_logs({**LOGS, **{f"geneval/{i}": 0.5 for i in range(40)}}, 3, 200)
    assert all(len(line) <= 119 for line in long.split("\n"))


def test_what_is_zero_by_design_is_shown_when_it_is_not_zero():
    logs = {**LOGS, "clip_ratio/low_mean": 0.25, "frac_skipped_steps": 0.5, "kl": 1e-5, "rewards/a/failed": 0.5}
    text = format_logs(logs, 3, 200)
    assert "| kl 1e-05" in text and "| frac_skipped_steps 0.5" in text
    assert "clip_ratio: low_mean 0.25" in text and "rewards/a: failed 0.5" in text
    assert "left" not in text


def test_several_rewards_are_shown_beside_their_sum():
    logs = {"reward": 1.5, "reward_std": 0.1, "rewards/a/mean": 1.0, "rewards/a/std": 0.2, "rewards/b/mean": 0.5}
    lines = ["step 1/2 | reward 1.5 ± 0.1", "    rewards: a 1 ± 0.2, b 0.5"]
    assert format_logs(logs, 1, 2).split("\n") == lines


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        ({"eval_reward": 0.5, "eval_runtime": 2.0}, "eval at step 4, in 2 s | reward 0.5"),
        ({"eval_hard_reward": None, "eval_hard_runtime": 60.0}, "eval_hard at step 4, in 1 min | reward None"),
        ({"train_runtime": 7200.0, "train_loss": 0.25, "total_flos": 0.0}, "4 steps in 2 h 00 min"),
    ],
)
def test_evaluations_and_the_summary_are_lines_too(logs, line):
    assert format_logs(logs, 4, 8) == line


def test_a_run_prints_short_lines_and_logs_everything(tmp_path, capsys):
    trainer = build_trainer(tmp_path, count_a, max_steps=2, disable_tqdm=False)
    assert trainer.pop_callback(ProgressCallback) is not None
    trainer.add_callback(CompactProgressCallback)
    trainer.train()
    printed = capsys.readouterr().out
    assert "step 1/2 | reward" in printed and "step 2/2 | reward" in printed and "2 steps in " in printed
    assert "{" not in printed and "clip_ratio" not in printed and " | 0 s left\n" in printed
    assert trainer.state.log_history[0]["clip_ratio/low_mean"] == 0.0


def test_the_time_that_is_left_counts_the_steps_of_this_run(tmp_path, capsys):
    trainer = build_trainer(tmp_path, count_a)
    callback, control = CompactProgressCallback(), TrainerControl()
    state = TrainerState(global_step=90, max_steps=100, is_world_process_zero=True)  # a resumed run
    callback.on_train_begin(trainer.args, state, control)
    callback._started = time.perf_counter() - 600
    state.global_step = 95
    callback.on_log(trainer.args, state, control, {"step_time": 120.0})
    callback.on_train_end(trainer.args, state, control)
    assert capsys.readouterr().out == "step 95/100 | 10 min left\n    speed: step_time 120\n"
