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

"""The model card of a run: metadata for the Hub, a snippet to try the model, its results, and how it was trained."""

import dataclasses
import functools
import inspect
import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from . import __version__


if TYPE_CHECKING:
    from .trainer.udm_grpo_trainer import UDMGRPOTrainer

CARD_FILES = ("README.md", "results.json", "samples.png", "samples.gif", "reward_curve.png")
"""Files of the output folder that are the card, or that it shows. [`train_and_compare`] leaves all but the first."""

_PIPELINE_TAGS = {"image": "text-to-image", "text": "text-generation", "video": "text-to-video"}

# Shown in every card, whether changed or not
_CENTRAL_ARGUMENTS = (
    "learning_rate per_device_train_batch_size gradient_accumulation_steps num_generations num_iterations action "
    "trajectory num_train_timesteps timestep_window num_inference_steps guidance_scale beta epsilon loss_type "
    "importance_sampling_level seed"
).split()
# Shown in none: where and how the run was logged, saved and pushed, which may name folders, servers and accounts
_UNTOLD_ARGUMENTS = (
    "adapter output_dir run_name report_to project resume_from_checkpoint gradient_checkpointing "
    "gradient_checkpointing_kwargs"
).split()
_UNTOLD_PREFIXES = ("hub_", "push_to_hub", "log", "save_", "dataloader_", "disable_tqdm", "trackio_", "ddp_", "vllm_")


def make_model_card(
    trainer: "UDMGRPOTrainer", model_name: str | None, dataset_name: str | None, tags: list[str]
) -> ModelCard:
    """The card of a trainer's model as it is now, with the results of [`train_and_compare`] if it left any."""
    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    base_model, is_adapter = trainer.pipeline.hub_id, is_peft_model(trainer.model)
    adapter = trainer.model.peft_config["default"].peft_type.value if is_adapter else None
    repo_id = trainer.hub_model_id or args.hub_model_id or output_dir.absolute().name
    model_name = model_name or repo_id.split("/")[-1]
    modality = trainer.pipeline.modality
    if modality == "video" and (args.pipeline_kwargs or {}).get("num_frames", 1) == 1:
        modality = "image"
    task = _PIPELINE_TAGS[modality]
    results, eval_results = _read_results(output_dir / "results.json"), None
    if results is not None:
        eval_results = EvalResult(
            task_type=task,
            dataset_type="prompts",
            dataset_name="the prompts of the evaluation before and after training",
            metric_type=results["metric"],
            metric_value=round(results["after"]["overall"], 4),
        )
    data = ModelCardData(
        base_model=base_model,
        base_model_relation=("adapter" if is_adapter else "finetune") if base_model is not None else None,
        datasets=dataset_name,
        eval_results=eval_results,
        library_name="peft" if is_adapter else "diffusers",
        model_name=model_name,
        pipeline_tag=task,
        tags=list(dict.fromkeys([*trainer._tag_names, *([adapter.lower()] if is_adapter else []), *tags])),
        **(_find_license(base_model, args.hub_token) if base_model is not None else {}),
    )

    num_rewards = len(trainer.reward_funcs) - trainer._num_eval_reward_funcs
    module = type(trainer.pipeline).__module__
    packages = ("trl", "transformers", "diffusers", "peft", "torch")
    return ModelCard.from_template(
        data,
        template_path=Path(__file__).parent / "templates" / "model_card.md",
        model_name=model_name,
        trainer_name=trainer._name,
        paper_id=trainer._paper["id"],
        base_model=base_model,
        adapter=adapter,
        rewards=trainer.reward_func_names[:num_rewards],
        files=[name for name in CARD_FILES if (output_dir / name).exists()],
        module="trl_udm" if module.startswith("trl_udm.") else module,
        pipeline=type(trainer.pipeline).__name__,
        repo_id=repo_id,
        dtype=trainer.pipeline.transformer.dtype,
        modality=modality,
        arguments=_format_call(trainer),
        results=results,
        config=type(args).__name__,
        training=_describe_training(trainer),
        versions=", ".join([f"trl-udm {__version__}", *(f"{package} {version(package)}" for package in packages)]),
        citation=trainer._paper["citation"].strip(),
    )


def _format_call(trainer: "UDMGRPOTrainer") -> str:
    """The arguments with which a pipeline draws one sample as the trainer's evaluation does."""
    args, call = trainer.args, inspect.signature(type(trainer.pipeline).__call__)
    options = {"num_inference_steps": args.num_inference_steps_eval, "guidance_scale": args.guidance_scale_eval}
    if "guidance_scale" not in call.parameters:
        del options["guidance_scale"]
    options |= args.pipeline_kwargs or {}
    return ", ".join([repr(trainer.train_dataset[0]["prompt"]), *(f"{k}={v!r}" for k, v in options.items())])


def _read_results(path: Path) -> dict[str, Any] | None:
    """What [`train_and_compare`] left, unless the file is missing or another's."""
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return results if isinstance(results, dict) and {"metric", "before", "after"} <= results.keys() else None


@functools.cache
def _find_license(base_model: str, token: str | None) -> dict[str, str]:
    """What the base model's own card says of its license; nothing where it says nothing or cannot be had."""
    try:
        data = ModelCard.load(base_model, token=token, ignore_metadata_errors=True).data
    except (HfHubHTTPError, EntryNotFoundError):
        return {}
    names = ("license", "license_name", "license_link")
    return {name: data.get(name) for name in names if data.get(name) is not None}


def _describe_training(trainer: "UDMGRPOTrainer") -> dict[str, Any]:
    args = trainer.args
    rows = {"optimization steps": trainer.state.global_step, "processes": args.world_size}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        is_changed = value != default and bool(value or default)  # `None` becomes `False` or empty on the way
        if field.name in _CENTRAL_ARGUMENTS or (is_changed and _may_be_told(field.name, value)):
            rows[f"`{field.name}`"] = json.dumps(value, default=str)
    return rows


def _may_be_told(name: str, value: Any) -> bool:
    is_untold = name in _UNTOLD_ARGUMENTS or name.startswith(_UNTOLD_PREFIXES) or name.endswith("_token")
    is_plain = value is None or isinstance(value, bool | int | float | str | list | dict)
    # What has a slash is the path of a file or the address of a server
    return not is_untold and is_plain and "/" not in str(value) and "\\" not in str(value)
