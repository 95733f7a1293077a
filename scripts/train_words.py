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
Trains the model of the embedded world of words: a VQ image tokenizer and a small URSA, on images of words with
captions.

    python scripts/train_words.py --output_dir words_checkpoint

The words are random letters, so the model learns to write letter by letter. Some images show a misspelled word. So the
model writes clearly, but often not what the prompt asks for. A second call of the command keeps a finished tokenizer,
and continues the network's training from its last checkpoint.
"""

import random
import string

from embedded_world import World, build_tokenizer, main
from tokenizers import Regex
from tokenizers.pre_tokenizers import Sequence, Split, Whitespace

from trl_udm.models.autoencoder_vq import AutoencoderVQ
from trl_udm.worlds.words.prompts import TEMPLATES, misspell, sample_word
from trl_udm.worlds.words.world import IMAGE_SIZE, INKS, render


def sample_captioned_images(num_images: int, caption_error: float, rng: random.Random):
    images, captions = [], []
    for _ in range(num_images):
        word = sample_word(rng)
        shown = misspell(word, rng) if rng.random() < caption_error else word
        images.append(render(shown, rng.choice(list(INKS))))
        captions.append(rng.choice(TEMPLATES).format(word))
    return images, captions


def build_autoencoder(num_vq_embeddings: int) -> AutoencoderVQ:
    return AutoencoderVQ(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        num_vq_embeddings=num_vq_embeddings,
        vq_embed_dim=8,
    )


if __name__ == "__main__":
    words = {word for template in TEMPLATES for word in template.replace('"{}"', "").split()}
    main(
        World(
            sample_captioned_images=sample_captioned_images,
            build_autoencoder=build_autoencoder,
            num_vq_embeddings=512,
            tokenizer=build_tokenizer(
                {*words, '"', *string.ascii_uppercase}, Sequence([Whitespace(), Split(Regex("[A-Z]"), "isolated")])
            ),
            max_prompt_length=13,
            image_size=IMAGE_SIZE,
            training_shift=5.0,
            description=__doc__,
            num_steps=3000,
            caption_error=0.6,
        )
    )
