"""The average that a run keeps beside its weights: made from the settings, resumed, and written as a model."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

from torch.optim import Optimizer

from whimbrel import __version__
from whimbrel.checkpoint import load_tensors
from whimbrel.checkpoint.tensorfile import SINGLE
from whimbrel.checkpoint.together import on_first, rank
from whimbrel.config import Config, OnlineConfig, encode, to_toml
from whimbrel.errors import CheckpointError
from whimbrel.files import publish_folder, remove, remove_leftovers, temporary_name
from whimbrel.merge.online import OnlineAverage
from whimbrel.merge.outputs import MANIFEST
from whimbrel.model import Decoder


def keep_average(config: OnlineConfig, model: Decoder, optimizer: Optimizer) -> OnlineAverage | None:
    """The average that the settings ask for, if they do."""
    if not config.every_steps:
        return None
    return OnlineAverage(
        model,
        optimizer,
        every=config.every_steps,
        count=config.count,
        windows=config.windows,
        method=config.method,
        device=config.device,
        accumulate=config.accumulate,
    )


def restore_average(average: OnlineAverage, source: Path) -> None:
    """Go on with the average of a checkpoint, or begin anew, with a warning, where it has none of these settings."""
    state = average.state_dict()
    try:
        load_tensors(source, state)
        average.load_state_dict(state)
    except CheckpointError as error:
        average.reset()
        if rank() == 0:
            warnings.warn(f"the average kept during training begins anew: {error}", stacklevel=2)


def average_dir(run_dir: Path, step: int) -> Path:
    """Where the average after `step` optimizer steps is written: RUN/average-NNNNNN."""
    return run_dir / f"average-{step:06d}"


def save_average(average: OnlineAverage, run_dir: Path, step: int, config: Config, *, tokenizer_path: Path) -> Path:
    """Write the average as a model that `whimbrel eval` and `generate` take; every process calls it."""
    final = average_dir(run_dir, step)
    temporary = temporary_name(final)

    def begin() -> None:
        # A run folder has one writer, so whatever unfinished average lies in it is a crash's.
        remove_leftovers(run_dir, "average-*", only_dead=False)
        temporary.mkdir()

    def finish() -> None:
        (temporary / "config.toml").write_text(to_toml(config), encoding="utf-8")
        shutil.copyfile(tokenizer_path, temporary / "tokenizer.json")
        size = (temporary / SINGLE).stat().st_size
        manifest = {
            "format": 1,
            "whimbrel": __version__,
            "method": encode(config.averaging.online.method),
            "steps": average.steps,
            "weights": average.weights.texts(),
            "files": {SINGLE: {"bytes": size, "sha256": digest}},
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        publish_folder(temporary, final, overwrite=True)

    on_first(begin)
    try:
        digest = average.save(temporary / SINGLE)
        on_first(finish)
    except BaseException:
        if rank() == 0:
            remove(temporary)
        raise
    return final
