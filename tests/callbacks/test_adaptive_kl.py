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

from trl_udm import AdaptiveKLCallback

from ..trainer.test_udm_grpo_trainer import build_trainer


def build(output_dir, target, **kwargs):
    options = {"beta": 0.5, "kl_estimator": "full", "learning_rate": 1e-2, "max_steps": 6, **kwargs}
    trainer = build_trainer(output_dir, **options)
    trainer.add_callback(AdaptiveKLCallback(trainer, target, rate=0.5))
    return trainer


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_the_weight_follows_the_divergence_by_the_formula(tmp_path, logging_steps):
    trainer = build(tmp_path, 0.05, logging_steps=1)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "beta" in log]
    beta = 0.5
    for log in logs:
        beta *= 1 + 0.5 * min(max(log["kl"] / 0.05 - 1, -0.2), 0.2)
        assert log["beta"] == pytest.approx(beta, rel=1e-6)
    assert logs[0]["beta"] == pytest.approx(0.45) and logs[-1]["kl"] > 0.05 and trainer.beta > logs[-2]["beta"]
    # It does not depend on when metrics are logged and forgotten
    other = build(tmp_path, 0.05, logging_steps=logging_steps)
    other.train()
    assert other.beta == trainer.beta


def test_a_resumed_run_continues_with_the_weight(tmp_path):
    unbroken = build(tmp_path / "unbroken", 0.05)
    unbroken.train()
    build(tmp_path / "stopped", 0.05, max_steps=4, save_strategy="steps", save_steps=4).train()
    resumed = build(tmp_path / "stopped", 0.05, save_strategy="steps", save_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.beta == unbroken.beta != 0.5


@pytest.mark.parametrize(
    ("target", "rate", "beta", "message"),
    [
        (0.0, 0.1, 0.5, "`target` must be > 0, got 0.0"),
        (0.1, 1.5, 0.5, r"`rate` must be in \(0, 1\], got 1.5"),
        (0.1, 0.1, 0.0, "`args.beta` must be > 0, got 0.0"),
    ],
)
def test_bad_settings_are_refused(tmp_path, target, rate, beta, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveKLCallback(build_trainer(tmp_path, beta=beta), target, rate)
