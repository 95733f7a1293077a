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

import os
import random
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler

from trl_udm import EMACallback, KineticOptimalScheduler
from trl_udm.trainer.checkpoint import EpochRepeatSampler, find_checkpoints, is_whole

from .resume_worker import build_trainer, run
from .toy_text_family import ToyTextPipeline


def outcome(output_dir):
    return torch.load(Path(output_dir) / "outcome.pth", weights_only=True)


def assert_equal(first, second):
    """Bit by bit."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_equal(first[name], second[name])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        assert first == second


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("ema", "num_iterations"), [(False, 1), (True, 2)], ids=["one update", "two updates and an average"]
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, lora, ema, num_iterations):
    """Ten steps; the kill comes after five, with two updates a rollout between the two. The prompts of an epoch last
    for 3 rollouts, so that several epochs have begun."""
    kwargs = {"lora": lora, "ema": ema, "num_iterations": num_iterations, "max_steps": 10}
    assert run(tmp_path / "unbroken", **kwargs) == 0
    assert run(tmp_path / "broken", moment="backward", step=5, **kwargs) == -signal.SIGKILL
    assert run(tmp_path / "broken", resume=True, **kwargs) == 0
    assert_equal(outcome(tmp_path / "unbroken"), outcome(tmp_path / "broken"))
    assert len(outcome(tmp_path / "broken")["history"]) == 4  # three logs and the summary
    assert len(outcome(tmp_path / "broken")["ema"]) == ema * len(outcome(tmp_path / "broken")["optimizer"]["state"])


@pytest.mark.parametrize("moment", ["rollout", "reward", "backward", "save", "saved but for its state"])
def test_a_run_killed_at_any_moment_goes_on_from_its_last_whole_checkpoint(tmp_path, moment):
    step = 3 if "save" in moment else 2
    assert run(tmp_path / "unbroken") == 0
    assert run(tmp_path / "broken", moment=moment, step=step, save_total_limit=1) == -signal.SIGKILL
    whole = [Path(checkpoint).name for checkpoint in find_checkpoints(tmp_path / "broken") if is_whole(checkpoint)]
    assert whole == ["checkpoint-2"]
    assert (tmp_path / "broken" / "checkpoint-3").exists() == ("save" in moment)
    assert run(tmp_path / "broken", resume=True, save_total_limit=1) == 0
    assert_equal(outcome(tmp_path / "unbroken"), outcome(tmp_path / "broken"))


def test_the_order_of_an_epoch_is_trls_and_needs_no_earlier_one():
    settings = {"data_source": range(7), "mini_repeat_count": 2, "batch_size": 3, "repeat_count": 2, "seed": 5}
    of_trl = RepeatSampler(**settings)
    for epoch in range(4):
        assert list(EpochRepeatSampler(get_epoch=lambda epoch=epoch: epoch, **settings)) == list(of_trl)


def test_a_torn_checkpoint_is_refused_by_name_and_passed_over_by_true(tmp_path, caplog):
    build_trainer(tmp_path, max_steps=3).train()
    state_path = tmp_path / "checkpoint-3" / "trainer_state.json"
    state_path.write_text(state_path.read_text()[:-2])
    with pytest.raises(
        ValueError, match="must be a whole checkpoint, got .*checkpoint-3', which is missing or was not"
    ):
        build_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    trainer = build_trainer(tmp_path, max_steps=2)
    trainer.train(resume_from_checkpoint="True")  # as the command line gives it
    assert "checkpoint-3 was not finished and is deleted" in caplog.text
    assert trainer.state.global_step == 2
    assert [Path(checkpoint).name for checkpoint in find_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("max_steps", [2, 3])  # in an epoch, and at its end
def test_a_finished_run_trains_no_further(tmp_path, max_steps):
    assert run(tmp_path, ema=True, max_steps=max_steps) == 0
    finished = outcome(tmp_path)
    assert run(tmp_path, ema=True, max_steps=max_steps, resume=True) == 0
    assert_equal(finished, outcome(tmp_path))


def test_true_without_a_whole_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match=r"has no whole checkpoint \(1 torn ones\). Start anew"):
        build_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_is_saved_again_is_torn_meanwhile(tmp_path):
    build_trainer(tmp_path, max_steps=3).train()
    assert run(tmp_path, resume=str(tmp_path / "checkpoint-1"), moment="save", step=2) == -signal.SIGKILL
    assert [is_whole(checkpoint) for checkpoint in find_checkpoints(tmp_path)] == [True, False, True]


def test_another_reference_policy_is_refused(tmp_path):
    build_trainer(tmp_path, max_steps=1).train()
    trainer = build_trainer(tmp_path, max_steps=2)
    with torch.no_grad():
        next(trainer.ref_model.parameters()).add_(1)
    with pytest.raises(ValueError, match="The reference policy must be the one that the run began with"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_without_a_state_goes_on_with_a_warning(tmp_path, caplog):
    build_trainer(tmp_path, max_steps=3, num_iterations=2).train()
    os.remove(tmp_path / "checkpoint-3" / "rollout_state_0.pth")
    trainer = build_trainer(tmp_path, max_steps=4, num_iterations=2)
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-3 has no rollout_state_0.pth" in caplog.text
    assert trainer.state.global_step == trainer._step == 4


# Another geometry
FIRST = {"per_device_train_batch_size": 24, "gradient_accumulation_steps": 2, "steps_per_generation": 2}
GEOMETRIES = {
    "accumulation": {"gradient_accumulation_steps": 4, "steps_per_generation": 4, "per_device_train_batch_size": 12},
    "accumulation of one": {"gradient_accumulation_steps": 1},
    "steps_per_generation": {"steps_per_generation": 4, "per_device_train_batch_size": 12},
    "num_iterations": {"num_iterations": 3},
    "batch": {"per_device_train_batch_size": 36},
    "num_generations": {"num_generations": 8},
}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_with_another_geometry_rollouts_begin_with_updates_to_the_end(tmp_path, caplog, geometry, lora):
    """The checkpoint is in the middle of a rollout with two iterations. After it, an update is of rows of one rollout, and
    the prompts are those that an unbroken run of the new geometry has there."""
    first = {**FIRST, "num_iterations": 2, "lora": lora}
    second = {**first, **GEOMETRIES[geometry], "max_steps": 9}
    build_trainer(tmp_path, max_steps=3, **first).train()
    trainer = build_trainer(tmp_path, **second)
    caplog.clear()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    warnings = [record.getMessage() for record in caplog.records if "unfinished rollouts" in record.getMessage()]
    (name,) = list(GEOMETRIES[geometry])[:1]
    assert len(warnings) == 1 and f"'{name}': {GEOMETRIES[geometry][name]}" in warnings[0]
    num_rollouts = {step: {rollout for at, rollout in trainer.rows if at == step} for step in range(3, 9)}
    assert all(len(rollouts) == 1 for rollouts in num_rollouts.values())
    assert trainer.rollouts[0][0] == 3

    unbroken = build_trainer(tmp_path / "unbroken", save_strategy="no", **second)
    unbroken.train()
    of_unbroken = {step: prompts for step, _, prompts in unbroken.rollouts}
    of_resumed = {step: prompts for step, _, prompts in trainer.rollouts[1:]}
    assert of_resumed == {step: prompts for step, prompts in of_unbroken.items() if step > 3}
    last = [prompts for step, prompts in of_unbroken.items() if step <= 3][-1]
    assert trainer.rollouts[0][2] == last


def test_a_run_resumed_with_another_geometry_is_exact_from_there(tmp_path):
    first, second = (
        {**FIRST, "num_iterations": 2},
        {"gradient_accumulation_steps": 1, "num_iterations": 2, "max_steps": 6},
    )
    build_trainer(tmp_path, max_steps=3, **first).train()
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "broken" / "checkpoint-3")
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "unbroken" / "checkpoint-3")
    assert run(tmp_path / "unbroken", resume=True, **second) == 0
    assert run(tmp_path / "broken", resume=True, moment="backward", step=4, **second) == -signal.SIGKILL
    assert run(tmp_path / "broken", resume=True, **second) == 0
    assert_equal(outcome(tmp_path / "unbroken"), outcome(tmp_path / "broken"))


def test_a_checkpoint_of_an_earlier_version_without_a_geometry_resumes_exactly(tmp_path):
    kwargs = {"num_iterations": 2, "max_steps": 4}
    assert run(tmp_path / "unbroken", **kwargs) == 0
    assert run(tmp_path / "broken", moment="backward", step=3, **kwargs) == -signal.SIGKILL
    path = tmp_path / "broken" / "checkpoint-3" / "rollout_state_0.pth"
    state = torch.load(path, weights_only=True)
    del state["geometry"]
    torch.save(state, path)
    assert run(tmp_path / "broken", resume=True, **kwargs) == 0
    assert_equal(outcome(tmp_path / "unbroken"), outcome(tmp_path / "broken"))


def test_a_second_training_draws_its_own_rollouts(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=1, num_iterations=2, save_strategy="no")
    trainer.train()
    trainer.train()
    assert [step for step, *_ in trainer.rollouts] == [0, 0]


def test_sigterm_saves_at_the_end_of_the_step_and_exits(tmp_path):
    kwargs = {"save_strategy": "no"}
    assert run(tmp_path, moment="reward", step=2, signal_number=signal.SIGTERM, **kwargs) == 143
    assert [Path(checkpoint).name for checkpoint in find_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert run(tmp_path, resume=True, **kwargs) == 0
    assert run(tmp_path / "unbroken", **kwargs) == 0
    assert_equal(outcome(tmp_path / "unbroken"), outcome(tmp_path))


def test_after_training_sigterm_is_the_scripts_own_again(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    build_trainer(tmp_path, max_steps=1, save_strategy="no").train()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_full_disk_ends_the_run_with_its_older_checkpoints_whole(tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path, max_steps=3, save_total_limit=1)
    save_optimizer = trainer._save_optimizer_and_scheduler

    def link_to_a_full_device(output_dir):
        if trainer.state.global_step == 2:
            os.symlink("/dev/full", Path(output_dir) / "optimizer.pt")
        save_optimizer(output_dir)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", link_to_a_full_device)
    with pytest.raises(RuntimeError, match=r"checkpoint-2 could not be written \(.*\). The disk has .* GB left"):
        trainer.train()
    assert [Path(checkpoint).name for checkpoint in find_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert is_whole(tmp_path / "checkpoint-1")


# The average
class Recorder(TrainerCallback):
    """Notes the weights after each step of the optimizer."""

    def __init__(self):
        self.weights = []

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        self.weights.append([parameter.detach().clone() for parameter in model.parameters()])


@pytest.mark.parametrize("is_deprecated", [False, True], ids=["option", "callback"])
def test_the_average_is_that_of_the_weights(tmp_path, is_deprecated):
    """By hand: w <- w + (1 - d_n) (p - w) with d_n = min(decay, n / (9 + n)), and d_1 = 0."""
    trainer = build_trainer(tmp_path, max_steps=3, save_strategy="no", ema_decay=None if is_deprecated else 0.15)
    if is_deprecated:
        with pytest.warns(FutureWarning, match="set `UDMGRPOConfig"):
            trainer.add_callback(EMACallback(decay=0.15))
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    expected = recorder.weights[0]
    for decay, now in zip((0.15, 0.15), recorder.weights[1:], strict=True):
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, now, strict=True)]
    for average, one in zip(trainer.ema.shadow_params, expected, strict=True):
        torch.testing.assert_close(average, one)


def test_a_second_training_begins_a_new_average(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=2, save_strategy="no", ema_decay=0.9)
    trainer.train()
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    assert trainer.ema.optimization_step == len(recorder.weights) == 2
    decay = 2 / 11
    expected = [decay * old + (1 - decay) * new for old, new in zip(*recorder.weights, strict=True)]
    for average, one in zip(trainer.ema.shadow_params, expected, strict=True):
        torch.testing.assert_close(average, one)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_average_is_saved_beside_the_weights(tmp_path, lora):
    trainer = build_trainer(tmp_path, lora=lora, ema=True, max_steps=2, save_strategy="no")
    trainer.train()
    trainer.save_model()
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    raw = load_file(tmp_path / ("" if lora else "transformer") / name)
    average = load_file(tmp_path / "transformer_ema" / name)
    assert raw.keys() == average.keys()
    assert any(not torch.equal(raw[key], average[key]) for key in raw)
    with trainer.ema_weights():
        trainer.save_model(tmp_path / "applied")
    applied = load_file(tmp_path / "applied" / ("" if lora else "transformer") / name)
    assert_equal(average, applied)
    if not lora:
        transformer = type(trainer.pipeline.transformer).from_pretrained(tmp_path, subfolder="transformer_ema")
        pipeline = ToyTextPipeline.from_pretrained(tmp_path, transformer=transformer)
        assert isinstance(pipeline.scheduler, KineticOptimalScheduler)
        key = "model.norm.weight"
        assert torch.equal(pipeline.transformer.state_dict()[key], average[key])


@pytest.mark.parametrize("evaluate", [True, False])
def test_evaluation_is_with_the_average_where_asked(tmp_path, evaluate):
    trainer = build_trainer(tmp_path, max_steps=2, save_strategy="no")
    with pytest.warns(FutureWarning):
        trainer.add_callback(EMACallback(decay=0.5, evaluate=evaluate))
    trainer.train()
    raw = trainer.model.state_dict()["model.norm.weight"].clone()
    seen = []
    rollout = trainer._rollout
    trainer._rollout = lambda *args, **kwargs: (
        seen.append(trainer.model.state_dict()["model.norm.weight"].clone()) or rollout(*args, **kwargs)
    )
    trainer.evaluate(trainer.train_dataset)
    assert torch.equal(seen[0], raw) != evaluate
    assert torch.equal(trainer.model.state_dict()["model.norm.weight"], raw)


def test_the_decay_is_checked(tmp_path):
    with pytest.raises(ValueError, match=r"`ema_decay` must be in \[0, 1\) or None, got 1.0"):
        build_trainer(tmp_path, ema_decay=1.0)
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match=r"`decay` must be in \[0, 1\), got 1.0"):
        EMACallback(decay=1.0)


# Gradients
class Poisoned:
    """Makes the loss NaN at some steps."""

    def __init__(self, trainer, steps):
        self.compute_loss, self.trainer, self.steps = trainer._compute_loss, trainer, steps

    def __call__(self, model, inputs):
        loss = self.compute_loss(model, inputs)
        return loss * torch.nan if self.trainer.state.global_step in self.steps else loss


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=3, logging_steps=1, save_steps=1)
    trainer._compute_loss = Poisoned(trainer, steps=[1])
    trainer.train()
    weights = [load_file(tmp_path / f"checkpoint-{step}" / "transformer" / "model.safetensors") for step in (1, 2, 3)]
    assert_equal(weights[0], weights[1])
    assert not torch.equal(weights[1]["model.norm.weight"], weights[2]["model.norm.weight"])
    assert all(value.isfinite().all() for value in weights[2].values())
    assert [log["frac_skipped_steps"] for log in trainer.state.log_history if "reward" in log] == [0.0, 1.0, 0.0]


def test_too_many_of_them_in_a_row_end_the_run(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=9, save_strategy="no", max_failed_steps=2)
    trainer._compute_loss = Poisoned(trainer, steps=[0, 1, 3, 4, 5, 6])
    with pytest.raises(RuntimeError, match="The gradient norm is nan.* 3 times in a row, and `max_failed_steps` is 2"):
        trainer.train()
    assert trainer.state.global_step == 5


def test_jit_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`enable_jit_checkpoint` must be False"):
        build_trainer(tmp_path, enable_jit_checkpoint=True)


def test_the_state_of_a_checkpoint_is_small_where_no_rollout_is_pending(tmp_path):
    build_trainer(tmp_path, max_steps=2, num_iterations=2).train()
    pending, done = (
        torch.load(tmp_path / f"checkpoint-{step}" / "rollout_state_0.pth", weights_only=True) for step in (1, 2)
    )
    assert pending["buffered_inputs"][0]["completion_ids"].shape == (24, 6)
    assert done["buffered_inputs"] is None


# What must not be lost
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("change", ["missing", "renamed"])
def test_a_checkpoint_without_some_weights_is_refused_by_their_names(tmp_path, lora, change):
    build_trainer(tmp_path, lora=lora, max_steps=1).train()
    path = tmp_path / "checkpoint-1" / ("adapter_model.safetensors" if lora else "transformer/model.safetensors")
    weights = load_file(path)
    name = sorted(weights)[0]
    value = weights.pop(name)
    if change == "renamed":
        weights["another"] = value
    save_file(weights, path, metadata={"format": "pt"})
    lacks = f"this one lacks ['{name}'], and has {['another'] if change == 'renamed' else []} besides"
    with pytest.raises(ValueError, match=re.escape(lacks)):
        build_trainer(tmp_path, lora=lora).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_best_model_has_the_average_of_its_step(tmp_path, lora):
    trainer = build_trainer(
        tmp_path,
        lora=lora,
        ema=True,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=6,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        greater_is_better=True,
    )
    rewards = iter([0.1, 0.9, 0.2, 0.3])
    evaluate = trainer._calculate_rewards

    def peaks_at_two(*args):
        calculated = evaluate(*args)
        return calculated if trainer.model.training else torch.full_like(calculated, next(rewards))

    trainer._calculate_rewards = peaks_at_two
    trainer.train()
    assert trainer.state.best_global_step == 2
    trainer.save_model(tmp_path / "best")
    folder = Path("transformer_ema", "adapter_model.safetensors" if lora else "model.safetensors")
    average = load_file(tmp_path / "best" / folder)
    assert_equal(average, load_file(tmp_path / "checkpoint-2" / folder))
    assert any(
        not torch.equal(value, average[name]) for name, value in load_file(tmp_path / "checkpoint-4" / folder).items()
    )
    assert trainer.ema.optimization_step == 2


def test_an_average_that_began_later_keeps_its_count_of_steps(tmp_path, caplog):
    build_trainer(tmp_path, max_steps=2).train()
    trainer = build_trainer(tmp_path, ema=True, max_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-2 has an average of `ema_decay` None. The run goes on with 0.9." in caplog.text
    assert trainer.ema.optimization_step == 1
    trainer = build_trainer(tmp_path, ema_decay=0.5, max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.ema.optimization_step == 2
    assert "checkpoint-3 has an average of `ema_decay` 0.9. The run goes on with 0.5." in caplog.text


def test_without_the_average_none_is_left_beside_new_weights(tmp_path, caplog):
    trainer = build_trainer(tmp_path, ema=True, max_steps=2)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "transformer_ema").is_dir()
    trainer = build_trainer(tmp_path, max_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-2 has an average of `ema_decay` 0.9. The run goes on with None." in caplog.text
    trainer.save_model()
    assert not (tmp_path / "transformer_ema").exists()


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_evaluation_leaves_the_rollouts_as_they_are_without_it(tmp_path, save_strategy):
    outcomes = []
    for is_evaluated in (False, True):
        trainer = build_trainer(
            tmp_path / str(is_evaluated),
            save_strategy=save_strategy,
            eval_strategy="steps" if is_evaluated else "no",
            eval_steps=1,
            per_device_eval_batch_size=6,
        )
        trainer.train()
        streams = (random.random(), np.random.rand(), torch.rand(1))
        outcomes.append((trainer.model.state_dict(), trainer.optimizer.state_dict(), streams))
    assert_equal(*outcomes)


def test_evaluations_of_one_model_are_equal(tmp_path):
    trainer = build_trainer(tmp_path, save_strategy="no", per_device_eval_batch_size=6)
    torch.manual_seed(5)
    first = trainer.evaluate(trainer.train_dataset)
    second = trainer.evaluate(trainer.train_dataset)
    assert first["eval_reward"] == second["eval_reward"]


def test_an_error_of_another_kind_than_a_full_disk_keeps_its_words(tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path, max_steps=1)
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", lambda output_dir: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="^inconsistent tensor size"):
        trainer.train()
    assert find_checkpoints(tmp_path) == []


def test_persistent_workers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`dataloader_persistent_workers` must be False, got True: a resumed run"):
        build_trainer(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
