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


import asyncio
import base64
import io
import json
import logging
import math
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from trl_udm.rewards.dpg import DPGReward
from trl_udm.rewards.vlm_judge import TEMPLATES, JudgeTemplate, VLMJudgeReward


RED, BLUE = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")
KEY = "sk-a-secret-of-the-tests"


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (
            "score",
            {"10": 1, " **5.5** ": 0.5, "Score: 1/10": 0, "Final score: 10 out of 10.": 1}
            | dict.fromkeys(["", "-5", ".5", "11", "0", "80%", "5%", "5/5", "7 or 8", "5,5", "1e1", "nan", "ten"])
            | dict.fromkeys(["I cannot rate this, by rule 5", "I'm sorry, but no. 7", "5.5.5", "inf"]),
        ),
        (
            "unified",
            {"The 2 dogs match.\nFinal Score: 3": 0.5, "**Final Score:** 4.5/5": 0.875}
            | {"Final score: 2. So, final score: 2": 0.25}
            | dict.fromkeys(["3", "Final Score: 4/10", "Final Score: -3", "Final Score: 6", "Final Score: .5"])
            | dict.fromkeys(["Final Score: 2, or Final Score: 3", "Final Score: unknown"]),
        ),
        (
            "geneval",
            {"Yes": 1, "no.": 0, "**Yes**, all of it": 1, "No, it has two": 0}
            | dict.fromkeys(["", "maybe", "yes or no", "I cannot say no", "Nothing", "1"]),
        ),
        (
            "json",
            {'{"reason": "good", "score": 5}': 0.5, '```json\n{"reason": "", "score": 10.0}\n```': 1}
            | dict.fromkeys(['{"score": 5}', '{"reason": "", "score": "5"}', '{"reason": "", "score": 11}', "5", "{"])
            | dict.fromkeys(['{"reason": "", "score": NaN}', '{"reason": "", "score": null}', "[5]", '"score"']),
        ),
    ],
)
def test_only_clear_answers_are_rewards(template, answers):
    rewards = {answer: TEMPLATES[template].parse(answer) for answer in answers}
    assert rewards == answers


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JudgeTemplate("?", answer="word"), "`answer` must be 'number', 'yes_no' or 'json', got 'word'."),
        (lambda: JudgeTemplate("?", low=2, high=1), "`low` must be < `high`, got 2 and 1."),
        (
            lambda: JudgeTemplate("?", "yes_no", high=2),
            "`low` and `high` must be 0 and 1 for 'yes_no', got 0.0 and 2.",
        ),
        (lambda: JudgeTemplate("{prompt"), "`text` and `pattern` must be well-formed, got '{prompt' and "),
        (lambda: JudgeTemplate("?", pattern="5"), "`pattern` must have one group, got 0 in '5'."),
        (lambda: VLMJudgeReward("judge", template="best"), "`template` must be a `JudgeTemplate` or one of ['score'"),
        (lambda: VLMJudgeReward("judge", timeout=0), "`timeout` must be > 0, got 0."),
        (lambda: VLMJudgeReward("judge", max_retries=-1), "`max_retries` must be >= 0, got -1."),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


class Handler(BaseHTTPRequestHandler):
    """Answers as the first word of the question says."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        server = self.server
        with server.lock:
            server.num_running += 1
            server.max_running = max(server.max_running, server.num_running)
        try:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = request["messages"][0]["content"]
            word = content[-1]["text"].split()[0]
            server.requests.append(request)
            server.counts[word] += 1
            self.answer(word, server.counts[word])
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client did not wait
        finally:
            with server.lock:
                server.num_running -= 1

    def answer(self, word, count):
        if self.headers["Authorization"] not in (f"Bearer {KEY}", "Bearer no-key"):
            self.send(401, {"error": {"message": f"wrong key: {self.headers['Authorization']}"}})
        elif word == "busy" and count == 1:
            self.send(429, {"error": {"message": "busy"}})
        elif word == "broken":
            self.send(500, {"error": {"message": "broken"}})
        elif word == "slow":
            time.sleep(0.6)
            self.send(200, {"choices": []})
        elif word == "cut":
            self.connection.close()
        elif word == "page":
            self.send(200, "<html>a page</html>", "text/html")
        elif word == "empty":
            self.send(200, {"id": "1", "object": "chat.completion"})
        else:
            message = {"role": "assistant", "content": "10"}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            if word == "refused":
                message |= {"content": None, "refusal": "I cannot help with that."}
            elif word == "filtered":
                choice["finish_reason"] = "content_filter"
            elif word == "garbage":
                message["content"] = "a lovely picture"
            elif word == "parts":
                message["content"] = [{"type": "text", "text": "10"}]
            elif word == "long":
                choice["finish_reason"] = "length"
            elif word == "yes":
                tops = {"Yes": 0.6, "yes": 0.1, "No": 0.2, "Maybe": 0.1}
                tops = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in tops.items()]
                choice["logprobs"] = {"content": [{**tops[0], "top_logprobs": tops}], "refusal": None}
                choice["finish_reason"], message["content"] = "length", "Yes"
            elif word == "no":
                message["content"] = "No."
            elif word == "json":
                message["content"] = '{"reason": "fine", "score": 2.5}'
            usage = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}
            self.send(200, {**body, "usage": usage})

    def send(self, status, body, content_type="application/json"):
        body = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("retry-after-ms", "5")
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server():
    pytest.importorskip("openai")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.lock, server.requests, server.counts = threading.Lock(), [], Counter()
    server.num_running = server.max_running = 0
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def judge(reward, prompts, completions=None, **columns):
    return asyncio.run(reward(prompts, [RED] * len(prompts) if completions is None else completions, **columns))


PLAIN = JudgeTemplate("{prompt}", high=10)


def test_no_failure_of_a_judge_is_a_reward_of_zero(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")  # as from a file
    problems = {
        "good": None,
        "busy": None,
        "refused": "refused",
        "filtered": "refused",
        "garbage": "unparsable",
        "parts": "unparsable",
        "long": "unparsable",
        "broken": "failed",
        "slow": "failed",
        "cut": "failed",
        "page": "failed",
        "empty": "failed",
    }
    logged, extras = {}, {}
    rewards = judge(
        VLMJudgeReward("judge", server.url, PLAIN, timeout=0.4, max_retries=1, max_concurrency=4, prices=(1.0, 50.0)),
        [*problems],
        log_metric=lambda name, value: logged.setdefault(name, []).append(value),
        log_extra=extras.__setitem__,
    )
    assert rewards == [1.0 if problem is None else None for problem in problems.values()]
    for kind in ("refused", "unparsable", "failed"):
        assert logged[f"vlm_judge/{kind}"] == [float(problem == kind) for problem in problems.values()]
    assert logged["vlm_judge/prompt_tokens"] == [100] * 7 + [0] * 5
    assert logged["vlm_judge/cost"] == pytest.approx([2e-4] * 7 + [0] * 5)
    assert extras["vlm_judge_answer"][:3] == ["10", "10", "I cannot help with that."]
    assert "500" in extras["vlm_judge_answer"][7]
    assert server.counts["busy"] == server.counts["broken"] == 2
    assert 2 <= server.max_running <= 4 + 1  # the client left a slow answer, which the server still works on


def test_a_server_that_always_fails_or_rejects_is_an_error(server, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    reward = VLMJudgeReward("judge", server.url, PLAIN, max_retries=0)
    with pytest.raises(RuntimeError, match="gave no judgment of 2 images .* The last failure: 500 "):
        judge(reward, ["broken", "broken"])
    wrong_key = KEY.replace("sk", "wrong")
    monkeypatch.setenv("JUDGE_KEY", wrong_key)
    reward = VLMJudgeReward("judge", server.url, PLAIN, api_key_variable="JUDGE_KEY")
    with pytest.raises(RuntimeError, match="The judge judge rejected a request: 401 .*Bearer <key>") as error:
        judge(reward, ["good", "slow"])
    for text in (str(error.value), repr(reward), str(vars(reward)), caplog.text):
        assert wrong_key not in text
    server.shutdown()
    server.server_close()
    with pytest.raises(RuntimeError, match="gave no judgment of 1 images"):
        judge(VLMJudgeReward("judge", server.url, PLAIN, max_retries=0), ["good"])


def test_probabilities_json_and_frames(server):
    template = JudgeTemplate("{question} {prompt}", "yes_no")
    images = torch.zeros(2, 3, 6, 8, dtype=torch.uint8)
    assert judge(VLMJudgeReward("judge", server.url, template), ["dogs"] * 2, images, question=["yes", "good"]) == [
        pytest.approx(0.7 / 0.9),
        None,
    ]
    request = next(
        request for request in server.requests if request["messages"][0]["content"][-1]["text"] == "yes dogs"
    )
    assert (request["model"], request["logprobs"], request["top_logprobs"]) == ("judge", True, 20)
    plain = VLMJudgeReward("judge", server.url, template, logprobs=False, request_options={"max_completion_tokens": 5})
    judge(plain, ["dogs"], question=["yes"])
    assert server.requests[-1].keys() == {"model", "messages", "max_completion_tokens"}

    schema = TEMPLATES["json"].schema
    template = JudgeTemplate("{prompt}", "json", high=10, schema=schema)
    assert judge(VLMJudgeReward("judge", server.url, template), ["json"]) == [0.25]
    assert server.requests[-1]["response_format"]["json_schema"]["schema"] == schema

    template = JudgeTemplate("{prompt}", high=10)
    judge(VLMJudgeReward("judge", server.url, template, max_frames=2), ["good"], [[RED, RED, BLUE]])
    *parts, text = server.requests[-1]["messages"][0]["content"]
    assert text["text"] == "These are 2 frames of one video, in their order. good"
    urls = [part["image_url"]["url"] for part in parts]
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    frames = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    assert [frame.getpixel((0, 0)) for frame in frames] == [(255, 0, 0), (0, 0, 255)]


def test_wrong_inputs_are_told_before_a_request(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="The environment variable OPENAI_API_KEY must have the key"):
        judge(VLMJudgeReward("judge"), ["a"])
    reward = VLMJudgeReward("judge", "http://127.0.0.1:1/v1", "question")
    with pytest.raises(ValueError, match=r"or columns of the dataset, \['tag'\], got 'question' in"):
        judge(reward, ["a"], tag=["b"])
    for completions in ([RED, RED], [[]]):
        with pytest.raises(ValueError, match="`completions` must have an image, or the frames of a video, for each"):
            judge(reward, ["a"], completions, question=["b"])
    with pytest.raises(TypeError, match="got a list with str"):
        judge(reward, ["a"], ["red"], question=["b"])


def test_a_question_of_dpg_counts_as_no_where_one_that_it_depends_on_does(server):
    def graph(*answers, dependency=()):
        return [
            {"id": i, "question": f"{answer}?", "dependency": [] if i == 1 else [*dependency]}
            for i, answer in enumerate(answers, 1)
        ]

    graphs = {
        "all": (graph("yes ,", "yes ,"), 1.0),
        "half": (graph("no ,", "yes ,"), 0.5),
        "dependent": (graph("no ,", "yes ,", dependency=[1]), 0.0),
        "unanswered": (graph("garbage ,", "yes ,", dependency=[1]), 1.0),
        "nothing": (graph("garbage ,"), None),
        "another task": (None, None),
    }
    logged = {}
    rewards = judge(
        DPGReward("judge", server.url),
        [*graphs],
        questions=[questions for questions, _ in graphs.values()],
        log_metric=lambda name, value: logged.setdefault(name, []).append(value),
    )
    assert rewards == [expected for _, expected in graphs.values()]
    assert logged["dpg/unparsable"] == [0] * 6 + [1, 0, 1]
