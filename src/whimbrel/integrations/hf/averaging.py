"""Averages of the weights in transformers' Trainer, kept as `whimbrel.merge.OnlineAverage` keeps them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from whimbrel.checkpoint.dcp import METADATA
from whimbrel.checkpoint.together import is_joined, on_first
from whimbrel.errors import CheckpointError
from whimbrel.merge import OnlineAverage

STATE_DIR = "whimbrel_average"
"""Folder of the average's state in each checkpoint."""
MODEL_DIR = "average"
"""Folder of the averaged model in the output folder."""


class AveragingCallback(TrainerCallback):
    """Keeps an average while Trainer trains: `Trainer(..., callbacks=[AveragingCallback(every=50, count=10)])`.

    It is saved with each checkpoint and resumed with it, and written to OUTPUT/average at the end of training, as a
    model with its configuration. `options` are those of `OnlineAverage`: every, count, windows, method, device, ...
    The live weights are not touched; to evaluate the average: `with callback.average.swapped(): trainer.evaluate()`.
    """

    def __init__(self, *, save_model: bool = True, **options: Any) -> None:
        self._save_model, self._options = save_model, options
        self._average: OnlineAverage | None = None
        self._model: Any = None

    @property
    def average(self) -> OnlineAverage:
        """The average; raises CheckpointError before training has begun."""
        if self._average is None:
            raise CheckpointError("there is no average before training has begun; call trainer.train() first")
        return self._average

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin, or go on with what the checkpoint that training resumes from holds."""
        self._model = kwargs["model"]
        # Trainer wraps the optimizer for mixed precision and FSDP; the one inside takes the steps.
        optimizer = getattr(kwargs.get("optimizer"), "optimizer", kwargs.get("optimizer"))
        self._average = OnlineAverage(self._model, optimizer, **self._options)
        if state.global_step:
            self._resume(args, state)

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        given = args.resume_from_checkpoint
        folder = Path(given) if isinstance(given, str) else _checkpoint(args, state)
        if not (folder / STATE_DIR / METADATA).is_file():
            warnings.warn(
                f"the average begins anew: {folder} holds none; where training resumes from another folder, name it in"
                " TrainingArguments(resume_from_checkpoint=...) too",
                stacklevel=2,
            )
            return
        saved = self.average.state_dict()
        try:
            with _alone():
                dcp.load(saved, checkpoint_id=folder / STATE_DIR, no_dist=not is_joined())
            self.average.load_state_dict(saved)
        except (CheckpointError, CheckpointException) as error:
            self.average.reset()
            reason = " ".join(str(error).split())[:300]
            warnings.warn(f"the average begins anew: {folder / STATE_DIR} does not fit ({reason})", stacklevel=2)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take a sample if one is due."""
        self.average.update(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the average's state into the checkpoint that has just been written."""
        folder = _checkpoint(args, state) / STATE_DIR
        with _alone():
            dcp.save(self.average.state_dict(), checkpoint_id=folder, no_dist=not is_joined())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the averaged model."""
        if self._save_model and self.average.samples:
            self.save_model(Path(str(args.output_dir)) / MODEL_DIR)

    def save_model(self, path: str | Path) -> None:
        """Write the averaged weights as `path`/model.safetensors, complete or not at all, with the configuration."""
        folder = Path(path)
        self.average.save(folder / "model.safetensors")
        config = getattr(self._model, "config", None)
        if config is not None:
            on_first(lambda: config.save_pretrained(folder))


@contextmanager
def _alone() -> Iterator[None]:
    """A single process is a case that is meant here; torch warns that it might be an oversight."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
        yield


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
