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

from dataclasses import dataclass, field
from typing import Any, Literal

from ..schedulers.forward_process import predicts_leave_one_out
from ..trainer.udm_grpo_config import UDMGRPOConfig


_ACTION = "an action is a step of the sampler, in the states that it passed through"
_LOSS = "the loss is that of dFlowGRPO"
FIXED_OPTIONS = {
    "action": _ACTION,
    "trajectory": _ACTION,
    "timestep_weighting": _ACTION,
    "antithetic_noise": _ACTION,
    "leave_one_out": _ACTION,
    "negative_bound_power": _ACTION,
    "guidance_scale": "the conditional network without guidance is what is trained",
    "kl_estimator": "the KL divergence is that of steps, not of predicted clean tokens",
} | dict.fromkeys(
    ("loss_type", "delta", "top_entropy_quantile", "off_policy_mask_threshold", "entropy_coef", "use_adaptive_entropy")
    + ("use_bias_correction_kl",),
    _LOSS,
)
"""Options of [`UDMGRPOConfig`] that must keep their default, and why."""


@dataclass
class DFlowGRPOConfig(UDMGRPOConfig):
    r"""
    Configuration of [`DFlowGRPOTrainer`].

    It has the arguments of [`UDMGRPOConfig`] and those below. The defaults are those of dFlowGRPO
    (https://huggingface.co/papers/2605.09291) for images, except that the first step is left out. On the metric path
    no token moves in it, so that its ratio is 1 on average and its gradient is noise. `timestep_window=[0, 0]` and
    `num_train_timesteps=7` train it, as in the paper. `FIXED_OPTIONS` must keep their default.

    Args:
        > Parameters that control the rollout

        num_draws (`int`, *optional*, defaults to `24`):
            Number n of clean tokens that are drawn for each token and step. More of them make ratios less noisy.
        average_rates (`bool`, *optional*, defaults to `False`):
            Whether a step jumps at the mean of the rates of all draws, as in the authors' code, for the metric and the
            mixture path. The ratio is then not exact for n > 1. By default a step uses the first draw.
        old_policy_steps (`int`, *optional*):
            Number of optimization steps after which the policy that draws the samples becomes the current one. By
            default it is the current one in every rollout.

        > Parameters that control the loss

        changed_only (`bool`, *optional*, defaults to `False`):
            Whether only tokens that moved in the step count.
        clip_token_ratios (`bool`, *optional*, defaults to `False`):
            Whether the ratios of tokens are clipped before their geometric mean is taken.
        step_discount (`float`, *optional*, defaults to `1.0`):
            Factor γ in `(0, 1]`. The advantage in step k is multiplied by γᵏ.
        kl_reference (`str`, *optional*, defaults to `"initial"`):
            Policy that `beta` keeps the trained one near to: `"initial"`, that before the first step, or `"old"`, the
            one that drew the samples.

    Changed defaults: `learning_rate` 1e-5, `adam_beta2` 0.999, `weight_decay` 1e-4, `num_inference_steps` 8,
    `num_inference_steps_eval` 20, `num_generations` 24, `per_device_train_batch_size` 144 (one group of 24 samples, 6
    steps), `action` "intermediate", `trajectory` "backward", `num_train_timesteps` 6, `timestep_window` [1, 1], `beta`
    0, `epsilon` 1e-3, `epsilon_high` 1.5e-3, `scale_rewards` "batch", `advantage_clip` `None`.

    Raises:
        ValueError: If a value is out of its range, or an option does not fit the algorithm.
    """

    # Defaults of the paper
    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate of AdamW."})
    adam_beta2: float = field(default=0.999, metadata={"help": "Second-moment decay of AdamW."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    per_device_train_batch_size: int = field(
        default=144, metadata={"help": "Rows, which are (sample, step) pairs, per device and forward pass."}
    )
    num_generations: int = field(default=24, metadata={"help": "Samples per prompt (G)."})
    num_inference_steps: int = field(default=8, metadata={"help": "Denoising steps of a rollout."})
    num_inference_steps_eval: int = field(default=20, metadata={"help": "Denoising steps in evaluation."})
    action: Literal["clean", "intermediate"] = field(
        default="intermediate", metadata={"help": "'intermediate': the clean tokens drawn in each step."}
    )
    trajectory: Literal["forward", "backward"] = field(
        default="backward", metadata={"help": "'backward': the states that the sampler passed through."}
    )
    num_train_timesteps: int = field(
        default=6, metadata={"help": "Consecutive steps of the rollout that a sample is trained on."}
    )
    timestep_window: list[int] | None = field(
        default_factory=lambda: [1, 1], metadata={"help": "First and last step at which they may start."}
    )
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL divergence."})
    epsilon: float = field(default=1e-3, metadata={"help": "Lower clip range of the probability ratio."})
    epsilon_high: float | None = field(default=1.5e-3, metadata={"help": "Upper clip range of the probability ratio."})
    scale_rewards: str = field(default="batch", metadata={"help": "'batch', 'group' or 'none', as in `GRPOConfig`."})
    advantage_clip: float | None = field(
        default=None, metadata={"help": "Advantages are clamped to plus or minus this value. By default not."}
    )

    # Parameters that control the rollout
    num_draws: int = field(default=24, metadata={"help": "Clean tokens (n) drawn for each token and step."})
    average_rates: bool = field(
        default=False,
        metadata={"help": "Whether steps jump at the mean rates of all draws. Ratios are not exact then."},
    )
    old_policy_steps: int | None = field(
        default=None,
        metadata={"help": "Steps after which the policy that draws samples is renewed. By default every rollout."},
    )

    # Parameters that control the loss
    changed_only: bool = field(default=False, metadata={"help": "Whether only tokens that moved count."})
    clip_token_ratios: bool = field(
        default=False, metadata={"help": "Whether the ratios of tokens are clipped before their mean is taken."}
    )
    step_discount: float = field(default=1.0, metadata={"help": "The advantage in step k has this factor to the k."})
    kl_reference: Literal["initial", "old"] = field(
        default="initial",
        metadata={
            "help": "'initial': the KL divergence is to the first policy. 'old': to the one that drew the samples."
        },
    )

    def __post_init__(self):
        for name, reason in FIXED_OPTIONS.items():
            value, only = getattr(self, name), type(self).__dataclass_fields__[name].default
            if value != only:
                raise ValueError(f"`{name}` must be {only!r}, got {value!r}: {reason}. Use `UDMGRPOTrainer` for it.")
        for name, is_valid, rule in (
            ("num_draws", self.num_draws > 0, "> 0"),
            ("old_policy_steps", self.old_policy_steps is None or self.old_policy_steps > 0, "> 0 or None"),
            ("step_discount", 0 < self.step_discount <= 1, "in (0, 1]"),
            ("kl_reference", self.kl_reference in ("initial", "old"), "'initial' or 'old'"),
            ("epsilon", not self.clip_token_ratios or self.epsilon < 1, "< 1 with `clip_token_ratios`"),
        ):
            if not is_valid:
                raise ValueError(f"`{name}` must be {rule}, got {getattr(self, name)!r}.")
        super().__post_init__()
        if self.clip_token_ratios and self.importance_sampling_level == "token":
            raise ValueError(
                "`clip_token_ratios` must be False with `importance_sampling_level='token'`, got True: the loss clips "
                "the ratios of tokens there. Set the level to 'sequence'."
            )


def check_scheduler(args: DFlowGRPOConfig, scheduler: Any) -> None:
    """Raises a `ValueError` if the scheduler lacks a method that the algorithm or an option needs."""
    name = type(scheduler).__name__
    if not hasattr(scheduler, "transition_probabilities"):
        raise ValueError(
            f"`pipeline.scheduler` must have `transition_probabilities`, got a `{name}`: the ratio of a step needs "
            "them. `KineticOptimalScheduler` and `UniformDDIMScheduler` have them."
        )
    if getattr(scheduler.config, "remasking", "random") != "random":
        raise ValueError(
            f"`remasking` of the scheduler must be 'random', got {scheduler.config.remasking!r}: the ratio of a step "
            "needs tokens that move independently. Set `pipeline.scheduler = MaskedDDIMScheduler.from_config("
            "pipeline.scheduler.config, remasking='random')`."
        )
    if predicts_leave_one_out(scheduler):
        raise ValueError(
            "`pipeline.scheduler` must have the `prediction_type` 'sample', got 'leave_one_out': the ratio of a step "
            "is that of the network's own predictions."
        )
    if args.average_rates and not hasattr(scheduler, "velocity"):
        raise ValueError(
            f"`average_rates` must be False with a `{name}`, got True: its steps have no rates. A "
            "`KineticOptimalScheduler` has."
        )
