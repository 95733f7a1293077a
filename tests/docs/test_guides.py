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

"""The guides, followed to the letter in a new folder, end where they say."""

import os
import subprocess
import sys

import numpy as np
from PIL import ImageChops

from trl_udm import URSAPipeline

from ..pages import ROOT, run_page


def test_the_guide_to_a_reward_trains_on_its_file(folder):
    trainer = run_page("guides/own_reward.md", folder)["trainer"]
    logs = [log for log in trainer.state.log_history if "rewards/brightness_reward/mean" in log]
    assert len(logs) == 3 and all(0 < log["reward"] <= 1 for log in logs)
    assert URSAPipeline.from_pretrained(folder / "bright-shapes").transformer is not None


def test_the_guide_to_a_lora_ends_with_the_images_of_the_adapter(folder):
    variables = run_page("guides/lora.md", folder, languages="python|bash")
    images = {name: variables[name] for name in ("with_adapter", "without_adapter", "merged")}
    assert ImageChops.difference(images["with_adapter"], images["without_adapter"]).getbbox()
    assert np.abs(np.asarray(images["with_adapter"], float) - np.asarray(images["merged"])).max() <= 1
    merged, fused = (URSAPipeline.from_pretrained(name).transformer.state_dict() for name in ("merged", "fused"))
    assert all((merged[name] - fused[name]).abs().max() < 1e-6 for name in merged)
    assert variables["trainer"].state.global_step == 1


def test_the_guide_to_logging_leaves_its_metrics_on_the_machine(folder):
    # In a process of its own, because Trackio reads its folder when it is imported
    command = "from pathlib import Path; from tests.pages import run_page; run_page('guides/logging.md', Path.cwd())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRACKIO_DIR": "trackio"}
    subprocess.run([sys.executable, "-c", command], cwd=folder, env=environment, check=True)
    assert list(folder.glob("sums/runs/*/events.out.tfevents.*"))
    assert list((folder / "trackio").glob("trl-udm*"))


def test_the_guide_to_an_image_family_learns(folder):
    variables = run_page("guides/image_family.md", folder)
    rewards, vae, images = variables["rewards"], variables["vae"], variables["pipeline"]("a picture").images
    assert rewards[0] < 0.2 and rewards[-1] > 0.6
    assert images[0].size == (32, 32) and (folder / "red.png").exists()
    ids = vae.encode(vae.codebook.T.reshape(1, 3, 1, 8).repeat_interleave(8, 2).repeat_interleave(8, 3))
    assert ids.tolist() == [list(range(8))]
