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


"""A judge on a real server: `transformers serve`, with a tiny vision-language model that always answers 7."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from trl_udm.rewards.vlm_judge import JudgeTemplate, VLMJudgeReward


CHARACTERS = ["<pad>", "<s>", "</s>", "<image>", "<unk>", *map(chr, range(32, 127)), "\n"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def save_judge(folder):
    """LLaVA whose language model looks at the last character only: it answers 7, and ends after a 7."""
    vocabulary = {character: index for index, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"height": 8, "width": 8}, crop_size={"height": 8, "width": 8}),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<image>"], **special),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**sizes, image_size=8, patch_size=4),
            text_config=LlamaConfig(
                **sizes, vocab_size=len(vocabulary), pad_token_id=0, bos_token_id=1, eos_token_id=2
            ),
            image_token_index=vocabulary["<image>"],
            vision_feature_layer=-1,
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("o_proj", "down_proj", "lm_head")):
                weight.zero_()
        embeddings, seven = model.get_input_embeddings().weight, vocabulary["7"]
        embeddings[:, :2] = torch.tensor([1.0, 0.0])
        embeddings[seven, 1] = 1.0
        model.lm_head.weight[seven, 0] = 10.0
        model.lm_head.weight[vocabulary["</s>"], 1] = 100.0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def test_transformers_serve_is_a_judge(tmp_path):
    for package in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(package)
    save_judge(tmp_path / "judge")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log.txt").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(600):  # a minute
            with socket.socket() as probe:
                if server.poll() is not None or probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        logged = {}
        template = JudgeTemplate("Rate {prompt}", high=10)
        reward = VLMJudgeReward(str(tmp_path / "judge"), f"http://127.0.0.1:{port}/v1", template)
        images = [Image.new("RGB", (16, 12), color) for color in ("red", "blue")]
        rewards = asyncio.run(
            reward(["a", "b"], images, log_metric=lambda name, value: logged.setdefault(name, []).append(value))
        )
    finally:
        server.terminate()
        server.wait(30)
    assert rewards == [0.7, 0.7], (tmp_path / "log.txt").read_text()
    # The image is in the prompt: 4 patches, and "Rate a"
    assert logged["vlm_judge/prompt_tokens"] == [4 + 6, 4 + 6] and logged["vlm_judge/unparsable"] == [0, 0]
