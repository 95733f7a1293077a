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

"""Several processes make the update that one makes, and continue one another's checkpoints."""

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from tests.trainer.toy_text_family import NUM_TOKENS, build_toy_text_pipeline

from .launch import launch, load
from .worker import LEARNING_RATE, LORA, PROMPTS, run_case


# 3 prompts of 4 samples over two processes, each sample 3 rows: 3 accumulated batches of 6 rows a process
FED = {
    "per_device_train_batch_size": 6,
    "gradient_accumulation_steps": 3,
    "num_iterations": 2,
    "log_completions": True,
}
# One group, of which either process has two samples
SPLIT_GROUP = {"per_device_train_batch_size": 6, "max_steps": 1, "log_completions": True}
# 3 prompts of 4 samples, one batch a process
SAMPLED = {"is_fed": False, "per_device_train_batch_size": 18, "optim": "adamw_torch", "learning_rate": 0.01}
BACKENDS = {
    "ddp": ("two_cpu_processes", "ddp"),
    "fsdp2": ("fsdp2", "fsdp2"),
    "zero2": ("deepspeed_zero2", "deepspeed"),
    "zero3": ("deepspeed_zero3", "deepspeed"),
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param.startswith("zero"):
        pytest.importorskip("deepspeed")
    return BACKENDS[request.param]


IMAGES = {
    "kind": "images",
    "num_inference_steps": 3,
    "num_inference_steps_eval": 3,
    "timestep_window": [0, 0],
    "learning_rate": 0.1,
}
UPDATES = {
    "full": FED,
    "lora": {**FED, "use_lora": True},
    "async": {**FED, "async_rewards": True},
    "split_group": SPLIT_GROUP,
    "groupwise": {**SPLIT_GROUP, "is_groupwise": True},
    "dynamic": {**FED, "drop_zero_variance": True, "resample_zero_variance": 1, "solved": PROMPTS[:4]},
    "full_kl": {**FED, "kl_estimator": "full"},
    "lora_full_kl": {**FED, "kl_estimator": "full", "use_lora": True},
}
EVALUATIONS = {
    f"evaluated_{batch_size}_{num_generations}": {
        "kind": "evaluation",
        "per_device_eval_batch_size": batch_size,
        "num_generations_eval": num_generations,
        "async_rewards": async_rewards,
        "rollout_batch_size": 2,
        "log_completions": True,
    }
    for batch_size, num_generations, async_rewards in ((2, 1, False), (4, 1, True), (2, 4, False), (8, 1, True))
}


def build_pipeline(weights: dict[str, torch.Tensor], use_lora: bool):
    """The toy pipeline on one process, with trained weights."""
    pipeline = build_toy_text_pipeline()
    model = get_peft_model(pipeline.transformer, LORA) if use_lora else pipeline.transformer
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    return pipeline


def gradients_of(weights: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """The gradients of all steps, each as one vector, from the weights before and after."""
    flat = [torch.cat([step[name].flatten() for name in sorted(step)]) for step in weights]
    return [(before - after) / LEARNING_RATE for before, after in zip(flat, flat[1:], strict=False)]


def assert_equal_weights(weights, expected, atol):
    assert weights.keys() == expected.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=atol)


def test_two_processes_do_what_one_does(tmp_path, backend):
    sampled = {}
    # With two updates a rollout, the checkpoint is between them
    for name, use_lora, num_iterations in (("sampled", False, 2), ("sampled_lora", True, 1)):
        sampled[name] = {**SAMPLED, "use_lora": use_lora, "save_strategy": "steps", "save_steps": 1}
        sampled[name]["num_iterations"] = num_iterations
        sampled[f"{name}_resumed"] = {**sampled[name], "resume_from": str(tmp_path / name / "checkpoint-1")}
    if backend[1] != "deepspeed":  # transformers refuses `bf16` on a CPU that `use_cpu` does not ask for
        sampled["half"] = {**SAMPLED, "bf16": True}
    images = {"images": IMAGES, "images_lora": {**IMAGES, "use_lora": True, "log_completions": True}}
    evaluations = EVALUATIONS if backend[1] == "ddp" else {}
    refused = {"uneven": {**IMAGES, "eval_batch_size": 2, "is_refused": True}} if backend[1] == "fsdp2" else {}
    # All in one launch, since each begins with the imports
    process = launch(tmp_path, *backend, {**UPDATES, **sampled, **images, **evaluations, **refused})
    assert process.returncode == 0, process.stderr[-5000:]
    check_updates(tmp_path)
    check_samples_and_checkpoints(tmp_path, has_half="half" in sampled)
    check_images(tmp_path)
    if evaluations:
        check_evaluations(tmp_path, process.stderr)
    if refused:  # sharded weights are evaluated in equally many batches a process
        for message in load(tmp_path, "uneven"):
            assert "`batch_size` must share 2 images out among 2 processes" in message
            assert "got 2. Nearest valid values: [1]." in message


def check_updates(tmp_path):
    for name, case in UPDATES.items():
        batch_size = 2 * case["per_device_train_batch_size"]
        settings = {**case, "per_device_train_batch_size": batch_size, "async_rewards": False}
        one = run_case(str(tmp_path / "one"), name, **settings)
        two = load(tmp_path, name)
        # Each sample is rewarded once, by the process that has it
        assert sorted(one["rewarded"]) == sorted(two[0]["rewarded"] + two[1]["rewarded"])
        if name == "dynamic":
            assert one["log"][0]["samples_drawn"] == two[0]["log"][0]["samples_drawn"] > 12
            assert one["log"][0]["frac_resampled"] == two[0]["log"][0]["frac_resampled"]
        else:
            assert one["rewarded"] == two[0]["rewarded"] + two[1]["rewarded"]
            # The process where a group begins has all of it
            counts = {"split_group": [2, 2], "groupwise": [4, 0]}.get(name, [6, 6])
            assert [len(result["rewarded"]) for result in two] == counts
        assert two[0]["advantages"] == pytest.approx(one["advantages"], abs=1e-6)
        assert len(set(one["advantages"])) > 1
        # There is no momentum: the change of the weights is the gradient
        gradients, expected_gradients = gradients_of(two[0]["weights"]), gradients_of(one["weights"])
        assert len(gradients) == len(expected_gradients) == case.get("max_steps", 2)
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert expected_gradient.abs().max() > 0.05
            torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-6)
        for expected, log in zip(one["log"], two[0]["log"], strict=True):
            assert log["loss"] == pytest.approx(expected["loss"], abs=1e-6)
            assert log["kl"] == pytest.approx(expected["kl"], rel=1e-5, abs=1e-6)
        if "max_steps" not in case:
            assert one["log"][1]["kl"] > 0.1 and one["log"][1]["clip_ratio/region_mean"] > 0


def test_the_reference_is_whole_where_zero3_has_split_the_weights_on_loading(tmp_path):
    pytest.importorskip("deepspeed")
    build_toy_text_pipeline().transformer.save_pretrained(tmp_path / "model")
    settings = {**SPLIT_GROUP, "max_steps": 2, "model_path": str(tmp_path / "model")}
    process = launch(tmp_path, *BACKENDS["zero3"], {"full": settings}, flags=("--zero3_init_flag", "true"))
    assert process.returncode == 0, process.stderr[-5000:]
    one = run_case(str(tmp_path / "one"), "full", **{**settings, "per_device_train_batch_size": 12})
    kl, expected_kl = ([log["kl"] for log in result["log"]] for result in (load(tmp_path, "full")[0], one))
    assert expected_kl[1] > 0.1
    assert kl == pytest.approx(expected_kl, rel=1e-5, abs=1e-6)


def check_samples_and_checkpoints(tmp_path, has_half):
    """Samples are drawn from whole weights, and a run goes on from its checkpoint."""
    for name in ("sampled", "sampled_lora"):
        two, use_lora = load(tmp_path, name), name == "sampled_lora"
        pipeline = build_pipeline(two[0]["weights"][-1], use_lora)
        for process_index, result in enumerate(two):
            torch.manual_seed(process_index)
            samples = pipeline.sample_tokens(*pipeline.encode_prompt(PROMPTS), (NUM_TOKENS,), 5).clean_samples
            assert (samples == result["samples"]).float().mean() > 0.9
        assert not torch.equal(two[0]["samples"], two[1]["samples"])
        unbroken, resumed = two[0], load(tmp_path, f"{name}_resumed")[0]
        assert len(unbroken["weights"]) == 3 and len(resumed["weights"]) == 2
        assert_equal_weights(resumed["weights"][0], unbroken["weights"][1], atol=0)
        assert_equal_weights(resumed["weights"][1], unbroken["weights"][2], atol=0)
        # What is saved is whole, under the names that a plain `from_pretrained` knows
        if use_lora:
            saved = load_file(tmp_path / name / "checkpoint-2" / "adapter_model.safetensors")
            trained = {key.replace(".default", ""): value for key, value in unbroken["weights"][2].items()}
            assert_equal_weights(saved, trained, atol=0)
        else:
            saved = load_file(tmp_path / name / "checkpoint-2" / "transformer" / "model.safetensors")
            assert_equal_weights(saved, unbroken["weights"][2], atol=0)
    # Log-probabilities keep their digits where the network computes in bfloat16
    if has_half:
        log_probs = load(tmp_path, "half")[0]["log_probs"]
        assert log_probs.dtype == torch.float32 and not torch.equal(log_probs, log_probs.bfloat16().float())


def check_images(tmp_path):
    for name in ("images", "images_lora"):
        two = load(tmp_path, name)
        # The processes share what they have scored
        assert two[0]["results"]["before"] == two[1]["results"]["before"]
        assert two[0]["results"]["after"] == two[1]["results"]["after"] != two[0]["results"]["before"]
        # Images cross processes for the table of completions only: two of each process and step
        assert [result["pickled"] for result in two] == ([0, 0] if name == "images" else [4, 4])


def check_evaluations(tmp_path, stderr):
    """Each sample counts once."""
    for name, case in EVALUATIONS.items():
        two = load(tmp_path, name)
        num_generations = case["num_generations_eval"]
        expected = sorted([0.0, 1.0, 2.0, 3.0, 4.0, 4.0] * num_generations)
        assert sorted(two[0]["rewarded"] + two[1]["rewarded"]) == expected
        metrics = two[0]["metrics"]
        assert metrics["eval_all_reward"] == metrics["eval_all_mean_number"] == 2.0
        variance = 2 * 5 * num_generations / (5 * num_generations - 1)
        assert metrics["eval_all_reward_std"] == pytest.approx(variance**0.5, rel=1e-12)
        assert metrics["eval_all_rewards/odd/mean"] == 2.0
        assert metrics["eval_all_rewards/failing_for_3/mean"] == pytest.approx(7 / 4)
        assert metrics["eval_all_rewards/failing_for_3/failed"] == pytest.approx(1 / 5)
        assert metrics["eval_all_rewards/group_size/mean"] == num_generations
        assert metrics["eval_last_reward"] == 4.0 and metrics["eval_last_rewards/odd/mean"] is None
    # The warnings of both processes, whichever has the prompt
    assert "samples have no reward of 'failing_for_3'" in stderr
