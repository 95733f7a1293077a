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
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback
from trl.trainer.utils import get_callable_name

from trl_udm import TextUDMPipeline, UDMGRPOConfig, UDMGRPOTrainer, URSAPipeline
from trl_udm.evaluation import evaluate, generate_images, score_images, summarize
from trl_udm.evaluation.comparison import train_and_compare, train_and_compare_texts
from trl_udm.evaluation.images import get_reward_name
from trl_udm.evaluation.report import save_curves, write_report
from trl_udm.worlds.sums import CHECKPOINT_PATH
from trl_udm.worlds.sums.problems import split_problems, sum_reward


ROWS = [
    {"prompt": "ab", "tag": "short", "target": 0.2},
    {"prompt": "abcd", "tag": "long", "target": 0.4},
    {"prompt": "c", "tag": "short", "target": 0.6},
]
SETTINGS = {"num_images_per_prompt": 3, "batch_size": 2, "height": 16, "width": 16, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipeline(oracle_dir):
    return URSAPipeline.from_pretrained(oracle_dir / "tiny-ursa", max_prompt_length=8)


def closeness(prompts, completions, target, **columns):
    return [1 - abs(np.asarray(image).mean() / 255 - row) for image, row in zip(completions, target, strict=True)]


def read_images(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_prompts_that_are_cut_are_counted_over_all_rows(oracle_dir, tmp_path, caplog):
    pipeline = URSAPipeline.from_pretrained(oracle_dir / "tiny-ursa", max_prompt_length=8)
    rows = [
        *ROWS,
        {"prompt": "a" * 20, "tag": "long", "target": 0.2},
        {"prompt": "b" * 20, "tag": "long", "target": 0},
    ]
    evaluate([closeness], tmp_path, pipeline, rows, **{**SETTINGS, "num_images_per_prompt": 1})
    (record,) = (record for record in caplog.records if record.name == "trl_udm.cut_prompts")
    assert record.message.startswith("2 of 5 prompts are longer than the 8 tokens that the pipeline reads")


def test_an_interrupted_run_ends_with_the_images_and_scores_of_an_unbroken_one(pipeline, tmp_path):
    class InterruptedPipeline(URSAPipeline):
        num_calls = 0

        def decode(self, *args, **kwargs):
            self.num_calls += 1
            if self.num_calls == 3:
                raise KeyboardInterrupt
            return super().decode(*args, **kwargs)

    def interrupted_closeness(prompts, **columns):
        if "c" in prompts:
            raise KeyboardInterrupt
        return closeness(prompts, **columns)

    interrupted_closeness.__name__ = "closeness"
    generate_images(pipeline, ROWS, tmp_path / "whole", **SETTINGS)
    whole = score_images(tmp_path / "whole", closeness, batch_size=4)

    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        generate_images(InterruptedPipeline(**pipeline.components, max_prompt_length=8), ROWS, broken, **SETTINGS)
    assert 0 < len(read_images(broken)) < 9
    generate_images(pipeline, ROWS, broken, **SETTINGS)
    assert read_images(broken) == read_images(tmp_path / "whole")
    assert len(read_images(broken)) == 9

    with pytest.raises(KeyboardInterrupt):
        score_images(broken, interrupted_closeness, batch_size=4)
    assert (broken / "00000" / "scores_closeness.json").exists()
    assert not (broken / "00002" / "scores_closeness.json").exists()
    assert score_images(broken, closeness, batch_size=4) == whole
    by_hand = closeness(["ab"], [Image.open(broken / "00000" / "samples" / "00001.png")], target=[0.2])
    assert whole[1] == {"filename": "00000/samples/00001.png", "prompt": "ab", "tag": "short", "score": by_hand[0]}


def test_images_made_elsewhere_are_scored(tmp_path):
    folder = tmp_path / "00000"
    (folder / "samples").mkdir(parents=True)
    (folder / "metadata.jsonl").write_text('{"prompt": "ab", "target": 0.5}\n')
    Image.new("RGB", (4, 4), "white").save(folder / "samples" / "0000.png")
    Image.new("RGB", (12, 4), "black").save(folder / "grid.png")
    (result,) = score_images(tmp_path, closeness)
    assert result == {"filename": "00000/samples/0000.png", "prompt": "ab", "tag": None, "score": 0.5}
    assert list(summarize([result])) == ["all", "overall"]


def test_the_summary_is_by_tag_and_resamples_prompts():
    # Two prompts of four images each: one always right, one never, so the interval spans all there is
    results = [
        {"filename": f"{prompt:05}/samples/{i:05}.png", "prompt": str(prompt), "tag": tag, "score": score}
        for prompt, (tag, score) in enumerate([("colors", 1.0), ("colors", 0.0), ("counting", 1.0)])
        for i in range(4)
    ]
    summary = summarize(results)
    assert summary["colors"] == {"mean": 0.5, "low": 0.0, "high": 1.0, "num_prompts": 2, "num_images": 8}
    assert summary["counting"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "num_prompts": 1, "num_images": 4}
    assert summary["overall"] == {"mean": 0.75, "low": 0.5, "high": 1.0, "num_prompts": 3, "num_images": 12}


def test_the_interval_of_many_prompts_is_that_of_the_normal_approximation():
    scores = np.random.default_rng(1).random(400)
    results = [
        {"filename": f"{i:05}/samples/00000.png", "prompt": str(i), "tag": None, "score": float(score)}
        for i, score in enumerate(scores)
    ]
    summary = summarize(results)["all"]
    half_width = 1.96 * scores.std() / 20
    assert summary["low"] == pytest.approx(scores.mean() - half_width, abs=0.1 * half_width)
    assert summary["high"] == pytest.approx(scores.mean() + half_width, abs=0.1 * half_width)


def test_the_report_holds_settings_table_and_grid(pipeline, tmp_path):
    summaries = evaluate([closeness], tmp_path, pipeline, ROWS, settings={"model": "tiny-ursa"}, **SETTINGS)
    results = {"closeness": score_images(tmp_path, closeness)}
    assert summaries == {"closeness": summarize(results["closeness"])}
    tables = (tmp_path / "results.md").read_text()
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["settings"] == {"model": "tiny-ursa", "num_prompts": 3, "seed": 0, **SETTINGS}
    assert report["results"] == results
    mean = np.mean([row["score"] for row in results["closeness"] if row["tag"] == "long"])
    assert re.search(rf"\| long \| {mean:.3f} \| .* \| 1 \| 3 \|", tables)
    with Image.open(tmp_path / "samples.png") as grid:
        assert 2 * 232 < grid.width < 3 * 232 and 232 < grid.height < 2 * 232  # a column for each tag


def test_videos_are_kept_and_scored_frame_by_frame(oracle_dir, tmp_path):
    pipeline = URSAPipeline.from_pretrained(oracle_dir / "video" / "tiny-ursa-video", max_prompt_length=24)
    drawn, seen = [], []

    def first_pixels(prompts, completions, **columns):
        seen.append(completions)
        return [float(np.asarray(frames[-1]).mean()) for frames in completions]

    settings = {"num_images_per_prompt": 1, "height": 32, "width": 48, "num_inference_steps": 2, "num_frames": 5}
    evaluate([first_pixels], tmp_path, pipeline, ROWS, **settings)
    (generated,) = seen[1:]
    drawn = pipeline(
        [row["prompt"] for row in ROWS],
        generator=torch.Generator().manual_seed(0),
        **{name: value for name, value in settings.items() if name != "num_images_per_prompt"},
    ).frames
    for frames, expected in zip(generated, drawn, strict=True):
        assert [frame.mode for frame in frames] == ["RGB"] * 5
        assert np.array_equal(np.stack(frames), np.stack(expected))
    with Image.open(tmp_path / "samples.gif") as animation, Image.open(tmp_path / "samples.png") as grid:
        assert animation.size == grid.size
        assert animation.n_frames == 5


def test_the_report_has_no_interval_where_it_would_say_nothing(tmp_path):
    scores = {"two|": [0.775, 0.775], "equal": [1.0, 1.0, 1.0, 1.0], "many": [0.0, 1.0, 0.5]}
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png")
    results = [
        {"filename": "image.png", "prompt": f"{tag} {i}", "tag": tag, "score": score}
        for tag, values in scores.items()
        for i, score in enumerate(values)
    ]
    lines = write_report(tmp_path, {"closeness": summarize(results)}, {"closeness": results}).splitlines()
    assert r"| two\| | 0.775 | n/a | 2 | 2 |" in lines and "| equal | 1.000 | n/a | 4 | 4 |" in lines
    assert "| many | 0.500 | 0.000 to 1.000 | 3 | 3 |" in lines
    assert any(line.startswith("| overall | 0.758 | n/a | ") for line in lines)
    lines = write_report(tmp_path, {"closeness": summarize(results[2:])}, {"closeness": results[2:]}).splitlines()
    assert any(line.startswith("| overall | 0.750 | 0.500 to 1.000 | ") for line in lines)


def test_prompts_are_scored_again_where_images_or_settings_have_changed(pipeline, tmp_path):
    scored = []

    def brightness(prompts, completions, **columns):
        scored.extend(prompts)
        return [np.asarray(image).mean() / 255 for image in completions]

    generate_images(pipeline, ROWS, tmp_path, **SETTINGS)
    first = score_images(tmp_path, brightness, settings={"options": (1, 2)})
    assert score_images(tmp_path, brightness, settings={"options": (1, 2)}) == first
    assert len(scored) == 9
    Image.new("RGB", (16, 16), "white").save(tmp_path / "00001" / "samples" / "00000.png")
    Image.new("RGB", (16, 16), "black").save(tmp_path / "00002" / "samples" / "00007.png")
    changed = score_images(tmp_path, brightness, settings={"options": (1, 2)})
    assert scored[9:] == ["abcd"] * 3 + ["c"] * 4
    assert changed[3]["score"] == 1.0 and changed[9]["score"] == 0.0 and changed[:3] == first[:3]
    assert score_images(tmp_path, brightness, settings={"options": (1, 3)}) == changed
    assert len(scored) == 16 + 10


def test_a_reward_has_the_name_that_the_trainer_logs():
    class Brightness:
        def __call__(self, completions, **columns):
            return []

    named = Brightness()
    named.__name__ = "brightness"
    for reward_func in (closeness, functools.partial(functools.partial(closeness), target=[]), Brightness(), named):
        assert get_reward_name(reward_func) == get_callable_name(reward_func)


def test_evaluation_imports_neither_trl_nor_the_trainer():
    code = """
import sys
import trl_udm.evaluation
print([name for name in sys.modules if name.split(".")[0] == "trl" or name.startswith("trl_udm.trainer")])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_curves_skip_what_was_not_measured(tmp_path):
    logs = [{"step": step, "reward": 0.1 * step, "kl": 0.5, "geneval/a": 0.2, "geneval/b": None} for step in range(4)]
    missing = {"step": 4, "reward": None, "kl": None, "geneval/a": None, "geneval/b": None}
    curves = {label: label for label in ("reward", "kl", "geneval/", "geneval/b", "never logged")}
    save_curves(tmp_path / "with.png", [*logs, missing, {"step": 4, "loss": 0.1}, {"train_runtime": 3.0}], curves)
    save_curves(tmp_path / "without.png", logs, curves)
    with Image.open(tmp_path / "with.png") as first, Image.open(tmp_path / "without.png") as second:
        assert first.size == second.size and first.tobytes() == second.tobytes()


def test_two_rewards_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"names that differ, got \['closeness', 'closeness'\]"):
        evaluate([closeness, closeness], tmp_path)


def test_a_reward_that_cannot_work_says_so_before_images_are_drawn(pipeline, tmp_path):
    def broken(prompts, **columns):
        raise ImportError("Install it.")

    with pytest.raises(ImportError, match="Install it."):
        evaluate([closeness, broken], tmp_path / "out", pipeline, ROWS, **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_an_asynchronous_reward_scores_outside_of_autocast(pipeline, tmp_path):
    async def later(prompts, completions, **columns):
        assert not torch.is_autocast_enabled("cpu")
        return [0.5] * len(prompts)

    with torch.autocast("cpu", torch.bfloat16):
        summaries = evaluate([later], tmp_path, pipeline, ROWS, **SETTINGS)
    assert summaries["later"]["overall"]["mean"] == 0.5


def test_rows_of_one_prompt_are_one_prompt(pipeline):
    # Two rows that are alike say no more than one: with one prompt, every resample is the same
    results = [
        {"filename": f"{row:05}/samples/{i:05}.png", "prompt": "ab", "tag": "colors", "score": float(row)}
        for row in range(2)
        for i in range(4)
    ]
    results.append({"filename": "00002/samples/00000.png", "prompt": "c", "tag": "colors", "score": 1.0})
    summary = summarize(results)["colors"]
    assert summary["mean"] == pytest.approx(5 / 9) and summary["num_prompts"] == 2 and summary["num_images"] == 9
    assert summary["low"] == 0.5 and summary["high"] == 1.0


class ModeCallback(TrainerCallback):
    """Notes the model's mode and the random state as the training begins, which is after the first evaluation."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.is_training, self.random_state = model.training, torch.get_rng_state()


def build_trainer(pipeline, reward_func, rows, output_dir, **options):
    args = UDMGRPOConfig(
        str(output_dir),
        num_generations=2,
        num_train_timesteps=1,
        per_device_train_batch_size=4,
        num_inference_steps=3,
        num_inference_steps_eval=3,
        max_steps=1,
        logging_steps=1,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    dataset = Dataset.from_list(rows)
    trainer = UDMGRPOTrainer(pipeline, reward_func, args, train_dataset=dataset, eval_dataset=dataset)
    trainer.model.train()
    return trainer


def test_images_are_compared_in_evaluation_mode_and_the_mode_is_restored(pipeline, tmp_path):
    # `SETTINGS` has the size of the images
    options = {"pipeline_kwargs": {name: SETTINGS[name] for name in ("height", "width")}}
    pipeline = URSAPipeline(**copy.deepcopy(pipeline.components), max_prompt_length=8)
    trainer, modes, callback = build_trainer(pipeline, closeness, ROWS, tmp_path, **options), [], ModeCallback()
    trainer.add_callback(callback)

    def watched_closeness(**columns):
        modes.append(trainer.model.training)
        return closeness(**columns)

    random_state = torch.get_rng_state()
    results = train_and_compare(trainer, watched_closeness, ROWS, num_images_per_prompt=1)
    assert torch.equal(callback.random_state, random_state)
    assert len(modes) > 0 and not any(modes)
    assert callback.is_training and trainer.model.training
    assert results["metric"] == "watched_closeness" and set(results["before"]) == {"short", "long", "overall"}
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "reward_curve.png").exists() and (tmp_path / "samples.png").exists()


@pytest.mark.parametrize("num_shown", [0, 2])
def test_texts_are_compared_with_the_same_seed(tmp_path, num_shown):
    rows, callback = split_problems()[1][:4], ModeCallback()
    # A learning rate of 0: with the same seed, the second evaluation is equal to the first
    trainer = build_trainer(
        TextUDMPipeline.from_pretrained(CHECKPOINT_PATH), sum_reward, rows, tmp_path, learning_rate=0.0
    )
    trainer.add_callback(callback)
    random_state = torch.get_rng_state()
    results = train_and_compare_texts(trainer, num_shown)
    assert torch.equal(callback.random_state, random_state)
    assert callback.is_training and trainer.model.training
    assert results["before"] == results["after"]
    assert [row["prompt"] for row in results.get("completions", [])] == [row["prompt"] for row in rows[:num_shown]]
    assert all(row["before"] == row["after"] for row in results.get("completions", []))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "reward_curve.png").exists()


def test_two_processes_draw_and_score_what_one_does(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    code = f"""
from accelerate import PartialState
from trl_udm import URSAPipeline
from trl_udm.evaluation import evaluate
from tests.test_evaluation import ROWS, SETTINGS, closeness
assert PartialState(cpu=True).num_processes == 2
pipeline = URSAPipeline.from_pretrained({str(tmp_path / "pipeline")!r}, max_prompt_length=8)
summaries = evaluate([closeness], {str(tmp_path / "two")!r}, pipeline, ROWS, **SETTINGS)
"""
    (tmp_path / "run.py").write_text(code)
    # `accelerate launch` starts several processes on CPUs only by way of MPI
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launch, str(tmp_path / "run.py")], check=True, env=environment)
    evaluate([closeness], tmp_path / "one", pipeline, ROWS, **SETTINGS)

    def contents(folder):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_overwriting_draws_again_and_leaves_other_files(pipeline, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metadata.jsonl").write_text("mine, too")
    evaluate([closeness], tmp_path, pipeline, ROWS, **SETTINGS)
    first = read_images(tmp_path)
    evaluate([closeness], tmp_path, pipeline, ROWS[:2], overwrite=True, **{**SETTINGS, "seed": 7})
    second = read_images(tmp_path)
    assert len(second) == 7 and second["00000/samples/00000.png"] != first["00000/samples/00000.png"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "train" / "metadata.jsonl").read_text() == "mine, too"


def test_a_folder_of_another_run_is_refused(pipeline, tmp_path):
    generate_images(pipeline, ROWS, tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="has num_inference_steps=2, got 3"):
        generate_images(pipeline, ROWS, tmp_path, **{**SETTINGS, "num_inference_steps": 3})
    with pytest.raises(ValueError, match="has num_prompts=3, got 2"):
        generate_images(pipeline, ROWS[:2], tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="00001.metadata.jsonl has prompt='abcd', got 'c'"):
        generate_images(pipeline, [ROWS[0], ROWS[2], ROWS[1]], tmp_path, **SETTINGS)


def test_images_made_elsewhere_are_not_taken_for_the_models(pipeline, tmp_path):
    generate_images(pipeline, ROWS, tmp_path, **SETTINGS)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="holds images that were made elsewhere: .*00000 has no settings.json"):
        generate_images(pipeline, ROWS, tmp_path, **SETTINGS)


@pytest.mark.parametrize("name", ["num_images_per_prompt", "batch_size"])
def test_numbers_out_of_range_are_refused(pipeline, tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` must be > 0, got 0"):
        generate_images(pipeline, ROWS, tmp_path, **{**SETTINGS, name: 0})


def test_steps_that_the_pipeline_refuses_leave_the_folder_as_it_was(pipeline, tmp_path):
    with pytest.raises(ValueError, match="`num_inference_steps` must be .*, got -3"):
        evaluate([closeness], tmp_path, pipeline, ROWS, **{**SETTINGS, "num_inference_steps": -3})
    assert not list(tmp_path.iterdir())


def test_no_rows_are_refused(pipeline, tmp_path):
    with pytest.raises(ValueError, match="`rows` must have at least one row"):
        generate_images(pipeline, [], tmp_path)


def test_a_folder_without_prompts_or_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must have folders like 00000"):
        score_images(tmp_path, closeness)
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "metadata.jsonl").write_text('{"prompt": "ab", "target": 0.5}')
    with pytest.raises(ValueError, match="must have images of every prompt"):
        score_images(tmp_path, closeness)


@pytest.mark.parametrize("returned", [{0: 1.0}, {1.0}, b"1", "1"], ids=repr)
def test_what_is_no_list_of_scores_is_refused(tmp_path, returned):
    def broken(prompts, completions, **columns):
        return returned

    (tmp_path / "00000" / "samples").mkdir(parents=True)
    (tmp_path / "00000" / "metadata.jsonl").write_text('{"prompt": "ab"}')
    Image.new("RGB", (4, 4)).save(tmp_path / "00000" / "samples" / "00000.png")
    with pytest.raises(TypeError, match="'broken' must return one reward a completion, in a list or an array"):
        score_images(tmp_path, broken)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (None, "'broken' must give a number for at least one image, got None for all 1."),
        (float("nan"), "'broken' must give a number or None, got nan for 'ab'"),
        (float("inf"), "'broken' must give a number or None, got inf for 'ab'"),
    ],
)
def test_a_score_that_is_no_number_is_refused(tmp_path, score, message):
    def broken(prompts, completions, **columns):
        return [score] * len(prompts)

    (tmp_path / "00000" / "samples").mkdir(parents=True)
    (tmp_path / "00000" / "metadata.jsonl").write_text('{"prompt": "ab"}')
    Image.new("RGB", (4, 4)).save(tmp_path / "00000" / "samples" / "00000.png")
    with pytest.raises(ValueError, match=message):
        score_images(tmp_path, broken)


def test_a_reward_that_abstains_is_counted_and_asked_again(pipeline, tmp_path):
    asked = []

    def unsure(prompts, completions, target, **columns):
        asked.append(prompts)
        return [None if row == 0.4 or (row == 0.2 and i == 1) else row for i, row in enumerate(target)]

    summaries = evaluate([unsure, closeness], tmp_path, pipeline, ROWS, **{**SETTINGS, "batch_size": 3})
    assert summaries["unsure"]["short"]["mean"] == pytest.approx((2 * 0.2 + 3 * 0.6) / 5)
    assert summaries["unsure"]["short"]["num_abstained"] == 1
    assert summaries["unsure"]["overall"] == {**summaries["unsure"]["short"], "num_abstained": 4}  # no score of "long"
    assert "num_abstained" not in summaries["closeness"]["overall"]
    report = json.loads((tmp_path / "results.json").read_text())
    assert [row["score"] for row in report["results"]["unsure"]] == [0.2, None, 0.2, None, None, None, 0.6, 0.6, 0.6]
    assert "4 of 9 images have no score: unsure abstained." in (tmp_path / "results.md").read_text()
    asked.clear()
    score_images(tmp_path, unsure, batch_size=3)
    assert asked == [["ab"] * 3, ["abcd"] * 3]
