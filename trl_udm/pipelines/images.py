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

"""What image families share: the checks of a call."""


def check_image_prompts(
    prompt: str | list[str], negative_prompt: str | list[str] | None, output_type: str
) -> tuple[list[str], list[str]]:
    """
    Checks what images a call asks for.

    Args:
        prompt (`str` or `list[str]`):
            Argument of the call.
        negative_prompt (`str` or `list[str]`, *optional*):
            Argument of the call.
        output_type (`str`):
            Argument of the call.

    Returns:
        `tuple`: The prompts and the negative prompts, each a list.

    Raises:
        ValueError: If one is out of its range.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"`prompt` must be a string or a non-empty list of strings, got {prompt!r}.")
    negative_prompts = negative_prompt
    if not isinstance(negative_prompts, list):
        negative_prompts = [negative_prompts or ""] * len(prompts)
    if not all(isinstance(text, str) for text in negative_prompts):
        raise ValueError(f"`negative_prompt` must be a string or a list of strings, got {negative_prompt!r}.")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
    return prompts, negative_prompts
