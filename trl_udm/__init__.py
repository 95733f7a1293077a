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

"""Reinforcement learning for uniform discrete diffusion models, on TRL, diffusers and PEFT."""

import gc
from importlib import import_module
from typing import TYPE_CHECKING


__version__ = "0.1.0"

# A name is imported when it is first asked for (PEP 562): `import trl_udm` alone loads neither PyTorch nor TRL.
_MODULES = {
    "AdaptiveKLCallback": ".callbacks.adaptive_kl",
    "AestheticReward": ".rewards.clip",
    "AutoencoderVQ": ".models.autoencoder_vq",
    "AutoencoderVQCosmos3D": ".models.autoencoder_vq_cosmos3d",
    "CLIPColorClassifier": ".rewards.clip_color",
    "CLIPReward": ".rewards.clip",
    "CLIPScoreReward": ".rewards.clip",
    "CompactProgressCallback": ".callbacks.progress",
    "DFlowDPOConfig": ".dflow_grpo.dflow_dpo_trainer",
    "DFlowDPOTrainer": ".dflow_grpo.dflow_dpo_trainer",
    "DFlowGRPOConfig": ".dflow_grpo.dflow_grpo_config",
    "DFlowGRPOTrainer": ".dflow_grpo.dflow_grpo_trainer",
    "DPGReward": ".rewards.dpg",
    "DiagnosticsCallback": ".callbacks.diagnostics",
    "DiffusionGemmaUDMPipeline": ".pipelines.pipeline_diffusion_gemma",
    "DiversityReward": ".rewards.diversity",
    "DuoConfig": ".models.configuration_duo",
    "DuoForMaskedLM": ".models.modeling_duo",
    "EMACallback": ".trainer.ema",
    "FUDOKIForImageGeneration": ".models.modeling_fudoki",
    "FUDOKIPipeline": ".pipelines.pipeline_fudoki",
    "FUDOKIUnderstandingPipeline": ".pipelines.fudoki_understanding",
    "FrameReward": ".rewards.frames",
    "GenEvalReward": ".rewards.geneval",
    "GiddConfig": ".models.configuration_gidd",
    "GiddForMaskedLM": ".models.modeling_gidd",
    "GuardrailCallback": ".callbacks.guardrails",
    "HPSv2Reward": ".rewards.clip",
    "HPSv3Reward": ".rewards.hpsv3",
    "ImageRewardReward": ".rewards.image_reward",
    "JudgeTemplate": ".rewards.vlm_judge",
    "KineticOptimalScheduler": ".schedulers.scheduling_kinetic_optimal",
    "Mask2FormerDetector": ".rewards.mask2former",
    "MaskedDDIMScheduler": ".schedulers.scheduling_masked",
    "MemoryEstimate": ".memory",
    "OCRReward": ".rewards.ocr",
    "PickScoreReward": ".rewards.clip",
    "RemoteReward": ".rewards.remote.client",
    "TextUDMPipeline": ".pipelines.pipeline_text",
    "ThroughputCallback": ".throughput",
    "UDMGRPOConfig": ".trainer.udm_grpo_config",
    "UDMGRPOTrainer": ".trainer.udm_grpo_trainer",
    "UDMPipeline": ".pipelines.pipeline_udm",
    "UDMSFTConfig": ".sft.udm_sft_trainer",
    "UDMSFTTrainer": ".sft.udm_sft_trainer",
    "URSAConfig": ".models.configuration_ursa",
    "URSAForImageGeneration": ".models.modeling_ursa",
    "URSAModel": ".models.modeling_ursa",
    "URSAPipeline": ".pipelines.pipeline_ursa",
    "UniformDDIMScheduler": ".schedulers.scheduling_uniform_ddim",
    "VLMJudgeReward": ".rewards.vlm_judge",
    "estimate_memory": ".memory",
}

__all__ = list(_MODULES)

if TYPE_CHECKING:
    from .callbacks.adaptive_kl import AdaptiveKLCallback as AdaptiveKLCallback
    from .callbacks.diagnostics import DiagnosticsCallback as DiagnosticsCallback
    from .callbacks.guardrails import GuardrailCallback as GuardrailCallback
    from .callbacks.progress import CompactProgressCallback as CompactProgressCallback
    from .dflow_grpo.dflow_dpo_trainer import DFlowDPOConfig as DFlowDPOConfig
    from .dflow_grpo.dflow_dpo_trainer import DFlowDPOTrainer as DFlowDPOTrainer
    from .dflow_grpo.dflow_grpo_config import DFlowGRPOConfig as DFlowGRPOConfig
    from .dflow_grpo.dflow_grpo_trainer import DFlowGRPOTrainer as DFlowGRPOTrainer
    from .memory import MemoryEstimate as MemoryEstimate
    from .memory import estimate_memory as estimate_memory
    from .models.autoencoder_vq import AutoencoderVQ as AutoencoderVQ
    from .models.autoencoder_vq_cosmos3d import AutoencoderVQCosmos3D as AutoencoderVQCosmos3D
    from .models.configuration_duo import DuoConfig as DuoConfig
    from .models.configuration_gidd import GiddConfig as GiddConfig
    from .models.configuration_ursa import URSAConfig as URSAConfig
    from .models.modeling_duo import DuoForMaskedLM as DuoForMaskedLM
    from .models.modeling_fudoki import FUDOKIForImageGeneration as FUDOKIForImageGeneration
    from .models.modeling_gidd import GiddForMaskedLM as GiddForMaskedLM
    from .models.modeling_ursa import URSAForImageGeneration as URSAForImageGeneration
    from .models.modeling_ursa import URSAModel as URSAModel
    from .pipelines.fudoki_understanding import FUDOKIUnderstandingPipeline as FUDOKIUnderstandingPipeline
    from .pipelines.pipeline_diffusion_gemma import DiffusionGemmaUDMPipeline as DiffusionGemmaUDMPipeline
    from .pipelines.pipeline_fudoki import FUDOKIPipeline as FUDOKIPipeline
    from .pipelines.pipeline_text import TextUDMPipeline as TextUDMPipeline
    from .pipelines.pipeline_udm import UDMPipeline as UDMPipeline
    from .pipelines.pipeline_ursa import URSAPipeline as URSAPipeline
    from .rewards.clip import AestheticReward as AestheticReward
    from .rewards.clip import CLIPReward as CLIPReward
    from .rewards.clip import CLIPScoreReward as CLIPScoreReward
    from .rewards.clip import HPSv2Reward as HPSv2Reward
    from .rewards.clip import PickScoreReward as PickScoreReward
    from .rewards.clip_color import CLIPColorClassifier as CLIPColorClassifier
    from .rewards.diversity import DiversityReward as DiversityReward
    from .rewards.dpg import DPGReward as DPGReward
    from .rewards.frames import FrameReward as FrameReward
    from .rewards.geneval import GenEvalReward as GenEvalReward
    from .rewards.hpsv3 import HPSv3Reward as HPSv3Reward
    from .rewards.image_reward import ImageRewardReward as ImageRewardReward
    from .rewards.mask2former import Mask2FormerDetector as Mask2FormerDetector
    from .rewards.ocr import OCRReward as OCRReward
    from .rewards.remote.client import RemoteReward as RemoteReward
    from .rewards.vlm_judge import JudgeTemplate as JudgeTemplate
    from .rewards.vlm_judge import VLMJudgeReward as VLMJudgeReward
    from .schedulers.scheduling_kinetic_optimal import KineticOptimalScheduler as KineticOptimalScheduler
    from .schedulers.scheduling_masked import MaskedDDIMScheduler as MaskedDDIMScheduler
    from .schedulers.scheduling_uniform_ddim import UniformDDIMScheduler as UniformDDIMScheduler
    from .sft.udm_sft_trainer import UDMSFTConfig as UDMSFTConfig
    from .sft.udm_sft_trainer import UDMSFTTrainer as UDMSFTTrainer
    from .throughput import ThroughputCallback as ThroughputCallback
    from .trainer.ema import EMACallback as EMACallback
    from .trainer.udm_grpo_config import UDMGRPOConfig as UDMGRPOConfig
    from .trainer.udm_grpo_trainer import UDMGRPOTrainer as UDMGRPOTrainer


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # What an import makes is kept. To look for garbage in it would take a sixth of the time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        value = getattr(import_module(_MODULES[name], __name__), name)
    finally:
        if was_enabled:
            gc.enable()
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
