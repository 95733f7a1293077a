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

import gc
import threading
import time

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Qwen3Config, Qwen3ForSequenceClassification

from trl_udm import UDMGRPOConfig, UDMGRPOTrainer
from trl_udm.trainer.reward_runner import RewardRunner

from .test_udm_grpo_trainer import LORA, PROMPTS, build_args, build_trainer, count_a, generate_batch
from .toy_text_family import build_toy_text_pipeline


NUM_SAMPLES = 8  # of a generation batch: 24 rows, 3 timesteps
PATIENCE = 30  # seconds after which what does not come is taken never to come


async def count_b(prompts, completions, **kwargs):
    return [None if "c" in completion else completion.count("b") for completion in completions]


def is_long(prompts, completions, **kwargs):
    return [float(len(prompt) > 2) for prompt in prompts]


@pytest.fixture
def reward_model(tmp_path):
    """A tiny reward model, loaded from a folder, where TRL finds its tokenizer."""
    pipeline = build_toy_text_pipeline()
    folder = str(tmp_path / "reward-model")
    pipeline.tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
    )
    config.num_labels = 1
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder)


def run(output_dir, reward_funcs, **kwargs):
    """Weights and logs of a short run, without what measures time."""
    trainer = UDMGRPOTrainer(
        build_toy_text_pipeline(),
        reward_funcs,
        build_args(output_dir, **{"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2, **kwargs}),
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS,
        eval_reward_funcs=is_long,
    )
    trainer.train()
    logs = [
        {name: value for name, value in log.items() if not name.endswith(("runtime", "per_second", "step_time"))}
        for log in trainer.state.log_history
    ]
    return trainer.model.state_dict(), logs


class Stages:
    """How far a generation batch of a trainer is: micro-batches that were begun, and whether the reference scores."""

    def __init__(self, trainer, monkeypatch):
        self.changed = threading.Condition()
        self.num_begun = 0
        self.is_scoring = False
        sample_tokens = trainer.pipeline.sample_tokens

        def sample(*args, **kwargs):
            self.set(num_begun=self.num_begun + 1)
            return sample_tokens(*args, **kwargs)

        monkeypatch.setattr(trainer.pipeline, "sample_tokens", sample)
        for module in trainer.ref_model.modules():
            module.register_forward_pre_hook(lambda *args: self.set(is_scoring=True))

    def set(self, **kwargs):
        with self.changed:
            vars(self).update(kwargs)
            self.changed.notify_all()

    def wait(self, is_reached, timeout):
        with self.changed:
            return self.changed.wait_for(lambda: is_reached(self), timeout)


def build_waiting_trainer(tmp_path, monkeypatch, is_async, timeout, **kwargs):
    """
    A trainer with four micro-batches of two samples, and the reward functions' calls. From the second call on, a call
    ends only when the next micro-batch is begun, or, after the last, when the reference scores.
    """
    calls = []

    def wait(completions):
        calls.append(len(completions))
        number = len(calls)
        if number > 1 and not stages.wait(
            lambda stages: stages.is_scoring if number == 4 else stages.num_begun > number, timeout
        ):
            raise RuntimeError(f"call {number} waited in vain")
        return [float(completion.count("a")) for completion in completions]

    def waiting(prompts, completions, **kwargs):
        return wait(completions)

    async def waiting_async(prompts, completions, **kwargs):
        return wait(completions)

    trainer = build_trainer(tmp_path, waiting_async if is_async else waiting, rollout_batch_size=2, **kwargs)
    stages = Stages(trainer, monkeypatch)
    return trainer, calls


# --- The same runs ---


@pytest.mark.parametrize("rollout_batch_size", [None, 1, 3])
def test_a_run_is_the_same_bit_by_bit(tmp_path, rollout_batch_size, reward_model):
    kwargs = {"rollout_batch_size": rollout_batch_size, "per_device_eval_batch_size": 4}
    reward_funcs = [count_a, count_b, reward_model]
    weights, logs = run(tmp_path / "one", reward_funcs, **kwargs)
    async_weights, async_logs = run(tmp_path / "two", reward_funcs, async_rewards=True, **kwargs)
    assert async_logs == logs
    assert {"rewards/count_b/mean", "reward", "kl"} <= logs[0].keys()
    assert any("eval_rewards/is_long/mean" in log for log in logs)
    assert weights.keys() == async_weights.keys()
    assert all(torch.equal(weights[name], async_weights[name]) for name in weights)


def test_a_run_with_several_updates_a_rollout_is_the_same_after_it_is_resumed(tmp_path):
    kwargs = {"max_steps": 4, "num_iterations": 2, "rollout_batch_size": 3, "save_strategy": "steps", "save_steps": 3}
    trainers = [
        build_trainer(tmp_path / name, [count_a, count_b], peft_config=LORA, async_rewards=True, **kwargs)
        for name in ("unbroken", "resumed")
    ]
    trainers[0].train()
    trainers[1].train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-3"))
    expected = trainers[0].model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trainers[1].model.state_dict().items())


# --- Calls ---


def test_calls_are_of_micro_batches_in_order_with_the_arguments_of_one_call(tmp_path):
    seen = {False: [], True: []}

    def build(is_async_rewards):
        def record(**kwargs):
            state = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()
            seen[is_async_rewards].append((kwargs, state, threading.current_thread()))
            return [1.0] * len(kwargs["prompts"])

        return build_trainer(
            tmp_path, record, rollout_batch_size=3, bf16=True, use_cpu=True, async_rewards=is_async_rewards
        )

    for is_async_rewards in (False, True):
        torch.manual_seed(0)
        generate_batch(build(is_async_rewards))
    ((expected, state, thread),) = seen[False]
    assert thread is threading.main_thread()
    parts, states, threads = zip(*seen[True], strict=True)
    assert [len(part["prompts"]) for part in parts] == [3, 3, 2]
    assert set(states) == {state}
    assert len(set(threads)) == 1 and threads[0].daemon and threads[0] is not threading.main_thread()
    assert threads[0].name == "record"
    for part in parts:
        assert part.keys() == expected.keys()
    for name in ("prompts", "completions", "completion_ids", "target"):
        assert [value for part in parts for value in part[name]] == expected[name]


@pytest.mark.parametrize("is_async", [False, True], ids=["synchronous", "asynchronous"])
def test_a_function_is_never_called_twice_at_the_same_time(tmp_path, is_async):
    running, most = [], []

    def work(completions):
        running.append(completions)
        most.append(len(running))
        time.sleep(0.02)
        running.remove(completions)
        return [1.0] * len(completions)

    def slow(prompts, completions, **kwargs):
        return work(completions)

    async def slow_async(prompts, completions, **kwargs):
        return work(completions)

    trainer = build_trainer(tmp_path, slow_async if is_async else slow, rollout_batch_size=1, async_rewards=True)
    generate_batch(trainer)
    assert most == [1] * NUM_SAMPLES


@pytest.mark.parametrize("is_async", [False, True], ids=["synchronous", "asynchronous"])
def test_rewards_run_beside_the_rollout_and_the_scoring(tmp_path, monkeypatch, is_async):
    trainer, calls = build_waiting_trainer(tmp_path, monkeypatch, is_async, PATIENCE, async_rewards=True)
    generate_batch(trainer)
    assert calls == [2, 2, 2, 2]


def test_without_the_option_they_do_not(tmp_path, monkeypatch):
    def wait_for_scoring(prompts, completions, **kwargs):
        if not stages.wait(lambda stages: stages.is_scoring, 0.1):
            raise RuntimeError("nothing scores")
        return [1.0] * len(completions)

    trainer = build_trainer(tmp_path, wait_for_scoring)
    stages = Stages(trainer, monkeypatch)
    with pytest.raises(RuntimeError, match="'wait_for_scoring' failed on 8 prompts"):
        generate_batch(trainer)


def test_functions_run_at_the_same_time(tmp_path):
    both = threading.Barrier(2)
    num_calls = {"first": 0, "second": 0}

    def meet(name, completions):
        num_calls[name] += 1
        if num_calls[name] > 1:
            both.wait(PATIENCE)
        return [1.0] * len(completions)

    def first(prompts, completions, **kwargs):
        return meet("first", completions)

    def second(prompts, completions, **kwargs):
        return meet("second", completions)

    generate_batch(build_trainer(tmp_path, [first, second], rollout_batch_size=2, async_rewards=True))
    assert num_calls == {"first": 4, "second": 4}


def test_a_function_is_waited_for_until_it_has_given_a_reward(tmp_path, monkeypatch):
    numbers_begun = []

    def load_then_score(prompts, completions, **kwargs):
        number = len(numbers_begun) + 1
        if number <= 2:
            stages.wait(lambda stages: stages.num_begun > number, 0.2)
        numbers_begun.append(stages.num_begun)
        return [None if number == 1 else 1.0] * len(completions)

    trainer = build_trainer(tmp_path, load_then_score, rollout_batch_size=2, async_rewards=True)
    stages = Stages(trainer, monkeypatch)
    generate_batch(trainer)
    assert numbers_begun[:2] == [1, 2]
    assert len(numbers_begun) == 4


def test_what_functions_log_is_that_of_one_call(tmp_path):
    def logging(prompts, completions, log_metric, log_extra, **kwargs):
        log_metric("num_a", sum(completion.count("a") for completion in completions) / len(completions))
        log_extra("again", completions)
        return [float(completion.count("a")) for completion in completions]

    trainers = []
    for async_rewards in (False, True):
        trainers.append(
            build_trainer(tmp_path, [logging], rollout_batch_size=2, async_rewards=async_rewards, log_completions=True)
        )
        torch.manual_seed(0)
        generate_batch(trainers[-1])
    expected, trainer = trainers
    assert len(expected._logs["completion"]) == NUM_SAMPLES
    assert (
        list(trainer._logs["extra"]["again"])
        == list(trainer._logs["completion"])
        == list(expected._logs["completion"])
    )
    assert trainer._metrics["train"]["num_a"] == pytest.approx(expected._metrics["train"]["num_a"])


# --- Failures ---


def failing_after_the_first(error):
    """A reward function that fails on the second of its calls, and the sizes of the calls."""
    sizes = []

    def count(prompts, completions, **kwargs):
        sizes.append(len(completions))
        if len(sizes) == 2:
            error()
        return count_a(prompts, completions)

    return count, sizes


def fail():
    raise ConnectionError("no route to the scorer")


@pytest.mark.parametrize("is_async", [False, True], ids=["synchronous", "asynchronous"])
def test_an_error_names_the_function_and_the_prompt(tmp_path, is_async):
    count, _ = failing_after_the_first(fail)

    async def count_async(**kwargs):
        return count(**kwargs)

    count_async.__name__ = "count"
    trainer = build_trainer(tmp_path, count_async if is_async else count, rollout_batch_size=2, async_rewards=True)
    with pytest.raises(RuntimeError, match="'count' failed on 2 prompts, the first of which is '[abcd]+'") as error:
        trainer.train()
    assert isinstance(error.value.__cause__, ConnectionError)
    assert trainer.state.global_step == 0


def test_a_function_that_exits_ends_the_run(tmp_path):
    count, _ = failing_after_the_first(lambda: exit(3))
    trainer = build_trainer(tmp_path, count, rollout_batch_size=2, async_rewards=True)
    with pytest.raises(SystemExit, match="3"):
        trainer.train()


def test_a_call_that_takes_too_long_ends_the_run(tmp_path):
    count, _ = failing_after_the_first(lambda: time.sleep(PATIENCE))
    trainer = build_trainer(tmp_path, count, rollout_batch_size=2, async_rewards=True, reward_timeout=0.3)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="'count' took longer than the 0.3 s of `reward_timeout` on 2 prompts"):
        trainer.train()
    assert time.monotonic() - started < PATIENCE


def test_a_micro_batch_that_takes_too_long_is_left_out(tmp_path):
    count, sizes = failing_after_the_first(lambda: time.sleep(PATIENCE))
    trainer = build_trainer(
        tmp_path, count, rollout_batch_size=2, async_rewards=True, reward_timeout=0.3, reward_error="none"
    )
    trainer.train()
    assert sizes == [2, 2, 2, 2]
    assert trainer.state.log_history[0]["rewards/count/failed"] == 2 / NUM_SAMPLES


def test_a_call_that_fails_is_repeated_for_each_sample_of_its_micro_batch(tmp_path):
    count, sizes = failing_after_the_first(fail)
    trainer = build_trainer(tmp_path, count, rollout_batch_size=2, async_rewards=True, reward_error="none")
    trainer.train()
    assert sizes == [2, 2, 1, 1, 2, 2]
    assert trainer.state.log_history[0]["rewards/count/failed"] == 0


def test_steps_without_any_reward_are_counted_by_generation_batch(tmp_path):
    def never(prompts, completions, **kwargs):
        fail()

    trainer = build_trainer(
        tmp_path, never, rollout_batch_size=2, async_rewards=True, reward_error="none", max_steps=9, max_failed_steps=2
    )
    with pytest.raises(RuntimeError, match="for all 8 samples of a batch.* 3 times in a row"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_rewards_of_a_rollout_that_failed_are_dropped(tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path, count_a, rollout_batch_size=2, async_rewards=True)
    generate_batch(trainer)
    decode, num_calls = trainer.pipeline.decode, []

    def fail_once(*args):
        num_calls.append(1)
        if len(num_calls) == 3:
            raise MemoryError("no room to decode")
        return decode(*args)

    monkeypatch.setattr(trainer.pipeline, "decode", fail_once)
    with pytest.raises(MemoryError, match="no room to decode"):
        generate_batch(trainer)
    seen = {}
    calculate_rewards = trainer._calculate_rewards

    def record(inputs, prompts, completions, completion_ids_list):
        seen["completions"] = completions
        seen["rewards"] = calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return seen["rewards"]

    monkeypatch.setattr(trainer, "_calculate_rewards", record)
    generate_batch(trainer)
    expected = torch.tensor(count_a(None, seen["completions"]), dtype=torch.float64).unsqueeze(1)
    assert len(expected) == NUM_SAMPLES
    torch.testing.assert_close(seen["rewards"], expected)


def test_calls_that_have_not_begun_when_they_are_dropped_never_do():
    begun, go_on = [], threading.Event()

    def wait(prompts, **kwargs):
        begun.append(prompts)
        if prompts == [1]:
            go_on.wait(PATIENCE)
        return [1.0]

    reward = RewardRunner(wait)
    reward.start()
    for number in range(3):
        reward.submit(prompts=[number], log_metric=print, log_extra=print)
    reward.cancel()
    go_on.set()
    assert reward(prompts=[3], log_metric=print, log_extra=print) == [1.0]
    assert begun[0] == [0] and begun[-1] == [3] and [2] not in begun


def test_the_thread_ends_with_its_function():
    before = threading.enumerate()
    reward = RewardRunner(count_a)
    reward.start()
    reward(prompts=["a"], completions=["ab"], log_metric=print, log_extra=print)
    (thread,) = [thread for thread in threading.enumerate() if thread not in before]
    del reward
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_the_option_is_off_by_default():
    assert UDMGRPOConfig("unused", bf16=False).async_rewards is False
