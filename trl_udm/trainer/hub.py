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

"""The Hub: what a run pushes there, and when."""

import os
import shutil
from concurrent.futures import Future
from pathlib import Path

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS_NAME
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from .. import __version__
from ..model_card import CARD_FILES, make_model_card
from .ema import EMA_FOLDER


logger = get_logger(__name__)

_hub = HfApi(library_name="trl-udm", library_version=__version__)


class HubMixin:
    """
    Pushes to the Hub the files that load the model, its card, and the files that the card shows.

    Needs `pipeline`, `args`, `model`, `state`, and of [`~transformers.Trainer`] `push_in_progress` and `hub_model_id`.

    [`~transformers.Trainer`] would push the whole output folder, logs and pickles included. During training it would
    push only weights in a checkpoint's root.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        try:
            super().init_hf_repo(token, private)
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                error.append_to_message(
                    "\n`hub_token`, or the token of `hf auth login` without it, must be one that may write to the "
                    f"repository `hub_model_id` {self.args.hub_model_id!r}."
                )
            raise

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        if self.is_world_process_zero():
            card = make_model_card(self, model_name, dataset_name, [tags] if isinstance(tags, str) else tags or [])
            card.save(os.path.join(self.args.output_dir, "README.md"))

    # PEFT writes into the card of the folder that it saves to
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if output_dir in (None, self.args.output_dir):
            self.create_model_card()

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future | None:
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()  # which reads the files that are saved below
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        return self._upload_model(commit_message, token=token, revision=revision, run_as_future=not blocking)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        is_pushing = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_pushing and not args.hub_always_push:
            return
        missing = [name for name in self._model_files() if not os.path.exists(os.path.join(checkpoint_folder, name))]
        if missing:
            logger.warning(
                f"Step {self.state.global_step} is not pushed to the Hub: its checkpoint has no {missing}, since its "
                "weights are sharded. Set `hub_strategy='end'`, or save whole weights."
            )
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        # Copied, since the checkpoint may be deleted during the upload
        for name in self._model_files():
            source, target = os.path.join(checkpoint_folder, name), os.path.join(args.output_dir, name)
            if os.path.isdir(source):
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copy(source, target)
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._upload_model(message, token=args.hub_token, run_as_future=True)]
        if args.hub_strategy != HubStrategy.EVERY_SAVE:
            is_last = args.hub_strategy == HubStrategy.CHECKPOINT
            upload = _hub.upload_folder(
                repo_id=self.hub_model_id,
                folder_path=checkpoint_folder,
                path_in_repo="last-checkpoint" if is_last else Path(checkpoint_folder).name,
                commit_message=f"{message}, checkpoint",
                token=args.hub_token,
                revision=args.hub_revision,
                ignore_patterns=["README.md", TRAINING_ARGS_NAME],
                run_as_future=True,
            )
            jobs.append(upload)
        for job in jobs:
            job.add_done_callback(_warn_of_failure)
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if is_pushing else []), *jobs])

    def _model_files(self) -> list[str]:
        """Files and folders of the output folder that load the model or the average of its weights."""
        average = [] if self.args.ema_decay is None else [EMA_FOLDER]
        if is_peft_model(self.model):
            return [ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, *average]
        return [self.pipeline.config_name, *self.pipeline.components, *average]

    def _upload_model(
        self, commit_message: str, token: str | None, run_as_future: bool, revision: str | None = None
    ) -> CommitInfo | Future:
        output_dir = Path(self.args.output_dir)
        patterns = [f"{name}/*" if (output_dir / name).is_dir() else name for name in self._model_files()]
        return _hub.upload_folder(
            repo_id=self.hub_model_id,
            folder_path=output_dir,
            commit_message=commit_message,
            token=token,
            revision=self.args.hub_revision if revision is None else revision,
            allow_patterns=[*patterns, *CARD_FILES],
            ignore_patterns=[f"{EMA_FOLDER}/README.md"],  # which PEFT writes
            run_as_future=run_as_future,
        )


# `Trainer` waits for a push in the background, but does not ask how it ended
def _warn_of_failure(job: Future) -> None:
    if not job.cancelled() and job.exception() is not None:
        logger.warning(f"A push to the Hub failed, and the training goes on: {job.exception()}")
