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
Open a page that draws a prompt and shows the states of the sampler, for one model or for two side by side.

It needs `pip install trl-udm[demo]`. The page takes nothing from other machines, and sends nothing to them.
"""

import dataclasses
import os
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from ..worlds import WORLDS
from .arguments import SamplingArguments, load_pipeline
from .parser import check_range


if TYPE_CHECKING:
    import gradio as gr

    from ..pipelines.pipeline_udm import UDMPipeline


PIPELINE_NAMES = ("URSAPipeline", "TextUDMPipeline")
"""The families that the page draws with, by the name in `model_index.json`."""

PAGE_WORLDS = {name: world for name, world in WORLDS.items() if world.modality != "video"}
"""The embedded worlds that it shows."""

TILE_SIZE = 96
"""Width and height of a state in the strip, in pixels."""

CSS = ".pixels img {image-rendering: pixelated}"
"""Small images are enlarged without blur."""


@dataclass(kw_only=True)
class Arguments(SamplingArguments):
    """
    Arguments of `trl-udm demo`.

    Args:
        > Parameters that control the page

        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen on. The default serves this machine only.
        port (`int`, *optional*, defaults to `7860`):
            Port to listen on. 0 takes a free one.

        > Parameters that control the model

        model (`str`, *optional*, defaults to `"shapes"`):
            Folder or Hub repository of a pipeline, or the name of an embedded world.
        compare (`str`, *optional*):
            Folder or Hub repository of a second pipeline, or of a PEFT adapter of the model.

        > Parameters that control how images are drawn

        num_images_per_prompt (`int`, *optional*, defaults to `4`):
            Images, or completions, of a prompt.
        batch_size (`int`, *optional*, defaults to `16`):
            The most that the page offers.

        The others as in [`SamplingArguments`]. Seed, steps, guidance and number are where the page starts.
    """

    model: str = field(
        default="shapes",
        metadata={"help": f"Folder or Hub repository of a pipeline, or an embedded world: {', '.join(PAGE_WORLDS)}."},
    )
    compare: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub repository of a second pipeline, or of a PEFT adapter of the model."},
    )
    num_images_per_prompt: int = field(default=4, metadata={"help": "Images, or completions, of a prompt."})
    batch_size: int = field(default=16, metadata={"help": "The most images of a prompt that the page offers."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int = field(default=7860, metadata={"help": "Port to listen on. 0 takes a free one."})

    @property
    def checkpoint_path(self) -> Any:
        return PAGE_WORLDS[self.model].checkpoint_path if self.model in PAGE_WORLDS else self.model


def load_pipelines(arguments: Arguments) -> dict[str, "UDMPipeline"]:
    """
    Loads the model and the one that it is compared with. Both are found before one is loaded.

    Args:
        arguments ([`Arguments`]):
            The models.

    Returns:
        `dict[str, UDMPipeline]`: One or two pipelines, by their titles.

    Raises:
        OSError: If there is no such model.
        ValueError: If a model is of another family, or the two do not fit each other.
    """
    from ..weights import find_file

    model_class = find_pipeline_class("model", arguments.checkpoint_path)
    if model_class.modality == "text" and (arguments.height is not None or arguments.width is not None):
        raise ValueError("`--height` and `--width` must be left out for a model of text.")
    if arguments.num_frames not in (None, 1):
        raise ValueError(f"`--num_frames` must be left out, got {arguments.num_frames}: the page shows images.")
    if arguments.compare is None:
        return {arguments.model: load_pipeline(arguments, arguments.adapter, model_class)}
    names = ["model_index.json", "adapter_model.safetensors", "adapter_model.bin"]
    if find_file(arguments.compare, names).name != "model_index.json":
        # First, for a mistake in the adapter is told before a model is loaded
        after = load_pipeline(arguments, arguments.compare, model_class)
    else:
        compare_class = find_pipeline_class("compare", arguments.compare)
        if compare_class is not model_class:
            raise ValueError(
                f"`--compare` must be of the model's family, {model_class.__name__}, got {compare_class.__name__}."
            )
        after = load_pipeline(dataclasses.replace(arguments, model=arguments.compare), None, compare_class)
    before = load_pipeline(arguments, arguments.adapter, model_class)
    return {f"{arguments.model} (before)": before, f"{arguments.compare} (after)": after}


def find_pipeline_class(name: str, path: Any) -> "type[UDMPipeline]":
    """Finds the class of a saved pipeline. `name` is the argument, for an error."""
    import trl_udm

    from ..pipelines.original_checkpoint import load_json
    from ..weights import find_file

    class_name = load_json(find_file(path, ["model_index.json"])).get("_class_name")
    if class_name not in PIPELINE_NAMES:
        raise ValueError(f"`--{name}` must be a pipeline of one of {PIPELINE_NAMES}, got {class_name} in {path}.")
    return getattr(trl_udm, class_name)


def draw_states(
    pipeline: Any, prompt: str, seed: int, num_samples: int, size: dict[str, int] | None = None, **kwargs: Any
) -> list[list[Any]]:
    """
    Draws samples of a prompt, and keeps what the sampler passed through.

    Args:
        pipeline ([`UDMPipeline`]):
            The pipeline, whose own callback tells the states.
        prompt (`str`):
            What to draw.
        seed (`int`):
            Seed of all samples together, as in `trl-udm generate`.
        num_samples (`int`):
            Number of samples.
        size (`dict[str, int]`, *optional*):
            Options of the pipeline's `latent_shape`.
        kwargs:
            Further arguments of a call of the pipeline.

    Returns:
        `list[list]`: For each state, the decoded samples: uniform noise, then the state after each step. The last are
        those that the pipeline returns.
    """
    import torch

    size = size or {}
    latent_shape, generator = pipeline.latent_shape(**size), torch.Generator().manual_seed(seed)
    # The pipeline would draw the same noise. Its callback does not tell it.
    shape = (num_samples, torch.Size(latent_shape).numel())
    states = [pipeline.scheduler.draw_noise(shape, generator, pipeline.device)]

    def keep_state(pipeline: "UDMPipeline", step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        states.append(tensors["latents"])
        return tensors

    pipeline(
        [prompt] * num_samples,
        latents=states[0],
        generator=generator,
        callback_on_step_end=keep_state,
        output_type="latent",
        **size,
        **kwargs,
    )
    with torch.no_grad():
        return [pipeline.decode(state, latent_shape) for state in states]


def make_strip(states: list[list[Image.Image]]) -> Image.Image:
    """
    Arranges states, one column each. Every sample has a row.

    Args:
        states (`list[list[PIL.Image.Image]]`):
            From `draw_states`.

    Returns:
        `PIL.Image.Image`: The strip.
    """
    from diffusers.utils import make_image_grid

    tiles = [
        ImageOps.expand(ImageOps.contain(image, (TILE_SIZE, TILE_SIZE), Image.Resampling.NEAREST), 1, "white")
        for row in zip(*states, strict=True)
        for image in row
    ]
    return make_image_grid(tiles, rows=len(states[0]), cols=len(states))


def make_table(states: list[list[str]]) -> dict[str, Any]:
    """Arranges states of texts, one row each, as [`~gradio.Dataframe`] takes them. Every sample has a column."""
    headers = ["step", *(f"completion {number}" for number, _ in enumerate(states[0], start=1))]
    return {"headers": headers, "data": [[step, *texts] for step, texts in enumerate(states)]}


def make_page(pipelines: dict[str, "UDMPipeline"], arguments: Arguments) -> "gr.Blocks":
    """
    Makes the page.

    Args:
        pipelines (`dict[str, UDMPipeline]`):
            From `load_pipelines`.
        arguments ([`Arguments`]):
            What the page starts with.

    Returns:
        [`~gradio.Blocks`]: The page, to be launched.
    """
    import gradio as gr

    is_text = next(iter(pipelines.values())).modality == "text"
    size = {name: getattr(arguments, name) for name in ("height", "width") if getattr(arguments, name) is not None}
    world = PAGE_WORLDS.get(arguments.model)
    prompts = [] if world is None else [row["prompt"] for row in world.load_eval_rows()]
    prompts = prompts[:: max(1, len(prompts) // 6)]
    # Without the button that uploads, and without those that would cover a state
    image_options: dict[str, Any] = {"format": "png", "show_label": False, "elem_classes": "pixels", "buttons": []}
    gallery_options: dict[str, Any] = {**image_options, "columns": 4, "height": "max-content", "object_fit": "contain"}
    progress_bar = gr.Progress(track_tqdm=True)  # that of the pipeline

    def draw(prompt, seed, num_samples, num_inference_steps, guidance_scale, progress=progress_bar):
        samples, strips = [], []
        options = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        for pipeline in pipelines.values():
            states = draw_states(pipeline, prompt, seed, num_samples, size, **options)
            samples.append([[text] for text in states[-1]] if is_text else states[-1])
            strips.append(make_table(states) if is_text else make_strip(states))
        return [*samples, *strips]

    with gr.Blocks(analytics_enabled=False, title="trl-udm", delete_cache=(3600, 3600)) as page:
        gr.Markdown(
            "# trl-udm\nA model starts from random tokens, and replaces them step by step. "
            "Two models start from the same tokens."
        )
        with gr.Row():
            prompt = gr.Textbox(prompts[-1] if prompts else "", label="Prompt", scale=5)
            button = gr.Button("Draw", variant="primary")
        if prompts:
            gr.Examples(prompts, prompt, label="Examples")
        noun = "Completions" if is_text else "Images"
        num_samples, num_steps = arguments.num_images_per_prompt, arguments.num_inference_steps
        with gr.Row():
            inputs = [
                prompt,
                gr.Number(arguments.seed, label="Seed", precision=0, minimum=0),
                gr.Slider(1, max(arguments.batch_size, num_samples), num_samples, step=1, precision=0, label=noun),
                gr.Slider(1, max(50, num_steps), num_steps, step=1, precision=0, label="Steps"),
                gr.Number(arguments.guidance_scale, label="Guidance scale (1 is none)", step=0.5),
            ]
        samples, strips = [], []
        with gr.Row():
            for title in pipelines:
                with gr.Column():
                    gr.Markdown(f"### {title}")
                    if is_text:
                        samples.append(gr.Dataframe(headers=["completion"], wrap=True))
                    else:
                        samples.append(gr.Gallery(**gallery_options))
        for title in pipelines:
            gr.Markdown(f"### {title}: from noise to the result")
            strips.append(gr.Dataframe(wrap=True) if is_text else gr.Image(**image_options))
        gr.on([button.click, prompt.submit], draw, inputs, [*samples, *strips], concurrency_limit=1, api_name="draw")
    return page.queue(api_open=False)


def find_port(host: str, port: int) -> int:
    """Finds a free port if `port` is 0. Raises an `OSError` if `port` is taken."""
    with socket.create_server((host, port)) as server:
        return server.getsockname()[1]


def launch(page: "gr.Blocks", host: str, port: int) -> None:
    """
    Serves the page in threads, without a public link and without a font or a script from another machine.

    Args:
        page ([`~gradio.Blocks`]):
            From `make_page`.
        host (`str`):
            Address to listen on.
        port (`int`):
            Port to listen on.
    """
    import gradio as gr

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    look: dict[str, Any] = {"theme": theme, "css": CSS, "footer_links": []}
    server: dict[str, Any] = {"server_name": host, "server_port": port, "share": False, "ssr_mode": False}
    page.launch(prevent_thread_lock=True, quiet=True, show_error=True, **server, **look)


def run(arguments: Arguments) -> None:
    """
    Serves the page until the process is stopped.

    Args:
        arguments ([`Arguments`]):
            The models and the page.

    Raises:
        ImportError: If Gradio is not installed.
        OSError: If there is no such model, or the port is taken.
        ValueError: If a number is out of its range, or the models do not fit each other.
    """
    arguments.check()
    check_range(arguments, port=(0, 65535))
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which reads it
    try:
        import gradio as gr  # noqa: F401
    except ImportError as error:
        raise ImportError("The demo needs Gradio. Run `pip install trl-udm[demo]`.") from error
    port = find_port(arguments.host, arguments.port)  # a taken one is told before a model is loaded
    page = make_page(load_pipelines(arguments), arguments)
    launch(page, arguments.host, port)
    print(f"{page.local_url} (Ctrl+C stops it)")
    page.block_thread()
