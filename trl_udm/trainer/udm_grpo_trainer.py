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

import copy
import functools
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftConfig
from torch import nn
from torch.utils.data import Sampler
from transformers import GenerationConfig, TrainerCallback
from trl import GRPOTrainer
from trl.extras.profiling import profiling_context, profiling_decorator

from ..cut_prompts import expect_prompts
from ..models.layers import without_checkpointing
from ..pipelines.bidirectional import check_bidirectional
from ..pipelines.pipeline_output import UDMSamplerOutput
from ..pipelines.pipeline_udm import UDMPipeline
from ..schedulers.forward_process import predicts_leave_one_out
from ..throughput import ThroughputCallback
from .adapters import PolicyMixin, copy_reference, prepare_model
from .checkpoint import CheckpointMixin, EpochRepeatSampler, WeightsMixin
from .completions import CompletionsMixin
from .dynamic_sampling import DynamicSamplingMixin
from .ema import EMAMixin
from .hub import HubMixin
from .reward_runner import RewardsMixin, check_rewards
from .rollout import Rollout
from .udm_grpo_config import UDMGRPOConfig, check_datasets, check_pipeline


class UDMGRPOTrainer(
    EMAMixin,
    CheckpointMixin,
    WeightsMixin,
    HubMixin,
    CompletionsMixin,
    PolicyMixin,
    DynamicSamplingMixin,
    RewardsMixin,
    GRPOTrainer,
):
    r"""
    Trainer for UDM-GRPO (https://huggingface.co/papers/2604.18518): group relative policy optimization of uniform
    discrete diffusion models.

    For each prompt the current policy draws G samples x̂₁, which are scored and compared within their group. A sample's
    action is the clean sample itself. Its states are rebuilt by the forward process, at K early steps of the grid:

        x̂_t ~ p_t(· | x̂₁),    log π = (1/N) Σ_n log p_θ(x̂₁ⁿ | x̂_t, c).

    One row of a training batch is one (sample, timestep) pair, whose "prompt" is the conditioning followed by x̂_t and
    whose "completion" is x̂₁. So the loss, its options and what it logs are those of [`~trl.GRPOTrainer`]. This class
    replaces the rollout and the scoring of tokens. It knows no model family: it speaks to a [`UDMPipeline`].

    Args:
        pipeline ([`UDMPipeline`]):
            Pipeline whose `transformer` is trained, in place or by an adapter.
        reward_funcs (`Callable` or `list[Callable]`):
            Reward functions `f(prompts, completions, **columns) -> list[float | None]`, synchronous or not, as in
            [`~trl.GRPOTrainer`]. `completions` are the outputs of `pipeline.decode`: PIL images, lists of them for
            videos, or strings.
        args ([`UDMGRPOConfig`], *optional*):
            Configuration.
        train_dataset ([`~datasets.Dataset`]):
            Dataset with a column `"prompt"`. Its other columns are passed to the reward functions. Those that
            `pipeline.encode_condition` reads, such as `"image"`, also give tokens of the samples.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Dataset of evaluation prompts.
        callbacks (`list[TrainerCallback]`, *optional*):
            As in [`~transformers.Trainer`].
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning rate scheduler, as in [`~transformers.Trainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            New adapter to train, instead of all weights. `args.adapter`, or an adapter of the pipeline, is trained
            further instead. The reference policy is the one before the first step.
        eval_reward_funcs (`Callable` or `list[Callable]`, *optional*):
            Reward functions that are called in evaluation only, with weight 0. They are logged as
            `eval_rewards/<name>/mean`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there are too few prompts or no reward function, or the pipeline or an option does not fit.

    Example:

    ```python
    >>> import numpy as np
    >>> from datasets import Dataset
    >>> from trl_udm import UDMGRPOConfig, UDMGRPOTrainer, URSAPipeline
    >>> from trl_udm.worlds.shapes import CHECKPOINT_PATH

    >>> def brightness(completions, **kwargs):
    ...     return [float(np.asarray(image).mean()) / 255 for image in completions]

    >>> trainer = UDMGRPOTrainer(
    ...     URSAPipeline.from_pretrained(CHECKPOINT_PATH),
    ...     reward_funcs=brightness,
    ...     args=UDMGRPOConfig("bright-shapes", max_steps=1, bf16=False),
    ...     train_dataset=Dataset.from_dict({"prompt": ["a photo of a circle"]}),
    ... )
    >>> trainer.train()
    ```
    """

    args: UDMGRPOConfig
    model: Any  # not `None`, as transformers says
    _config_class: type[UDMGRPOConfig] = UDMGRPOConfig
    _sampler_kwargs: dict[str, Any] = {}  # further arguments of `pipeline.sample_tokens`
    _tag_names = ["trl", "trl-udm", "udm-grpo"]
    _name = "UDM-GRPO"
    _paper = {
        "title": "UDM-GRPO: Stable and Efficient Group Relative Policy Optimization for Uniform Discrete Diffusion "
        "Models",
        "id": "2604.18518",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{wang2026udmgrpo,
                title        = {{UDM-GRPO: Stable and Efficient Group Relative Policy Optimization for Uniform Discrete
                               Diffusion Models}},
                author       = {Jiaqi Wang and Haoge Deng and Ting Pan and Yang Liu and Chengyuan Wang and Fan Zhang
                               and Yonggang Qi and Xinlong Wang},
                year         = 2026,
                booktitle    = {International Conference on Machine Learning},
                eprint       = {arXiv:2604.18518},
            }"""),
    }

    def __init__(
        self,
        pipeline: UDMPipeline,
        reward_funcs: Callable | str | Sequence[Callable | str],
        args: UDMGRPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
        eval_reward_funcs: Callable | Sequence[Callable] | None = None,
    ):
        # Args
        if not isinstance(pipeline, UDMPipeline):
            raise TypeError(f"`pipeline` must be a `UDMPipeline`, got {type(pipeline).__name__}.")
        pipeline.check_components()
        if args is None:
            args = self._config_class(f"{type(pipeline).__name__}-{self._name}")
        if not isinstance(args, self._config_class):
            raise TypeError(f"`args` must be a `{self._config_class.__name__}`, got {type(args).__name__}.")
        args = copy.copy(args)  # changed below
        check_pipeline(args, pipeline)
        datasets = check_datasets(args, train_dataset, eval_dataset)
        reward_funcs, eval_reward_funcs = check_rewards(pipeline, args, reward_funcs, eval_reward_funcs)
        self.pipeline = pipeline
        pipeline.forget_local_paths()
        self.latent_shape = pipeline.latent_shape(**(args.pipeline_kwargs or {}))

        # Model
        transformer = pipeline.transformer
        with pipeline.keep_base_weights(peft_config) as base_weights:
            model, peft_config = prepare_model(pipeline, peft_config, args.adapter)
            adapter_weights = {weight: weight.data for weight in model.parameters() if weight.requires_grad}
            has_reference = args.beta != 0.0 and peft_config is None and not is_peft_model(model)
            reference = copy_reference(transformer) if has_reference else None
            if not hasattr(transformer, "generation_config"):  # `GRPOTrainer` writes the padding token into it
                transformer.generation_config = GenerationConfig()
            names = ("bos_token_id", "eos_token_id", "pad_token_id")
            configs = (transformer.config.get_text_config(), transformer.generation_config)
            self._special_tokens = [
                (config, {name: getattr(config, name, None) for name in names}) for config in configs
            ]

            # With a `beta`, `GRPOTrainer` would load a reference model by the name of the model's class, so it is told
            # 0. The detour can go once it takes the reference model as an argument (docs/upstream.md).
            beta, args.beta = args.beta, 0.0
            super().__init__(
                model=model,
                reward_funcs=self._wrap_reward_funcs(reward_funcs, eval_reward_funcs, args),
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=pipeline.tokenizer,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
            )
            if peft_config is not None:
                pipeline.attach_adapters(self.model, base_weights)
            self._restore_special_tokens()
            self.beta = self.args.beta = beta
            self.max_completion_length = math.prod(self.latent_shape)
            self.aux_loss_enabled = False  # families do not return what routers computed
            self._prepare_policy(peft_config is not None, adapter_weights)
        self.add_callback(ThroughputCallback(self))
        if args.async_rewards:
            for runner in self._reward_runners:
                runner.start(self.async_loop if runner.is_async else None)
        if reference is not None:
            self.ref_model = self._prepare_reference(reference)
        for component in pipeline.components.values():
            if isinstance(component, nn.Module) and component is not transformer:
                component.requires_grad_(False).eval().to(self.accelerator.device)
        for dataset in datasets:
            pipeline.encode_condition([dataset[0]], self.latent_shape)  # tells mistakes before the first rollout
            expect_prompts(dataset["prompt"], [pipeline, *(runner.reward_func for runner in self._reward_runners)])
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # whose weights are elsewhere, or split
            check_bidirectional(pipeline, train_dataset[0]["prompt"], self.latent_shape, **self.chat_template_kwargs)

    # `GRPOTrainer` and `Trainer.train` write the tokenizer's tokens into the config of the model. Saved there, its
    # padding token would become one whose embedding has no gradient.
    def _restore_special_tokens(self) -> None:
        for config, tokens in self._special_tokens:
            vars(config).update(tokens)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._restore_special_tokens()
        self._forget_input_gradients()
        return super()._inner_training_loop(*args, **kwargs)

    # A sample has K rows, which lie side by side in the generation batch
    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        num_rows = self.num_generations * self.args.num_train_timesteps
        return EpochRepeatSampler(
            get_epoch=lambda: int(self.state.epoch or 0),
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=num_rows,
            batch_size=self.args.generation_batch_size // num_rows,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        mode = "train" if self.model.training else "eval"
        num_timesteps = self.args.num_train_timesteps
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        if mode == "train":
            inputs = inputs[::num_timesteps]  # the sampler repeats a sample for each of its rows
        inputs = self._mark_padding(inputs)
        rollout, batch, rewards_per_func = self._draw(inputs, mode)
        weights = self._find_reward_weights(inputs, len(rewards_per_func))  # (B, F)
        advantages, rewards, std_rewards = self._compute_advantages(rewards_per_func, num_generations, weights)
        prompts = [x["prompt"] for x in inputs]
        num_samples = len(inputs) - sum(row.get("is_padding", False) for row in inputs)
        self._log_rollout(
            mode, prompts, rollout.completions, num_samples, rewards_per_func, rewards, std_rewards, advantages
        )
        self._log_diversity(mode, rollout.output.drawn_samples, num_generations, len(rewards))
        if self._is_sampling_dynamic:
            rollout, advantages = self._select_groups(inputs, rollout, rewards_per_func, weights)
        if batch is None:
            batch = self._score_rows(rollout, mode)
        batch["advantages"] = self._spread_advantages(advantages, len(rollout.output.clean_samples), batch)
        if mode == "eval":
            batch["num_samples"] = len(rewards)
        return batch

    def _draw(
        self, inputs: list[dict[str, Any]], mode: str
    ) -> tuple[Rollout, dict[str, torch.Tensor] | None, torch.Tensor]:
        """Samples for B rows of the dataset, the batch if it is scored already, and the rewards."""

        def submit(first: int, clean_samples: torch.Tensor, decoded: list[Any]) -> None:
            self._submit_rewards(*self._reward_arguments(inputs[first : first + len(decoded)], clean_samples, decoded))

        for runner in self._reward_runners:
            runner.cancel()  # what an earlier batch left, after an error
        condition = self.pipeline.encode_condition(inputs, self.latent_shape)
        on_decoded = submit if self.args.async_rewards else None
        rollout = self._rollout([x["prompt"] for x in inputs], mode, on_decoded=on_decoded, condition=condition)
        batch = None
        if self.args.async_rewards and not self._is_sampling_dynamic:  # scoring may go on while rewards are computed
            batch = self._score_rows(rollout, mode)
        arguments = self._reward_arguments(inputs, rollout.output.clean_samples, rollout.completions)
        return rollout, batch, self._calculate_rewards(*arguments)

    @torch.no_grad()
    def _rollout(
        self,
        prompts: list[Any],
        mode: str,
        return_trajectory: bool = False,
        on_decoded: Callable[[int, torch.Tensor, list[Any]], None] | None = None,
        condition: torch.Tensor | None = None,
    ) -> Rollout:
        """
        Draws a sample for each prompt, with the tokens of a `condition` (B, N).

        The samples come with the trajectory where the rows are built from it, or where it is asked for. `on_decoded`
        is called for each micro-batch, with the number of samples before it, its samples, and its completions.
        """
        args, device = self.args, self.accelerator.device
        return_trajectory |= args.action == "intermediate" or args.trajectory == "backward"
        num_inference_steps = args.num_inference_steps if mode == "train" else args.num_inference_steps_eval
        guidance_scale = args.guidance_scale if mode == "train" else args.guidance_scale_eval
        # With guidance the empty prompt is encoded along with the others, so that it is padded to their length
        texts = prompts if guidance_scale == 1.0 else [*prompts, ""]
        encoded = [tensor.to(device) for tensor in self.pipeline.encode_prompt(texts, **self.chat_template_kwargs)]
        prompt_ids, prompt_mask = (tensor[: len(prompts)] for tensor in encoded)
        batch_size = args.rollout_batch_size or len(prompts)
        outputs, completions = [], []
        with profiling_context(self, "rollout"), self._sampling():
            for first in range(0, len(prompts), batch_size):
                part = slice(first, first + batch_size)
                ids, mask = prompt_ids[part], prompt_mask[part]
                negative_ids = negative_mask = None
                if guidance_scale != 1.0:
                    negative_ids, negative_mask = (tensor[-1:].expand(len(ids), -1) for tensor in encoded)
                output = self.pipeline.sample_tokens(
                    ids,
                    mask,
                    self.latent_shape,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    guidance_trunc=args.guidance_trunc,
                    negative_prompt_ids=negative_ids,
                    negative_prompt_mask=negative_mask,
                    condition=None if condition is None else condition[part],
                    return_trajectory=return_trajectory,
                    **self._sampler_kwargs,
                )
                outputs.append(output)
                parts = output.clean_samples.split(args.decode_batch_size or batch_size)
                decoded = [one for samples in parts for one in self.pipeline.decode(samples, self.latent_shape)]
                if on_decoded is not None:
                    on_decoded(len(completions), output.clean_samples, decoded)
                completions += decoded
        output = UDMSamplerOutput.cat(outputs)
        prompt_ids, prompt_mask = self.pipeline.extend_prompt(prompt_ids, prompt_mask, output.clean_samples)
        return Rollout(prompt_ids, prompt_mask, output, completions)

    def _score_rows(self, rollout: Rollout, mode: str) -> dict[str, torch.Tensor]:
        """The rows (B * K) of B samples, with their old and reference log-probabilities."""
        num_timesteps = self.args.num_train_timesteps
        group_size = self.num_generations if mode == "train" and self.args.shared_noise else 1
        # (B * K, N), (B * K, N), (B * K,) or (B * K, N)
        noised_samples, actions, t = self._build_rows(rollout.output, group_size)
        prompt_ids = torch.cat([rollout.prompt_ids.repeat_interleave(num_timesteps, dim=0), noised_samples], dim=1)
        # `_compute_loss` hands on ids and masks only, so the mask of the noised tokens holds their time. That can go
        # once TRL hands on further keys of a batch (docs/upstream.md).
        prompt_mask = torch.cat(
            [rollout.prompt_mask.repeat_interleave(num_timesteps, dim=0), t.view(len(t), -1).expand_as(actions)],
            dim=1,
        )
        completion_mask = self._mask_actions(rollout.output, actions)
        input_ids = torch.cat([prompt_ids, actions], dim=1)  # (B * K, T + N + N)
        attention_mask = torch.cat([prompt_mask, completion_mask], dim=1)
        batch_size = self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
        score = functools.partial(
            self._get_per_token_logps_and_entropies,
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_to_keep=actions.size(1),
            batch_size=batch_size,
        )
        batch = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": actions,
            "completion_mask": completion_mask,
            "num_items_in_batch": self.accelerator.gather(completion_mask.sum()).sum(),
        }
        with torch.no_grad(), without_checkpointing(self.model):
            # With one update a rollout the ratio is 1, and `_compute_loss` takes the current log-probabilities for the
            # old. With several, the old ones are the rollout policy's, of the same action at the same noised state.
            generate_every = self.args.steps_per_generation * self.num_iterations  # generation frequency
            has_bound = self.args.negative_bound_power is not None  # whose weights are the old policy's
            if has_bound or self.args.gradient_accumulation_steps % generate_every != 0:
                batch["old_per_token_logps"] = score(self.model)[0]
            if self.beta != 0.0 and self.args.kl_estimator == "k3":
                with self._reference_weights() as reference:
                    batch["ref_per_token_logps"] = score(reference)[0]
        return batch

    def _mask_actions(self, output: UDMSamplerOutput, actions: torch.Tensor) -> torch.Tensor:
        """The tokens that count, of actions in rows (B * K, N). Given ones do not."""
        mask = self.pipeline.completion_mask(actions)
        if output.condition is None:
            return mask
        return mask * (output.condition.repeat_interleave(self.args.num_train_timesteps, dim=0) < 0)

    def _draw_timesteps(
        self, num_samples: int, group_size: int, device: torch.device, num_frames: int = 1
    ) -> torch.Tensor:
        """Timesteps (B * K, F) of F frames in the rows of B samples. Each `group_size` samples have the same."""
        first, last = self.args.timestep_window
        num_groups, num_timesteps = num_samples // group_size, self.args.num_train_timesteps
        index = torch.arange(num_timesteps, device=device).unsqueeze(1)  # (K, 1)
        if self.args.timestep_sampling == "stratified":
            num_steps = last + num_timesteps - first
            parts = index + torch.rand(num_groups, num_timesteps, num_frames, device=device)
            # Rounding may take the last part beyond its end
            timesteps = first + (parts * (num_steps / num_timesteps)).long().clamp(max=num_steps - 1)
        else:
            timesteps = torch.randint(first, last + 1, (num_groups, 1, num_frames), device=device) + index
        return timesteps.repeat_interleave(group_size, dim=0).flatten(0, 1)

    @torch.no_grad()
    def _build_rows(
        self, output: UDMSamplerOutput, group_size: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Noised states and actions of K timesteps for each of B samples, both (B * K, N), sample by sample, and the
        times of the states: (B * K,), or (B * K, N) where frames differ or tokens are given, which are at time 1. Each
        `group_size` samples share timesteps and random numbers of the noise.
        """
        args, scheduler = self.args, self.pipeline.scheduler
        num_samples, device = output.clean_samples.size(0), output.clean_samples.device
        num_frames = self.latent_shape[0] if args.frame_timesteps else 1  # F
        timesteps = self._draw_timesteps(num_samples, group_size, device, num_frames)  # (B * K, F)
        rows = torch.arange(num_samples, device=device).repeat_interleave(args.num_train_timesteps)  # (B * K,)
        clean_samples = output.clean_samples[rows]  # (B * K, N)
        grid = torch.tensor([scheduler.timestep_to_t(timestep) for timestep in scheduler.timesteps.tolist()])
        t = grid.to(device)[timesteps]  # (B * K, F)
        timesteps = timesteps[:, 0]  # with more than one frame, only the times are used
        if num_frames > 1 or output.condition is not None:
            t = t.repeat_interleave(clean_samples.size(1) // num_frames, dim=1)  # (B * K, N)
        if output.condition is not None:
            t = t.masked_fill(output.condition[rows] >= 0, 1.0)
        t = t.squeeze(1)
        if args.trajectory == "forward":
            generators, mirrored, steps = None, {}, torch.arange(args.num_train_timesteps)
            if group_size > 1 or args.antithetic_noise:  # rows that share random numbers have one seed
                seeds = torch.randint(2**62, (num_samples // group_size, len(steps)))
                if args.antithetic_noise:
                    seeds, mirrored = seeds[:, steps // 2], {"mirrored": (steps % 2 == 1).repeat(num_samples)}
                seeds = seeds.repeat_interleave(group_size, dim=0).flatten()
                generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
            noised_samples = scheduler.add_noise(clean_samples, t, generators, **mirrored)
        else:
            noised_samples = output.trajectory.noised_samples[timesteps, rows]
        if args.action == "intermediate":
            return noised_samples, output.trajectory.pred_original_samples[timesteps, rows], t
        return noised_samples, clean_samples, t

    @profiling_decorator
    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """
        Log-probabilities of the actions: (B, N), or their mean over the tokens that count (B, 1) at sequence level.

        `input_ids` are the conditioning, the noised tokens and the action, of lengths T, N and N = `logits_to_keep`.
        `attention_mask` is the conditioning's mask, the time of the noised tokens, and the tokens of the action that
        count.
        """
        sizes = [input_ids.size(1) - 2 * logits_to_keep, logits_to_keep, logits_to_keep]
        batch_size = batch_size or input_ids.size(0)  # Chunk inputs into smaller batches to reduce memory peak
        all_logps, all_entropies = [], []
        for input_ids_batch, mask_batch in zip(
            input_ids.split(batch_size), attention_mask.split(batch_size), strict=True
        ):
            prompt_ids, noised_samples, actions = input_ids_batch.split(sizes, dim=1)
            prompt_mask, t, mask = mask_batch.split(sizes, dim=1)
            t = t.float() if self.pipeline.takes_token_times else t[:, 0].float()
            # The probability of the noised token, which relates predictions with and without it
            needs_own = self.args.leave_one_out != predicts_leave_one_out(self.pipeline.scheduler)
            labels = torch.stack([actions, noised_samples], dim=-1) if needs_own else actions
            rows = (prompt_ids, prompt_mask.long(), noised_samples, self.latent_shape, labels, t)
            with self.accelerator.autocast():
                if self.args.kl_estimator == "full":
                    reference = None if self._kl is None else self._predict_reference(*rows[:4], actions, t)
                    logps, entropies, kl = self.pipeline.score_with_kl(model, reference, *rows)
                    if kl is not None:
                        self._kl.append((kl * mask).sum(dim=1) / mask.sum(dim=1))
                else:
                    logps, entropies = self.pipeline.score(model, *rows)
            if needs_own:
                scheduler = self.pipeline.scheduler
                convert = scheduler.leave_one_out if self.args.leave_one_out else scheduler.undo_leave_one_out
                logps = convert(logps, actions, noised_samples, t)
            if self.args.timestep_weighting == "elbo":
                elbo_weights = self.pipeline.scheduler.elbo_weights
                logps = logps * elbo_weights(actions, noised_samples, t, self.args.num_inference_steps)
            all_logps.append(logps)
            if compute_entropy:
                all_entropies.append(entropies)
        logps = torch.cat(all_logps)  # (B, N)
        entropies = torch.cat(all_entropies) if compute_entropy else None  # (B, N)
        if self.importance_sampling_level == "sequence":
            mask = attention_mask[:, -logits_to_keep:]  # (B, N)
            logps = (logps * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)  # (B, 1)
        return logps, entropies, None
