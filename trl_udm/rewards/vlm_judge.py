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

"""
A vision-language model as judge: a reward that any server with OpenAI's chat API gives.

A [`JudgeTemplate`] has the question and says how the answer is read. An answer that cannot be read gives no reward.
"""

import asyncio
import base64
import io
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, Literal

import torch
from PIL import Image

from .images import as_pil_images


# A number that is not a part of a larger one, or of a fraction or percentage
_NUMBER = r"(-?\d+(?:\.\d+)?)(?![\w%]|[.,/]\d|\s*/)"

PROBLEMS = ("refused", "unparsable", "failed")
"""Why a judgment has no reward."""


@dataclass(frozen=True)
class JudgeTemplate:
    r"""
    A question for a judge, and how to read the answer.

    The value v that is read becomes the reward (v - low) / (high - low). A value outside `[low, high]` is no answer.

    Args:
        text (`str`):
            The question. `{prompt}` stands for the prompt, and `{<column>}` for a column of the dataset. Other braces
            are written twice.
        answer (`str`, *optional*, defaults to `"number"`):
            What v is. With `"number"`, the number that the answer consists of, or that `pattern` finds. With
            `"yes_no"`, 1 for yes and 0 for no, or the probability of yes against no where the server gives the
            log-probabilities of tokens. With `"json"`, the number or boolean under `field` of a JSON object.
        low (`float`, *optional*, defaults to `0.0`):
            The worst value.
        high (`float`, *optional*, defaults to `1.0`):
            The best value.
        pattern (`str`, *optional*):
            Regular expression, with one group, of the number. All that it finds must be equal. By default the answer
            is a number after at most two words, as in "Final score: 4/5".
        schema (`dict[str, Any]`, *optional*):
            JSON schema that the server makes the answer follow.
        field (`str`, *optional*, defaults to `"score"`):
            Name of the value in the JSON object.

    Raises:
        ValueError: If an argument is out of range, or `text` or `pattern` is malformed.

    Example:

    ```python
    >>> from trl_udm.rewards.vlm_judge import JudgeTemplate

    >>> template = JudgeTemplate("Rate from 1 to 5 how well the image shows: {prompt}", low=1, high=5)
    >>> template.parse("4")
    0.75
    >>> template.parse("I cannot rate this.") is None
    True
    ```
    """

    text: str
    answer: Literal["number", "yes_no", "json"] = "number"
    low: float = 0.0
    high: float = 1.0
    pattern: str = rf"\A[^\w.-]*(?:[^\W\d]+[^\w.-]+){{0,2}}{_NUMBER}[^\w-]*\Z"
    schema: dict[str, Any] | None = None
    field: str = "score"

    def __post_init__(self) -> None:
        if self.answer not in ("number", "yes_no", "json"):
            raise ValueError(f"`answer` must be 'number', 'yes_no' or 'json', got {self.answer!r}.")
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"`low` must be < `high`, got {self.low} and {self.high}.")
        if self.answer == "yes_no" and (self.low, self.high) != (0, 1):
            raise ValueError(f"`low` and `high` must be 0 and 1 for 'yes_no', got {self.low} and {self.high}.")
        try:
            num_groups = re.compile(self.pattern).groups
            list(Formatter().parse(self.text))
        except (re.error, ValueError) as error:
            raise ValueError(
                f"`text` and `pattern` must be well-formed, got {self.text!r} and {self.pattern!r}: {error}."
            ) from error
        if num_groups != 1:
            raise ValueError(f"`pattern` must have one group, got {num_groups} in {self.pattern!r}.")

    def parse(self, answer: str) -> float | None:
        """
        Read an answer.

        Args:
            answer (`str`):
                What the judge wrote.

        Returns:
            `float` or `None`: The reward in `[0, 1]`, or nothing where the answer is not clear.
        """
        value: Any = None
        if self.answer == "yes_no":
            words = {word.lower() for word in re.findall(r"\b(yes|no)\b", answer, re.IGNORECASE)}
            if len(words) == 1 and re.match(r"\W*(yes|no)\b", answer, re.IGNORECASE):
                value = float(words == {"yes"})
        elif self.answer == "number":
            answer = re.sub(rf"\s*(?:/|out of)\s*{self.high:g}\b(?!\.\d)", "", answer)  # 4 of "4/5"
            numbers = {float(number) for number in re.findall(self.pattern, answer)}
            if len(numbers) == 1:
                (value,) = numbers
        else:
            try:
                content = json.loads(re.sub(r"^```(?:json)?|```$", "", answer.strip()))
            except ValueError:
                return None
            if isinstance(content, dict) and content.keys() >= set((self.schema or {}).get("required", ())):
                value = content.get(self.field)
        if not isinstance(value, (int, float)) or not self.low <= value <= self.high:
            return None
        return (value - self.low) / (self.high - self.low)


TEMPLATES = {
    "score": JudgeTemplate(
        'How well does this match the description "{prompt}"? Consider every object, number, color, position and '
        "text that the description names, and then how good the picture looks. Rate it from 1 (nothing matches) to 10 "
        "(all matches, and it looks flawless). Answer with the number only.",
        low=1,
        high=10,
    ),
    "unified": JudgeTemplate(
        'You see what a generator made of the caption "{prompt}". Compare it with the caption part by part, and say '
        "briefly what matches and what does not. Then judge how well it is made: is it coherent and free of "
        'artifacts? Give one overall score from 1 (worst) to 5 (best). End with a line "Final Score: " and the score.',
        low=1,
        high=5,
        pattern=rf"(?i:final score)[^\w.-]{{1,5}}{_NUMBER}",
    ),
    "geneval": JudgeTemplate(
        'Does this show "{prompt}", with exactly the objects, numbers, colors and positions that are named? Other '
        "objects in the background do not matter. Answer yes or no, in one word.",
        answer="yes_no",
    ),
    "question": JudgeTemplate("{question} Answer yes or no, in one word.", answer="yes_no"),
    "json": JudgeTemplate(
        'Judge how well this matches the description "{prompt}". Answer with a JSON object: "reason", one sentence, '
        'and "score", a number from 0 (nothing matches) to 10 (all matches).',
        answer="json",
        high=10,
        schema={
            "type": "object",
            "properties": {"reason": {"type": "string"}, "score": {"type": "number"}},
            "required": ["reason", "score"],
            "additionalProperties": False,
        },
    ),
}
"""Templates by name. `"question"` asks what a column `question` of the dataset asks."""


@dataclass
class _Judgment:
    answer: str
    reward: float | None = None
    problem: str | None = None
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0


class VLMJudgeReward:
    """
    A vision-language model on a server as judge, as a reward function for [`UDMGRPOTrainer`].

    Each image is one request to the chat API that OpenAI, vLLM, SGLang, llama.cpp and `transformers serve` offer. The
    requests are sent at the same time, up to `max_concurrency`. The client of OpenAI repeats a request that the server
    was too busy or too slow for. The reward is between 0 and 1.

    An image gets no reward, never 0, if the judge refuses (`refused`), if its answer is not clear (`unparsable`), or
    if the server fails to the end (`failed`). The shares are logged as `<name>/refused` and so on, the numbers of
    tokens as `<name>/prompt_tokens` and `<name>/completion_tokens`, and the answers as a column `<name>_answer`. It is
    an error if the server fails for all images of a call, or if it rejects a request, as for a wrong key.

    The key is read from the environment when it is needed. It is not kept, and not shown in an error.

    Args:
        model (`str`):
            Name of the model on the server.
        base_url (`str`, *optional*):
            The server, such as `"http://127.0.0.1:8000/v1"`. By default OpenAI's.
        template (`str` or [`JudgeTemplate`], *optional*, defaults to `"score"`):
            The question: one of `TEMPLATES`, or one of your own.
        api_key_variable (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable with the key. With a `base_url`, it may be unset.
        max_concurrency (`int`, *optional*, defaults to `8`):
            Number of requests at a time, in each process.
        timeout (`float`, *optional*, defaults to `60.0`):
            Seconds for a request. A judgment takes `(max_retries + 1) * timeout` at most, with all waiting.
        max_retries (`int`, *optional*, defaults to `4`):
            Number of times that a request is repeated.
        max_frames (`int`, *optional*, defaults to `8`):
            Number of frames of a video that the judge sees, evenly spaced.
        logprobs (`bool`, *optional*, defaults to `True`):
            Whether to ask for log-probabilities where the answer is yes or no. Some servers reject this.
        prices (`tuple[float, float]`, *optional*):
            Prices of a million tokens of questions and of answers. The cost is then logged as `<name>/cost`.
        request_options (`dict[str, Any]`, *optional*):
            Other options of a request. By default `{"temperature": 0, "max_tokens": 512}`.
        name (`str`, *optional*, defaults to `"vlm_judge"`):
            Name in the logs.

    Raises:
        ValueError: If a number is out of its range, or there is no such template.

    Example:

    ```python
    >>> from trl_udm.rewards.vlm_judge import VLMJudgeReward

    >>> reward = VLMJudgeReward("Qwen/Qwen2.5-VL-7B-Instruct", "http://127.0.0.1:8000/v1", template="geneval")
    >>> # UDMGRPOTrainer(..., reward_funcs=reward)
    ```
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        template: str | JudgeTemplate = "score",
        api_key_variable: str = "OPENAI_API_KEY",
        max_concurrency: int = 8,
        timeout: float = 60.0,
        max_retries: int = 4,
        max_frames: int = 8,
        logprobs: bool = True,
        prices: tuple[float, float] | None = None,
        request_options: dict[str, Any] | None = None,
        name: str = "vlm_judge",
    ):
        if isinstance(template, str):
            if template not in TEMPLATES:
                raise ValueError(f"`template` must be a `JudgeTemplate` or one of {[*TEMPLATES]}, got {template!r}.")
            template = TEMPLATES[template]
        for argument, value in (
            ("max_concurrency", max_concurrency),
            ("timeout", timeout),
            ("max_frames", max_frames),
        ):
            if value <= 0:
                raise ValueError(f"`{argument}` must be > 0, got {value}.")
        if max_retries < 0:
            raise ValueError(f"`max_retries` must be >= 0, got {max_retries}.")
        self.model = model
        self.base_url = base_url
        self.template = template
        self.api_key_variable = api_key_variable
        self.max_concurrency = max_concurrency
        self.timeout = timeout
        self.max_retries = max_retries
        self.max_frames = max_frames
        self.logprobs = logprobs
        self.prices = prices
        self.request_options = {"temperature": 0, "max_tokens": 512} if request_options is None else request_options
        self.__name__ = name

    async def __call__(
        self,
        prompts: list[str],
        completions: Sequence[Image.Image | Sequence[Image.Image]] | torch.Tensor,
        completion_ids: list[list[int]] | None = None,
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """
        Reward images or videos.

        Args:
            prompts (`list[str]`):
                The prompts.
            completions (`list[Image.Image]`, `list[list[Image.Image]]` or `torch.Tensor` of shape `(B, 3, H, W)` and \
dtype `torch.uint8`):
                The generated images, or the frames of each video.
            completion_ids (`list[list[int]]`, *optional*):
                Not used.
            trainer_state ([`~transformers.TrainerState`], *optional*):
                Not used.
            log_metric (`Callable[[str, float], None]`, *optional*):
                The trainer's logging function.
            log_extra (`Callable[[str, list[Any]], None]`, *optional*):
                The trainer's logging function of columns.
            columns (`dict[str, Any]`):
                The dataset's columns, for the template.

        Returns:
            `list[float | None]`: A reward in `[0, 1]` for each image, or `None`.

        Raises:
            ImportError: If the client is not installed.
            ValueError: If the completions are not images, a column is missing, or there is no key for OpenAI's server.
            RuntimeError: If the server rejects a request, or fails for all images.
        """
        try:
            import openai
        except ImportError as error:
            raise ImportError("`VLMJudgeReward` needs OpenAI's client: `pip install trl-udm[judge]`.") from error
        api_key = os.environ.get(self.api_key_variable, "").strip()
        if not api_key and self.base_url is None:
            raise ValueError(f"The environment variable {self.api_key_variable} must have the key of OpenAI's server.")
        videos = self._select_frames(completions, len(prompts))
        questions = self._ask(prompts, columns)

        semaphore = asyncio.Semaphore(self.max_concurrency)
        async with openai.AsyncOpenAI(
            api_key=api_key or "no-key", base_url=self.base_url, timeout=self.timeout, max_retries=self.max_retries
        ) as client:
            tasks = [
                asyncio.create_task(self._judge(client, semaphore, question, frames))
                for question, frames in zip(questions, videos, strict=True)
            ]
            try:
                judgments = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

        if judgments and all(judgment.problem == "failed" for judgment in judgments):
            raise RuntimeError(
                f"The judge {self.model} gave no judgment of {len(prompts)} images within `timeout` = {self.timeout} "
                f"s and `max_retries` = {self.max_retries}. The last failure: {judgments[-1].answer}"
            )
        if log_metric is not None:
            for judgment in judgments:
                self._log(judgment, log_metric)
        if log_extra is not None:
            log_extra(f"{self.__name__}_answer", [judgment.answer for judgment in judgments])
        return [judgment.reward for judgment in judgments]

    def _select_frames(self, completions: Any, num_prompts: int) -> list[list[Image.Image]]:
        if isinstance(completions, torch.Tensor):
            completions = as_pil_images(completions, num_prompts)
        videos = [list(sample) if isinstance(sample, (list, tuple)) else [sample] for sample in completions]
        if len(videos) != num_prompts or not all(videos):
            raise ValueError(
                f"`completions` must have an image, or the frames of a video, for each of {num_prompts} prompts, got "
                f"{[len(frames) for frames in videos]} frames."
            )
        selected = []
        for frames in videos:
            count = min(len(frames), self.max_frames)
            selected.append([frames[round(i * (len(frames) - 1) / max(count - 1, 1))] for i in range(count)])
        as_pil_images([image for frames in selected for image in frames], sum(map(len, selected)))
        return selected

    def _ask(self, prompts: list[str], columns: dict[str, Any]) -> list[str]:
        questions = []
        for i, prompt in enumerate(prompts):
            row = {name: values[i] for name, values in columns.items()}
            try:
                questions.append(self.template.text.format(prompt=prompt, **row))
            except (LookupError, AttributeError, ValueError, TypeError) as error:
                raise ValueError(
                    f"`template` must ask for `prompt` or columns of the dataset, {sorted(columns)}, got {error} in "
                    f"{self.template.text!r}."
                ) from error
        return questions

    async def _judge(
        self, client: Any, semaphore: asyncio.Semaphore, question: str, frames: list[Image.Image]
    ) -> _Judgment:
        import openai

        options = dict(self.request_options)
        if self.template.answer == "yes_no" and self.logprobs:
            options |= {"logprobs": True, "top_logprobs": 20}
        if self.template.answer == "json" and self.template.schema is not None:
            schema = {"name": "judgment", "schema": self.template.schema, "strict": True}
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        async with semaphore:
            try:
                async with asyncio.timeout((self.max_retries + 1) * self.timeout):
                    content = await asyncio.to_thread(_make_content, question, frames)
                    completion = await client.chat.completions.create(
                        model=self.model, messages=[{"role": "user", "content": content}], **options
                    )
                choice, answer, probability = _read_completion(completion)
            except TimeoutError:
                return _Judgment("no answer in time", problem="failed")
            except openai.APIStatusError as error:
                message = f"{error.status_code} {error}".replace(client.api_key, "<key>")
                if error.status_code < 500 and error.status_code not in (408, 409, 429):
                    # Not `from error`, whose own message may have the key
                    raise RuntimeError(f"The judge {self.model} rejected a request: {message}") from None
                return _Judgment(message, problem="failed")
            except openai.APIError as error:
                # Without the words of the cause, which may be about a header with the key
                return _Judgment(f"{error} ({type(error.__cause__).__name__})", problem="failed")
            except ValueError as error:
                return _Judgment(f"no answer of a chat: {error}", problem="failed")

        judgment = _Judgment(answer)
        if completion.usage is not None:
            judgment.num_prompt_tokens = completion.usage.prompt_tokens or 0
            judgment.num_completion_tokens = completion.usage.completion_tokens or 0
        refusal = getattr(choice.message, "refusal", None)
        if refusal or not answer.strip() or choice.finish_reason == "content_filter":
            judgment.answer, judgment.problem = refusal or answer, "refused"
            return judgment
        if self.template.answer == "yes_no" and probability is not None:
            judgment.reward = probability
        elif self.template.answer == "yes_no" or choice.finish_reason != "length":
            judgment.reward = self.template.parse(answer)  # not of an answer that may lack its last digits
        if judgment.reward is None:
            judgment.problem = "unparsable"
        return judgment

    def _log(self, judgment: _Judgment, log_metric: Callable[[str, float], None]) -> None:
        for problem in PROBLEMS:
            log_metric(f"{self.__name__}/{problem}", float(judgment.problem == problem))
        num_tokens = (judgment.num_prompt_tokens, judgment.num_completion_tokens)
        log_metric(f"{self.__name__}/prompt_tokens", num_tokens[0])
        log_metric(f"{self.__name__}/completion_tokens", num_tokens[1])
        if self.prices is not None:
            cost = sum(price * count for price, count in zip(self.prices, num_tokens, strict=True)) / 1e6
            log_metric(f"{self.__name__}/cost", cost)


def _make_content(question: str, frames: list[Image.Image]) -> list[dict[str, Any]]:
    """The parts of a message: the images as PNG in data URLs, and the question."""
    content: list[dict[str, Any]] = []
    for image in frames:
        file = io.BytesIO()
        image.convert("RGB").save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    if len(frames) > 1:
        question = f"These are {len(frames)} frames of one video, in their order. {question}"
    return [*content, {"type": "text", "text": question}]


def _read_completion(completion: Any) -> tuple[Any, str, float | None]:
    """The choice, its text, and the probability of yes. The client checks nothing of what a server answers."""
    try:
        choice = completion.choices[0]
        return choice, str(choice.message.content or ""), _compute_yes_probability(choice.logprobs)
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(str(error)) from error


def _compute_yes_probability(logprobs: Any) -> float | None:
    """The probability of yes against no at the first token, where it is one of them."""
    if logprobs is None or not logprobs.content:
        return None
    first = logprobs.content[0]
    if first.token.strip().lower() not in ("yes", "no"):
        return None
    weights = {"yes": 0.0, "no": 0.0}
    # Some servers list the token itself, and some only others
    candidates = {candidate.token: candidate.logprob for candidate in (*(first.top_logprobs or ()), first)}
    for token, logprob in candidates.items():
        word = token.strip().lower()
        if word in weights:
            weights[word] += math.exp(logprob)
    total = sum(weights.values())
    return weights["yes"] / total if total > 0 else None
