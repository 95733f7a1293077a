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

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from trl_udm.rewards.geneval import CLASS_NAMES, THRESHOLD, Detection, GenEvalReward
from trl_udm.rewards.mask2former import Mask2FormerDetector, find_objects


ROOT = Path(__file__).parents[2]
DOG = CLASS_NAMES.index("dog")
CAT = CLASS_NAMES.index("cat")


def load_module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


benchmark = load_module(ROOT / "benchmarks" / "geneval_detector.py")
script = load_module(ROOT / "scripts" / "compare_geneval_detectors.py")


def build_tiny_mask2former(num_labels=80):
    """A network of random weights whose every query is sure to see a dog."""
    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        num_labels=num_labels,
    )
    model = Mask2FormerForUniversalSegmentation(config).eval()
    nn.init.constant_(model.class_predictor.bias[DOG], 8.0)
    return model


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("mask2former")
    build_tiny_mask2former().save_pretrained(path)
    return path


def tiny_detector(model_path, **options):
    return Mask2FormerDetector(model_path, **{"device": "cpu", "shortest_edge": 64, "longest_edge": 96, **options})


def random_image(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def one_query(class_probabilities, mask_logits):
    """Outputs of a network with one query that has these class probabilities, and else sees no object."""
    probabilities = torch.zeros(1, len(CLASS_NAMES) + 1)
    for class_index, probability in class_probabilities.items():
        probabilities[0, class_index] = probability
    probabilities[0, -1] = 1 - probabilities.sum()
    return probabilities.log(), mask_logits[None]


def same_size(size):
    return {"padded_size": size, "resized_size": size, "image_size": size}


def test_class_names_are_the_80_of_coco_in_its_order():
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 80
    assert [CLASS_NAMES[index] for index in (0, 16, 24, 39, 56, 63, 64, 65, 66, 79)] == [
        *("person", "dog", "backpack", "bottle", "chair", "laptop"),
        *("computer mouse", "tv remote", "computer keyboard", "toothbrush"),
    ]


def test_the_comparison_sees_each_kind_of_difference():
    mask, smaller = np.ones((4, 4), dtype=bool), np.eye(4, dtype=bool)
    dog = [Detection((0, 0, 4, 4), 0.9, mask)]
    assert benchmark.largest_difference({"dog": dog}, {"dog": dog}) == 0
    assert benchmark.largest_difference({"dog": dog}, {"cat": dog}) == math.inf
    assert benchmark.largest_difference({"dog": dog}, {"dog": dog * 2}) == math.inf
    assert benchmark.largest_difference({"dog": dog}, {"dog": [Detection((0, 0, 4, 2), 0.9, mask)]}) == 2
    assert benchmark.largest_difference({"dog": dog}, {"dog": [Detection((0, 0, 4, 4), 0.9, smaller)]}) == 1
    assert benchmark.largest_difference({"dog": dog}, {"dog": [Detection((0, 0, 4, 4), 0.4, mask)]}) == 0.5


@pytest.mark.parametrize("seed", range(50))
def test_post_processing_equals_the_literal_version(seed):
    sizes = [
        {"image_size": (64, 64), "resized_size": (96, 96), "padded_size": (96, 96)},
        {"image_size": (60, 84), "resized_size": (90, 126), "padded_size": (96, 128)},
        {"image_size": (120, 50), "resized_size": (115, 48), "padded_size": (128, 64)},
    ][seed % 3]
    class_logits, mask_logits = benchmark.make_outputs(
        sizes["padded_size"], num_queries=30, generator=torch.Generator().manual_seed(seed)
    )
    for score_threshold in (THRESHOLD, 0.0):
        found = find_objects(class_logits, mask_logits, **sizes, score_threshold=score_threshold)
        literal = benchmark.find_objects_literally(
            class_logits.double(), mask_logits.double(), **sizes, score_threshold=score_threshold
        )
        assert found
        assert benchmark.largest_difference(found, literal) <= 1e-5


def test_score_is_the_class_probability_times_the_mean_over_the_mask():
    mask_logits = torch.full((4, 6), -1.0)
    mask_logits[1:3, 2:5] = 2.0
    mask_logits[1, 2] = 1.0
    outputs = one_query({DOG: 0.6, CAT: 0.35}, mask_logits)
    found = find_objects(*outputs, **same_size((4, 6)), score_threshold=0.0)
    mean = (5 * torch.tensor(2.0).sigmoid() + torch.tensor(1.0).sigmoid()) / 6
    (dog,), (cat,) = found["dog"], found["cat"]
    assert dog.score == pytest.approx(0.6 * mean.item(), abs=1e-6)
    assert cat.score == pytest.approx(0.35 * mean.item(), abs=1e-6)
    assert dog.box == cat.box == (2, 1, 5, 3)
    assert dog.mask.dtype == bool and np.array_equal(dog.mask, mask_logits.numpy() > 0)


def test_scores_below_the_threshold_are_dropped():
    sure, unsure = torch.full((4, 4), 20.0), torch.full((4, 4), 1.0)  # sigmoids 1.0 and 0.73
    assert find_objects(*one_query({DOG: 0.6, CAT: 0.25}, sure), **same_size((4, 4))).keys() == {"dog"}
    assert find_objects(*one_query({DOG: 0.5, CAT: 0.35}, unsure), **same_size((4, 4))).keys() == {"dog"}


def test_pruning_changes_nothing_that_geneval_looks_at():
    sizes = same_size((64, 64))
    outputs = benchmark.make_outputs((64, 64), num_queries=100, generator=torch.Generator().manual_seed(0))
    pruned, full = find_objects(*outputs, **sizes), find_objects(*outputs, **sizes, score_threshold=0.0)
    assert sum(map(len, full.values())) > sum(map(len, pruned.values()))
    above = {name: [detection for detection in group if detection.score > THRESHOLD] for name, group in full.items()}
    above = {name: group for name, group in above.items() if group}
    assert benchmark.largest_difference(pruned, above) == 0


def test_empty_masks_are_no_objects():
    outputs = one_query({DOG: 1.0}, torch.full((4, 4), -1.0))
    assert find_objects(*outputs, **same_size((4, 4)), score_threshold=0.0) == {}


def test_at_most_100_candidates_are_kept():
    class_logits, mask_logits = torch.zeros(3, len(CLASS_NAMES) + 1), torch.ones(3, 4, 4)
    found = find_objects(class_logits, mask_logits, **same_size((4, 4)), score_threshold=0.0)
    assert sum(map(len, found.values())) == 100


def test_padding_is_cut_before_the_mask_is_resized_to_the_image():
    mask_logits = torch.full((8, 8), -1.0)
    mask_logits[:, 6:] = 1.0  # in the padding only
    sizes = {"padded_size": (32, 32), "resized_size": (32, 20), "image_size": (16, 10)}
    assert find_objects(*one_query({DOG: 1.0}, mask_logits), **sizes, score_threshold=0.0) == {}


def test_detector_runs_the_network_on_the_resized_padded_image(model_path):
    image = random_image(50, 40)
    (detected,) = tiny_detector(model_path)([image])

    # The shorter edge, 40, becomes 64; the longer, 80, is padded to 96.
    pixels = torch.from_numpy(np.array(image.resize((80, 64), Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = functional.pad((pixels - mean[:, None, None]) / std[:, None, None], (0, 16))
    with torch.no_grad():
        outputs = build_tiny_mask2former()(pixels[None])
    sizes = {"padded_size": (64, 96), "resized_size": (64, 80), "image_size": (40, 50)}
    literal = benchmark.find_objects_literally(
        outputs.class_queries_logits[0], outputs.masks_queries_logits[0], **sizes, score_threshold=THRESHOLD
    )
    assert len(detected["dog"]) > 0 and detected["dog"][0].mask.shape == (40, 50)
    assert benchmark.largest_difference(detected, literal) <= 1e-5


def test_images_of_different_sizes_are_detected_in_batches_as_alone(model_path):
    sizes = [(50, 40), (64, 64), (40, 50), (52, 40), (64, 64), (300, 60), (64, 64)]
    images = [random_image(*size, seed) for seed, size in enumerate(sizes)]
    detector = tiny_detector(model_path, batch_size=2)
    together, alone = detector(images), [detector([image])[0] for image in images]
    for image, detected, detected_alone in zip(images, together, alone, strict=True):
        assert detected["dog"][0].mask.shape == (image.height, image.width)
        assert benchmark.largest_difference(detected, detected_alone) <= 1e-5


def test_images_of_other_modes_are_converted(model_path):
    image = random_image(40, 40)
    rgba, gray = image.convert("RGBA"), image.convert("L")
    detector = tiny_detector(model_path)
    assert benchmark.largest_difference(detector([image])[0], detector([rgba])[0]) == 0
    assert benchmark.largest_difference(detector([gray.convert("RGB")])[0], detector([gray])[0]) == 0


def test_weights_are_loaded_on_first_use_in_the_given_type(model_path):
    detector = tiny_detector(model_path, dtype=torch.bfloat16)
    assert detector.model is None
    (detected,) = detector([random_image(40, 40)])
    assert detector.model.dtype == torch.bfloat16 and not detector.model.training
    assert detected["dog"]
    assert Mask2FormerDetector("missing/weights").model is None


def test_detector_serves_the_reward(model_path):
    reward = GenEvalReward(tiny_detector(model_path), mode="dense")
    completions = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    row = {"tag": ["single_object"] * 2, "include": [[{"class": name, "count": 5}] for name in ("dog", "cat")]}
    assert reward(prompts=["five dogs", "five cats"], completions=completions, **row) == [1.0, 0.0]
    assert "torchvision" not in sys.modules


def test_other_numbers_of_classes_are_refused(tmp_path):
    build_tiny_mask2former(num_labels=19).save_pretrained(tmp_path)
    message = f"`model_name_or_path` must be a model of COCO's 80 classes, got {tmp_path!r} with 19."
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_detector(tmp_path)([random_image(8, 8)])


def test_missing_weights_are_refused(tmp_path):
    model = build_tiny_mask2former()
    state_dict = {name: weight for name, weight in model.state_dict().items() if not name.startswith("class_predict")}
    model.save_pretrained(tmp_path, state_dict=state_dict)
    message = f", got {tmp_path!r}, which lacks 2 parameters, such as 'class_predictor"
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_detector(tmp_path)([random_image(8, 8)])


def test_outputs_that_are_not_finite_are_an_error(model_path):
    detector = tiny_detector(model_path)
    detector([random_image(8, 8)])
    nn.init.constant_(detector.model.class_predictor.bias, torch.nan)
    message = f"The outputs of {model_path!r} must be finite. If the weights are sound, use `dtype=torch.float32`"
    with pytest.raises(ValueError, match=re.escape(message)):
        detector([random_image(8, 8)])


def test_missing_scipy_is_named_with_its_extra(model_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    message = "`Mask2FormerDetector` needs SciPy: `pip install trl-udm[geneval]`."
    with pytest.raises(ImportError, match=re.escape(message)):
        tiny_detector(model_path)([random_image(8, 8)])


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="`batch_size` must be > 0, got 0."):
        Mask2FormerDetector(batch_size=0)


def write_geneval_results(folder, judged):
    """Images in GenEval's layout, and the results that GenEval's evaluate_images.py writes about them elsewhere."""
    lines = []
    for number, (class_name, correct) in enumerate(judged):
        metadata = {"tag": "single_object", "include": [{"class": class_name, "count": 1}], "prompt": class_name}
        filename = Path(f"{number:05}", "samples", "0000.png")
        (folder / filename).parent.mkdir(parents=True)
        random_image(80, 8, seed=number).save(folder / filename)
        result = {"filename": f"/elsewhere/{filename}", "tag": metadata["tag"], "prompt": metadata["prompt"]}
        result |= {"correct": correct, "reason": "", "metadata": json.dumps(metadata), "details": "{}"}
        lines.append(json.dumps(result))
    path = folder / "results.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_script_compares_with_the_results_of_geneval(model_path, tmp_path, capsys):
    judged = [("dog", True), ("cat", False), ("dog", False), ("cat", True), ("dog", True)]
    path, output = write_geneval_results(tmp_path, judged), tmp_path / "agreement.json"
    arguments = ["--results", path, "--images_dir", tmp_path, "--output", output, "--detector", model_path]
    summary = script.main([str(argument) for argument in [*arguments, "--device", "cpu", "--batch_size", "2"]])
    counts = {"images": 5, "agreement": 3 / 5, "both": 2, "geneval_only": 1, "ours_only": 1, "neither": 1}
    assert summary == {"single_object": counts, "all": counts}
    assert capsys.readouterr().out.splitlines()[1].split() == ["single_object", "5", "0.600", "2", "1", "1", "1"]
    written = json.loads(output.read_text(encoding="utf-8"))
    assert written["summary"] == summary
    assert [entry["prompt"] for entry in written["differing"]] == ["dog", "cat"]


def test_script_counts_by_tag():
    results = [
        {"tag": tag, "correct": theirs} for tag, theirs in (("colors", True), ("counting", False), ("colors", False))
    ]
    summary = script.summarize(results, correct=[True, True, False])
    assert list(summary) == ["counting", "colors", "all"]
    assert [row["agreement"] for row in summary.values()] == [0.0, 1.0, 2 / 3]
    assert (summary["all"]["both"], summary["all"]["ours_only"], summary["all"]["neither"]) == (1, 1, 1)


def test_script_refuses_other_files(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"filename": "a.png", "tag": "colors"}\n', encoding="utf-8")
    message = f"Line 1 of {path} must be a result of GenEval's `evaluate_images.py`, lacks ['correct', 'metadata']."
    with pytest.raises(ValueError, match=re.escape(message)):
        script.load_results(path)
