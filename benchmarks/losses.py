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
Tries each loss that the trainer inherits from TRL, with each way to scale rewards and at both levels.

Each combination trains on the world of shapes for a few steps. It has several updates per rollout, clipping on both
sides, the KL term and two weighted rewards, so that every branch of the loss is used. Prints a Markdown table: the
gradient norm of the first step and the KL divergence of the last step, or the error that refuses the combination.

    python benchmarks/losses.py
"""

import argparse
import itertools
import logging
import tempfile
import warnings
from typing import Any

import numpy as np
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from shapes_runs import build_trainer
from tqdm.auto import tqdm
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging


LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
LEVELS = ("sequence", "token")
# Options that are varied beside the loss and the level
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    '`scale_rewards="batch"`': {"scale_rewards": "batch"},
    '`scale_rewards="none"`': {"scale_rewards": "none"},
    '`multi_objective_aggregation="normalize_then_sum"`': {"multi_objective_aggregation": "normalize_then_sum"},
    "`delta=1.5`, `epsilon_high=2e-4`": {"delta": 1.5, "epsilon_high": 2e-4},
    "`entropy_coef=0.01`": {"entropy_coef": 0.01},
    "`top_entropy_quantile=0.5`": {"top_entropy_quantile": 0.5},
}


def redness(completions: list[Image.Image], **kwargs) -> list[float]:
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in completions]


def darkness(completions: list[Image.Image], **kwargs) -> list[float]:
    return [1 - float(np.asarray(image).mean()) / 255 for image in completions]


def train(output_dir: str, num_steps: int, **options: Any) -> str:
    """Trains one combination. Returns its cell of the table."""
    trainer = build_trainer(
        output_dir,
        [redness, darkness],
        num_generations=4,
        num_iterations=2,
        per_device_train_batch_size=8,
        num_train_timesteps=1,
        num_inference_steps=4,
        num_inference_steps_eval=4,
        learning_rate=1e-3,
        reward_weights=[1.0, 0.5],
        max_steps=num_steps,
        disable_tqdm=True,
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    if not all(np.isfinite(parameter.detach().numpy()).all() for parameter in trainer.model.parameters()):
        raise RuntimeError(f"Training with {options} gave weights that are not finite.")
    return f"{logs[0]['grad_norm']:.2g}, {logs[-1]['kl']:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_steps", type=int, default=3, help="training steps of each combination")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")

    cells: dict[tuple[str, str, str], str] = {}
    reasons: list[str] = []
    combinations = list(itertools.product(VARIANTS, LEVELS, LOSS_TYPES))
    with tempfile.TemporaryDirectory() as output_dir:
        for variant, level, loss_type in tqdm(combinations, unit="combination"):
            options = {"loss_type": loss_type, "importance_sampling_level": level, **VARIANTS[variant]}
            if loss_type == "cispo":  # there it bounds the weight of a log-probability
                options["epsilon_high"] = 5.0
            try:
                cells[variant, level, loss_type] = train(output_dir, args.num_steps, **options)
            except ValueError as error:
                reasons += [] if str(error) in reasons else [str(error)]
                cells[variant, level, loss_type] = f"refused ({reasons.index(str(error)) + 1})"
    print("| options | level | " + " | ".join(f"`{loss_type}`" for loss_type in LOSS_TYPES) + " |")
    print("|---" * (len(LOSS_TYPES) + 2) + "|")
    for variant, level in itertools.product(VARIANTS, LEVELS):
        print(f"| {variant} | {level} | " + " | ".join(cells[variant, level, name] for name in LOSS_TYPES) + " |")
    for number, reason in enumerate(reasons, start=1):
        print(f"\n({number}) {reason}")


if __name__ == "__main__":
    main()
