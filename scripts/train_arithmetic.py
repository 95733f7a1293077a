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
Trains the model of the embedded world of sums: a small BERT that denoises sums with their working. Some of them are
wrong.

    python scripts/train_arithmetic.py --output_dir arithmetic_checkpoint

Each number in the working is sometimes wrong. So the model learns the form of the working, and its sums are often
wrong. It sees only training problems. A second call of the command continues from its last checkpoint.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from embedded_world import build_optimizer, load_training_state, save_training_state, update
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from trl_udm import MaskedDDIMScheduler, TextUDMPipeline, UniformDDIMScheduler
from trl_udm.worlds.sums.problems import MAX_COMPLETION_LENGTH, split_problems, sum_reward, work_out


# Only the text of a message counts: there is one speaker, and "=" ends the prompt
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def build_pipeline(
    tokens: Iterable[str], max_completion_length: int, max_length: int, num_layers: int = 4, noise: str = "uniform"
) -> TextUDMPipeline:
    """
    Builds a tokenizer and an untrained network of at most `max_length` tokens. A token is a character. Numbers are
    tokens too if the tokens have some with several digits. With "masked" noise there is a mask token, the last one.
    """
    masks = ["<mask>"] if noise == "masked" else []
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *tokens, *masks])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    pattern = "[0-9]+|." if "10" in vocabulary else "."
    backend.pre_tokenizer = Split(Regex(pattern), behavior="isolated")
    backend.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=max_length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    scheduler = UniformDDIMScheduler(codebook_size=len(tokenizer))
    if masks:
        tokenizer.mask_token = masks[0]
        scheduler = MaskedDDIMScheduler(len(tokenizer), tokenizer.mask_token_id)
    return TextUDMPipeline(BertForMaskedLM(config), scheduler, tokenizer, max_completion_length)


def train(
    pipeline: TextUDMPipeline,
    args: argparse.Namespace,
    write_batch: Callable[[int, random.Random], tuple[list[str], list[str]]],
    eval_prompts: list[str],
    measure_accuracy: Callable[[list[str]], list[float]],
):
    """
    Trains with the cross-entropy of the clean tokens given tokens that are noised to a uniform time.

    Args:
        pipeline ([`TextUDMPipeline`]):
            Pipeline of the network.
        args (`argparse.Namespace`):
            From [`parse_arguments`].
        write_batch (`Callable`):
            Writes prompts and completions, given their number and a source of randomness.
        eval_prompts (`list[str]`):
            Prompts whose completions are measured every 250 steps.
        measure_accuracy (`Callable`):
            Measures completions of these prompts.
    """
    network, tokenizer = pipeline.transformer.train(), pipeline.tokenizer
    if args.bf16:
        network.set_attn_implementation("eager")  # the backward pass of SDPA is slow in bfloat16 on CPUs
    optimizer, schedule = build_optimizer(network, args.num_steps)
    first_step = load_training_state(args.output_dir, network, optimizer, schedule)
    start, losses = time.perf_counter(), []
    for step in range(first_step, args.num_steps):
        seed = args.seed * args.num_steps + step
        generator = torch.Generator().manual_seed(seed)
        prompts, completions = write_batch(args.batch_size, random.Random(seed))
        clean_samples = tokenizer(
            [completion + tokenizer.eos_token for completion in completions],
            padding="max_length",
            padding_side="right",
            max_length=pipeline.config.max_completion_length,
            return_tensors="pt",
        )["input_ids"]  # (B, N): the completion, the end token, and padding
        t = torch.rand(args.batch_size, generator=generator)
        noised_samples = pipeline.scheduler.add_noise(clean_samples, t, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits = pipeline.denoise(*pipeline.encode_prompt(prompts), noised_samples, pipeline.latent_shape())
        logits = pipeline.scheduler.constrain_logits(logits, noised_samples)
        loss = functional.cross_entropy(logits.float().flatten(0, 1), clean_samples.flatten())  # of (B * N, V)
        update(network, loss, optimizer, schedule)
        losses.append(loss.item())
        if (step + 1) % 250 == 0:
            save_training_state(args.output_dir, step + 1, network, optimizer, schedule)
            rewards = measure_accuracy(pipeline(eval_prompts, generator=generator, num_inference_steps=10).texts)
            print(
                f"{step + 1}/{args.num_steps} loss {sum(losses[-250:]) / len(losses[-250:]):.4f} accuracy "
                f"{sum(rewards) / len(rewards):.3f} {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    network.eval().set_attn_implementation("sdpa")
    pipeline.save_pretrained(args.output_dir / "pipeline")


def build_parser(description: str, num_steps: int, slip_rate: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of the checkpoint.")
    parser.add_argument("--num_steps", type=int, default=num_steps, help="Training steps.")
    parser.add_argument("--batch_size", type=int, default=256, help="Problems per step.")
    parser.add_argument("--slip_rate", type=float, default=slip_rate, help="Probability of each possible mistake.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of everything.")
    parser.add_argument("--bf16", action="store_true", help="Train in bfloat16, on CPUs that have it.")
    return parser


def main():
    args = build_parser(__doc__, num_steps=3000, slip_rate=0.22).parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    problems, eval_problems = split_problems()

    def write_batch(num_samples: int, rng: random.Random) -> tuple[list[str], list[str]]:
        prompts = [problem["prompt"] for problem in rng.choices(problems, k=num_samples)]
        terms = [map(int, prompt.removesuffix("=").split("+")) for prompt in prompts]
        return prompts, [work_out(first, second, args.slip_rate, rng) for first, second in terms]

    train(
        build_pipeline("0123456789+=", MAX_COMPLETION_LENGTH, max_length=32),
        args,
        write_batch,
        [row["prompt"] for row in eval_problems],
        lambda texts: sum_reward(texts, [row["answer"] for row in eval_problems]),
    )


if __name__ == "__main__":
    main()
