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
What the tests of several processes run in each of them: `accelerate launch -m tests.distributed.worker settings.json`.

The settings have a `backend` ("ddp", "fsdp2" or "deepspeed"), an `output_dir` and `cases`, from a name to the keyword
arguments of [`run_case`] or, with a `kind`, of [`compare_images`] or [`evaluate_rewards`]. What a case measures on a
process is left in `<output_dir>/<name>-<process>.pt`.
"""

import json
import os
import signal
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import TrainerCallback

from tests.trainer.toy_text_family import NUM_TOKENS, build_toy_text_pipeline
from trl_udm import UDMGRPOConfig, UDMGRPOTrainer, URSAPipeline
from trl_udm.evaluation.comparison import train_and_compare
from trl_udm.pipelines.pipeline_output import UDMSamplerOutput
from trl_udm.trainer.udm_grpo_trainer import Rollout
from trl_udm.worlds.shapes import CHECKPOINT_PATH


PROMPTS = ["ab", "abc", "b", "dcba", "c", "da", "bb", "acd"]
NUM_CODES = 10
LEARNING_RATE = 0.5
LORA = LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"])


def fed_tokens(prompt: str, index: int) -> torch.Tensor:
    """Tokens (N,) that depend on the prompt and on the sample's place in the whole generation batch alone."""
    seed = zlib.crc32(f"{index} {prompt}".encode())
    return torch.randint(2, NUM_CODES, (NUM_TOKENS,), generator=torch.Generator().manual_seed(seed))


class FedTrainer(UDMGRPOTrainer):
    """Takes samples and noised states from `fed_tokens`, so that any number of processes sees the same ones."""

    def _rollout(self, prompts, mode, return_trajectory=False, on_decoded=None, condition=None):
        first_index = self.accelerator.process_index * len(prompts)
        prompt_ids, prompt_mask = self.pipeline.encode_prompt(prompts)
        samples = torch.stack([fed_tokens(prompt, first_index + i) for i, prompt in enumerate(prompts)])
        completions = self.pipeline.decode(samples, self.latent_shape)
        if on_decoded is not None:
            for first in range(0, len(prompts), 4):
                on_decoded(first, samples[first : first + 4], completions[first : first + 4])
        return Rollout(prompt_ids, prompt_mask, UDMSamplerOutput(clean_samples=samples), completions)

    def _build_rows(self, output, group_size=1):
        num_timesteps = self.args.num_train_timesteps
        noise = torch.stack(
            [
                fed_tokens(str(sample), 1 + timestep)
                for sample in output.clean_samples.tolist()
                for timestep in range(num_timesteps)
            ]
        )
        samples = output.clean_samples.repeat_interleave(num_timesteps, dim=0)
        return torch.where(noise % 2 == 0, noise, samples), samples, torch.zeros(len(samples))


class Recorder(TrainerCallback):
    """Keeps the whole weights that are trained, before training and after each step, on the main process."""

    def __init__(self, trainer: UDMGRPOTrainer):
        self.trainer = trainer
        self.weights = []

    def record(self, *args, **kwargs):
        trainer = self.trainer
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        if trainer.accelerator.is_main_process:
            self.weights.append({name: state[name].detach().clone() for name in trained})

    on_train_begin = on_step_end = record


def start_fsdp_on_cpu() -> None:
    """Accelerate turns to FSDP for processes on accelerators only, so it is told that these are."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def build_args(output_dir: str, name: str, backend: str, **kwargs) -> UDMGRPOConfig:
    """Two steps of plain gradient descent where nothing else is said."""
    defaults = {
        "num_generations": 4,
        "num_inference_steps": 5,
        "num_inference_steps_eval": 5,
        "max_steps": 2,
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "max_grad_norm": 0.0,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if backend == "fsdp2":
        start_fsdp_on_cpu()
        defaults.update(use_cpu=True, accelerator_config={"use_configured_state": True})
    elif backend == "deepspeed":
        defaults.update(ddp_backend="gloo")
    else:
        defaults.update(use_cpu=True)
    return UDMGRPOConfig(str(Path(output_dir, name)), **{**defaults, **kwargs})


def run_case(
    output_dir: str,
    name: str,
    backend: str = "ddp",
    is_fed: bool = True,
    use_lora: bool = False,
    model_path: str | None = None,
    failure: str | None = None,
    resume_from: str | None = None,
    solved: Sequence[str] = (),
    is_groupwise: bool = False,
    **kwargs,
) -> dict[str, Any]:
    """
    Trains the toy text family. Samples of prompts that are `solved` have equal rewards. If the reward `is_groupwise`,
    each call must have a whole group.

    Returns the `weights` before and after each step, the `log` of each step, the `rewarded` completions of this
    process, the `advantages` of all samples of the last rollout, the `samples` of a rollout after training, whose seed
    is the number of the process, and their `log_probs`.
    """
    args = build_args(output_dir, name, backend, **kwargs)
    rewarded = []

    def mean_letter(prompts, completions, **kwargs):
        rewarded.extend(completions)
        assert not is_groupwise or len(completions) == args.num_generations
        if failure is not None and trainer.accelerator.process_index == 1:
            Path(output_dir, "failed").touch()
            if failure == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the detector of process 1 is out of order")
        rewards = [sum(map(ord, completion)) / len(completion) / 100 for completion in completions]
        return [1.0 if prompt in solved else reward for prompt, reward in zip(prompts, rewards, strict=True)]

    mean_letter.groupwise = is_groupwise
    pipeline = build_toy_text_pipeline()
    if model_path is not None:
        pipeline.transformer = pipeline.transformer.from_pretrained(model_path)
    trainer = (FedTrainer if is_fed else UDMGRPOTrainer)(
        pipeline,
        mean_letter,
        args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=LORA if use_lora else None,
    )
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train(resume_from_checkpoint=resume_from)
    torch.manual_seed(trainer.accelerator.process_index)
    rollout = UDMGRPOTrainer._rollout(trainer, PROMPTS, "train")
    prompt_ids, prompt_mask, output = rollout.prompt_ids, rollout.prompt_mask, rollout.output
    samples = output.clean_samples
    mask = torch.ones_like(samples)
    with torch.no_grad():
        log_probs = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([prompt_ids, samples, samples], dim=1),
            torch.cat([prompt_mask, mask, mask], dim=1),
            logits_to_keep=NUM_TOKENS,
        )[0]
    return {
        "weights": recorder.weights,
        "log": [log for log in trainer.state.log_history if "loss" in log],
        "rewarded": rewarded,
        "advantages": list(trainer._logs["advantages"]),
        "samples": samples,
        "log_probs": log_probs,
    }


def compare_images(
    output_dir: str, name: str, backend: str, use_lora: bool = False, eval_batch_size: int = 1, **kwargs
) -> dict[str, Any]:
    """
    Trains the world of shapes for two steps of one prompt, with an evaluation of two images before and after.

    Returns the `results` of the evaluations, and how many images this process has `pickled`.
    """
    args = build_args(output_dir, name, backend, **{"per_device_train_batch_size": 6, "num_generations": 4, **kwargs})
    pickled = []

    def count_pickle(image):
        pickled.append(image)
        return get_image_state(image)

    def redness(prompts, completions, **kwargs):
        return [float(np.asarray(image)[..., 0].mean()) / 255 for image in completions]

    get_image_state = Image.Image.__getstate__
    Image.Image.__getstate__ = count_pickle
    rows = [{"prompt": "a photo of a circle"}, {"prompt": "a photo of a ring"}]
    trainer = UDMGRPOTrainer(
        URSAPipeline.from_pretrained(CHECKPOINT_PATH),
        redness,
        args,
        train_dataset=Dataset.from_list(rows),
        peft_config=LORA if use_lora else None,
    )
    results = train_and_compare(trainer, redness, rows, num_images_per_prompt=1, batch_size=eval_batch_size)
    Image.Image.__getstate__ = get_image_state
    return {"results": results, "pickled": len(pickled)}


def evaluate_rewards(output_dir: str, name: str, backend: str, **kwargs) -> dict[str, Any]:
    """Evaluates the rewards 0 to 4 of five prompts. Returns `metrics`, and what was `rewarded` on this process."""
    rewarded = []

    def number(prompts, number, log_metric, log_extra, **columns):
        rewarded.extend(number)
        log_metric("mean_number", sum(number) / len(number))
        log_extra("number", number)
        return number

    async def odd(prompts, number, **columns):
        return [float(one) if one % 2 == 1 else None for one in number]

    def failing_for_3(prompts, number, **columns):
        if 3.0 in number:
            raise ConnectionError("no route to the scorer")
        return number

    def group_size(prompts, **columns):
        return [len(prompts)] * len(prompts)

    group_size.groupwise = True
    dataset = Dataset.from_dict({"prompt": PROMPTS[:5], "number": [0.0, 1.0, 2.0, 3.0, 4.0]})
    trainer = UDMGRPOTrainer(
        build_toy_text_pipeline(),
        [number, odd, failing_for_3, group_size],
        build_args(output_dir, name, backend, reward_weights=[1.0, 0.0, 0.0, 0.0], reward_error="none", **kwargs),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset={"all": dataset, "last": dataset.select([4])},
    )
    return {"metrics": trainer.evaluate(), "rewarded": rewarded}


def main(settings_path: str) -> None:
    settings = json.loads(Path(settings_path).read_text())
    for name, case in settings["cases"].items():
        run = {"images": compare_images, "evaluation": evaluate_rewards}.get(case.pop("kind", None), run_case)
        is_refused = case.pop("is_refused", False)
        try:
            result = run(settings["output_dir"], name, settings["backend"], **case)
        except ValueError as error:
            if not is_refused:
                raise
            result = str(error)
        path = Path(settings["output_dir"], f"{name}-{PartialState().process_index}.pt")
        torch.save(result, path)


if __name__ == "__main__":
    main(sys.argv[1])
