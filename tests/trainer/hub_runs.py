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
Runs that push to the Hub and load from it, in a process of their own, whose environment says where the Hub is.

    python -m tests.trainer.hub_runs push FOLDER ORIGINAL_CHECKPOINT    train and push; FOLDER has samples then
    python -m tests.trainer.hub_runs load FOLDER                        load what was pushed, and compare
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import logging as hub_logging
from peft import LoraConfig

from trl_udm import UDMGRPOConfig, UDMGRPOTrainer, URSAPipeline
from trl_udm.evaluation.comparison import train_and_compare
from trl_udm.worlds.shapes import CHECKPOINT_PATH

from .hub_server import TOKEN, USER
from .toy_text_family import ToyTextPipeline, build_toy_text_pipeline


PROMPTS = {
    "image": Dataset.from_dict({"prompt": ["a photo of a red circle", "a photo of a ring"]}),
    "text": Dataset.from_dict({"prompt": ["ab", "cd"]}),
}
LORA = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear")
LICENCE = {"license": "other", "license_name": "licence-of-the-shapes"}
# By repository: whether it is of a LoRA, the base model, and when it is pushed to
RUNS = {
    "lora": (True, "shapes", "all_checkpoints"),
    "full": (False, "original", "checkpoint"),
    "text-lora": (True, "toy", "end"),
    "text-full": (False, None, "every_save"),
}


def redness(completions, **kwargs):
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in completions]


def count_a(completions, **kwargs):
    return [completion.count("a") / len(completion) for completion in completions]


def load_base(name: str | None):
    if name is None:
        return build_toy_text_pipeline()
    if name == "toy":
        return ToyTextPipeline.from_pretrained(f"{USER}/toy")
    return URSAPipeline.from_pretrained(f"{USER}/{name}", **({"max_prompt_length": 16} if name == "original" else {}))


def build_trainer(output_dir: Path, is_lora: bool, base: str | None, hub_strategy: str, **kwargs) -> UDMGRPOTrainer:
    pipeline = load_base(base)
    args = UDMGRPOConfig(
        str(output_dir),
        **{
            "num_generations": 4,
            "per_device_train_batch_size": 12,
            "num_inference_steps": 5,
            "num_inference_steps_eval": 6,
            "learning_rate": 1e-2,
            "max_steps": 2,
            "bf16": False,
            "activation_checkpointing": False,
            "report_to": "tensorboard",
            "logging_steps": 1,
            "save_steps": 1,
            "push_to_hub": True,
            "hub_model_id": f"{USER}/{output_dir.name}",
            "hub_strategy": hub_strategy,
            "hub_token": TOKEN,
            "ema_decay": 0.5 if pipeline.modality == "text" else None,
            "pipeline_kwargs": {"height": 32, "width": 32} if base == "original" else None,
            **kwargs,
        },
    )
    sys.stdout.write(repr(args))
    return UDMGRPOTrainer(
        pipeline,
        redness if pipeline.modality == "image" else count_a,
        args,
        train_dataset=PROMPTS[pipeline.modality],
        peft_config=LORA if is_lora else None,
    )


def draw(pipeline, **kwargs):
    """What the card's snippet draws: the codes of an image, or text."""
    generator = torch.Generator().manual_seed(0)
    prompt = PROMPTS[pipeline.modality][0]["prompt"]
    output = pipeline(prompt, num_inference_steps=6, guidance_scale=1.0, generator=generator, **kwargs)
    return np.asarray(output.images[0]).tolist() if pipeline.modality == "image" else output.texts[0]


def push(folder: Path, original_checkpoint: Path) -> None:
    transformers.logging.set_verbosity_debug()
    hub_logging.set_verbosity_debug()
    api = HfApi(token=TOKEN)
    build_toy_text_pipeline().save_pretrained(folder / "toy")
    for name, path in (("shapes", CHECKPOINT_PATH), ("original", original_checkpoint), ("toy", folder / "toy")):
        api.create_repo(f"{USER}/{name}")
        api.upload_folder(repo_id=f"{USER}/{name}", folder_path=path)
    card = ModelCard(f"---\n{ModelCardData(**LICENCE).to_yaml()}\n---\n")
    api.upload_file(repo_id=f"{USER}/shapes", path_or_fileobj=str(card).encode(), path_in_repo="README.md")

    samples = {}
    for name, run in RUNS.items():
        trainer = build_trainer(folder / name, *run)
        if name == "lora":
            train_and_compare(trainer, redness, list(PROMPTS["image"]), num_images_per_prompt=1)
        else:
            trainer.train()
        trainer.push_to_hub()
        samples[name] = draw(trainer.pipeline, **(trainer.args.pipeline_kwargs or {}))
    (folder / "samples.json").write_text(json.dumps(samples))

    # Without `push_to_hub=True`
    build_trainer(folder / "later", False, None, "end", push_to_hub=False).push_to_hub("By hand")

    try:
        build_trainer(folder / "refused", False, None, "end", hub_token="hf_" + "Wrong")
    except HfHubHTTPError as error:
        (folder / "refused.txt").write_text(str(error))


def load(folder: Path) -> None:
    samples, outcome = json.loads((folder / "samples.json").read_text()), {}
    for name, (_, base, _) in RUNS.items():
        card = ModelCard.load(f"{USER}/{name}")
        (snippet,) = re.findall("```python\n(.*?)```", card.text, flags=re.DOTALL)
        variables = {}
        exec(snippet, variables)
        drawn = variables["text"] if "text" in variables else np.asarray(variables["image"]).tolist()
        kwargs = {"height": 32, "width": 32} if base == "original" else {}
        outcome[name] = {
            "is_the_trainers": drawn == samples[name],
            "is_the_base_models": drawn == draw(load_base(base), **kwargs),
        }

    # What was pushed in the middle of the training
    for name, cls in (("full", URSAPipeline), ("text-full", ToyTextPipeline)):
        commits = {commit.title: commit.commit_id for commit in HfApi().list_repo_commits(f"{USER}/{name}")}
        first, last, saved = (
            cls.from_pretrained(path, revision=revision).transformer.state_dict()
            for path, revision in (
                (f"{USER}/{name}", commits["Training in progress, step 1"]),
                (f"{USER}/{name}", None),
                (folder / name / "checkpoint-1", None),
            )
        )
        outcome[name]["first_is_step_1"] = all(torch.equal(first[key], saved[key]) for key in saved)
        outcome[name]["last_is_step_1"] = all(torch.equal(last[key], saved[key]) for key in saved)

    checkpoint = Path(snapshot_download(f"{USER}/full", allow_patterns="last-checkpoint/*")) / "last-checkpoint"
    trainer = build_trainer(folder / "resumed", *RUNS["full"], push_to_hub=False, max_steps=3)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    steps = [log["step"] for log in trainer.state.log_history if "reward" in log]
    outcome["resumed"] = {"steps": steps, "global_step": trainer.state.global_step}
    (folder / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    {"push": push, "load": load}[sys.argv[1]](*map(Path, sys.argv[2:]))
