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

"""
Trains the model of the embedded world that moves: a video tokenizer and a small URSA, on rendered scenes with
captions.

    python scripts/train_moving.py --output_dir moving_checkpoint

Some captions have one mistake: a wrong class, color, count, direction or speed. So the model draws well, but often
something else than the prompt says. Reinforcement learning then has this to correct. Of a quarter of the videos the
network sees the first frame without noise, so that it also continues images. A second call of the command keeps a
finished tokenizer, and continues the network's training from its last checkpoint.
"""

import random
import time

import torch
from embedded_world import World, build_tokenizer, encode_frames, main, to_tensor, update
from tokenizers.pre_tokenizers import Whitespace
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR

from trl_udm.models.autoencoder_vq_cosmos3d import AutoencoderVQCosmos3D
from trl_udm.worlds.moving.prompts import TAGS, all_metadata, corrupt, sample_scene
from trl_udm.worlds.moving.world import CELL_SIZE, IMAGE_SIZE, NUM_FRAMES, render


METADATA = {tag: all_metadata(tag) for tag in TAGS}


def sample_captioned_videos(num_videos: int, caption_error: float, rng: random.Random):
    videos, captions = [], []
    for _ in range(num_videos):
        # The hardest kind is drawn three times as often as each other kind
        metadata = rng.choice(METADATA[rng.choice([*TAGS, "two_object", "two_object"])])
        shown = corrupt(metadata, rng) if rng.random() < caption_error else metadata
        videos.append(render(sample_scene(shown, rng)))
        captions.append(metadata["prompt"])
    return videos, captions


def build_autoencoder(num_vq_embeddings: int) -> AutoencoderVQCosmos3D:
    return AutoencoderVQCosmos3D(
        block_out_channels=(40, 40),
        layers_per_block=1,
        latent_channels=16,
        sample_size=IMAGE_SIZE,
        sample_frames=NUM_FRAMES,
        num_vq_embeddings=num_vq_embeddings,
        vq_embed_dim=6,
        # With three values a channel, no code is a multiple of another: the path's codes are normalized
        levels=(3,) * 6,
        patch_size=4,
        spatial_stride=CELL_SIZE,
        temporal_stride=4,
    )


def train_autoencoder(world: World, autoencoder: AutoencoderVQCosmos3D, num_steps: int, rng: random.Random) -> None:
    """Trains the video tokenizer. The gradient passes the rounding of the codes as if there were none."""
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = OneCycleLR(optimizer, max_lr=2e-3, total_steps=num_steps, pct_start=0.05)
    start = time.perf_counter()
    for step in range(num_steps):
        videos = to_tensor(world.sample_captioned_images(world.vq_batch_size, 0.0, rng)[0])
        latents = encode_frames(lambda frames: autoencoder.encode(frames).latents, videos, dim=2)
        bounded = autoencoder.quantizer.bound(latents)
        codes = bounded + (bounded.round() - bounded).detach()  # of a channel with three values: -1, 0 or 1
        loss = functional.mse_loss(autoencoder.decode(codes).sample, videos)
        update(autoencoder, loss, optimizer, schedule)
        if (step + 1) % 50 == 0:
            print(
                f"tokenizer {step + 1}/{num_steps} mse {loss.item():.5f} {time.perf_counter() - start:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    words = {word for rows in METADATA.values() for row in rows for word in row["prompt"].split()}
    main(
        World(
            sample_captioned_images=sample_captioned_videos,
            build_autoencoder=build_autoencoder,
            num_vq_embeddings=3**6,
            tokenizer=build_tokenizer(words, Whitespace()),
            max_prompt_length=11,
            image_size=(IMAGE_SIZE, IMAGE_SIZE, NUM_FRAMES),
            training_shift=5.0,
            description=__doc__,
            num_steps=4000,
            caption_error=0.4,
            known_frame_share=0.25,
            num_vq_steps=1500,
            vq_batch_size=16,
        ),
        train_autoencoder,
    )
