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

"""What a type checker must refuse. Lines that end with a code of mypy have that error, and no other line has one."""

import torch
from PIL import Image

from trl_udm import (
    GenEvalReward,
    KineticOptimalScheduler,
    TextUDMPipeline,
    UDMGRPOConfig,
    UDMGRPOTrainer,
    URSAPipeline,
)
from trl_udm.data.loading import load_prompts
from trl_udm.evaluation import evaluate


class NamelessDetector:
    def __call__(self, images: list[Image.Image]) -> list[dict[str, list[float]]]:
        return [{} for _ in images]


pipe = URSAPipeline.from_pretrained("folder")
text_pipe = TextUDMPipeline.from_pretrained("folder")
scheduler = KineticOptimalScheduler.from_pretrained("folder")
prompts = load_prompts("prompts.txt")

GenEvalReward(3)  # arg-type
GenEvalReward(NamelessDetector())  # arg-type
GenEvalReward(lambda images: [])  # arg-type
GenEvalReward(NamelessDetector, mode="strict")  # arg-type
pipe("a dog").images[0].nope()  # attr-defined
str(pipe("a dog").image)  # attr-defined
str(pipe("a dog").images.shape)  # attr-defined
pipe("a dog", output_type="latent").images.save("dog.png")  # attr-defined
str(pipe("a dog", return_dict=False).images)  # attr-defined
pipe("a dog", output_type="jpg")  # call-overload
pipe("a dog", heigth=512)  # call-overload
pipe("a dog", output_type="np", num_inference_steps="ten")  # call-overload
pipe(3)  # call-overload
str(text_pipe("17+45=").images)  # attr-defined
text_pipe("17+45=", output_type="np")  # call-overload
str(scheduler.step(torch.zeros(1, 2, 8), 0, torch.zeros(1, 2), return_dict=False).prev_sample)  # attr-defined
scheduler.add_noise([1, 2], 0.5)  # arg-type
load_prompts("prompts.csv", task="genval")  # call-overload
str(load_prompts("prompts.csv", streaming=True).column_nmes)  # attr-defined
UDMGRPOConfig("run", action="noisy")  # arg-type
UDMGRPOConfig("run", reward_error="ignore")  # arg-type
UDMGRPOConfig("run", num_train_timestep=3)  # call-arg
UDMGRPOTrainer(pipe, 3, train_dataset=prompts)  # arg-type
UDMGRPOTrainer(pipe, print, train_dataset=load_prompts("prompts.txt", streaming=True))  # arg-type
UDMGRPOTrainer("folder", print, train_dataset=prompts)  # arg-type
evaluate([3], "report")  # list-item
