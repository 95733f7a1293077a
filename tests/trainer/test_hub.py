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
import json
import logging
import os
import pickle
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import ModelCard

from trl_udm import UDMGRPOConfig, URSAPipeline
from trl_udm.trainer.hub import _warn_of_failure
from trl_udm.worlds.shapes import CHECKPOINT_PATH

from .hub_runs import LICENCE, RUNS
from .hub_server import TOKEN, USER, HubServer
from .test_udm_grpo_trainer import LORA, build_trainer


ROOT = Path(__file__).resolve().parents[2]
TRAINER_FILES = {"optimizer.pt", "rng_state.pth", "rollout_state_0.pth", "scheduler.pt", "trainer_state.json"}
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
RESULT_FILES = {"results.json", "samples.png", "reward_curve.png"}


def run(server, folder, command, *arguments):
    """A process of `hub_runs` with a Hub, and a cache that is its own. Returns what it wrote to its terminal."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment.pop("HF_TOKEN", None)
    environment.update(
        HF_ENDPOINT=server.url,
        HF_HOME=str(folder / f"{command}-cache"),
        HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        PYTHONPATH=str(ROOT),
    )
    process = subprocess.run(
        [sys.executable, "-m", "tests.trainer.hub_runs", command, str(folder), *map(str, arguments)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


# One test, for the two processes take their time and all of it needs both
def test_runs_push_to_a_hub_what_the_cards_snippet_loads_and_no_token(tmp_path, oracle_dir):
    with HubServer() as server:
        output = run(server, tmp_path, "push", oracle_dir / "tiny-ursa") + run(server, tmp_path, "load")
    repositories = {name: server.repositories[f"{USER}/{name}"] for name in RUNS}
    files = {name: set(repository.files) for name, repository in repositories.items()}
    messages = {name: repository.messages for name, repository in repositories.items()}
    cards = {name: ModelCard(repository.files["README.md"].decode()) for name, repository in repositories.items()}

    # What is loaded is the trained model
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    trained = {"is_the_trainers": True, "is_the_base_models": False}
    full = {**trained, "first_is_step_1": True, "last_is_step_1": False}
    assert outcome.pop("resumed") == {"steps": [1, 2, 3], "global_step": 3}
    assert outcome == {"lora": trained, "full": full, "text-lora": trained, "text-full": full}

    # The strategies
    assert messages["text-lora"] == ["initial commit", "End of training"]
    for name in ("lora", "full", "text-full"):
        assert messages[name][1] == "Training in progress, step 1"
    assert "Training in progress, step 1, checkpoint" in messages["lora"]
    assert "Training in progress, step 1, checkpoint" in messages["full"]

    assert server.repositories[f"{USER}/later"].messages == ["initial commit", "By hand"]

    # The files
    checkpoint_files = ADAPTER_FILES | TOKENIZER_FILES | TRAINER_FILES
    average_files = {f"transformer_ema/{name}" for name in ADAPTER_FILES}
    assert files["text-lora"] == {"README.md"} | ADAPTER_FILES | average_files
    assert "transformer_ema/model.safetensors" in files["text-full"]
    assert files["lora"] >= {"README.md"} | ADAPTER_FILES | RESULT_FILES
    assert files["lora"] <= {"README.md"} | ADAPTER_FILES | RESULT_FILES | {
        f"checkpoint-{step}/{name}" for step in (1, 2) for name in checkpoint_files
    }
    assert {f"checkpoint-1/{name}" for name in checkpoint_files} <= files["lora"]
    pipeline_files = {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "scheduler/diffusion_pytorch_model.safetensors",
    }
    pipeline_files |= {"transformer/config.json", "transformer/model.safetensors"}
    pipeline_files |= {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    pipeline_files |= {f"tokenizer/{name}" for name in TOKENIZER_FILES}
    last_checkpoint_files = {f"last-checkpoint/{name}" for name in pipeline_files | TRAINER_FILES}
    assert files["full"] == {"README.md"} | pipeline_files | last_checkpoint_files

    # Neither a token nor a folder of this machine is told
    contents = [
        content
        for repository in repositories.values()
        for files in repository.commits.values()
        for content in files.values()
    ]
    local_files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(b"hub_strategy" in content for content in local_files) >= 8  # training_args.bin
    for token in (TOKEN, "hf_" + "Wrong"):
        assert token not in output
        assert not any(token.encode() in content for content in [*contents, *local_files])
    for name, repository in repositories.items():
        for path, content in repository.files.items():
            if not path.endswith("trainer_state.json"):  # whose business they are
                assert str(tmp_path).encode() not in content, (name, path)

    # The cards
    data = {name: card.data.to_dict() for name, card in cards.items()}
    assert {name: data[name]["library_name"] for name in RUNS} == {
        "lora": "peft",
        "full": "diffusers",
        "text-lora": "peft",
        "text-full": "diffusers",
    }
    assert {name: data[name]["pipeline_tag"] for name in RUNS} == {
        "lora": "text-to-image",
        "full": "text-to-image",
        "text-lora": "text-generation",
        "text-full": "text-generation",
    }
    assert {name: (data[name].get("base_model"), data[name].get("base_model_relation")) for name in RUNS} == {
        "lora": (f"{USER}/shapes", "adapter"),
        "full": (f"{USER}/original", "finetune"),
        "text-lora": (f"{USER}/toy", "adapter"),
        "text-full": (None, None),
    }
    assert LICENCE.items() <= data["lora"].items() and "license" not in data["full"]
    assert data["lora"]["tags"] == ["trl", "trl-udm", "udm-grpo", "lora"]
    results = json.loads((tmp_path / "lora" / "results.json").read_text())
    (result,) = cards["lora"].data.eval_results
    assert (result.metric_type, result.metric_value) == ("redness", round(results["after"]["overall"], 4))
    assert "| redness | before | after |" in cards["lora"].text
    assert (
        f"| overall | {results['before']['overall']:.3f} | {results['after']['overall']:.3f} |" in cards["lora"].text
    )
    assert "](samples.png)" in cards["lora"].text and "](samples.png)" not in cards["full"].text
    adapter_config = json.loads(repositories["lora"].files["adapter_config.json"])
    assert adapter_config["base_model_name_or_path"] == f"{USER}/shapes"

    # A wrong token
    refusal = (tmp_path / "refused.txt").read_text()
    assert "401 Unauthorized" in refusal
    assert f"must be one that may write to the repository `hub_model_id` '{USER}/refused'" in refusal
    assert f"{USER}/refused" not in server.repositories


def test_a_configuration_keeps_its_token_to_itself():
    args = UDMGRPOConfig("out", bf16=False, hub_token=TOKEN)
    copies = (copy.copy(args), copy.deepcopy(args), pickle.loads(pickle.dumps(args)))
    assert all(copied.hub_token == TOKEN for copied in copies)
    assert repr(args) == str(args) and "hub_token=<HUB_TOKEN>" in repr(args)


def test_a_push_that_fails_beside_the_training_is_warned_of(caplog):
    job = Future()
    job.add_done_callback(_warn_of_failure)
    with caplog.at_level(logging.WARNING, logger="trl_udm.trainer.hub"):
        job.set_exception(OSError("no route to the Hub"))
    assert "A push to the Hub failed, and the training goes on: no route to the Hub" in caplog.text


def test_a_checkpoint_without_whole_weights_is_not_pushed(tmp_path, caplog):
    trainer = build_trainer(tmp_path, hub_strategy="every_save")
    trainer.push_in_progress = None
    with caplog.at_level(logging.WARNING, logger="trl_udm.trainer.hub"):
        trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert "Step 0 is not pushed to the Hub: its checkpoint has no ['model_index.json', 'transformer'," in caplog.text
    assert trainer.push_in_progress is None


def test_the_card_of_a_run_without_a_hub(tmp_path):
    trainer = build_trainer(tmp_path / "run", peft_config=LORA, run_name="mine", data_seed=7, deepspeed=None)
    (tmp_path / "run" / "results.json").write_text('{"accuracy": 1.0}')  # of something else
    trainer.create_model_card(tags="toy", dataset_name="me/prompts")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    data = card.data.to_dict()
    assert data["tags"] == ["trl", "trl-udm", "udm-grpo", "lora", "toy"]
    assert data["datasets"] == "me/prompts"
    assert "base_model" not in data and "license" not in data and "model-index" not in data
    assert card.text.strip().startswith("# run\n")
    assert 'from_pretrained("path/to/the/base/model", dtype=torch.float32)' in card.text
    assert "## Results" not in card.text
    # Central, and as by default; changed; changed, and not told
    assert '| `loss_type` | "grpo" |' in card.text and "| `data_seed` | 7 |" in card.text and "mine" not in card.text
    assert "@inproceedings{wang2026udmgrpo" in card.text
    trainer.save_model()
    assert ModelCard.load(tmp_path / "run" / "README.md").data.to_dict().get("base_model") is None


def test_a_folder_is_no_base_model(tmp_path, oracle_dir):
    for folder in (CHECKPOINT_PATH, oracle_dir / "tiny-ursa"):
        pipeline = URSAPipeline.from_pretrained(folder)
        assert str(pipeline.name_or_path) == str(folder)
        assert pipeline.hub_id is None
        pipeline.forget_local_paths()
        pipeline.save_pretrained(tmp_path)
        assert not any(str(folder) in path.read_text() for path in tmp_path.rglob("*.json"))
