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
Trains a text-to-image uniform discrete diffusion model on the GenEval reward with UDM-GRPO.

Without arguments, the embedded world of coloured shapes, on a CPU in minutes (settings in configs/shapes.yaml):

    accelerate launch examples/train_geneval.py

URSA, with the paper's settings:

    accelerate launch examples/train_geneval.py --config examples/configs/ursa_geneval.yaml \
        --dataset_name train_metadata.jsonl --eval_dataset_name evaluation_metadata.jsonl \
        --detector my_package.detection:build_detector --color_classifier my_package.detection:build_color_classifier

Every argument of `UDMGRPOConfig` and TRL's `ModelConfig` (LoRA among them) is a flag, and a key of the `--config` file.
The run leaves in its output folder: `samples_before.png` and `samples_after.png` (same prompts, same seeds),
`reward_curve.png`, `results.json` with the accuracy by tag before and after, and the trained weights.
"""

import importlib
import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from trl import ModelConfig, TrlParser, get_peft_config

from trl_udm import GenEvalReward, UDMGRPOConfig, UDMGRPOTrainer, URSAPipeline
from trl_udm.data.geneval import geneval_dataset, load_geneval_metadata
from trl_udm.rewards.geneval import TAGS, accuracy_by_tag
from trl_udm.shapes import CHECKPOINT_PATH
from trl_udm.shapes.prompts import balance_metadata, split_metadata
from trl_udm.trainer.completion_logging import make_image_grid


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


LORA_TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES_CONFIG_PATH = Path(__file__).parent / "configs" / "shapes.yaml"


@dataclass
class ScriptArguments:
    """
    Arguments of this script.

    Args:
        dataset_name (`str`, *optional*):
            JSON-lines file of training prompts with GenEval metadata. By default those of the embedded world.
        eval_dataset_name (`str`, *optional*):
            JSON-lines file of evaluation prompts, such as GenEval's `evaluation_metadata.jsonl`.
        detector (`str`, *optional*):
            `module:callable` that builds the detector; see `trl_udm.rewards.geneval.Detector`.
        color_classifier (`str`, *optional*):
            `module:callable` that builds the color classifier.
        reward_mode (`str`, *optional*, defaults to `"dense"`):
            Reward that is trained on: `"dense"` (partial credit, as in the paper) or `"official"`.
        num_eval_images (`int`, *optional*, defaults to `4`):
            Images a prompt in the evaluation before and after.
        eval_images_batch_size (`int`, *optional*, defaults to `120`):
            Images at a time in that evaluation.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "JSON-lines file of training prompts."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "JSON-lines file of evaluation prompts."})
    detector: str | None = field(default=None, metadata={"help": "'module:callable' that builds the detector."})
    color_classifier: str | None = field(
        default=None, metadata={"help": "'module:callable' that builds the color classifier."}
    )
    reward_mode: str = field(
        default="dense", metadata={"help": "Reward that is trained on.", "choices": ["dense", "official"]}
    )
    num_eval_images: int = field(default=4, metadata={"help": "Images a prompt in the final evaluations."})
    eval_images_batch_size: int = field(default=120, metadata={"help": "Images at a time in the final evaluations."})


def import_callable(path: str):
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def load_world(script_args: ScriptArguments, model_name_or_path: str | None):
    """The pipeline's name, the detector, the color classifier, and the prompts."""
    if model_name_or_path is None:
        from trl_udm.shapes.detector import ShapesColorClassifier, ShapesDetector

        train_rows, eval_rows = split_metadata()
        return (
            CHECKPOINT_PATH,
            ShapesDetector(),
            ShapesColorClassifier(),
            balance_metadata(train_rows, 96),
            balance_metadata(eval_rows, 20),
        )
    for name in ("dataset_name", "eval_dataset_name", "detector", "color_classifier"):
        if getattr(script_args, name) is None:
            raise ValueError(f"`--{name}` is needed with `--model_name_or_path`.")
    return (
        model_name_or_path,
        import_callable(script_args.detector)(),
        import_callable(script_args.color_classifier)(),
        load_geneval_metadata(script_args.dataset_name),
        load_geneval_metadata(script_args.eval_dataset_name),
    )


@torch.no_grad()
def evaluate(trainer: UDMGRPOTrainer, dataset: Dataset, reward: GenEvalReward, script_args: ScriptArguments):
    """Strict accuracy by tag, and each prompt's first image. Batches and seeds depend on the arguments only."""
    pipeline, args = trainer.pipeline, trainer.args
    rows = [row for row in dataset for _ in range(script_args.num_eval_images)]
    batch_size = script_args.eval_images_batch_size
    starts = list(range(0, len(rows), batch_size))
    results, images = [], []
    with trainer.accelerator.split_between_processes(starts) as local_starts:
        for start in local_starts:
            batch = rows[start : start + batch_size]
            prompt_ids, prompt_mask = pipeline.encode_prompt([row["prompt"] for row in batch])
            output = pipeline.sample_tokens(
                prompt_ids,
                prompt_mask,
                trainer.latent_shape,
                num_inference_steps=args.num_inference_steps_eval,
                generator=torch.Generator().manual_seed(start),
            )
            completions = pipeline.decode(output.clean_samples, trainer.latent_shape)
            columns = {name: [row[name] for row in batch] for name in ("tag", "include", "exclude")}
            scores = reward([row["prompt"] for row in batch], completions, **columns)
            results += [
                (start + i, row["tag"], score == 1.0) for i, (row, score) in enumerate(zip(batch, scores, strict=True))
            ]
            images += [
                (start + i, image)
                for i, image in enumerate(completions)
                if (start + i) % script_args.num_eval_images == 0
            ]
    results, images = sorted(gather_object(results)), sorted(gather_object(images), key=lambda pair: pair[0])
    return accuracy_by_tag((tag, correct) for _, tag, correct in results), [image for _, image in images]


def save_samples(path: Path, dataset: Dataset, images: list[Any], num_per_tag: int = 4) -> None:
    """A column a tag, from each tag's first prompts."""
    picked = [[i for i, tag in enumerate(dataset["tag"]) if tag == wanted][:num_per_tag] for wanted in TAGS]
    order = [i for row in zip(*picked, strict=True) for i in row]
    make_image_grid([images[i] for i in order], [dataset[i]["prompt"] for i in order], num_columns=len(TAGS)).save(
        path
    )


def save_curve(path: Path, log_history: list[dict[str, float]]) -> None:
    steps = [log["step"] for log in log_history if "reward" in log]
    rewards = [log["reward"] for log in log_history if "reward" in log]
    accuracies = []
    for log in log_history:
        if "reward" in log:
            by_tag = [log[f"geneval/{tag}"] for tag in TAGS if log.get(f"geneval/{tag}") is not None]
            accuracies.append(sum(by_tag) / len(by_tag))
    figure, axis = plt.subplots(figsize=(7, 4))
    for values, label, color in ((rewards, "reward", "tab:blue"), (accuracies, "strict accuracy", "tab:orange")):
        window = max(1, len(values) // 15)
        means = [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]
        axis.plot(steps, values, color=color, alpha=0.25)
        axis.plot(steps, means, color=color, label=label)
    axis.set(xlabel="step", ylabel="mean over the rollout's samples", title="UDM-GRPO on the GenEval reward")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def format_table(before: dict[str, float], after: dict[str, float]) -> str:
    lines = [f"{'GenEval accuracy':<18} {'before':>7} {'after':>7}"]
    lines += [f"{name:<18} {before[name]:>7.3f} {after[name]:>7.3f}" for name in before]
    return "\n".join(lines)


def main(argv: list[str]) -> dict[str, Any]:
    parser = TrlParser((ScriptArguments, UDMGRPOConfig, ModelConfig))
    if not any(argument.partition("=")[0] in ("--config", "--model_name_or_path") for argument in argv):
        argv = ["--config", str(SHAPES_CONFIG_PATH), *argv]
    script_args, training_args, model_args = parser.parse_args_and_config(args=argv)

    path, detector, color_classifier, train_rows, eval_rows = load_world(script_args, model_args.model_name_or_path)
    train_dataset = geneval_dataset(train_rows, detector.class_names)
    eval_dataset = geneval_dataset(eval_rows, detector.class_names)
    if model_args.lora_target_modules is None:
        model_args.lora_target_modules = LORA_TARGET_MODULES
    dtype = None if model_args.dtype in (None, "auto") else getattr(torch, model_args.dtype)
    pipeline = URSAPipeline.from_pretrained(path, torch_dtype=dtype)
    if model_args.attn_implementation is not None:
        pipeline.transformer.set_attn_implementation(model_args.attn_implementation)
    trainer = UDMGRPOTrainer(
        pipeline,
        reward_funcs=GenEvalReward(detector, color_classifier, mode=script_args.reward_mode),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
    )
    accuracy = GenEvalReward(detector, color_classifier, mode="official")
    output_dir = Path(training_args.output_dir)

    before, images_before = evaluate(trainer, eval_dataset, accuracy, script_args)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    after, images_after = evaluate(trainer, eval_dataset, accuracy, script_args)
    trainer.save_model()

    results = {"before": before, "after": after, "seconds": trainer.state.log_history[-1].get("train_runtime")}
    if trainer.accelerator.is_main_process:
        save_samples(output_dir / "samples_before.png", eval_dataset, images_before)
        save_samples(output_dir / "samples_after.png", eval_dataset, images_after)
        save_curve(output_dir / "reward_curve.png", trainer.state.log_history)
        (output_dir / "results.json").write_text(json.dumps(results, indent=2))
        print(format_table(before, after))
        print(f"Wrote samples_before.png, samples_after.png, reward_curve.png and results.json to {output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
