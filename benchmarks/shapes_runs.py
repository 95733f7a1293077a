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

"""What benchmarks share that train the world of shapes on a CPU."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_udm import UDMGRPOConfig, UDMGRPOTrainer, URSAPipeline
from trl_udm.worlds.shapes import CHECKPOINT_PATH


PROMPTS = Dataset.from_dict({"prompt": ["a photo of a red circle", "a photo of a blue ring"]})


def build_trainer(
    output_dir: str | Path,
    reward_funcs: Any,
    train_dataset: Dataset = PROMPTS,
    peft_config: Any = None,
    **options: Any,
) -> UDMGRPOTrainer:
    """
    Builds a trainer that computes in float32 on the CPU, logs each step, and neither saves nor reports.

    Args:
        output_dir (`str` or `Path`):
            Output folder of the run.
        reward_funcs (`Any`):
            As in [`UDMGRPOTrainer`].
        train_dataset ([`~datasets.Dataset`], *optional*):
            Training prompts. By default two.
        peft_config ([`~peft.PeftConfig`], *optional*):
            As in [`UDMGRPOTrainer`].
        options (`Any`):
            Arguments of [`UDMGRPOConfig`]. They override those above.

    Returns:
        [`UDMGRPOTrainer`]: The trainer.
    """
    defaults = {
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    args = UDMGRPOConfig(str(output_dir), **{**defaults, **options})
    pipeline = URSAPipeline.from_pretrained(CHECKPOINT_PATH)
    return UDMGRPOTrainer(pipeline, reward_funcs, args, train_dataset=train_dataset, peft_config=peft_config)
