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
Compute a reward for other processes, over HTTP.

It needs `pip install trl-udm[server]`. The client is trl_udm.rewards.remote.RemoteReward. If the environment variable
TRL_UDM_REWARD_TOKEN is set, clients must send its value. Without a token, only processes of this machine are served.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from ..evaluation.benchmarks import make_reward
from ..rewards.loading import REWARD_NAMES, find_reward
from ..worlds import VISUAL_WORLDS
from .parser import check_range


@dataclass(kw_only=True)
class Arguments:
    """
    Arguments of `trl-udm serve-reward`.

    Args:
        > Parameters that control the reward

        reward (`str`):
            Name of the reward, as in [`~trl_udm.rewards.loading.load_reward`], or of an embedded world of images or
            videos.
        options (`dict[str, Any]`, *optional*, defaults to `{}`):
            Arguments of its constructor.

        > Parameters that control the server, as in [`~trl_udm.rewards.remote.server.serve`]

        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen on.
        port (`int`, *optional*, defaults to `8765`):
            Port to listen on. 0 takes a free one.
        token_file (`Path`, *optional*):
            File that contains the token. By default the token is the environment variable `TRL_UDM_REWARD_TOKEN`, if
            it is set.

        > Parameters that control what is accepted, as in [`~trl_udm.rewards.remote.server.create_app`]

        max_batch_size (`int`, *optional*, defaults to `64`):
            Most images a request.
        max_body_bytes (`int`, *optional*, defaults to `67108864`):
            Longest request.
        max_pixels (`int`, *optional*, defaults to `4194304`):
            Most pixels an image.
        max_concurrency (`int`, *optional*, defaults to `1`):
            Calls of the reward at a time.
        max_queue (`int`, *optional*, defaults to `256`):
            Requests that wait for their turn.
        body_timeout (`float`, *optional*, defaults to `30.0`):
            Seconds for a request to arrive.
    """

    reward: str = field(
        init=False,
        metadata={"help": f"{', '.join([*REWARD_NAMES, *VISUAL_WORLDS])}, or module:attribute of a reward of yours."},
    )
    options: dict = field(
        default_factory=dict,
        metadata={"help": """Arguments of the reward's constructor as a JSON object, such as '{"mode": "dense"}'."""},
    )

    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int = field(default=8765, metadata={"help": "Port to listen on. 0 takes a free one."})
    token_file: Path | None = field(
        default=None, metadata={"help": "File that contains the token, instead of the variable."}
    )

    max_batch_size: int = field(default=64, metadata={"help": "Most images a request."})
    max_body_bytes: int = field(default=64 * 1024 * 1024, metadata={"help": "Longest request."})
    max_pixels: int = field(default=2048 * 2048, metadata={"help": "Most pixels an image."})
    max_concurrency: int = field(default=1, metadata={"help": "Calls of the reward at a time."})
    max_queue: int = field(default=256, metadata={"help": "Requests that wait for their turn."})
    body_timeout: float = field(default=30.0, metadata={"help": "Seconds for a request to arrive."})


def run(arguments: Arguments) -> None:
    """
    Serves a reward until the process is stopped, with [`~trl_udm.rewards.remote.server.serve`].

    Args:
        arguments ([`Arguments`]):
            The reward and the server.
    """
    from ..rewards.remote.server import serve
    from ..rewards.remote.wire import TOKEN_VARIABLE

    check_range(arguments, port=(0, 65535), max_batch_size=(1, math.inf), max_body_bytes=(1, math.inf))
    check_range(arguments, max_pixels=(1, math.inf), max_concurrency=(1, math.inf), max_queue=(0, math.inf))
    if not 0 < arguments.body_timeout < math.inf:
        raise ValueError(f"`--body_timeout` must be > 0, got {arguments.body_timeout}.")
    token = os.environ.get(TOKEN_VARIABLE)
    if arguments.token_file is not None:
        token = arguments.token_file.read_text(encoding="utf-8", errors="replace").strip()  # refused below
    reward_names = ("reward", "options", "token_file")
    server_options = {name: value for name, value in vars(arguments).items() if name not in reward_names}
    # A mistake is told before the server starts, which loads the reward in a thread
    if arguments.reward in VISUAL_WORLDS:
        make_reward(arguments.reward, arguments.options)
    else:
        find_reward(arguments.reward, arguments.options)
    serve(lambda: make_reward(arguments.reward, arguments.options), token=token, **server_options)
