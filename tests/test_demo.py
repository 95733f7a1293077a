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

import re
import shutil
import socket
import subprocess
import sys
import threading
import time

import httpx2
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from trl_udm import TextUDMPipeline, URSAPipeline
from trl_udm.cli import demo, main
from trl_udm.worlds import shapes, sums

from .test_cli import find_mistake


gradio_client = pytest.importorskip("gradio_client")

PROMPT = "a photo of a red ring"
OPTIONS = {"num_inference_steps": 3, "guidance_scale": 1.0}


def draw(pipeline, seed, num_images):
    generator = torch.Generator().manual_seed(seed)
    return pipeline(PROMPT, num_images_per_prompt=num_images, generator=generator, **OPTIONS).images


def are_equal(images, others):
    return np.array_equal([np.asarray(image) for image in images], [np.asarray(image) for image in others])


@pytest.fixture(scope="module")
def pipeline():
    return URSAPipeline.from_pretrained(shapes.CHECKPOINT_PATH)


@pytest.mark.parametrize("size", [{}, {"height": 16, "width": 24}])
def test_the_states_are_those_of_the_pipeline(pipeline, size):
    states = demo.draw_states(pipeline, PROMPT, 5, 2, size, **OPTIONS)
    generator = torch.Generator().manual_seed(5)
    output = pipeline([PROMPT] * 2, generator=generator, return_trajectory=True, **size, **OPTIONS)
    assert len(states) == 3 + 1
    assert are_equal(states[-1], output.images)
    for images, tokens in zip(states, output.trajectory.noised_samples, strict=False):
        with torch.no_grad():
            assert are_equal(images, pipeline.decode(tokens, pipeline.latent_shape(**size)))
    assert demo.make_strip(states).size == ((3 + 1) * 98, 2 * (98 if not size else 66))


def test_the_states_of_text_are_text():
    pipeline = TextUDMPipeline.from_pretrained(sums.CHECKPOINT_PATH)
    states = demo.draw_states(pipeline, "17+45=", 0, 3, **OPTIONS)
    generator = torch.Generator().manual_seed(0)
    expected = pipeline("17+45=", num_completions_per_prompt=3, generator=generator, **OPTIONS)
    assert states[-1] == expected.texts and len({*map(str, states)}) > 1
    table = demo.make_table(states)
    assert table["headers"] == ["step", "completion 1", "completion 2", "completion 3"]
    assert [row[0] for row in table["data"]] == [0, 1, 2, 3] and table["data"][-1][1:] == expected.texts


@pytest.mark.parametrize("compare", ["adapter", "pipeline"])
def test_the_model_is_compared_with_a_pipeline_or_an_adapter(compare, tmp_path, pipeline):
    torch.manual_seed(0)
    other = URSAPipeline.from_pretrained(shapes.CHECKPOINT_PATH)
    config = LoraConfig(r=4, lora_alpha=1, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(other.transformer, config)
    if compare == "pipeline":
        other.transformer = model.merge_and_unload()
        other.save_pretrained(tmp_path / compare)
    else:
        model.save_pretrained(tmp_path / compare)
    pipelines = demo.load_pipelines(demo.Arguments(compare=str(tmp_path / compare)))
    assert [*pipelines] == ["shapes (before)", f"{tmp_path / compare} (after)"]
    before, after = (draw(each, 0, 2) for each in pipelines.values())
    assert are_equal(before, draw(pipeline, 0, 2)) and not are_equal(before, after)


class Watched(URSAPipeline):
    """Notes when calls begin and end."""

    def __call__(self, *args, **kwargs):
        EVENTS.append("begin")
        output = super().__call__(*args, **kwargs)
        EVENTS.append("end")
        return output


EVENTS, HOSTS = [], set()


def note_host(event, arguments):
    if event == "socket.getaddrinfo":
        HOSTS.add(arguments[0])
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        HOSTS.add(arguments[1][0])


@pytest.fixture(scope="module")
def url():
    """Address of the page, with the model and itself, as the command serves it."""
    sys.addaudithook(note_host)
    HOSTS.clear()
    port = demo.find_port("127.0.0.1", 0)
    argv = ["demo", "--compare", str(shapes.CHECKPOINT_PATH), "--port", str(port), "--num_inference_steps", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_SHARE", "True")  # is not heeded
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
        threading.Thread(target=main, args=(argv,), daemon=True).start()
        url, deadline = f"http://127.0.0.1:{port}/", time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                httpx2.get(url, timeout=5)
                break
            except httpx2.HTTPError:
                time.sleep(0.1)
        assert HOSTS == {"127.0.0.1"}
        yield url


def test_the_page_draws_what_the_pipeline_draws(url, pipeline, tmp_path):
    client = gradio_client.Client(url, download_files=tmp_path, verbose=False, analytics_enabled=False)
    before, after, strip, _ = client.predict(PROMPT, 7, 2, 3, 1.0, api_name="/draw")
    for images in (before, after):
        assert are_equal([Image.open(each["image"]) for each in images], draw(pipeline, 7, 2))
    assert are_equal([Image.open(strip)], [demo.make_strip(demo.draw_states(pipeline, PROMPT, 7, 2, **OPTIONS))])
    for wrong in ((PROMPT, -1, 2, 3, 1.0), (PROMPT, 0, 17, 3, 1.0), (PROMPT, 0, 1, 0, 1.0)):
        with pytest.raises(gradio_client.exceptions.AppError, match="Value .* is (less|greater) than"):
            client.predict(*wrong, api_name="/draw")


def test_the_page_needs_no_other_machine(url):
    client = gradio_client.Client(url, download_files=False, verbose=False, analytics_enabled=False)
    HOSTS.clear()
    client.predict(PROMPT, 0, 1, 1, 1.0, api_name="/draw")
    assert HOSTS == {"127.0.0.1"}
    assert httpx2.get(f"{url}config").json()["analytics_enabled"] is False
    for address in (url, f"{url}theme.css"):
        sources = r"""(?:<(?:script|link)[^>]*(?:src|href)=|url\(|@import )["']?https?://([\w.-]+)"""
        assert {*re.findall(sources, httpx2.get(address).text)} <= {"127.0.0.1"}


def test_two_users_do_not_draw_at_the_same_time(url):
    pipeline = Watched.from_pretrained(shapes.CHECKPOINT_PATH)
    page = demo.make_page({"shapes": pipeline}, demo.Arguments())
    demo.launch(page, "127.0.0.1", demo.find_port("127.0.0.1", 0))
    try:
        client = gradio_client.Client(page.local_url, verbose=False, analytics_enabled=False)
        jobs = [client.submit(PROMPT, seed, 1, 3, 1.0, api_name="/draw") for seed in range(3)]
        refused = httpx2.post(f"{page.local_url}gradio_api/run/draw", json={"data": [PROMPT, 0, 1, 3, 1.0]})
        assert refused.status_code >= 400  # what does not wait in the queue
        assert [len(job.result()[0]) for job in jobs] == [1, 1, 1]
    finally:
        page.close()
    assert EVENTS == ["begin", "end"] * 3


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="there is no browser")
def test_a_browser_shows_the_page(url, tmp_path):
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command = [BROWSER, *flags, "--virtual-time-budget=20000", "--dump-dom", url]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert all(f">{text}<" in shown for text in ("Draw", "a photo of a triangle", "shapes (before)"))


def test_a_taken_port_is_told_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert "Address already in use" in find_mistake(["demo", "--port", port, "--model", "no/such"], capsys)


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "Run `pip install trl-udm[demo]`" in find_mistake(["demo", "--model", "no/such"], capsys)


def test_models_of_two_families_are_not_compared(tmp_path, capsys):
    mistakes = {
        str(sums.CHECKPOINT_PATH): "`--compare` must be of the model's family, URSAPipeline, got TextUDMPipeline",
        str(tmp_path): "`--compare` must be a pipeline of one of ('URSAPipeline', 'TextUDMPipeline'), got Other in",
    }
    (tmp_path / "model_index.json").write_text('{"_class_name": "Other"}')
    for compare, mistake in mistakes.items():
        assert mistake in find_mistake(["demo", "--port", "0", "--compare", compare], capsys)
