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

import pytest
import torch
from accelerate import PartialState
from transformers import TrainerControl, TrainerState

from trl_udm import GuardrailCallback, UDMGRPOTrainer

from ..trainer.test_udm_grpo_trainer import PROMPTS, build_args, build_trainer, count_a, generate_batch
from ..trainer.toy_text_family import build_toy_text_pipeline


def feed(callback, **curves):
    """Logs the curves, step by step, until the callback asks to stop; returns the number of steps."""
    PartialState()  # as in a trainer
    state, control = TrainerState(), TrainerControl()
    for step, values in enumerate(zip(*curves.values(), strict=True), start=1):
        logs = dict(zip(curves, values, strict=True))
        state.global_step = step
        state.log_history.append({**logs, "step": step})
        callback.on_log(None, state, control, logs)
        if control.should_training_stop:
            return step
    return step


@pytest.mark.parametrize(
    ("name", "bound", "good", "bad"),
    [("kl", {"max_kl": 1.0}, 0.1, 1.5), ("entropy", {"min_entropy": 0.3}, 0.5, 0.1)]
    + [("diversity", {"min_diversity": 0.2}, 0.6, 0.1)],
)
def test_an_alarm_is_raised_once_where_a_mean_passes_its_bound(caplog, name, bound, good, bad):
    callback = GuardrailCallback(**bound, num_smoothed=2)
    values = [good, bad, good, bad, bad, bad, bad]  # the mean of two is beyond the bound from the fifth on
    assert feed(callback, reward=[0.0] * 7, **{name: values}) == 7
    assert callback.alarms == {name: 5}
    assert caplog.text.count("Alarm at step 5: ") == 1 and f"`{name}` is" in caplog.text


def test_an_alarm_stops_the_training_when_asked():
    callback = GuardrailCallback(max_kl=1.0, num_smoothed=1, stop=True)
    assert feed(callback, reward=[0.0] * 9, kl=[0.5] * 4 + [2.0] * 5) == 5


def noisy(values):
    return [value + 0.01 * (-1) ** i for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("reward", "watched", "is_hacked"),
    [
        ([0.1] * 10 + [0.5] * 10, [0.9] * 10 + [0.5] * 10, True),
        ([0.1] * 10 + [0.5] * 10, [0.5] * 10 + [0.9] * 10, False),
        ([0.5] * 10 + [0.1] * 10, [0.9] * 10 + [0.5] * 10, False),
        ([0.1] * 10 + [0.5] * 10, [0.5] * 20, False),
    ],
)
def test_hacking_is_a_reward_that_rises_while_the_watched_one_falls(reward, watched, is_hacked):
    callback = GuardrailCallback(watched="rewards/true/mean", window=5)
    feed(callback, **{"reward": noisy(reward), "rewards/true/mean": noisy(watched)})
    assert ("hacking" in callback.alarms) is is_hacked
    if is_hacked:
        assert 10 < callback.alarms["hacking"] <= 15


def test_logs_in_which_the_watched_reward_abstained_are_passed_over():
    reward, watched = noisy([0.1] * 10 + [0.5] * 10), noisy([0.9] * 10 + [0.5] * 10)
    callback = GuardrailCallback(watched="rewards/true/mean", window=5)
    feed(callback, **{"reward": [0.0, *reward], "rewards/true/mean": [None, *watched]})
    assert "hacking" in callback.alarms


def test_logs_without_a_value_are_skipped():
    """TRL logs None where all values of a step are NaN."""
    callback = GuardrailCallback(max_kl=1.0, num_smoothed=2, watched="rewards/true/mean", window=5)
    reward, watched = noisy([0.1] * 10 + [0.5] * 10), noisy([0.9] * 10 + [0.5] * 10)
    feed(
        callback,
        **{"reward": [None, *reward, None], "kl": [*[0.5] * 20, 2.0, None], "rewards/true/mean": [0.0, *watched, 0.0]},
    )
    assert callback.alarms.keys() == {"kl", "hacking"}


def test_a_watched_metric_may_be_missing_in_some_logs():
    """A function logs `geneval/<tag>` only where a batch has the tag."""
    state, control = TrainerState(), TrainerControl()
    callback = GuardrailCallback(watched="geneval/counting", window=2)
    for logs in ({"reward": 0.1, "geneval/counting": 0.5}, {"reward": 0.2}):
        state.log_history.append(logs)
        callback.on_log(None, state, control, logs)
    assert not callback.alarms


def test_a_hacked_reward_stops_a_run(tmp_path):
    def hackable(prompts, completions, **kwargs):
        return count_a(prompts, completions)

    def true(prompts, completions, **kwargs):
        return [len(set(completion)) / len(completion) for completion in completions]

    callback = GuardrailCallback(watched="rewards/true/mean", window=4, stop=True)
    trainer = UDMGRPOTrainer(
        build_toy_text_pipeline(),
        [hackable, true],
        build_args(
            tmp_path, max_steps=40, per_device_train_batch_size=96, num_generations=8, reward_weights=[1.0, 0.0]
        ),
        train_dataset=PROMPTS,
        callbacks=[callback],
    )
    trainer.train()
    assert callback.alarms == {"hacking": trainer.state.global_step}
    assert 8 <= trainer.state.global_step < 40


def test_the_diversity_of_groups_is_logged(tmp_path):
    trainer = build_trainer(tmp_path, num_generations=4)
    _, batch = generate_batch(trainer)
    samples = batch["completion_ids"][::3].unflatten(0, (2, 4))  # 2 groups of 4 samples, 3 rows each
    pairs = [(i, j) for i in range(4) for j in range(4) if i < j]
    expected = torch.stack([(samples[:, i] != samples[:, j]).float().mean() for i, j in pairs]).mean().item()
    assert trainer._metrics["train"]["diversity"] == [pytest.approx(expected)]


def test_numbers_out_of_range_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match="`window` must be > 1, got 1"):
        GuardrailCallback(window=1)
    with pytest.raises(ValueError, match="`num_smoothed` must be > 0, got 0"):
        GuardrailCallback(num_smoothed=0)
    with pytest.raises(ValueError, match=r"`watched` must be one of \['kl', 'reward'\], got 'rewards/true/mean'"):
        feed(GuardrailCallback(watched="rewards/true/mean"), reward=[0.0], kl=[0.0])
