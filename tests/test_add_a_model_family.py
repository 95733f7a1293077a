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

"""The code of docs/add_a_model_family.md, run as a reader would: a family that follows the page alone trains."""

import math

import pytest
import torch

from .pages import run_page


@pytest.fixture(scope="module")
def namespace(tmp_path_factory):
    return run_page("add_a_model_family.md", tmp_path_factory.mktemp("page"), num_blocks=4)


@pytest.mark.parametrize("name", ["trainer", "dice_trainer"])
def test_the_families_of_the_page_train(namespace, name):
    trainer = namespace[name]
    log = trainer.state.log_history[-1]
    assert trainer.state.global_step == 8 and 0 < log["reward"] < 1
    assert math.isfinite(log["train_loss"]) and log["clip_ratio/region_mean"] == 0
    untrained = namespace["network"] if name == "trainer" else namespace["dice_pipeline"].transformer
    assert trainer.accelerator.unwrap_model(trainer.model) is untrained


@pytest.mark.parametrize("name", ["trainer", "dice_trainer"])
def test_the_families_of_the_page_score_what_they_predict(namespace, name):
    trainer = namespace[name]
    pipeline, shape = trainer.pipeline, trainer.latent_shape
    num_tokens, size = math.prod(shape), pipeline.scheduler.config.codebook_size
    prompt_ids, prompt_mask = pipeline.encode_prompt(["what is red ?", "what is"])
    noised_samples, actions = torch.randint(size, (2, 2, num_tokens), generator=torch.Generator().manual_seed(0))
    trainer.importance_sampling_level = "token"
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([prompt_ids, noised_samples, actions], dim=1),
            torch.cat([prompt_mask, torch.ones(2, 2 * num_tokens)], dim=1),
            num_tokens,
        )
        direct = pipeline.denoise(prompt_ids, prompt_mask, noised_samples, shape).log_softmax(dim=-1)
        alone = pipeline.denoise(*pipeline.encode_prompt(["what is"]), noised_samples[1:], shape).log_softmax(dim=-1)
    for expected, rows in ((direct, slice(None)), (alone, slice(1, None))):
        expected = expected.gather(-1, actions[rows].unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(logps[rows], expected, rtol=1e-5, atol=1e-5)


def test_another_convention_of_the_time_reaches_the_network(namespace):
    base = namespace["pipeline"]
    pipeline = namespace["SigmaPipeline"](base.transformer, base.scheduler, base.tokenizer, max_completion_length=2)
    inputs = pipeline.prepare_denoiser_inputs(
        *pipeline.encode_prompt(["what"]), torch.tensor([[3, 4]]), (2,), t=torch.tensor([0.5])
    )
    assert inputs["sigma"].item() == pytest.approx(math.log(2))
