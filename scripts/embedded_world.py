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

"""Shared code of the worlds' training scripts: trains a tokenizer and a small URSA on rendered scenes."""

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import PreTokenizer
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR
from transformers import PreTrainedTokenizerFast

from trl_udm.models.autoencoder_vq import AutoencoderVQ
from trl_udm.models.autoencoder_vq_cosmos3d import AutoencoderVQCosmos3D
from trl_udm.models.configuration_ursa import URSAConfig
from trl_udm.models.modeling_ursa import URSAForImageGeneration
from trl_udm.pipelines.pipeline_ursa import URSAPipeline
from trl_udm.schedulers.scheduling_kinetic_optimal import KineticOptimalScheduler


Autoencoder = AutoencoderVQ | AutoencoderVQCosmos3D


@dataclass
class World:
    """
    Description of a world.

    Args:
        sample_captioned_images (`Callable`):
            Draws images or videos, and captions, given their number, the share of wrong captions and a
            `random.Random`.
        build_autoencoder (`Callable`):
            Builds the untrained tokenizer, given its number of codes.
        num_vq_embeddings (`int`):
            Default number of codes.
        tokenizer (`PreTrainedTokenizerFast`):
            Text tokenizer, from [`build_tokenizer`].
        max_prompt_length (`int`):
            Maximum number of text tokens in a prompt.
        image_size (`tuple[int, ...]`):
            Height and width in pixels, and the number of frames of videos.
        training_shift (`float`):
            Shift of the times at which the network is trained. A larger shift means more noise.
        description (`str`):
            Description of the script.
        num_steps (`int`):
            Default number of training steps of the network.
        caption_error (`float`):
            Default share of wrong captions.
        known_frame_share (`float`, *optional*, defaults to `0.0`):
            Share of the videos whose first latent frame is not noised, so that the network learns to continue images.
        num_vq_steps (`int`, *optional*, defaults to `1200`):
            Default number of training steps of the tokenizer.
        vq_batch_size (`int`, *optional*, defaults to `32`):
            Scenes per step of the tokenizer.
    """

    sample_captioned_images: Callable[[int, float, random.Random], tuple[list[Any], list[str]]]
    build_autoencoder: Callable[[int], Autoencoder]
    num_vq_embeddings: int
    tokenizer: PreTrainedTokenizerFast
    max_prompt_length: int
    image_size: tuple[int, ...]
    training_shift: float
    description: str
    num_steps: int
    caption_error: float
    known_frame_share: float = 0.0
    num_vq_steps: int = 1200
    vq_batch_size: int = 32


def to_tensor(images) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))  # (B, H, W, 3) or (B, T, H, W, 3)
    return pixels.movedim(-1, 1).float() / 127.5 - 1


def farthest_points(points: torch.Tensor, num_points: int) -> torch.Tensor:
    """Picks points one by one. Each is the point farthest from those picked before."""
    picked = [0]
    nearest = points @ points[0]
    while len(picked) < num_points:
        picked.append(nearest.argmin().item())
        nearest = torch.maximum(nearest, points @ points[picked[-1]])
    return points[picked].clone()


def train_autoencoder(world: World, autoencoder: AutoencoderVQ, num_steps: int, rng: random.Random) -> None:
    """
    Trains the image tokenizer: first without codes, then with a codebook that is initialized with latents.

    Codes have norm 1, and only the direction of a latent counts. So the nearest code is the one with the largest inner
    product. Unused codes are moved onto latents that are far from all codes.
    """
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = OneCycleLR(optimizer, max_lr=2e-3, total_steps=num_steps, pct_start=0.05)
    num_warmup_steps = num_steps // 5
    codebook = autoencoder.codebook
    usage = torch.zeros(codebook.size(0))
    start = time.perf_counter()
    for step in range(num_steps):
        images = to_tensor(world.sample_captioned_images(world.vq_batch_size, 0.0, rng)[0])
        latents = functional.normalize(autoencoder.encode(images).latents.permute(0, 2, 3, 1), dim=-1)  # (B, h, w, d)
        codes, quantization_loss = latents, torch.zeros(())
        if step < num_warmup_steps:
            # Noise pulls latents together whose images are alike, and pushes others apart
            codes = functional.normalize(latents + 0.15 * torch.randn_like(latents), dim=-1)
        else:
            flat = latents.detach().flatten(0, 2)
            if step == num_warmup_steps:
                codebook.data = farthest_points(flat, codebook.size(0))
            directions = functional.normalize(codebook, dim=-1)
            similarity = flat @ directions.T  # (B * h * w, V)
            best, ids = similarity.max(dim=-1)
            usage += torch.bincount(ids, minlength=usage.numel())
            if step % 25 == 0 and step < num_steps * 3 // 4:
                unused = (usage == 0).nonzero().squeeze(1)
                poor = (best < 0.95).nonzero().squeeze(1)[: len(unused)]
                codebook.data[unused[: len(poor)]] = flat[poor]
                usage.zero_()
            quantized = directions[ids].view_as(latents)
            quantization_loss = functional.mse_loss(quantized, latents.detach(), reduction="sum") / len(flat)
            quantization_loss += 0.25 * functional.mse_loss(latents, quantized.detach(), reduction="sum") / len(flat)
            codes = latents + (quantized - latents).detach()
        decoded = autoencoder.decoder(autoencoder.post_quant_conv(codes.permute(0, 3, 1, 2)))
        reconstruction_loss = functional.mse_loss(decoded, images)
        update(autoencoder, reconstruction_loss + 0.1 * quantization_loss, optimizer, schedule)
        if (step + 1) % 100 == 0:
            print(
                f"vq {step + 1}/{num_steps} mse {reconstruction_loss.item():.5f} "
                f"quantization {quantization_loss.item():.4f} {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    codebook.data = functional.normalize(codebook.data, dim=-1)


def encode_frames(encode: Callable[[torch.Tensor], torch.Tensor], frames: torch.Tensor, dim: int) -> torch.Tensor:
    """
    Encodes images, or videos of shape (B, 3, T, H, W), whose latent frames are in dimension `dim`. The first one is
    encoded without the others, as where an image is continued.
    """
    if frames.ndim == 4:
        return encode(frames)
    encoded = encode(frames)
    return torch.cat([encode(frames[:, :, :1]), encoded.narrow(dim, 1, encoded.size(dim) - 1)], dim=dim)


@torch.no_grad()
def build_token_dataset(
    world: World, output_dir: Path, autoencoder: Autoencoder, num_images: int, caption_error: float, seed: int
):
    """Encodes all scenes once. The network then trains on token ids."""
    tokens_path, captions_path = output_dir / "tokens.safetensors", output_dir / "captions.json"
    if not captions_path.exists():
        rng = random.Random(seed + 1)
        tokens, captions = [], []
        for _ in range(0, num_images, 256):
            images, texts = world.sample_captioned_images(256, caption_error, rng)
            ids = encode_frames(autoencoder.encode_to_ids, to_tensor(images), dim=1)
            tokens.append(ids.flatten(1).to(torch.int16))
            captions += texts
        save_file({"tokens": torch.cat(tokens)}, tokens_path)
        captions_path.write_text(json.dumps(captions))
    return load_file(tokens_path)["tokens"].long(), json.loads(captions_path.read_text())


def build_tokenizer(words: set[str], pre_tokenizer: PreTokenizer) -> PreTrainedTokenizerFast:
    """Builds a tokenizer with one token per word."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<bov>", "<unk>", *sorted(words)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<bov>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_scheduler(autoencoder: Autoencoder) -> KineticOptimalScheduler:
    """
    Builds a scheduler with the path of URSA, but with a larger alpha, which makes the early steps noisier.

    In the first half of a rollout's 10 steps the model decides which objects the image shows and where. In the second
    half it decides their outlines.
    """
    scheduler = KineticOptimalScheduler(alpha=1.5, c=3.0, shift=2.0)
    if isinstance(autoencoder, AutoencoderVQ):
        scheduler.set_codebook(autoencoder.codebook.detach())
    else:
        scheduler.set_codebook(autoencoder.quantizer.decode(torch.arange(autoencoder.config.num_vq_embeddings)))
    return scheduler


def build_network(text_vocab_size: int, autoencoder: Autoencoder) -> URSAForImageGeneration:
    config = URSAConfig(
        text_vocab_size=text_vocab_size,
        codebook_size=autoencoder.config.num_vq_embeddings,
        bov_token_id=2,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
    )
    return URSAForImageGeneration(config)


def build_optimizer(network: torch.nn.Module, num_steps: int) -> tuple[torch.optim.Optimizer, OneCycleLR]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.02)
    return optimizer, OneCycleLR(optimizer, max_lr=2e-3, total_steps=num_steps, pct_start=0.05)


def update(
    network: torch.nn.Module, loss: torch.Tensor, optimizer: torch.optim.Optimizer, schedule: OneCycleLR
) -> None:
    """Takes one optimizer step, with the norm of the gradient clipped to 1."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    schedule.step()


def load_training_state(
    output_dir: Path, network: torch.nn.Module, optimizer: torch.optim.Optimizer, schedule: OneCycleLR
) -> int:
    """Loads what [`save_training_state`] saved, if it exists. Returns the number of steps that were done."""
    path = output_dir / "network.pt"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["step"]


def save_training_state(
    output_dir: Path, step: int, network: torch.nn.Module, optimizer: torch.optim.Optimizer, schedule: OneCycleLR
):
    """Saves the state from which a training can continue."""
    state = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "step": step,
    }
    torch.save(state, output_dir / "network.pt")


def train_network(
    world: World,
    output_dir: Path,
    pipeline: URSAPipeline,
    tokens: torch.LongTensor,
    captions: list[str],
    num_steps: int,
    batch_size: int,
    seed: int,
    bf16: bool,
):
    """Trains with the cross-entropy of the clean tokens given noised ones, as URSA. Drops 5 % of the prompts."""
    torch.manual_seed(seed)
    network, scheduler = pipeline.transformer.train(), pipeline.scheduler
    if bf16:
        network.set_attn_implementation("eager")  # the backward pass of SDPA is slow in bfloat16 on CPUs
    times = KineticOptimalScheduler.from_config(scheduler.config, shift=world.training_shift)
    latent_shape = pipeline.latent_shape(*world.image_size)
    prompt_ids, prompt_mask = pipeline.encode_prompt(captions)
    empty_ids, empty_mask = pipeline.encode_prompt([""])
    optimizer, schedule = build_optimizer(network, num_steps)
    first_step = load_training_state(output_dir, network, optimizer, schedule)
    start, losses = time.perf_counter(), []
    for step in range(first_step, num_steps):
        generator = torch.Generator().manual_seed(seed * num_steps + step)
        rows = torch.randint(len(tokens), (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, 1, generator=generator) < 0.05
        ids = torch.where(dropped, empty_ids, prompt_ids[rows])
        mask = torch.where(dropped, empty_mask, prompt_mask[rows])
        clean_samples = tokens[rows]
        t = times.sample_timesteps((batch_size,), generator=generator)
        if world.known_frame_share > 0:
            t = t.unsqueeze(1).repeat(1, clean_samples.size(1))
            is_known = torch.rand(batch_size, generator=generator) < world.known_frame_share
            t[is_known, : math.prod(latent_shape[1:])] = 1.0
        noised_samples = scheduler.add_noise(clean_samples, t, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = pipeline.denoise(ids, mask, noised_samples, latent_shape)  # (B, N, V)
        loss = functional.cross_entropy(logits.float().flatten(0, 1), clean_samples.flatten())
        update(network, loss, optimizer, schedule)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            elapsed = time.perf_counter() - start
            print(f"network {step + 1}/{num_steps} loss {np.mean(losses[-50:]):.4f} {elapsed:.0f} s", flush=True)
        if (step + 1) % 250 == 0:
            save_training_state(output_dir, step + 1, network, optimizer, schedule)
    network.eval()


def main(world: World, train_autoencoder: Callable[..., None] = train_autoencoder):
    parser = argparse.ArgumentParser(
        description=world.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of the checkpoint.")
    parser.add_argument("--num_vq_steps", type=int, default=world.num_vq_steps, help="Steps of the tokenizer.")
    parser.add_argument(
        "--num_vq_embeddings", type=int, default=world.num_vq_embeddings, help="Codes of the tokenizer."
    )
    parser.add_argument(
        "--num_images", type=int, default=65536, help="Number of scenes on which the network is trained."
    )
    parser.add_argument("--num_steps", type=int, default=world.num_steps, help="Steps of the network.")
    parser.add_argument("--batch_size", type=int, default=128, help="Scenes per step of the network.")
    parser.add_argument("--caption_error", type=float, default=world.caption_error, help="Share of wrong captions.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of everything.")
    parser.add_argument("--bf16", action="store_true", help="Train the network in bfloat16, on CPUs that have it.")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    autoencoder, path = world.build_autoencoder(args.num_vq_embeddings), args.output_dir / "vae"
    if path.exists():
        autoencoder = type(autoencoder).from_pretrained(path)
        autoencoder.register_to_config(_name_or_path=None)  # else the pipeline would be saved with this folder's name
    else:
        train_autoencoder(world, autoencoder, args.num_vq_steps, random.Random(args.seed))
        autoencoder.save_pretrained(path)
    autoencoder.eval()
    tokens, captions = build_token_dataset(
        world, args.output_dir, autoencoder, args.num_images, args.caption_error, args.seed
    )
    pipeline = URSAPipeline(
        build_network(len(world.tokenizer), autoencoder),
        build_scheduler(autoencoder),
        world.tokenizer,
        autoencoder,
        world.max_prompt_length,
    )
    train_network(
        world, args.output_dir, pipeline, tokens, captions, args.num_steps, args.batch_size, args.seed, args.bf16
    )
    pipeline.save_pretrained(args.output_dir / "pipeline")
