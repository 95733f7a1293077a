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

"""DPG-Bench (https://huggingface.co/papers/2403.05135): questions about dense prompts, which a judge answers."""

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from .vlm_judge import VLMJudgeReward


class DPGReward:
    """
    The score of DPG-Bench, with a vision-language model on a server that answers the questions.

    The score of an image is the share of its prompt's questions that are answered with yes. A question counts as
    answered with no where one that it depends on is: "is the hat red?" where there is no hat. Questions that the judge
    gives no answer to are left out of the share. An image without any answer has no score.

    Args:
        model (`str`):
            Name of the model on the server.
        base_url (`str`, *optional*):
            The server. By default OpenAI's.
        name (`str`, *optional*, defaults to `"dpg"`):
            Name in the logs.
        kwargs (`dict[str, Any]`):
            Other arguments of [`VLMJudgeReward`] but `template`.

    Example:

    ```python
    >>> from trl_udm.rewards.dpg import DPGReward

    >>> reward = DPGReward("Qwen/Qwen2.5-VL-7B-Instruct", "http://127.0.0.1:8000/v1")
    >>> reward.judge.template.text
    '{question} Answer yes or no, in one word.'
    ```
    """

    def __init__(self, model: str, base_url: str | None = None, name: str = "dpg", **kwargs: Any):
        self.judge = VLMJudgeReward(model, base_url, template="question", name=name, **kwargs)
        self.__name__ = name

    async def __call__(
        self,
        prompts: list[str],
        completions: Sequence[Image.Image | Sequence[Image.Image]],
        questions: list[list[dict[str, Any]] | None],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """
        Reward images or videos.

        Args:
            prompts (`list[str]`):
                The prompts.
            completions (`list[Image.Image]` or `list[list[Image.Image]]`):
                The generated images, or the frames of each video.
            questions (`list[list[dict]]`):
                The questions of each prompt, as [`~trl_udm.data.dpg.load_dpg`] gives them. `None` for a prompt of
                another task, which gets no reward.
            log_metric (`Callable[[str, float], None]`, *optional*):
                The trainer's logging function.
            columns (`dict[str, Any]`):
                Other columns of the dataset, which are not used.

        Returns:
            `list[float | None]`: A reward in `[0, 1]` for each image, or `None`.
        """
        asked = [(i, question["question"]) for i, row in enumerate(questions) for question in row or ()]
        answers = iter(
            await self.judge(
                [prompts[i] for i, _ in asked],
                [completions[i] for i, _ in asked],
                question=[question for _, question in asked],
                log_metric=log_metric,
            )
        )
        return [_score_graph(row, [next(answers) for _ in row]) if row else None for row in questions]


def _score_graph(questions: list[dict[str, Any]], probabilities: list[float | None]) -> float | None:
    """The share of the answered questions that are answered with yes, as are those that they depend on."""
    numbers = [question["id"] for question in questions]
    answers = {i: p > 0.5 for i, p in zip(numbers, probabilities, strict=True) if p is not None}
    scores = [
        answers[question["id"]] and all(answers.get(parent, True) for parent in question["dependency"])
        for question in questions
        if question["id"] in answers
    ]
    return sum(scores) / len(scores) if scores else None
