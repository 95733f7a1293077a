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
Trains the model of the embedded world of shapes: a VQ image tokenizer and a small URSA, on rendered scenes with
captions.

    python scripts/train_shapes.py --output_dir shapes_checkpoint

Some captions have one mistake: a wrong class, color, count or side. So the model draws well, but follows only about
two of three prompts. Reinforcement learning then has this to correct. A second call of the command keeps a finished
tokenizer, and continues the network's training from its last checkpoint.
"""

import random

from embedded_world import World, build_tokenizer, main
from tokenizers.pre_tokenizers import Whitespace

from trl_udm.models.autoencoder_vq import AutoencoderVQ
from trl_udm.worlds.shapes.prompts import TAGS, all_metadata, corrupt, sample_scene
from trl_udm.worlds.shapes.world import IMAGE_SIZE, render


METADATA = {tag: all_metadata(tag) for tag in TAGS}


def sample_captioned_images(num_images: int, caption_error: float, rng: random.Random):
    images, captions = [], []
    for _ in range(num_images):
        # The hardest kind is drawn three times as often as each other kind
        metadata = rng.choice(METADATA[rng.choice([*TAGS, "position", "position"])])
        shown = corrupt(metadata, rng) if rng.random() < caption_error else metadata
        images.append(render(sample_scene(shown, rng)))
        captions.append(metadata["prompt"])
    return images, captions


def build_autoencoder(num_vq_embeddings: int) -> AutoencoderVQ:
    return AutoencoderVQ(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        num_vq_embeddings=num_vq_embeddings,
        vq_embed_dim=8,
    )


if __name__ == "__main__":
    words = {word for rows in METADATA.values() for row in rows for word in row["prompt"].split()}
    main(
        World(
            sample_captioned_images=sample_captioned_images,
            build_autoencoder=build_autoencoder,
            num_vq_embeddings=128,
            tokenizer=build_tokenizer(words, Whitespace()),
            max_prompt_length=10,
            image_size=(IMAGE_SIZE, IMAGE_SIZE),
            # From t = 0.3 on, the noised tokens show what an object is. Two thirds of the training times are earlier,
            # so that the network has to use the prompt
            training_shift=5.0,
            description=__doc__,
            num_steps=4000,
            caption_error=0.3,
        )
    )
