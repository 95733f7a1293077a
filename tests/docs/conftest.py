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

import gzip
import shutil

import pytest
from datasets import Dataset

from trl_udm.data.geneval import generate_geneval_prompts
from trl_udm.worlds.shapes import CHECKPOINT_PATH

from ..pipelines import tiny_diffusion_gemma
from ..rewards.test_clip import save_head, save_tiny_clip
from ..rewards.test_hpsv3 import convert, save_original_files
from ..rewards.test_image_reward import save_tiny_image_reward
from ..rewards.test_mask2former import build_tiny_mask2former


CLIPS = (
    "openai/clip-vit-base-patch32",
    "openai/clip-vit-large-patch14",
    "yuvalkirstain/PickScore_v1",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "hpsv2.1",
)
QUOTE = 'A sign that says "Open"'


@pytest.fixture(scope="session")
def models(tmp_path_factory, oracle_dir):
    """A folder of small networks under the names of large ones on the Hub."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(oracle_dir / "tiny-ursa", folder / "BAAI" / "URSA-1.7B-IBQ512")
    shutil.copytree(oracle_dir / "fudoki" / "tiny-fudoki", folder / "LucasJinWang" / "FUDOKI")
    shutil.copytree(oracle_dir / "fudoki" / "release_layout", folder / "release")
    for name in CLIPS:
        save_tiny_clip(folder / name, max_length=77)
    save_head(folder / "sac+logos+ava1-l14-linearMSE.pth", (0, 2, 4, 6, 7))
    save_tiny_image_reward(folder / "THUDM" / "ImageReward", folder / "google-bert" / "bert-base-uncased")
    originals = tmp_path_factory.mktemp("originals")
    save_original_files(originals)
    convert(originals, folder / "hpsv3")
    build_tiny_mask2former().save_pretrained(folder / "facebook" / "mask2former-swin-small-coco-instance")
    tiny_diffusion_gemma.build_pipeline().save_pretrained(folder / "google" / "diffusiongemma-26B-A4B-it")
    return folder


@pytest.fixture
def folder(models, tmp_path, monkeypatch):
    """A working folder with these networks, the files that a reader has, and the model that `make geneval` leaves."""
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    generate_geneval_prompts(60).to_json(tmp_path / "evaluation_metadata.jsonl")
    for name in ("prompts.txt", "test.txt"):
        (tmp_path / name).write_text(f"{QUOTE}\n")
    (tmp_path / "prompts.csv").write_text("prompt;place\na café;Orléans\n", encoding="latin-1")
    (tmp_path / "prompts.csv.gz").write_bytes(gzip.compress(f"prompt\n'{QUOTE}'\n".encode()))
    Dataset.from_dict({"caption": [QUOTE] * 2}).to_parquet(tmp_path / "prompts.parquet")
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "shapes-udm-grpo").symlink_to(CHECKPOINT_PATH)
    monkeypatch.chdir(tmp_path)
    return tmp_path
