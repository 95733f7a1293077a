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

import itertools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset, IterableDataset
from trl import GRPOConfig

from ..schedulers.forward_process import predicts_leave_one_out


_FOREIGN_OPTIONS = (
    "use_transformers_continuous_batching use_transformers_paged transformers_continuous_batching_config top_p top_k "
    "min_p repetition_penalty generation_kwargs cache_implementation pad_to_multiple_of max_tool_calling_iterations "
    "mask_truncated_completions sync_ref_model ref_model_mixup_alpha ref_model_sync_steps"
).split()
_FOREIGN_OPTIONS += [name for name in GRPOConfig.__dataclass_fields__ if name.startswith(("use_vllm", "vllm_"))]
REFUSED_OPTIONS = {
    **dict.fromkeys(
        _FOREIGN_OPTIONS,
        "it belongs to autoregressive generation or to a moving reference policy, which UDM-GRPO does not have",
    ),
    "temperature": "rollouts draw from the distribution that is scored, and a group needs its spread",
    "max_completion_length": "a sample has the number of tokens that `pipeline_kwargs` asks the pipeline for",
    "model_init_kwargs": "the pipeline has loaded its model. Pass them to its `from_pretrained`",
    "router_aux_loss_coef": "families do not return what routers computed, so there is no such loss",
    "log_multimodal": "images are the completions that `log_completions` logs. Set that to False",
    "label_smoothing_factor": "the loss is that of `loss_type`, which has no labels to smooth",
    "train_sampling_strategy": "each batch must hold whole groups. The order of prompts is that of `shuffle_dataset`",
    "enable_jit_checkpoint": "it saves in the middle of a step. SIGTERM saves at its end without it",
    "dataloader_persistent_workers": "a resumed run would draw other random numbers than an unbroken one",
}
"""Options of [`~trl.GRPOConfig`] that must keep their default or be `None`, and why."""


@dataclass
class UDMGRPOConfig(GRPOConfig):
    r"""
    Configuration of [`UDMGRPOTrainer`].

    It has the arguments of [`~trl.GRPOConfig`] and those below. Arguments without effect (`REFUSED_OPTIONS`) must keep
    their default. The defaults are those of UDM-GRPO (https://huggingface.co/papers/2604.18518).

    One row of a training batch is one *(sample, timestep)* pair, so `per_device_train_batch_size` counts rows. A
    generation batch has `per_device_train_batch_size * steps_per_generation * num_processes` rows. Each sample has
    `num_train_timesteps` of them, and the samples must form whole groups of `num_generations`.

    Args:
        > Parameters that control what is trained

        adapter (`str`, *optional*):
            Folder or Hub repository of a PEFT adapter to train further, which [`LoraMixin.load_lora_weights`] loads.
            By default a new adapter is trained, or all weights.

        > Parameters that control the rollout

        num_inference_steps (`int`, *optional*, defaults to `10`):
            Denoising steps of a rollout.
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            Weight of classifier-free guidance in rollouts. 1 is no guidance (*CFG-Free*).
        guidance_trunc (`float`, *optional*, defaults to `0.9`):
            Time in `[0, 1]` at which guidance ends.
        rollout_batch_size (`int`, *optional*):
            Number of samples that are denoised together. By default all samples of a process.
        decode_batch_size (`int`, *optional*):
            Number of samples that are decoded together, at most `rollout_batch_size`. By default all that were
            denoised together.
        async_rewards (`bool`, *optional*, defaults to `False`):
            Whether reward functions run in threads during the rollout. Each is called as soon as a micro-batch of
            `rollout_batch_size` samples is decoded, and its rewards are collected before the advantages are computed.
            Samples, rewards, losses and weights stay the same if a function scores each sample by itself.
        merge_adapter (`bool`, *optional*):
            Whether rollouts merge the adapter into the weights, which are restored exactly afterwards. By default they
            do if the model computes in float32. In half precision, merging would round a small adapter away, and the
            samples would come from another policy than the one that is trained.
        pipeline_kwargs (`dict` or `str`, *optional*):
            Size options of the pipeline family, such as `{"height": 512, "width": 512}`, for `pipeline.latent_shape`.
            By default the model's native size.

        > Parameters that control the trajectory

        action (`str`, *optional*, defaults to `"clean"`):
            Tokens whose probability is scored: `"clean"`, the final sample x̂₁, or `"intermediate"`, the clean tokens
            drawn in the step itself.
        trajectory (`str`, *optional*, defaults to `"forward"`):
            Source of the noised states: `"forward"` draws them from the sample by the forward process, `"backward"`
            takes those that the sampler passed through.
        num_train_timesteps (`int`, *optional*, defaults to `3`):
            Consecutive steps K of the rollout's grid that a sample is trained on (*Reduced-Step*).
        timestep_window (`list[int]`, *optional*, defaults to `[0, 2]`):
            First and last step at which the K steps may start. The start is drawn uniformly for each sample. `None` is
            the whole grid, and becomes `[0, num_inference_steps - K]`.
        timestep_sampling (`str`, *optional*, defaults to `"consecutive"`):
            How the K steps are drawn. `"consecutive"`: from a start on. `"stratified"`: one from each of K equal parts
            of the steps that the window reaches, which are `timestep_window[0]` to `timestep_window[1] + K - 1`.
        frame_timesteps (`bool`, *optional*, defaults to `False`):
            Whether each frame of a video has K steps of its own. Frames are the first axis of the pipeline's latent
            shape. By default all frames of a sample have the same steps.
        timestep_weighting (`str`, *optional*, defaults to `"none"`):
            Weights of a sample's tokens in log π. `"none"`: all tokens that count weigh the same. `"elbo"`: as in the
            evidence lower bound of the sample, [`KineticOptimalScheduler.elbo_weights`] or
            [`MaskedDDIMScheduler.elbo_weights`].
        shared_noise (`bool`, *optional*, defaults to `False`):
            Whether the samples of a group have the same steps, and are noised with the same random numbers. Tokens in
            which they agree are then noised alike.
        antithetic_noise (`bool`, *optional*, defaults to `False`):
            Whether a sample's first and second step, its third and fourth, and so on, are noised with the same random
            numbers u and 1 − u. Needs a scheduler that does so, [`UniformDDIMScheduler`] or [`MaskedDDIMScheduler`].
        leave_one_out (`bool`, *optional*, defaults to `False`):
            Whether a token's log-probability is that given all other tokens of the state,
            [`UniformDDIMScheduler.leave_one_out`]. Needs a scheduler of uniform corruption.

        > Parameters that control the advantages

        final_reward_weights (`list[float]`, *optional*):
            Weights of the rewards in the end. They begin with `reward_weights` and move linearly. Evaluations have the
            final ones, so that they can be compared. By default weights stay as they are.
        reward_weights_steps (`int`, *optional*):
            Number of steps after which the weights are the final ones. By default all steps of the run.
        tag_reward_weights (`dict` or `str`, *optional*):
            Factors of the weights for samples with a certain tag: a dictionary from the tag to a factor for each
            reward. Samples with other tags have the weights as they are.
        tag_column (`str`, *optional*, defaults to `"tag"`):
            Column of the dataset that has the tags.
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            Advantages are clamped to plus or minus this value. `None` for no bound.
        negative_advantage_scale (`float`, *optional*, defaults to `1.0`):
            Factor of negative advantages, in `[0, inf)`. At 0 a run learns from the better half of each group alone.
        negative_bound_power (`float`, *optional*):
            Power β > 0 of the bound (1 / β) · log (1 / K) Σ_k π_k^β that takes the place of the mean of log π_k over
            the K states of a sample whose advantage is negative, as in SPG (https://huggingface.co/papers/2510.09541).
            By default none.

        > Parameters that control dynamic sampling

        drop_zero_variance (`bool`, *optional*, defaults to `False`):
            Whether samples of groups whose rewards are all equal are left out of the update. The loss is then the mean
            over the others.
        resample_zero_variance (`int`, *optional*, defaults to `0`):
            Greatest number of further draws of a generation batch. Each draws a group of another prompt for every
            group whose rewards are still all equal. Those whose rewards differ take their places.

        > Parameters that control the KL divergence

        kl_estimator (`str`, *optional*, defaults to `"k3"`):
            `"k3"`: the paper's, of the log-probabilities that are trained. `"full"`: the mean over the tokens that
            count of KL(π_θ ‖ π_ref), summed over the whole vocabulary at the trained states.

        > Parameters that control the average of the weights

        ema_decay (`float`, *optional*):
            Decay per step of an exponential moving average of the trained weights, in `[0, 1)`. 0.99 averages over
            about the last 100 steps. Evaluation then uses the average, and it is saved beside the weights. By default
            there is none.
        ema_steps (`int`, *optional*, defaults to `1`):
            Number of optimization steps between updates of the average.

        > Parameters that control evaluation

        num_inference_steps_eval (`int`, *optional*, defaults to `25`):
            Denoising steps in evaluation.
        guidance_scale_eval (`float`, *optional*, defaults to `1.0`):
            Weight of classifier-free guidance in evaluation.

        > Parameters that control failures

        reward_timeout (`float`, *optional*):
            Seconds that a call of a reward function may take, in `(0, inf)`. By default there is no bound.
        reward_error (`str`, *optional*, defaults to `"raise"`):
            What happens when a reward function fails or takes too long. `"raise"` stops the run. `"none"` leaves the
            samples that failed out of their group's statistics, and logs their share as `rewards/<name>/failed`.
        max_failed_steps (`int`, *optional*, defaults to `5`):
            Number of steps in a row that may fail before the run stops. A step fails if its gradient is not finite,
            and it is then skipped. With `reward_error="none"`, it also fails without any reward.

    Changed defaults: `learning_rate` 1e-6, `adam_beta2` 0.95, `weight_decay` 0.01, `lr_scheduler_type` "constant",
    `beta` 0.05, `epsilon` 1e-4, `loss_type` "grpo", `importance_sampling_level` "sequence", `use_bias_correction_kl`
    False, `disable_dropout` True, `num_generations` 8, `num_generations_eval` 1, `per_device_train_batch_size` 24 (one
    group of 8 samples, 3 timesteps), `num_completions_to_print` 3.

    Raises:
        ValueError: If a value is out of its range, or the batch does not contain whole groups.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["pipeline_kwargs", "tag_reward_weights"]

    # Defaults of the paper
    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second-moment decay of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    per_device_train_batch_size: int = field(
        default=24, metadata={"help": "Rows, which are (sample, timestep) pairs, per device and forward pass."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Whether to disable dropout, in the network and in adapters."}
    )
    num_generations: int = field(default=8, metadata={"help": "Samples per prompt (G)."})
    num_generations_eval: int | None = field(default=1, metadata={"help": "Samples per prompt in evaluation."})
    beta: float = field(default=0.05, metadata={"help": "Weight of the KL divergence to the reference policy."})
    epsilon: float = field(default=1e-4, metadata={"help": "Clip range of the probability ratio."})
    loss_type: str = field(default="grpo", metadata={"help": "Loss, as in `GRPOConfig`."})
    importance_sampling_level: Literal["sequence", "token"] = field(
        default="sequence",
        metadata={"help": "'sequence': one mean log-probability per row. 'token': one log-probability per token."},
    )
    use_bias_correction_kl: bool = field(
        default=False, metadata={"help": "Whether to weight the KL divergence by the probability ratio."}
    )

    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "The former name of `activation_checkpointing`."}
    )
    num_completions_to_print: int | None = field(
        default=3, metadata={"help": "Completions that a log prints with `log_completions`. `None` prints all."}
    )

    # Parameters that control what is trained
    adapter: str | None = field(
        default=None, metadata={"help": "Folder or Hub repository of an adapter to train further."}
    )

    # Parameters that control the rollout
    num_inference_steps: int = field(default=10, metadata={"help": "Denoising steps of a rollout."})
    guidance_scale: float = field(
        default=1.0, metadata={"help": "Weight of classifier-free guidance in rollouts. 1 is no guidance (CFG-Free)."}
    )
    guidance_trunc: float = field(default=0.9, metadata={"help": "Time in [0, 1] at which guidance ends."})
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Samples denoised together. By default all of a process."}
    )
    decode_batch_size: int | None = field(
        default=None, metadata={"help": "Samples decoded together. By default all that were denoised together."}
    )
    async_rewards: bool = field(
        default=False, metadata={"help": "Whether reward functions run in threads during the rollout."}
    )
    merge_adapter: bool | None = field(
        default=None,
        metadata={"help": "Whether rollouts merge the adapter into the weights. By default in float32 only."},
    )
    pipeline_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": 'Size options of the pipeline family, such as \'{"height": 512, "width": 512}\'.'},
    )

    # Parameters that control the trajectory
    action: Literal["clean", "intermediate"] = field(
        default="clean", metadata={"help": "Tokens whose probability is scored."}
    )
    trajectory: Literal["forward", "backward"] = field(
        default="forward", metadata={"help": "Source of the noised states."}
    )
    num_train_timesteps: int = field(
        default=3, metadata={"help": "Consecutive steps (K) of the rollout's grid that a sample is trained on."}
    )
    timestep_window: list[int] | None = field(
        default_factory=lambda: [0, 2],
        metadata={"help": "First and last step at which the K steps may start. None is the whole grid."},
    )

    timestep_sampling: Literal["consecutive", "stratified"] = field(
        default="consecutive",
        metadata={"help": "'consecutive': K steps from a start on. 'stratified': one from each of K equal parts."},
    )
    frame_timesteps: bool = field(
        default=False, metadata={"help": "Whether each frame of a video has its own K steps."}
    )
    timestep_weighting: Literal["none", "elbo"] = field(
        default="none", metadata={"help": "Weights of the tokens in log π: equal, or those of the ELBO."}
    )
    shared_noise: bool = field(
        default=False, metadata={"help": "Whether the samples of a group share steps and random numbers of the noise."}
    )

    antithetic_noise: bool = field(
        default=False, metadata={"help": "Whether pairs of a sample's steps are noised with u and 1 - u."}
    )
    leave_one_out: bool = field(
        default=False, metadata={"help": "Whether a token is scored given all other tokens of the state alone."}
    )

    # Parameters that control the advantages
    final_reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of the rewards in the end. By default they stay as they are."}
    )
    reward_weights_steps: int | None = field(
        default=None, metadata={"help": "Steps after which the weights are the final ones. By default all of the run."}
    )
    tag_reward_weights: dict | str | None = field(
        default=None,
        metadata={"help": "Factors of the weights for samples of a tag, such as '{\"counting\": [1.0, 0.0]}'."},
    )
    tag_column: str = field(default="tag", metadata={"help": "Column of the dataset that has the tags."})
    advantage_clip: float | None = field(
        default=5.0, metadata={"help": "Advantages are clamped to plus or minus this value."}
    )
    negative_advantage_scale: float = field(default=1.0, metadata={"help": "Factor of negative advantages."})
    negative_bound_power: float | None = field(
        default=None, metadata={"help": "Power of the upper bound of log π for negative advantages. By default none."}
    )

    # Parameters that control dynamic sampling
    drop_zero_variance: bool = field(
        default=False, metadata={"help": "Whether groups of equal rewards are left out of the update."}
    )
    resample_zero_variance: int = field(
        default=0, metadata={"help": "Greatest number of further draws that replace groups of equal rewards."}
    )

    # Parameters that control the KL divergence
    kl_estimator: Literal["k3", "full"] = field(
        default="k3",
        metadata={"help": "'k3': of the trained log-probabilities. 'full': of whole distributions of the tokens."},
    )

    # Parameters that control the average of the weights
    ema_decay: float | None = field(
        default=None, metadata={"help": "Decay per step of an average of the weights, in [0, 1). By default none."}
    )
    ema_steps: int = field(default=1, metadata={"help": "Optimization steps between updates of the average."})

    # Parameters that control evaluation
    num_inference_steps_eval: int = field(default=25, metadata={"help": "Denoising steps in evaluation."})
    guidance_scale_eval: float = field(
        default=1.0, metadata={"help": "Weight of classifier-free guidance in evaluation."}
    )

    # Parameters that control failures
    reward_timeout: float | None = field(
        default=None, metadata={"help": "Seconds that a call of a reward function may take. By default no bound."}
    )
    reward_error: Literal["raise", "none"] = field(
        default="raise",
        metadata={"help": "'raise': a reward function that fails stops the run. 'none': its samples are left out."},
    )
    max_failed_steps: int = field(
        default=5,
        metadata={
            "help": "Steps in a row that may fail before the run stops, without a finite gradient or any reward."
        },
    )

    __repr__ = GRPOConfig.__str__  # a dataclass would print `hub_token`

    def __post_init__(self):
        # `GRPOConfig` has this default under the former name, of which `TrainingArguments` warns
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True
        if self.num_generations < 2:
            raise ValueError(
                f"`num_generations` must be >= 2, got {self.num_generations}: a sample's advantage is measured "
                "against the others of its group."
            )
        scales, aggregations = ("group", "batch", "none"), ("sum_then_normalize", "normalize_then_sum")
        levels, samplings = ("sequence", "token"), ("consecutive", "stratified")
        has_weights_steps = self.reward_weights_steps is None or self.reward_weights_steps > 0
        is_aggregation, power = self.multi_objective_aggregation in aggregations, self.negative_bound_power
        for name, is_valid, rule in (
            ("learning_rate", 0 <= self.learning_rate < math.inf, ">= 0"),
            ("beta", 0 <= self.beta < math.inf, ">= 0"),
            ("epsilon", 0 <= self.epsilon < math.inf, ">= 0"),
            ("num_inference_steps", self.num_inference_steps > 0, "> 0"),
            ("num_inference_steps_eval", self.num_inference_steps_eval > 0, "> 0"),
            ("num_train_timesteps", self.num_train_timesteps > 0, "> 0"),
            ("rollout_batch_size", self.rollout_batch_size is None or self.rollout_batch_size > 0, "> 0 or None"),
            ("decode_batch_size", self.decode_batch_size is None or self.decode_batch_size > 0, "> 0 or None"),
            ("action", self.action in ("clean", "intermediate"), "'clean' or 'intermediate'"),
            ("trajectory", self.trajectory in ("forward", "backward"), "'forward' or 'backward'"),
            ("timestep_sampling", self.timestep_sampling in samplings, f"one of {samplings}"),
            ("timestep_weighting", self.timestep_weighting in ("none", "elbo"), "'none' or 'elbo'"),
            ("negative_advantage_scale", 0 <= self.negative_advantage_scale < math.inf, ">= 0"),
            ("reward_weights_steps", has_weights_steps, "> 0 or None"),
            ("resample_zero_variance", self.resample_zero_variance >= 0, ">= 0"),
            ("negative_bound_power", power is None or power > 0, "> 0 or None"),
            ("antithetic_noise", not self.antithetic_noise or self.trajectory == "forward", "False without noise"),
            ("kl_estimator", self.kl_estimator in ("k3", "full"), "'k3' or 'full'"),
            ("importance_sampling_level", self.importance_sampling_level in levels, f"one of {levels}"),
            ("guidance_trunc", 0 <= self.guidance_trunc <= 1, "in [0, 1]"),
            ("advantage_clip", self.advantage_clip is None or self.advantage_clip > 0, "> 0 or None"),
            ("ema_decay", self.ema_decay is None or 0 <= self.ema_decay < 1, "in [0, 1) or None"),
            ("ema_steps", self.ema_steps > 0, "> 0"),
            ("reward_timeout", self.reward_timeout is None or self.reward_timeout > 0, "> 0 or None"),
            ("reward_error", self.reward_error in ("raise", "none"), "'raise' or 'none'"),
            ("max_failed_steps", self.max_failed_steps >= 0, ">= 0"),
            ("scale_rewards", self.scale_rewards in (*scales, True, False), f"one of {scales}"),
            ("multi_objective_aggregation", is_aggregation, f"one of {aggregations}"),
        ):
            if not is_valid:
                raise ValueError(f"`{name}` must be {rule}, got {getattr(self, name)!r}.")
        self._check_timestep_window()
        self._check_batch_geometry()
        for name, reason in REFUSED_OPTIONS.items():
            value, only = getattr(self, name), GRPOConfig.__dataclass_fields__[name].default
            if value not in (None, only):
                raise ValueError(f"`{name}` must be {only}, got {value}: {reason}.")
        super().__post_init__()
        is_polynomial = self.lr_scheduler_type == "polynomial"
        if is_polynomial and self.max_steps > 0 and self.get_warmup_steps(self.max_steps) == self.max_steps:
            raise ValueError(
                f"`warmup_steps` must differ from `max_steps` with `lr_scheduler_type='polynomial'`, got "
                f"{self.warmup_steps} and {self.max_steps}: the schedule would divide by 0 after the last step. Set "
                f"`warmup_steps={self.max_steps - 1}`, or train longer."
            )
        if self.timestep_weighting == "elbo" and (self.action, self.trajectory) != ("clean", "forward"):
            raise ValueError(
                f"`timestep_weighting` must be 'none' with `action={self.action!r}` and `trajectory="
                f"{self.trajectory!r}`, got 'elbo': the bound is of the clean sample at forward states."
            )
        is_forward = (self.action, self.trajectory, self.timestep_weighting) == ("clean", "forward", "none")
        if self.frame_timesteps and not is_forward:
            raise ValueError(
                f"`frame_timesteps` must be False with `action={self.action!r}`, `trajectory={self.trajectory!r}` and "
                f"`timestep_weighting={self.timestep_weighting!r}`, got True: all frames of a sampler's state, and of "
                "the bound's, have one time. Set 'clean', 'forward' and 'none'."
            )
        if self.top_entropy_quantile < 1.0 and self.importance_sampling_level == "sequence":
            raise ValueError(
                f"`top_entropy_quantile` must be 1.0 with `importance_sampling_level='sequence'`, got "
                f"{self.top_entropy_quantile}: it selects tokens, and there a row has one log-probability. Set "
                "`importance_sampling_level='token'`."
            )
        epsilon_high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.loss_type == "cispo" and epsilon_high < 1.0:
            raise ValueError(
                f"`epsilon_high` must be >= 1 with `loss_type='cispo'`, got {epsilon_high}: there it is the greatest "
                "weight of a log-probability, so that below 1 it scales every gradient down. Set it to 5, for "
                "instance."
            )
        num_samples = self.per_device_eval_batch_size * self.world_size
        num_generations_eval = self.num_generations_eval or self.num_generations
        if num_samples % num_generations_eval != 0:
            raise ValueError(
                f"An evaluation batch of {num_samples} samples (`per_device_eval_batch_size` "
                f"{self.per_device_eval_batch_size} * {self.world_size} processes) must hold whole groups of "
                f"`num_generations_eval` {num_generations_eval}."
            )

    def _check_timestep_window(self):
        name = min(("num_inference_steps", "num_inference_steps_eval"), key=lambda name: getattr(self, name))
        num_steps = getattr(self, name)
        last_start = num_steps - self.num_train_timesteps
        if last_start < 0:
            raise ValueError(
                f"`num_train_timesteps` must be at most {num_steps}, the steps of the grid, got "
                f"{self.num_train_timesteps}. Lower it, or raise `{name}`."
            )
        if self.timestep_window is None:
            self.timestep_window = [0, last_start]
        window = self.timestep_window
        if len(window) != 2 or not 0 <= window[0] <= window[1]:
            raise ValueError(f"`timestep_window` must be [first, last] with 0 <= first <= last, got {window}.")
        if window[1] > last_start:
            raise ValueError(
                f"`timestep_window` must end at {last_start} at the latest, for {self.num_train_timesteps} training "
                f"timesteps to fit on a grid of {num_steps} steps, got {window}. Lower it or `num_train_timesteps`, "
                f"or raise `{name}`."
            )

    def _check_batch_geometry(self):
        # `self.world_size` is not known before `super().__post_init__`, whose own checks count samples, not rows
        num_processes, batch_size = int(os.environ.get("WORLD_SIZE", 1)), self.per_device_train_batch_size
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        if self.generation_batch_size is not None:
            steps, rest = divmod(self.generation_batch_size, batch_size * num_processes)
            if rest != 0:
                return  # `GRPOConfig` names this one
        group_rows = self.num_generations * self.num_train_timesteps

        def fits(batch_size: int, num_generations: int) -> bool:
            local_rows, group_rows = batch_size * steps, num_generations * self.num_train_timesteps
            unit = group_rows if self.shared_noise else self.num_train_timesteps  # that no two processes share
            return local_rows * num_processes % group_rows == 0 and local_rows % unit == 0

        if fits(batch_size, self.num_generations):
            return
        period = group_rows * num_processes
        batch_sizes = _find_nearest(lambda size: fits(size, self.num_generations), batch_size, 1, batch_size + period)
        num_generations = _find_nearest(lambda size: fits(batch_size, size), self.num_generations, 2, 1024)
        raise ValueError(
            f"A generation batch of {batch_size * steps * num_processes} rows (`per_device_train_batch_size` "
            f"{batch_size} * {steps} steps * {num_processes} processes) must hold whole groups of {group_rows} rows "
            f"(`num_generations` {self.num_generations} * `num_train_timesteps` {self.num_train_timesteps}), and each "
            f"process whole {'groups, for `shared_noise`' if self.shared_noise else 'samples'}. Nearest valid "
            f"`per_device_train_batch_size`: {batch_sizes}; nearest valid `num_generations`: {num_generations}."
        )


def _find_nearest(fits: Callable[[int], bool], value: int, first: int, last: int) -> str:
    sides = (range(value - 1, first - 1, -1), range(value + 1, last + 1))
    return " or ".join(str(size) for side in sides for size in itertools.islice(filter(fits, side), 1)) or "none"


def check_pipeline(args: UDMGRPOConfig, pipeline: Any) -> None:
    """Raises a `ValueError` if an option needs what the pipeline or its scheduler does not have."""
    if args.timestep_weighting == "elbo" and not hasattr(pipeline.scheduler, "elbo_weights"):
        raise ValueError(
            f"`timestep_weighting` must be 'none' with a {type(pipeline.scheduler).__name__}, got 'elbo': it has no "
            "`elbo_weights`. A `KineticOptimalScheduler` and a `MaskedDDIMScheduler` have."
        )
    rules_out_tokens = getattr(pipeline.scheduler, "rules_out_tokens", False)
    if rules_out_tokens and (args.action, args.trajectory) == ("intermediate", "forward"):
        raise ValueError(
            f"`action` must be 'clean' with `trajectory='forward'` and a {type(pipeline.scheduler).__name__}, got "
            "'intermediate': such a state shows tokens of the clean sample, and so rules out other actions."
        )
    if args.antithetic_noise and not getattr(pipeline.scheduler, "can_mirror_noise", False):
        raise ValueError(
            f"`antithetic_noise` must be False with a {type(pipeline.scheduler).__name__}, got True: its `add_noise` "
            "has no `mirrored`. Those of `UniformDDIMScheduler` and `MaskedDDIMScheduler` have."
        )
    if args.leave_one_out and not getattr(pipeline.scheduler, "has_uniform_noise", False):
        raise ValueError(
            f"`leave_one_out` must be False with a {type(pipeline.scheduler).__name__}, got True: by its "
            "`has_uniform_noise`, its corruption is not uniform."
        )
    if args.kl_estimator == "full" and args.beta != 0.0 and predicts_leave_one_out(pipeline.scheduler):
        raise ValueError(
            "`kl_estimator` must be 'k3' where the scheduler's `prediction_type` is 'leave_one_out', got 'full': the "
            "network's distributions are not those that samples are drawn from."
        )
    if args.frame_timesteps and not pipeline.takes_token_times:
        raise ValueError(
            f"`frame_timesteps` must be False with a {type(pipeline).__name__}, got True: by its `takes_token_times`, "
            "all tokens of a sample have one time."
        )


# What reward functions get beside the columns of the dataset, here or in `GRPOTrainer`
RESERVED_COLUMNS = {"prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra"}
RESERVED_COLUMNS |= {"environments", "is_padding", "self"}


def check_datasets(args: UDMGRPOConfig, train_dataset: Any, eval_dataset: Any) -> list[Dataset]:
    """
    Returns all datasets. Raises a `TypeError` or `ValueError` if one is not a `Dataset` with prompts, or has too few
    of them.
    """
    datasets = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        datasets |= {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    elif eval_dataset is not None:
        datasets["eval_dataset"] = eval_dataset
    for name, dataset in datasets.items():
        if isinstance(dataset, IterableDataset):
            raise TypeError(
                f"`{name}` must be a `Dataset`, got an `IterableDataset`. Prompts are small: load them without "
                "streaming, or use `Dataset.from_generator`."
            )
        if not isinstance(dataset, Dataset):
            raise TypeError(f"`{name}` must be a `Dataset`, got `{type(dataset).__name__}`.")
        reserved = RESERVED_COLUMNS.intersection(dataset.column_names)
        if reserved:
            raise ValueError(
                f"`{name}` must not have the columns {sorted(reserved)}: reward functions have other arguments of "
                "these names. Rename the columns, with `dataset.rename_column`."
            )
        if args.tag_reward_weights is not None and args.tag_column not in dataset.column_names:
            raise ValueError(
                f"`{name}` must have the column {args.tag_column!r} of `tag_column` for `tag_reward_weights`, got "
                f"{dataset.column_names}."
            )
        if "prompt" not in dataset.column_names:
            raise ValueError(f"`{name}` must have a column 'prompt', got {dataset.column_names}.")
        if len(dataset) == 0:
            raise ValueError(f"`{name}` must have at least one row.")
    num_prompts = args.generation_batch_size // (args.num_generations * args.num_train_timesteps)
    if len(train_dataset) < num_prompts:
        raise ValueError(
            f"`train_dataset` must have at least the {num_prompts} prompts of a generation batch "
            f"(`generation_batch_size` {args.generation_batch_size} / (`num_generations` {args.num_generations} * "
            f"`num_train_timesteps` {args.num_train_timesteps})), got {len(train_dataset)}. Repeat its rows, or lower "
            "the batch."
        )
    return list(datasets.values())
