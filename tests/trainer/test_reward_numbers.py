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

"""Numbers of rewards: what is read from a function, advantages of equal rewards, and means over evaluations."""

import json
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from datasets import Dataset

from trl_udm import UDMGRPOTrainer
from trl_udm.reward_values import read_rewards
from trl_udm.trainer.reward_runner import RewardRunner

from .test_udm_grpo_trainer import PROMPTS, absent, build_args, build_trainer, count_a, generate_batch
from .toy_text_family import NUM_TOKENS, build_toy_text_pipeline


NUMBERS = Dataset.from_dict({"prompt": ["ab", "b", "c", "da", "abc"], "number": [0.0, 1.0, 2.0, 3.0, 4.0]})


def first(prompts, **kwargs):
    return [0.0] * len(prompts)


def second(prompts, **kwargs):
    return [0.0] * len(prompts)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A trainer of two reward functions, of which the tests change what scales the advantages."""
    return build_trainer(tmp_path_factory.mktemp("run"), [first, second])


# --- Equal rewards ---


@pytest.mark.parametrize("num_generations", [3, 7, 8, 64])
@pytest.mark.parametrize("scaling", ["group", "batch", "none", "normalize_then_sum"])
def test_equal_rewards_have_no_advantage(trainer, scaling, num_generations):
    trainer.multi_objective_aggregation = scaling if scaling == "normalize_then_sum" else "sum_then_normalize"
    trainer.scale_rewards = "group" if scaling == "normalize_then_sum" else scaling
    size, generator = (num_generations, 2), torch.Generator().manual_seed(0)
    spread = torch.rand(size, generator=generator, dtype=torch.float64)
    for value in (0.7, 21.3, 1000.1, 1e6 + 0.1, -1e39, 1e-300):
        equal = torch.full(size, value, dtype=torch.float64)
        some = equal.clone()
        some[0, 0], some[-1] = math.nan, math.nan  # one function abstained for a sample, and both for another
        for weights, groups in (
            ([1.0, 1.0], (equal, spread, 2 * equal)),
            ([0.1, -0.3], (spread, equal)),
            ([1.0, 0.0], (some, spread)),
        ):
            trainer.reward_weights = torch.tensor(weights, dtype=torch.float64)
            advantages, _, stds = trainer._compute_advantages(torch.cat(groups), num_generations)
            is_equal = torch.cat([torch.full((num_generations,), group is not spread) for group in groups])
            assert (advantages[is_equal] == 0).all() and (stds[is_equal] == 0).all()
            assert (advantages[~is_equal] != 0).any() and (stds[~is_equal] > 0).all()


def test_sums_that_only_rounding_makes_differ_are_equal(trainer):
    trainer.multi_objective_aggregation, trainer.scale_rewards = "sum_then_normalize", "group"
    trainer.reward_weights = torch.ones(2, dtype=torch.float64)
    rows = torch.tensor([[0.1, 0.2], [0.3, 0.0], [1e6 + 0.3, -1e6], [0.15, 0.15]], dtype=torch.float64)
    assert rows.sum(dim=1).unique().numel() > 1
    advantages, _, stds = trainer._compute_advantages(rows, 4)
    assert advantages.tolist() == stds.tolist() == [0.0] * 4
    # What differs by more than float64 rounds is a difference, however small
    rows = torch.tensor([[1000.0, 0.0], [1000.0 + 1e-7, 0.0]], dtype=torch.float64)
    advantages = trainer._compute_advantages(rows, 2)[0]
    assert advantages.tolist() == pytest.approx([-5e-8 / (5e-8 + 1e-4), 5e-8 / (5e-8 + 1e-4)], rel=1e-5)


@pytest.mark.parametrize("value", [0.7, 21.3, 1000.1, 1e6 + 0.1])
def test_a_constant_reward_moves_no_weight(tmp_path, value):
    def constant(completions, **kwargs):
        return [value] * len(completions)

    trainer = build_trainer(tmp_path, constant, num_generations=8, beta=0.0, weight_decay=0.0)
    initial = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["frac_reward_zero_std"] == 1.0 and log["reward_std"] == 0.0 and log["grad_norm"] == 0.0
    assert log["reward"] == log["rewards/constant/mean"] == value
    assert all(torch.equal(tensor, initial[name]) for name, tensor in trainer.model.state_dict().items())


# --- What a function returns ---


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([0.1, None, True], [0.1, None, 1.0]),
        ((Decimal("0.1"), Fraction(1, 4), 10**30), [0.1, 0.25, 1e30]),
        ([np.float32(0.5), np.bool_(True), np.int64(3)], [0.5, 1.0, 3.0]),
        ([torch.tensor([0.5]), torch.tensor(1.5, requires_grad=True), np.array([2.5])], [0.5, 1.5, 2.5]),
        (torch.tensor([0.5, 1.5, 2.5], requires_grad=True), [0.5, 1.5, 2.5]),
        (torch.tensor([[0.5], [1.5], [2.5]], dtype=torch.bfloat16), [0.5, 1.5, 2.5]),
        (np.array([[0.5], [1.5], [2.5]]), [0.5, 1.5, 2.5]),
        (np.array([0.1, 1e300, -1e39]), [0.1, 1e300, -1e39]),
        ([10**400, -1.0, Decimal("1e400")], [math.inf, -1.0, math.inf]),
    ],
)
def test_numbers_of_all_kinds_are_read_exactly(returned, expected):
    rewards = read_rewards("score", returned, ["a", "b", "c"])
    assert rewards == expected and {type(reward) for reward in rewards} <= {float, type(None)}


MISTAKES = [
    (dict.fromkeys(range(8)), TypeError, "in a list or an array, but returned {0: None.* of type dict on 8 prompts"),
    (dict.fromkeys(range(8)).keys(), TypeError, "but returned dict_keys"),
    (set(range(8)), TypeError, "of type set on 8 prompts, the first of which is '[abcd]+'"),
    (frozenset(range(8)), TypeError, "of type frozenset"),
    (b"12345678", TypeError, "but returned b'12345678' of type bytes"),
    ("12345678", TypeError, "but returned '12345678' of type str"),
    (None, TypeError, "but returned None"),
    (0.5, TypeError, "but returned 0.5 of type float"),
    (torch.tensor(0.5), TypeError, r"but returned tensor\(0.5000\)"),
    ([1.0], ValueError, "must return one reward a completion, but returned 1 on 8 prompts"),
    (torch.zeros(1, 8), ValueError, "but returned 1 on 8 prompts"),
    (np.zeros((8, 2)), TypeError, r"must return numbers or None, but returned array.* \(index 0\)"),
    ([[0.5]] * 8, TypeError, r"must return numbers or None, but returned \[0.5\] for the prompt '[abcd]+'"),
    ([0.5] * 7 + ["0.5"], TypeError, r"but returned '0.5' for the prompt '[abcd]+' \(index 7\)"),
    ([0.5] * 7 + [1j], TypeError, r"but returned 1j for the prompt '[abcd]+' \(index 7\)"),
]


@pytest.mark.parametrize("reward_error", ["raise", "none"])
@pytest.mark.parametrize(("returned", "error", "message"), MISTAKES)
def test_what_is_no_list_of_rewards_is_always_refused(tmp_path, returned, error, message, reward_error):
    def mistaken(completions, **kwargs):
        return returned

    trainer = build_trainer(tmp_path, mistaken, reward_error=reward_error)
    with pytest.raises(error, match=f"The reward function 'mistaken' .*{message}"):
        generate_batch(trainer)


@pytest.mark.parametrize(
    "value",
    [math.inf, -math.inf, 10**400, Decimal("-1e400"), np.float32("inf")],
    ids=lambda value: type(value).__name__,
)
def test_a_reward_that_is_too_large_is_named_or_left_out(tmp_path, value):
    calls = []

    def large(completions, **kwargs):
        calls.append(completions)
        return [value if completion == calls[0][-1] else 1.0 for completion in completions]

    with pytest.raises(ValueError, match=r"'large' returned .* for the prompt '[abcd]+' \(index \d\)"):
        generate_batch(build_trainer(tmp_path, large))
    trainer = build_trainer(tmp_path, large, reward_error="none")
    calls.clear()
    generate_batch(trainer)
    assert trainer._metrics["train"]["reward"] == [1.0]


@pytest.mark.parametrize(("value", "weight"), [(1e20, 1.0), (-1e39, 1.0), (1.0, 1e39), (1e100, 1e-80)])
def test_large_rewards_teach_as_small_ones(tmp_path, value, weight):
    def large(completions, **kwargs):
        return [value] + [0.0] * (len(completions) - 1)

    _, batch = generate_batch(build_trainer(tmp_path, large, reward_weights=[weight]))
    expected = torch.tensor([3.0, -1.0, -1.0, -1.0] + [0.0] * 4) / 3**0.5 * math.copysign(1, value)
    torch.testing.assert_close(batch["advantages"], expected.repeat_interleave(3))


@pytest.mark.parametrize(("value", "weight"), [(1e200, 1.0), (1e10, 1e300), (1e100, 1e100)])
def test_rewards_whose_square_overflows_are_refused(tmp_path, value, weight):
    def large(completions, **kwargs):
        return [0.0] * (len(completions) - 1) + [value]

    trainer = build_trainer(tmp_path, [count_a, large], reward_weights=[1.0, weight])
    with pytest.raises(ValueError, match="at most 1e150.* of 'large' with the weight .* for the sample 7 of a batch"):
        generate_batch(trainer)


def test_a_generator_gives_rewards_and_its_error_is_named(tmp_path):
    def lazy(completions, **kwargs):
        return (float(completion.count("a")) for completion in completions)

    def failing(completions, **kwargs):
        return (1 / len(completion[:i]) for i, completion in enumerate(completions))

    generate_batch(build_trainer(tmp_path, lazy))
    with pytest.raises(RuntimeError, match="'failing' failed on 8 prompts") as error:
        generate_batch(build_trainer(tmp_path, failing))
    assert isinstance(error.value.__cause__, ZeroDivisionError)


# --- Names and weights ---


def test_two_functions_of_one_name_are_refused(tmp_path):
    message = "`reward_funcs` and `eval_reward_funcs` must have names that differ, got 2 of the name 'count_a'"
    with pytest.raises(ValueError, match=message):
        build_trainer(tmp_path, [count_a, first, count_a])
    with pytest.raises(ValueError, match=message):
        UDMGRPOTrainer(
            build_toy_text_pipeline(), count_a, build_args(tmp_path), PROMPTS, eval_reward_funcs=[first, count_a]
        )


@pytest.mark.parametrize("weights", [[math.inf, 1.0], [math.nan, 1.0], [0.0, 0.0]])
def test_weights_that_teach_nothing_are_refused(tmp_path, weights):
    with pytest.raises(ValueError, match="`reward_weights` must be finite, and at least one of them not 0, got"):
        build_trainer(tmp_path, [first, second], reward_weights=weights)


# --- Weights of the step and of the tag ---


def test_weights_move_to_the_final_ones_and_evaluations_have_these(tmp_path):
    options = {"reward_weights": [1.0, 0.0], "final_reward_weights": [0.0, 2.0], "reward_weights_steps": 4}
    trainer = build_trainer(tmp_path, [first, second], max_steps=6, **options)
    trainer.model.train()
    weights = []
    for trainer.state.global_step in (0, 1, 4, 5):
        weights.append(trainer._find_reward_weights([{}] * 2, 2).tolist())
    assert weights == [[[1.0, 0.0]] * 2, [[0.75, 0.5]] * 2, [[0.0, 2.0]] * 2, [[0.0, 2.0]] * 2]
    trainer.state.global_step = 0
    trainer.model.eval()
    assert trainer._find_reward_weights([{}], 1).tolist() == [[0.0, 2.0]]


def test_a_schedule_takes_all_steps_of_the_run_by_default(tmp_path):
    def one(prompts, **kwargs):
        return [1.0] * len(prompts)

    def ten(prompts, **kwargs):
        return [10.0] * len(prompts)

    options = {"reward_weights": [1.0, 0.0], "final_reward_weights": [0.0, 1.0], "max_steps": 4}
    trainer = build_trainer(tmp_path, [one, ten], eval_strategy="steps", eval_steps=2, **options)
    trainer.train()
    assert [log["reward"] for log in trainer.state.log_history if "reward" in log] == [1.0, 3.25, 5.5, 7.75]
    assert {log["eval_reward"] for log in trainer.state.log_history if "eval_reward" in log} == {10.0}


def test_tags_have_weights_of_their_own(tmp_path):
    rows = Dataset.from_dict({"prompt": ["ab", "b"], "task": ["first", "other"]})
    factors = {"tag_reward_weights": {"first": [1.0, 0.0]}, "tag_column": "task"}
    args = build_args(tmp_path, reward_weights=[1.0, 3.0], shuffle_dataset=False, **factors)
    trainer = UDMGRPOTrainer(build_toy_text_pipeline(), [first, second], args, rows, eval_reward_funcs=count_a)
    trainer.model.train()
    weights = trainer._find_reward_weights([{"task": "first"}, {"task": "other"}, {"task": None}], 3)
    assert weights.tolist() == [[1.0, 0.0, 0.0], [1.0, 3.0, 0.0], [1.0, 3.0, 0.0]]
    # A function that does not count for a group does not move its advantages
    rewards = torch.tensor([[0.0, 9.0], [1.0, 0.0], [0.0, 9.0], [1.0, 0.0]], dtype=torch.float64)
    rewards = torch.cat([rewards, torch.full((4, 1), math.nan, dtype=torch.float64)], dim=1)
    advantages, sums, _ = trainer._compute_advantages(rewards, 2, weights[[0, 0, 1, 1]])
    assert sums.tolist() == [0.0, 1.0, 27.0, 1.0]
    assert advantages.sign().tolist() == [-1, 1, 1, -1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"final_reward_weights": [1.0]},
            "`final_reward_weights` must have one weight for each of the 2 `reward_func",
        ),
        (
            {"final_reward_weights": [0.0, 0.0]},
            "`final_reward_weights` must be finite, and at least one of them not 0",
        ),
        ({"tag_reward_weights": {"a": [1.0]}}, "`train_dataset` must have the column 'tag' of `tag_column` for"),
        ({"tag_reward_weights": {"a": [1.0]}, "tag_column": "prompt"}, r"`tag_reward_weights\['a'\]` must have one"),
        ({"tag_reward_weights": {"a": [0, 0]}, "tag_column": "prompt"}, r"`tag_reward_weights\['a'\]` must be finite"),
        ({"reward_weights_steps": 0}, "`reward_weights_steps` must be > 0 or None, got 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build_trainer(tmp_path, [first, second], **options)


# --- Evaluation ---


@pytest.mark.parametrize("num_generations", [1, 2])
@pytest.mark.parametrize("batch_size", [2, 4, 6, 16])
def test_evaluation_means_are_over_samples(tmp_path, batch_size, num_generations):
    def number(number, log_metric, **kwargs):
        log_metric("mean_number", sum(number) / len(number))
        for one in number:
            log_metric("number", one)
        log_metric("even", None if number[0] % 2 else number[0])
        return number

    async def odd(number, **kwargs):
        return [one if one % 2 == 1 else None for one in number]

    trainer = UDMGRPOTrainer(
        build_toy_text_pipeline(),
        number,
        build_args(tmp_path, per_device_eval_batch_size=batch_size, num_generations_eval=num_generations),
        train_dataset=PROMPTS.add_column("number", [0.0] * len(PROMPTS)),
        eval_dataset=NUMBERS,
        eval_reward_funcs=odd,
    )
    metrics = trainer.evaluate()
    std = np.std([0.0, 1.0, 2.0, 3.0, 4.0] * num_generations, ddof=1)
    for name in ("reward", "rewards/number/mean", "rewards/odd/mean", "mean_number", "number"):
        assert metrics[f"eval_{name}"] == pytest.approx(2.0, rel=1e-12), name
    assert metrics["eval_reward_std"] == metrics["eval_rewards/number/std"] == pytest.approx(std, rel=1e-12)
    # Each dataset has its own names, and the last does not overwrite the others
    metrics = trainer.evaluate({"small": NUMBERS.select([0, 1, 2]), "last": NUMBERS.select([4])})
    assert metrics["eval_small_reward"] == metrics["eval_small_mean_number"] == pytest.approx(1.0)
    assert metrics["eval_last_reward"] == 4.0 and metrics["eval_last_rewards/odd/mean"] is None
    assert "eval_reward" not in metrics and "eval_last_entropy" in metrics


def test_what_trl_logs_of_an_evaluation_counts_samples_too(tmp_path):
    trainer = build_trainer(tmp_path, per_device_eval_batch_size=4, num_generations_eval=1)
    batches = []
    compute_loss = trainer._compute_loss

    def record(model, inputs):
        batches.append(len(inputs["completion_ids"]))
        return compute_loss(model, inputs)

    trainer._compute_loss = record
    log = []
    trainer.log = lambda logs, start_time=None: log.append(dict(trainer._metrics["eval"]))
    trainer.evaluate(NUMBERS)
    assert batches == [12, 3] and len(log[0]["entropy"]) == 5
    assert len(set(log[0]["entropy"][:4])) == 1 and log[0]["entropy"][4] != log[0]["entropy"][0]


def test_an_evaluation_without_rewards_is_never_the_best(tmp_path):
    trainer = build_trainer(
        tmp_path,
        absent,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=2,
        metric_for_best_model="reward",
        load_best_model_at_end=True,
        save_only_model=True,
    )
    trainer.train()
    assert trainer.state.best_metric is None


# --- Tokens after the end of a text ---


def test_diversity_counts_tokens_up_to_the_end_of_a_text(tmp_path):
    trainer = build_trainer(tmp_path)

    def completion_mask(clean_samples):  # up to the first token 1
        return ((clean_samples == 1).cumsum(dim=1) - (clean_samples == 1).long() == 0).long()

    trainer.pipeline.completion_mask = completion_mask
    same = torch.tensor([[2, 3, 1, 4, 5, 6], [2, 3, 1, 7, 8, 9]])
    other = torch.tensor([[2, 1, 5, 5, 5, 5], [2, 3, 4, 1, 5, 5]])  # 3 of the 4 positions differ
    assert same.size(1) == NUM_TOKENS
    trainer._log_diversity("train", same, 2, 2)
    trainer._log_diversity("train", other, 2, 2)
    trainer._log_diversity("eval", torch.cat([same, other, same]), 2, 4)  # the last two are padding
    assert trainer._metrics["train"]["diversity"] == [0.0, 0.75]
    assert trainer._metrics["eval"]["diversity"] == [0.0, 0.75]


def test_the_oracle_has_a_tiny_spread_that_teaches(oracle_dir):
    cases = json.loads((oracle_dir / "advantages.json").read_text())
    assert any(max(case["scores_std_per_prompt"]) < 1e-5 for case in cases)


def test_values_that_are_of_samples_count_once():
    def score(prompts, log_metric, **kwargs):
        for prompt in prompts:
            if prompt == "a":
                log_metric("tag/a", float(len(prompts)))
        return [0.0] * len(prompts)

    logged = []
    for logs_samples in (False, True):
        score.logs_samples = logs_samples
        runner = RewardRunner(score)
        runner(prompts=["a", "b", "b"], log_metric=lambda name, value: logged.append(value), log_extra=print)
    assert logged == [3.0, 3.0, 3.0] + [3.0]
