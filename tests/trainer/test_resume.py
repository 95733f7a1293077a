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

import ast
import errno
import os
import random
import re
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from trl.trainer.utils import RepeatSampler

from trl_udm import EMACallback, KineticOptimalScheduler, TextUDMPipeline
from trl_udm.checkpoint_folders import find_checkpoints, is_whole
from trl_udm.trainer.checkpoint import EpochRepeatSampler

from ..pipelines.text_families import build_text_pipeline
from .resume_worker import PROMPTS, build_trainer, run
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


def test_a_run_whose_prompts_another_process_loads_goes_on_so_too(tmp_path):
    outcomes = []
    for folder, max_steps, resume in (("unbroken", 5, False), ("broken", 2, False), ("broken", 5, True)):
        trainer = build_trainer(tmp_path / folder, max_steps=max_steps, dataloader_num_workers=1)
        trainer.train(resume_from_checkpoint=resume)
        outcomes.append((trainer.model.state_dict(), trainer.optimizer.state_dict(), torch.rand(1)))
    assert_equal(outcomes[0], outcomes[2])


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
FIRST = {"gradient_accumulation_steps": 2, "steps_per_generation": 2, "num_iterations": 2}
GEOMETRIES = {
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 1},
    "steps_per_generation": {"steps_per_generation": 4, "per_device_train_batch_size": 12},
    "both": {"gradient_accumulation_steps": 4, "steps_per_generation": 4, "per_device_train_batch_size": 12},
    "num_iterations": {"num_iterations": 3},
    "per_device_train_batch_size": {"per_device_train_batch_size": 36},
    "num_generations": {"num_generations": 8},
    "num_train_timesteps": {"num_train_timesteps": 2},
    "importance_sampling_level": {"importance_sampling_level": "token"},
    "beta": {"beta": 0.0},
}


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def unfinished(request, tmp_path_factory):
    """Whether it is LoRA, and a checkpoint after the third of the four updates of a rollout's two iterations."""
    folder = tmp_path_factory.mktemp("unfinished")
    build_trainer(folder, lora=request.param, max_steps=3, save_steps=3, **FIRST).train()
    return request.param, folder / "checkpoint-3"


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_with_another_geometry_rollouts_begin_with_updates_to_the_end(tmp_path, caplog, unfinished, geometry):
    lora, checkpoint = unfinished
    changed = GEOMETRIES[geometry]
    options = {**FIRST, **changed, "lora": lora, "max_steps": 9, "save_strategy": "no"}
    trainer = build_trainer(tmp_path, **options)
    caplog.clear()
    trainer.train(resume_from_checkpoint=str(checkpoint))
    (warning,) = [record.getMessage() for record in caplog.records if "unfinished rollouts" in record.getMessage()]
    before, now = re.search("was saved with ({.*}), and this run has ({.*}). Its unfinished", warning).groups()
    assert (ast.literal_eval(before).keys(), ast.literal_eval(now)) == (changed.keys(), changed)

    # The rows of an update are of one rollout, and as a rollout's first update begins, the policy is the rollout's
    first_updates = [step for step, *_ in trainer.rollouts]
    assert first_updates[0] == 3
    for step in range(3, 9):
        rollouts, clipped = zip(*(row[1:] for row in trainer.rows if row[0] == step), strict=True)
        assert len(set(rollouts)) == 1
        assert (sum(clipped) == 0) == (step in first_updates)

    # The prompts are those that an unbroken run of this geometry has there
    num_rows = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
    sampler, steps = trainer._get_train_sampler(), []
    for epoch in range(9):
        sampler.get_epoch = lambda epoch=epoch: epoch
        rows = list(sampler)
        steps += [rows[i : i + num_rows : trainer.args.num_train_timesteps] for i in range(0, len(rows), num_rows)]
    for global_step, _, prompts in trainer.rollouts:
        rows = steps[global_step * trainer.args.gradient_accumulation_steps]
        assert prompts == [trainer.train_dataset[row]["prompt"] for row in rows]


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


def make_a_checkpoint_of_version_0_1(checkpoint):
    """Which has neither the geometry nor the average's decay and number of steps."""
    path = Path(checkpoint) / "rollout_state_0.pth"
    state = torch.load(path, weights_only=True)
    del state["geometry"]
    torch.save(state, path)
    (path.parent / "ema_state.json").unlink(missing_ok=True)


def test_a_checkpoint_of_version_0_1_resumes_exactly(tmp_path):
    kwargs = {"ema": True, "num_iterations": 2, "max_steps": 4}
    assert run(tmp_path / "unbroken", **kwargs) == 0
    assert run(tmp_path / "broken", moment="backward", step=3, **kwargs) == -signal.SIGKILL
    make_a_checkpoint_of_version_0_1(tmp_path / "broken" / "checkpoint-3")
    assert run(tmp_path / "broken", resume=True, **kwargs) == 0
    assert_equal(outcome(tmp_path / "unbroken"), outcome(tmp_path / "broken"))


@pytest.mark.parametrize("changed", [{"gradient_accumulation_steps": 1}, GEOMETRIES["steps_per_generation"]])
def test_a_checkpoint_of_version_0_1_shows_another_geometry(tmp_path, caplog, unfinished, changed):
    lora, checkpoint = unfinished
    checkpoint = shutil.copytree(checkpoint, tmp_path / "checkpoint-3")
    make_a_checkpoint_of_version_0_1(checkpoint)
    trainer = build_trainer(tmp_path, **{**FIRST, **changed}, lora=lora, max_steps=4)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    (now,) = re.findall("this run has ({.*}). Its unfinished rollouts are dropped", caplog.text)
    assert ast.literal_eval(now) == changed
    assert trainer.rollouts[0][0] == 3


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


class FileSizeLimit(TrainerCallback):
    """From the second step on, a file may have `size` bytes. PyTorch and safetensors fail as on a full disk."""

    def __init__(self, size):
        self.size = size

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


def fail_to_save(output_dir, size):
    trainer = build_trainer(output_dir, max_steps=3, save_total_limit=1)
    trainer.add_callback(FileSizeLimit(size))
    with pytest.raises(RuntimeError, match=r"checkpoint-2 could not be written \(.*\). The disk has .* GB left"):
        trainer.train()


@pytest.mark.parametrize("size", [10_000, 100_000], ids=["weights", "optimizer"])
def test_a_full_disk_ends_the_run_with_its_older_checkpoints_whole(tmp_path, size):
    assert run(tmp_path, target=fail_to_save, size=size) == 0
    assert [Path(checkpoint).name for checkpoint in find_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert is_whole(tmp_path / "checkpoint-1")


class Failing(TrainerCallback, ExportableState):
    """Its state cannot be saved."""

    def __init__(self, error):
        self.error, self.has_begun = error, False

    def on_step_end(self, args, state, control, **kwargs):
        self.has_begun = True

    def state(self):
        if self.has_begun:
            raise self.error
        return {"args": {}, "attributes": {}}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, None])
def test_only_a_full_disk_is_reported_as_one(tmp_path, number):
    is_full = number in (errno.ENOSPC, errno.EDQUOT)
    error = RuntimeError("CUDA error") if number is None else OSError(number, os.strerror(number))
    trainer = build_trainer(tmp_path, max_steps=1)
    trainer.add_callback(Failing(error))
    with pytest.raises((RuntimeError, OSError)) as raised:
        trainer.train()
    assert ("GB left" in str(raised.value), raised.value is error) == (is_full, not is_full)
    assert find_checkpoints(tmp_path) == []


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
@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def finished(request, tmp_path_factory):
    """Whether it is LoRA, and a checkpoint with an average."""
    folder = tmp_path_factory.mktemp("finished")
    build_trainer(folder, lora=request.param, ema=True, max_steps=1).train()
    return request.param, folder / "checkpoint-1"


@pytest.mark.parametrize("is_average", [False, True], ids=["weights", "average"])
@pytest.mark.parametrize("change", ["missing", "renamed", "reshaped", "no file"])
def test_a_checkpoint_without_some_weights_is_refused_by_their_names(tmp_path, finished, is_average, change):
    lora, checkpoint = finished
    checkpoint = shutil.copytree(checkpoint, tmp_path / "checkpoint-1")
    folder = checkpoint / ("transformer_ema" if is_average else "." if lora else "transformer")
    path = folder / ("adapter_model.safetensors" if lora else "model.safetensors")
    weights = load_file(path)
    name = sorted(weights)[0]
    value = weights.pop(name)
    if change == "renamed":
        weights["another"] = value
    elif change == "reshaped":
        weights[name] = torch.cat([value, value])
    save_file(weights, path, metadata={"format": "pt"})
    words = {
        "missing": f"The weights in {folder} miss ['{name}'] and have unexpected none.",
        "renamed": f"The weights in {folder} miss ['{name}'] and have unexpected ['another'].",
        "reshaped": f"`{name}` in {folder} must have shape {tuple(value.shape)}",
        "no file": f"There is no `{path.name}` or",
    }
    if change == "no file":
        path.unlink()
    error = FileNotFoundError if change == "no file" else ValueError
    with pytest.raises(error, match=re.escape(words[change])):
        build_trainer(tmp_path, lora=lora, ema=True).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_of_an_adapter_needs_one_and_others_none(tmp_path, finished):
    lora, checkpoint = finished
    rule = "be given to resume from .*, which holds an adapter" if lora else "be None to resume .* holds all weights"
    with pytest.raises(ValueError, match=f"`peft_config` must {rule}"):
        build_trainer(tmp_path, lora=not lora, ema=True).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_without_one_of_its_files_is_refused(tmp_path, finished, name):
    lora, checkpoint = finished
    checkpoint = shutil.copytree(checkpoint, tmp_path / "checkpoint-1")
    (checkpoint / name).unlink()
    with pytest.raises(ValueError, match=rf"must have all of its files, but .*checkpoint-1 lacks \['{name[:8]}"):
        build_trainer(tmp_path, lora=lora, ema=True).train(resume_from_checkpoint=str(checkpoint))


def test_weights_that_were_loaded_under_other_names_are_found_again(tmp_path):
    """Old repositories call the weight of a layer norm gamma, and its bias beta."""
    build_text_pipeline("bert").save_pretrained(tmp_path / "new")
    path = tmp_path / "new" / "transformer" / "model.safetensors"
    weights = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    kwargs = {"ema": True, "pipeline_kwargs": None, "max_steps": 1}
    trainers = []
    for resume in (False, True):
        pipeline = TextUDMPipeline.from_pretrained(tmp_path / "new")
        trainers.append(build_trainer(tmp_path, pipeline=pipeline, **kwargs))
        trainers[-1].train(resume_from_checkpoint=resume)
    assert_equal(*(trainer.model.state_dict() for trainer in trainers))
    assert_equal(*(trainer.ema.shadow_params for trainer in trainers))
    saved = TextUDMPipeline.from_pretrained(tmp_path / "checkpoint-1").transformer
    assert_equal(saved.state_dict(), trainers[0].model.state_dict())


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
    assert "checkpoint-2 was saved with `ema_decay=None`, and this run has 0.9." in caplog.text
    assert trainer.ema.optimization_step == 1
    trainer = build_trainer(tmp_path, ema_decay=0.5, max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.ema.optimization_step == 2
    assert "checkpoint-3 was saved with `ema_decay=0.9`, and this run has 0.5." in caplog.text


def test_without_the_average_none_is_left_beside_new_weights(tmp_path, caplog):
    trainer = build_trainer(tmp_path, ema=True, max_steps=2)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "transformer_ema").is_dir()
    trainer = build_trainer(tmp_path, max_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-2 was saved with `ema_decay=0.9`, and this run has None." in caplog.text
    trainer.save_model()
    assert list(tmp_path.glob("*ema*")) == []


class Predict(TrainerCallback):
    """Predicts after each step, which draws samples as an evaluation does."""

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.predict(self.trainer.train_dataset)


@pytest.mark.parametrize("kind", ["on start", "several datasets", "predict", "worker"])
def test_evaluation_leaves_the_rollouts_as_they_are_without_it(tmp_path, kind):
    outcomes = []
    for is_evaluated in (False, True):
        kwargs = {"per_device_eval_batch_size": 6, "dataloader_num_workers": int(kind == "worker")}
        if is_evaluated and kind != "predict":
            kwargs |= {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": kind == "on start"}
        trainer = build_trainer(tmp_path / str(is_evaluated), save_steps=2, **kwargs)
        if is_evaluated and kind == "several datasets":
            trainer.eval_dataset = {"first": PROMPTS, "second": PROMPTS}
        if is_evaluated and kind == "predict":
            callback = Predict()
            callback.trainer = trainer
            trainer.add_callback(callback)
        trainer.train()
        streams = (random.random(), np.random.rand(), torch.rand(1))
        outcomes.append((trainer.model.state_dict(), trainer.optimizer.state_dict(), streams))
    assert_equal(*outcomes)


def test_evaluations_of_one_model_are_equal(tmp_path):
    trainer = build_trainer(tmp_path, save_strategy="no", per_device_eval_batch_size=6)
    torch.manual_seed(5)
    trainer.evaluate(PROMPTS)
    trainer.evaluate({"first": PROMPTS, "second": PROMPTS})
    prefixes = ("eval_", "eval_first_", "eval_second_")
    logs = zip(prefixes, trainer.state.log_history, strict=True)
    first, second, third = ((log[f"{prefix}reward"], log[f"{prefix}entropy"]) for prefix, log in logs)
    assert first == second == third


def test_a_resumed_run_that_is_evaluated_at_once_has_its_average(tmp_path):
    kwargs = {"ema": True, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 6}
    rewards = []
    for resume in (False, True):
        trainer = build_trainer(tmp_path, max_steps=2 + resume, eval_on_start=resume, **kwargs)
        trainer.train(resume_from_checkpoint=resume)
        rewards.append([log["eval_entropy"] for log in trainer.state.log_history if "eval_entropy" in log])
    assert rewards[1][:2] == rewards[0] * 2


def test_persistent_workers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`dataloader_persistent_workers` must be False, got True: a resumed run"):
        build_trainer(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
