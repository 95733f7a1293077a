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

import asyncio
import threading
import time

import pytest
import torch

from trl_udm.trainer.reward_runner import RewardRunner

from .test_udm_grpo_trainer import build_args, build_trainer


def trainer_with(tmp_path, reward_func, is_async, **kwargs):
    """`reward_func(completions, calls)` as a synchronous or asynchronous reward function, and the calls' sizes."""
    calls = []

    def count(prompts, completions, **kwargs):
        calls.append(len(prompts))
        return reward_func(completions, calls)

    async def count_async(prompts, completions, **kwargs):
        calls.append(len(prompts))
        if reward_func is hang:
            await asyncio.sleep(30)
        return reward_func(completions, calls)

    count_async.__name__ = "count"
    return build_trainer(tmp_path, reward_funcs=count_async if is_async else count, **kwargs), calls


def hang(completions, calls):
    time.sleep(30)


def fail_on_the_third(completions, calls):
    if len(completions) > 1 or len(calls) == 4:  # the call of all, and the third of those for one each
        raise ConnectionError("no route to the scorer")
    return [completion.count("a") / len(completion) for completion in completions]


@pytest.mark.parametrize("is_async", [False, True], ids=["synchronous", "asynchronous"])
def test_a_reward_function_that_hangs_ends_the_run(tmp_path, is_async):
    trainer, _ = trainer_with(tmp_path, hang, is_async, reward_timeout=0.2)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="'count' took longer than the 0.2 s of `reward_timeout` on 8 prompts"):
        trainer.train()
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("is_async", [False, True], ids=["synchronous", "asynchronous"])
def test_a_sample_whose_reward_fails_is_left_out_of_its_group(tmp_path, is_async, caplog):
    trainer, calls = trainer_with(tmp_path, fail_on_the_third, is_async, reward_error="none")
    compute_advantages, seen = trainer._compute_advantages, {}

    def record(rewards_per_func, *args):
        seen["rewards"] = rewards_per_func
        seen["advantages"] = compute_advantages(rewards_per_func, *args)[0]
        return compute_advantages(rewards_per_func, *args)

    trainer._compute_advantages = record
    trainer.train()
    assert calls == [8] + [1] * 8
    assert torch.isnan(seen["rewards"]).flatten().tolist() == [i == 2 for i in range(8)]
    rewards, advantages = seen["rewards"][[0, 1, 3], 0], seen["advantages"]
    expected = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)
    torch.testing.assert_close(advantages[[0, 1, 3]], expected)
    assert advantages[2] == 0
    assert trainer.state.log_history[0]["rewards/count/failed"] == 1 / 8
    assert "1 of 8 samples have no reward of 'count'" in caplog.text
    assert "'count' failed on 1 prompts" in caplog.text
    assert "ConnectionError('no route to the scorer')" in caplog.text


def test_a_call_that_takes_too_long_is_not_repeated(tmp_path):
    def hang_once(completions, calls):
        if len(calls) == 1:
            time.sleep(5)
        return [completion.count("a") / len(completion) for completion in completions]

    trainer, calls = trainer_with(
        tmp_path, hang_once, False, reward_error="none", reward_timeout=0.5, max_steps=2, max_failed_steps=1
    )
    trainer.train()
    assert calls == [8, 8]
    assert [log["rewards/count/failed"] for log in trainer.state.log_history[:2]] == [1.0, 0.0]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_steps_without_any_reward_end_the_run_in_the_end(tmp_path):
    def never(completions, calls):
        raise ConnectionError("no route to the scorer")

    trainer, _ = trainer_with(tmp_path, never, False, reward_error="none", max_steps=9, max_failed_steps=2)
    with pytest.raises(
        RuntimeError, match="for all 8 samples of a batch.* 3 times in a row, and `max_failed_steps` is 2"
    ):
        trainer.train()
    assert trainer.state.global_step == 2


def test_a_bounded_reward_function_runs_in_a_thread_and_its_own_error_is_named(tmp_path):
    threads = []

    def fail(completions, calls):
        threads.append(threading.current_thread())
        raise KeyError("missing")

    trainer, _ = trainer_with(tmp_path, fail, False, reward_timeout=30)
    with pytest.raises(RuntimeError, match="'count' failed on 8 prompts") as error:
        trainer.train()
    assert isinstance(error.value.__cause__, KeyError)
    assert threads[0] is not threading.main_thread()
    assert threads[0].daemon


def test_a_bounded_reward_function_that_exits_ends_the_run_at_once(tmp_path):
    def leave(completions, calls):
        raise SystemExit(7)

    trainer, _ = trainer_with(tmp_path, leave, False, reward_timeout=30)
    started = time.monotonic()
    with pytest.raises(SystemExit):
        trainer.train()
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("kwargs", [{}, {"async_rewards": True, "rollout_batch_size": 2}, {"reward_timeout": 30}])
@pytest.mark.parametrize("error", [SystemExit(7), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("is_nested", [False, True], ids=["itself", "in a task"])
def test_an_asynchronous_reward_function_that_exits_ends_the_run(tmp_path, error, kwargs, is_nested):
    async def exit_later():
        await asyncio.sleep(0)
        raise error

    async def leave(completions, **kwargs):
        await (asyncio.gather(exit_later(), asyncio.sleep(0)) if is_nested else exit_later())

    trainer = build_trainer(tmp_path, leave, reward_error="none", **kwargs)
    with pytest.raises(RuntimeError, match="The reward function 'leave' raised ") as raised:
        trainer.train()
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("kind", ["submitted", "bounded", "asynchronous"])
def test_a_thread_has_the_device_of_the_process(tmp_path, monkeypatch, kind):
    devices = threading.local()  # as in CUDA, each thread begins on device 0
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: getattr(devices, "index", 0))
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: setattr(devices, "index", index))
    torch.accelerator.set_device_index(3)
    seen = []

    def device(prompts, **kwargs):
        assert threading.current_thread() is not threading.main_thread()
        seen.append(torch.accelerator.current_device_index())
        return [0.0] * len(prompts)

    async def device_async(prompts, **kwargs):
        return device(prompts)

    if kind == "asynchronous":
        trainer = build_trainer(tmp_path, device_async)
        trainer._calculate_rewards([{"prompt": "a"}] * 2, ["a"] * 2, ["a"] * 2, [[2]] * 2)
    else:
        runner = RewardRunner(device, timeout=30 if kind == "bounded" else None)
        if kind == "submitted":
            runner.start()
        runner(prompts=["a"], log_metric=print, log_extra=print)
    assert seen == [3]


def test_what_a_failed_call_logged_is_dropped(tmp_path):
    def fail_once(prompts, completions, log_metric, **kwargs):
        log_metric("size", len(prompts))
        if len(prompts) > 1:
            raise ConnectionError("no route to the scorer")
        return [1.0]

    trainer = build_trainer(tmp_path, fail_once, reward_error="none")
    trainer.train()
    assert trainer.state.log_history[0]["size"] == 1.0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("reward_timeout", 0, "`reward_timeout` must be > 0 or None, got 0"),
        ("reward_error", "zero", "`reward_error` must be 'raise' or 'none', got 'zero'"),
        ("max_failed_steps", -1, "`max_failed_steps` must be >= 0, got -1"),
    ],
)
def test_options_of_failures_are_checked(tmp_path, name, value, message):
    with pytest.raises(ValueError, match=message):
        build_args(tmp_path, **{name: value})
