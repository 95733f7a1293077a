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

"""What users write, for a type checker to read. `assert_type` fails where a type is not known exactly."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, assert_type

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from PIL import Image
from torch import nn
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config

from trl_udm import (
    AdaptiveKLCallback,
    AestheticReward,
    AutoencoderVQ,
    AutoencoderVQCosmos3D,
    CLIPColorClassifier,
    CLIPReward,
    CLIPScoreReward,
    CompactProgressCallback,
    DFlowDPOConfig,
    DFlowDPOTrainer,
    DFlowGRPOConfig,
    DFlowGRPOTrainer,
    DiagnosticsCallback,
    DiffusionGemmaUDMPipeline,
    DiversityReward,
    DPGReward,
    DuoConfig,
    DuoForMaskedLM,
    EMACallback,
    FrameReward,
    FUDOKIForImageGeneration,
    FUDOKIPipeline,
    FUDOKIUnderstandingPipeline,
    GenEvalReward,
    GiddConfig,
    GiddForMaskedLM,
    GuardrailCallback,
    HPSv2Reward,
    HPSv3Reward,
    ImageRewardReward,
    JudgeTemplate,
    KineticOptimalScheduler,
    Mask2FormerDetector,
    MaskedDDIMScheduler,
    MemoryEstimate,
    OCRReward,
    PickScoreReward,
    RemoteReward,
    TextUDMPipeline,
    ThroughputCallback,
    UDMGRPOConfig,
    UDMGRPOTrainer,
    UDMPipeline,
    UDMSFTConfig,
    UDMSFTTrainer,
    UniformDDIMScheduler,
    URSAConfig,
    URSAForImageGeneration,
    URSAModel,
    URSAPipeline,
    VLMJudgeReward,
    estimate_memory,
)
from trl_udm.data.files import load_rows
from trl_udm.data.geneval import generate_geneval_prompts, geneval_dataset, geneval_prompt
from trl_udm.data.loading import load_prompts
from trl_udm.data.ocr import generate_ocr_prompts
from trl_udm.evaluation import evaluate, generate_images, score_images, summarize
from trl_udm.evaluation.benchmarks import BENCHMARKS
from trl_udm.evaluation.comparison import train_and_compare, train_and_compare_texts
from trl_udm.image_grid import make_image_grid
from trl_udm.pipelines.pipeline_output import TextUDMPipelineOutput, UDMTrajectory, URSAPipelineOutput
from trl_udm.rewards.geneval import Detection
from trl_udm.worlds import WORLDS
from trl_udm.worlds.shapes import CHECKPOINT_PATH
from trl_udm.worlds.shapes.detector import ShapesColorClassifier, ShapesDetector


# Images

pipe = URSAPipeline.from_pretrained("BAAI/URSA-1.7B-IBQ512", dtype=torch.bfloat16)
assert_type(pipe, URSAPipeline)
assert_type(pipe.to("cuda"), URSAPipeline)
assert_type(URSAPipeline.from_pretrained(CHECKPOINT_PATH).to("cuda", torch.bfloat16), URSAPipeline)
assert_type(URSAPipeline.from_configs(Path("folder")), URSAPipeline)
assert_type(pipe.device, torch.device)

output = pipe("a red car", height=512, width=512, num_inference_steps=25, guidance_scale=1.0)
assert_type(output, URSAPipelineOutput[list[Image.Image]])
assert_type(output.images[0], Image.Image)
assert_type(pipe(["a red car", "a dog"], negative_prompt="blurry", num_images_per_prompt=2).images, list[Image.Image])
output.images[0].save("car.png")
assert_type(pipe("a red car", output_type="pil").images[0].size, tuple[int, int])
assert_type(pipe("a red car", output_type="np").images, np.ndarray)
assert_type(pipe("a red car", output_type="pt", generator=torch.Generator().manual_seed(0)).images, torch.Tensor)
latents = pipe("a red car", output_type="latent", generator=[torch.Generator()]).images
assert_type(latents, torch.Tensor)
assert_type(pipe("a red car", latents=latents, return_dict=True).images[0], Image.Image)
images, *_ = pipe("a red car", return_dict=False)
images, trajectory = pipe("a red car", output_type="np", return_dict=False, return_trajectory=True)
assert_type(pipe("a red car", return_trajectory=True).trajectory, UDMTrajectory | None)
clip = pipe("a red car", num_frames=49, motion_score=9.0, flow_shift=3.0, image=output.images[0]).frames[0]
pipe("a red car", num_frames=49, video=clip, cond_noise_scale=0.1, condition="redraw", cond_indices=[0])


def on_step_end(pipeline: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
    pipeline._interrupt = step == 3
    return tensors


pipe("a red car", callback_on_step_end=on_step_end, callback_on_step_end_tensor_inputs=["latents", "logits"])

# Components

assert_type(pipe.transformer, URSAForImageGeneration)
assert_type(pipe.transformer.config.codebook_size, int)
assert_type(pipe.scheduler, KineticOptimalScheduler)
assert_type(pipe.tokenizer, PreTrainedTokenizerBase)
assert_type(pipe.vae, AutoencoderVQ | AutoencoderVQCosmos3D | None)
codebook_size: int = pipe.scheduler.config.codebook_size
pipe.load_lora_weights("lora", adapter_name="style")
pipe.set_adapters(["style"], [0.5])
assert_type(pipe.get_active_adapters(), list[str])
pipe.fuse_lora()
pipe.save_pretrained(Path("folder"))
prompt_ids, prompt_mask = pipe.encode_prompt(["a red car"])
samples = pipe.sample_tokens(prompt_ids, prompt_mask, pipe.latent_shape(height=512, width=512), 10)
assert_type(samples.clean_samples, torch.Tensor)
assert_type(pipe.decode(samples.clean_samples, (1, 32, 32))[0], Image.Image)

fudoki = FUDOKIPipeline.from_pretrained("LucasJinWang/FUDOKI", dtype=torch.bfloat16).to("cuda")
assert_type(fudoki, FUDOKIPipeline)
assert_type(fudoki.transformer, FUDOKIForImageGeneration)
assert_type(fudoki("a red car", num_inference_steps=50).images[0], Image.Image)
assert_type(fudoki("a red car", output_type="latent").images, torch.Tensor)
fudoki.load_lora_weights("release", subfolder="lora_adapter")
reader = FUDOKIUnderstandingPipeline.from_pretrained("LucasJinWang/FUDOKI", dtype=torch.bfloat16).to("cuda")
assert_type(reader(Image.open("car.png").convert("RGB"), "What is it?", generator=torch.Generator()), list[str])

config = URSAConfig(text_vocab_size=320, codebook_size=256, bov_token_id=315, hidden_size=64)
network = URSAForImageGeneration(config)
position_ids = torch.arange(10).view(1, 10, 1).expand(1, 10, 3)
logits = network(input_ids=torch.zeros(1, 10, dtype=torch.long), position_ids=position_ids).logits
backbone = URSAModel(config)
vae = AutoencoderVQ.from_pretrained("folder", subfolder="vae")
assert_type(vae, AutoencoderVQ)
assert_type(vae.codebook, torch.Tensor)
ids: torch.Tensor = vae.encode_to_ids(torch.zeros(1, 3, 64, 64))
assert_type(vae.decode_ids(ids).sample, torch.Tensor)
assert_type(vae.decode_ids(ids, return_dict=False)[0], torch.Tensor)
video_vae = AutoencoderVQCosmos3D.from_pretrained("folder", subfolder="vae", temporal_tiling="original")
assert_type(video_vae, AutoencoderVQCosmos3D)
video_ids: torch.Tensor = video_vae.encode_to_ids(torch.zeros(1, 3, 5, 64, 64))
assert_type(video_vae.decode_ids(video_ids).sample, torch.Tensor)
assert_type(video_vae.encode(torch.zeros(1, 3, 5, 64, 64)).latents, torch.Tensor)
built = URSAPipeline(network, KineticOptimalScheduler(shift=2.0), AutoTokenizer.from_pretrained("folder"), vae)

# Schedulers

scheduler = KineticOptimalScheduler(alpha=None, codebook_size=256)
scheduler.set_timesteps(10, device="cuda")
clean_samples = torch.randint(256, (2, 64))
assert_type(scheduler.add_noise(clean_samples, torch.tensor([0.1, 0.6])), torch.Tensor)
step = scheduler.step(torch.randn(2, 64, 256), 0, clean_samples, generator=torch.Generator())
assert_type(step.prev_sample, torch.Tensor)
assert_type(step.pred_original_sample, torch.Tensor)
for timestep in scheduler.timesteps:
    clean_samples = scheduler.step(torch.randn(2, 64, 256), timestep, clean_samples).prev_sample
assert_type(scheduler.timestep_to_t(3), float)
state, prediction = scheduler.step(torch.randn(2, 64, 256), 0, clean_samples, return_dict=False)
assert_type(state, torch.Tensor)
assert_type(scheduler.sample_timesteps(4), torch.Tensor)
assert_type(KineticOptimalScheduler.from_config(scheduler.config, shift=2.0), KineticOptimalScheduler)
assert_type(KineticOptimalScheduler.from_pretrained("folder", subfolder="scheduler"), KineticOptimalScheduler)

uniform = UniformDDIMScheduler(codebook_size=30)
masked = MaskedDDIMScheduler(codebook_size=31, mask_token_id=30, remasking="low_confidence")
assert_type(uniform.add_noise(torch.randint(30, (2, 16)), 0.5), torch.Tensor)
clean_samples = uniform.step(torch.randn(2, 16, 30), 0, clean_samples).prev_sample
assert_type(uniform.step(torch.randn(2, 16, 30), 0, torch.randint(30, (2, 16))).pred_original_sample, torch.Tensor)
state, prediction, *_ = uniform.step(torch.randn(2, 16, 30), 0, torch.randint(30, (2, 16)), return_dict=False)
vocabulary_size: int = uniform.config.codebook_size

# Text

masked = AutoModelForMaskedLM.from_pretrained("folder")
text_pipe = TextUDMPipeline(masked, uniform, AutoTokenizer.from_pretrained("folder"), max_completion_length=4)
assert_type(text_pipe.to("cuda"), TextUDMPipeline)
duo = DuoForMaskedLM(DuoConfig(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
gidd = GiddForMaskedLM(GiddConfig(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
duo_pipe = TextUDMPipeline(duo, uniform, AutoTokenizer.from_pretrained("folder"), time_argument="t")
assert_type(TextUDMPipeline.from_pretrained("s-sahoo/duo", tokenizer=duo_pipe.tokenizer), TextUDMPipeline)
assert_type(TextUDMPipeline.from_pretrained(Path("folder")), TextUDMPipeline)
assert_type(text_pipe("17+45="), TextUDMPipelineOutput[list[str]])
assert_type(text_pipe(["17+45=", "1+1="], max_completion_length=8, guidance_scale=2.0).texts[0], str)
assert_type(text_pipe([{"role": "user", "content": "17+45="}]).texts, list[str])
assert_type(text_pipe("17+45=", output_type="latent").texts, torch.Tensor)
texts, *_ = text_pipe("17+45=", return_dict=False)

gemma = DiffusionGemmaUDMPipeline.from_pretrained("google/diffusiongemma-26B-A4B-it", self_conditioning=True)
assert_type(gemma.to("cuda"), DiffusionGemmaUDMPipeline)
assert_type(gemma("Why is the sky blue?", gen_length=256).texts, list[str] | None)
sequences, texts = gemma(messages=[{"role": "user", "content": "Hello"}], return_dict=False)

# Prompts

prompts = load_prompts("prompts.txt")
assert_type(prompts, Dataset)
assert_type(load_prompts(Path("prompts.jsonl"), "geneval", split="train[:100]", class_names=["dog"]), Dataset)
assert_type(load_prompts("prompts.csv", task="ocr", streaming=False, delimiter=";"), Dataset)
assert_type(load_prompts("prompts.csv", task="ocr", encoding="latin-1", streaming=True), IterableDataset)
assert_type(generate_geneval_prompts(100, {"counting": 1}, exclude=["a photo of a dog"]), Dataset)
assert_type(generate_ocr_prompts(100, texts=["open"]), Dataset)
assert_type(geneval_dataset([{"prompt": "", "tag": "colors", "include": [{"class": "dog", "count": 1}]}]), Dataset)
assert_type(geneval_prompt([{"class": "dog", "count": 1}]), str)
assert_type(load_rows("rows.csv"), Dataset)

# Rewards


class MyDetector:
    """With a list, where others have a tuple, and with an argument of another name."""

    def __init__(self) -> None:
        self.class_names = ["bench", "dog"]

    def __call__(self, pictures: list[Image.Image]) -> list[dict[str, list[Detection]]]:
        return [{"bench": [Detection(box=(0, 0, *picture.size), score=0.95)]} for picture in pictures]


class FixedDetector:
    class_names = ("dog",)

    def __call__(self, images: Sequence[Image.Image]) -> list[dict[str, list[Detection]]]:
        return [{} for _ in images]


def name_red(image: Image.Image, found: list[Detection], name: str) -> list[str]:
    return ["red" for _ in found]


class Brightness:
    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.__name__ = "brightness"

    def __call__(self, prompts: list[str], completions: list[Image.Image], **columns: Any) -> list[float]:
        return [self.scale * float(np.asarray(image).mean()) for image in completions]


def has_prompt(prompts: list[str], completions: list[Image.Image], **columns: Any) -> list[float | None]:
    return [1.0 if prompt else None for prompt in prompts]


async def remote(prompts: list[str], completions: list[Any], **columns: Any) -> list[float]:
    await asyncio.sleep(0.1)
    return [0.0] * len(completions)


detector = Mask2FormerDetector(device="cuda", dtype=torch.float16, batch_size=4)
geneval = GenEvalReward(detector, CLIPColorClassifier(), mode="dense", clamp=False)
GenEvalReward(Mask2FormerDetector())
GenEvalReward(MyDetector(), name_red)
GenEvalReward(FixedDetector(), color_classifier=None, mode="official")
GenEvalReward(ShapesDetector(), ShapesColorClassifier())
assert_type(detector([output.images[0]])[0]["dog"][0].score, float)
scores = geneval(["a dog"], output.images, tag=["single_object"], include=[[{"class": "dog", "count": 1}]])
assert_type(scores, list[float | None])
assert_type(OCRReward(partial=True)(["the word 'a'"], output.images, target_text=["a"]), list[float | None])
assert_type(PickScoreReward()(["a dog"], output.images), list[float])
assert_type(CLIPScoreReward(device=torch.device("cuda"))(["a dog"], torch.zeros(1, 3, 8, 8)), list[float])
HPSv2Reward("folder")
assert_type(HPSv3Reward("folder", batch_size=4)(["a dog"], output.images), list[float])
assert_type(ImageRewardReward(dtype=torch.float16)(["a dog"], output.images), list[float])
AestheticReward("head.pth", batch_size=4)
FrameReward(AestheticReward("head.pth"), frames="middle", reduce="min")
assert_type(JudgeTemplate("Is it {prompt}?", answer="yes_no").parse("yes"), float | None)
vlm_judge = VLMJudgeReward("model", "http://127.0.0.1:8000/v1", template="geneval", prices=(1.0, 2.0))
CLIPReward("folder", prefix="a ", batch_size=4)
DPGReward("model", "http://127.0.0.1:8000/v1", timeout=30.0)
assert_type(DiversityReward()(["a dog"] * 2, output.images, completion_ids=[[1], [2]]), list[float | None])
remote_reward = RemoteReward(["http://one:8765", "http://two:8765"], columns=["tag"], timeout=60, name="remote")

# Training

args = UDMGRPOConfig(
    output_dir="run",
    action="clean",
    trajectory="forward",
    importance_sampling_level="token",
    reward_error="none",
    loss_type="grpo",
    timestep_window=[0, 2],
    pipeline_kwargs={"height": 512, "width": 512},
    advantage_clip=None,
    bf16=True,
    report_to="none",
)
trainer = UDMGRPOTrainer(
    pipe,
    reward_funcs=has_prompt,
    args=args,
    train_dataset=prompts,
    eval_dataset={"all": prompts, "ocr": load_prompts("prompts.csv", task="ocr")},
    peft_config=LoraConfig(r=8, target_modules=["q_proj"]),
    callbacks=[GuardrailCallback(max_kl=0.1), EMACallback(decay=0.99)],
    optimizers=(torch.optim.AdamW(pipe.transformer.parameters()), None),
    eval_reward_funcs=PickScoreReward(),
)
trainer.add_callback(DiagnosticsCallback(trainer, ["a red car"]))
trainer.add_callback(AdaptiveKLCallback(trainer, target=0.1))
trainer.remove_callback(ThroughputCallback)
trainer.add_callback(CompactProgressCallback)
trainer.train(resume_from_checkpoint=True)
trainer.save_model()
trainer.push_to_hub()
assert_type(trainer.args, UDMGRPOConfig)
assert_type(trainer.args.num_train_timesteps, int)
assert_type(trainer.pipeline, UDMPipeline)
assert_type(trainer.evaluate(), dict[str, float])

clip_rewards = [PickScoreReward(), CLIPScoreReward()]
UDMGRPOTrainer(pipe.to("cuda"), clip_rewards, UDMGRPOConfig("run"), prompts)
UDMGRPOTrainer(pipe, [geneval, OCRReward(), Brightness(), remote, remote_reward, vlm_judge], train_dataset=prompts)
UDMGRPOTrainer(pipe, (has_prompt, Brightness(2.0)), args, train_dataset=generate_ocr_prompts(100))
UDMGRPOTrainer(pipe, remote, args, train_dataset=prompts, eval_dataset=prompts, eval_reward_funcs=[OCRReward()])
UDMGRPOTrainer(text_pipe, "reward-model", args, train_dataset=Dataset.from_dict({"prompt": ["17+45="]}))
UDMGRPOTrainer(gemma, [lambda completions, **columns: [0.0] * len(completions)], args, train_dataset=prompts)

estimate = estimate_memory(URSAPipeline.from_configs("folder"), args, LoraConfig(), device="cuda")
assert_type(estimate, MemoryEstimate)
assert_type(estimate.peak, int)

# Evaluation

rows = [{"prompt": "a dog", "tag": "single_object"}]
summaries = evaluate(
    [PickScoreReward(), has_prompt, remote], "report", pipe, rows, num_images_per_prompt=2, height=512, width=512
)
assert_type(summaries, dict[str, dict[str, dict[str, float]]])
evaluate(clip_rewards, Path("report"))
generate_images(pipe, rows, "images", num_inference_steps=25)
assert_type(score_images("images", PickScoreReward()), list[dict[str, Any]])
assert_type(summarize(score_images("images", has_prompt)), dict[str, dict[str, float]])
train_and_compare(trainer, Brightness(), eval_rows=rows)
train_and_compare_texts(trainer, num_shown=3)
benchmark = BENCHMARKS["shapes"]
evaluate([benchmark.make_reward(benchmark.reward_options)], "report", pipe, benchmark.load_rows())
WORLDS["shapes"].make_reward(mode="dense")
make_image_grid(output.images, ["a red car"], [(0.5,)]).save("grid.png")


# A family of one's own, as in docs/add_a_model_family.md


class DiceConfig(Qwen3Config):
    model_type = "dice"
    num_faces: int = 6


class DiceModel(PreTrainedModel):
    config_class = DiceConfig

    def __init__(self, config: DiceConfig) -> None:
        super().__init__(config)
        self.head = nn.Linear(config.hidden_size, config.num_faces, bias=False)


class DicePipeline(UDMPipeline):
    transformer: DiceModel

    def __init__(
        self, transformer: DiceModel, scheduler: UniformDDIMScheduler, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, tokenizer=tokenizer)

    def latent_shape(self, num_dice: int = 3) -> tuple[int, ...]:
        return (num_dice,)

    def encode_prompt(self, prompt: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        encoded = self.tokenizer(prompt, padding=True, return_tensors="pt").to(self.device)
        return encoded["input_ids"], encoded["attention_mask"]

    def prepare_denoiser_inputs(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        noised_samples: torch.Tensor,
        latent_shape: tuple[int, ...],
        labels: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": torch.cat([prompt_ids, noised_samples + self.scheduler.config.codebook_size], dim=1)}
        if labels is not None:
            inputs["shift_labels"] = torch.cat([torch.full_like(prompt_ids, -100), labels], dim=1)
        return inputs

    def denoise(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        noised_samples: torch.Tensor,
        latent_shape: tuple[int, ...],
        t: torch.Tensor | None = None,
    ) -> torch.Tensor:
        inputs = self.prepare_denoiser_inputs(prompt_ids, prompt_mask, noised_samples, latent_shape, t=t)
        return self.transformer(**inputs)[:, prompt_ids.size(1) :]

    def decode(self, clean_samples: torch.Tensor, latent_shape: tuple[int, ...]) -> list[str]:
        return [" ".join(map(str, sample)) for sample in clean_samples.tolist()]


dice = DicePipeline(DiceModel(DiceConfig()), UniformDDIMScheduler(6), AutoTokenizer.from_pretrained("folder"))
assert_type(dice.to("cuda"), DicePipeline)
assert_type(DicePipeline.from_pretrained("folder"), DicePipeline)
UDMGRPOTrainer(dice, has_prompt, args, train_dataset=prompts)
DFlowGRPOTrainer(dice, has_prompt, DFlowGRPOConfig("run", num_draws=4, old_policy_steps=48), train_dataset=prompts)
DFlowDPOTrainer(dice, [has_prompt], DFlowDPOConfig("run", num_pairs=2), train_dataset=prompts)
UDMSFTTrainer(dice, UDMSFTConfig("run", max_steps=10), prompts, peft_config=LoraConfig(r=8))
