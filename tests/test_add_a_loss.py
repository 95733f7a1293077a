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

"""The code of docs/add_a_loss.md, run as a reader would."""

import re

import pytest
import torch

from .pages import DOCS_DIR, run_page


@pytest.fixture(scope="module")
def namespace(tmp_path_factory):
    return run_page("add_a_loss.md", tmp_path_factory.mktemp("page"), num_blocks=2)


def test_the_loss_of_the_page_has_15_lines():
    page = (DOCS_DIR / "add_a_loss.md").read_text(encoding="utf-8")
    method = re.search(r"^    def _compute_loss.*?(?=^```)", page, re.DOTALL | re.MULTILINE)
    assert len(method[0].splitlines()) <= 15


def test_the_trainer_of_the_page_learns(namespace):
    rewards = [log["reward"] for log in namespace["trainer"].state.log_history if "reward" in log]
    assert len(rewards) == 6
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2


def test_the_loss_of_the_page_is_its_formula(namespace):
    trainer = namespace["trainer"]
    trainer.model.train()
    batch = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    num_tokens = batch["completion_ids"].size(1)
    conditioning = batch["prompt_ids"].size(1) - num_tokens
    with torch.no_grad():
        loss = trainer._compute_loss(trainer.model, batch)
        log_probs = trainer.pipeline.denoise(
            batch["prompt_ids"][:, :conditioning],
            batch["prompt_mask"][:, :conditioning].long(),
            batch["prompt_ids"][:, conditioning:],
            trainer.latent_shape,
        ).log_softmax(dim=-1)
    log_probs = log_probs.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)  # (B, N)
    mask = batch["completion_mask"]
    log_pi = (log_probs * mask).sum(dim=1) / mask.sum(dim=1)
    torch.testing.assert_close(loss, -(batch["advantages"].exp() * log_pi).mean())
