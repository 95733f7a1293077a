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

import json
import math
import statistics

import pytest
import torch
from PIL import Image

from trl_udm import DiagnosticsCallback
from trl_udm.callbacks.diagnostics import energy_distance
from trl_udm.image_grid import image_statistics

from ..trainer.test_udm_grpo_trainer import PROMPTS, build_trainer


# --- The distance ---


def test_energy_distance_by_hand():
    x, y = torch.tensor([[0, 0], [0, 1]]), torch.tensor([[1, 1], [0, 0]])
    # Between: d(x1, y2) = 0 and d(x2, y1) = √½. Within: d(x1, x2) = √½ and d(y1, y2) = 1
    assert energy_distance(x, y) == pytest.approx(2 * math.sqrt(0.5) / 2 - math.sqrt(0.5) - 1)


def draw(generator, probabilities):
    return torch.multinomial(probabilities, 8, replacement=True, generator=generator)


def test_energy_distance_is_unbiased_although_each_prompt_has_a_distribution_of_its_own():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.softmax(2 * torch.randn(12, 5, generator=generator), dim=1)  # a row a prompt
    estimates = [energy_distance(draw(generator, probabilities), draw(generator, probabilities)) for _ in range(200)]
    error = statistics.stdev(estimates) / math.sqrt(200)
    assert abs(statistics.fmean(estimates)) < 3 * error
    others = probabilities.lerp(torch.full_like(probabilities, 0.2), 0.6)
    estimates = [energy_distance(draw(generator, probabilities), draw(generator, others)) for _ in range(200)]
    assert statistics.fmean(estimates) > 6 * error


# --- The callback ---


def train(output_dir, diagnose=True, resume=False, **kwargs):
    trainer = build_trainer(output_dir, learning_rate=1e-2, **kwargs)
    callback = DiagnosticsCallback(trainer, PROMPTS["prompt"][:6], measure_steps=2)
    if diagnose:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


@pytest.mark.parametrize("trajectory", ["forward", "backward"])
def test_a_run_is_measured_and_stays_the_same(tmp_path, trajectory):
    trainer, callback = train(tmp_path / "measured", max_steps=4, trajectory=trajectory)
    plain, _ = train(tmp_path / "plain", max_steps=4, trajectory=trajectory, diagnose=False)
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], tensor, rtol=0, atol=0)

    assert [one["step"] for one in callback.measurements] == [0, 2, 4]
    first, _, last = callback.measurements
    assert first["tokens_changed"] == 0 and last["tokens_changed"] > 0
    for one in callback.measurements:
        for kind in ("forward", "backward"):
            assert len(one["state_distance"][kind]) == 5
            assert all(0 < entropy < math.log(10) for entropy in one["entropy"][kind])
            assert all(variance > 0 for variance in one["log_prob_variance"][kind])
        # Both ways begin in uniform noise
        assert abs(one["state_distance"]["forward"][0]) < 0.2
    logs = [log for log in trainer.state.log_history if "diagnostics/tokens_changed" in log]
    # The measurement before training is logged with the first step
    assert [log["step"] for log in logs] == [1, 2, 4]
    assert logs[-1]["diagnostics/entropy_forward"] == pytest.approx(statistics.fmean(last["entropy"]["forward"]))
    assert json.loads((tmp_path / "measured" / "diagnostics.json").read_text())["measurements"][2] == last
    with Image.open(tmp_path / "measured" / "diagnostics.png") as image:
        assert image.width > 1000


def test_the_variance_of_log_probabilities_equals_a_direct_forward(tmp_path):
    trainer, callback = train(tmp_path, max_steps=1)
    pipeline = trainer.pipeline
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(callback.seed)
        rollout = trainer._rollout(callback.prompts, "train", return_trajectory=True)
        prompt_ids, prompt_mask, output = rollout.prompt_ids, rollout.prompt_mask, rollout.output
        torch.manual_seed(callback.seed)
        measurement = callback._measure_policy()
        for i, noised_samples in enumerate(output.trajectory.noised_samples):
            logits = pipeline.denoise(prompt_ids, prompt_mask, noised_samples, trainer.latent_shape)
            log_probs = logits.log_softmax(dim=-1).gather(-1, output.clean_samples.unsqueeze(-1)).mean(dim=(1, 2))
            assert measurement["log_prob_variance"]["backward"][i] == pytest.approx(log_probs.var().item(), rel=1e-3)


def test_a_resumed_run_is_compared_with_the_model_before_training(tmp_path):
    _, whole = train(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    _, resumed = train(tmp_path, max_steps=4, resume=str(tmp_path / "checkpoint-2"))
    assert [one["step"] for one in resumed.measurements] == [0, 2, 4]
    assert resumed.measurements[:2] == whole.measurements[:2]
    torch.testing.assert_close(resumed.initial_samples, whole.initial_samples, rtol=0, atol=0)


def test_given_clean_samples_stand_for_the_data(tmp_path):
    trainer = build_trainer(tmp_path)
    constant = torch.zeros(6, 6, dtype=torch.long)
    callback = DiagnosticsCallback(trainer, PROMPTS["prompt"][:6], clean_samples=constant)
    trainer.add_callback(callback)
    trainer.train()
    distances = callback.measurements[0]["state_distance"]["forward"]
    assert distances[-1] > 0.2 > abs(distances[0])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompts": ["ab"]}, r"`prompts` must have at least 2 prompts, got 1"),
        ({"clean_samples": torch.zeros(3, 6)}, r"`clean_samples` must have the shape \(2, 6\), got \(3, 6\)"),
        ({"measure_steps": 0}, "`measure_steps` must be > 0, got 0"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        DiagnosticsCallback(build_trainer(tmp_path), **{"prompts": ["ab", "b"], **kwargs})


# --- Statistics of images ---


def test_image_statistics():
    images = [Image.new("RGB", (8, 8), color) for color in ("black", "red", "gray")]
    images[2].paste("black", (0, 0, 4, 4))
    assert image_statistics(images) == {"dark_fraction": [1.0, 0.0, 0.25], "saturation": [0.0, 1.0, 0.0]}
    assert image_statistics([images, images[1]]) == {"dark_fraction": [1.25 / 3, 0.0], "saturation": [1 / 3, 1.0]}
