"""The folders of a run's checkpoints: their names, what makes one complete, which is the newest. No torch.

A step folder gets its name only when every file in it is on the disk, and `meta.json` in it lists the files
with their sizes and hashes. Folders whose names begin with a dot are unfinished.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from whimbrel.checkpoint.tensorfile import SINGLE
from whimbrel.errors import CheckpointError
from whimbrel.files import remove, sha256_file, temporary_name

META = "meta.json"
FORMAT = 1
_STEP = re.compile(r"step-(\d{6,})")


class Meta(NamedTuple):
    """What `meta.json` of a step folder says."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Training tokens seen."""
    world_size: int
    """Processes that wrote the checkpoint."""
    whimbrel: str
    """Version of Whimbrel that wrote it."""
    torch: str
    """Version of torch that wrote it."""
    files: dict[str, dict[str, Any]]
    """Path in the folder -> {"bytes": size, "sha256": hash}, for every file but meta.json."""


def step_dir(run_dir: str | Path, step: int) -> Path:
    """The folder of the checkpoint after `step` optimizer steps: RUN/step-NNNNNN."""
    return Path(run_dir) / f"step-{step:06d}"


def read_meta(path: str | Path) -> Meta:
    """What the step folder `path` says about itself; CheckpointError where it cannot be read."""
    file = Path(path) / META
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        version = data["format"]
        if version != FORMAT:
            raise CheckpointError(f"{file} has format {version}; this version of Whimbrel reads format {FORMAT}")
        return Meta(*(data[name] for name in Meta._fields))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); {path} is no complete checkpoint") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{file} is damaged; {path} is no complete checkpoint") from None


def write_meta(folder: Path, meta: Meta) -> None:
    """Write `meta.json` into `folder`; the last file of a checkpoint to be written."""
    (folder / META).write_text(json.dumps({"format": FORMAT, **meta._asdict()}, indent=1) + "\n", encoding="utf-8")


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; damaged ones are left out, each with a warning."""
    return [path for path in _step_folders(run_dir) if _is_complete(path)]


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None; damaged ones are skipped, each with a warning."""
    return next((path for path in reversed(_step_folders(run_dir)) if _is_complete(path)), None)


def _step_folders(run_dir: str | Path) -> list[Path]:
    folder = Path(run_dir)
    found = [path for path in folder.glob("step-*") if path.is_dir() and _STEP.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _is_complete(path: Path) -> bool:
    problem = _problem(path)
    if problem is not None:
        warnings.warn(f"skipped a damaged checkpoint: {problem}", stacklevel=3)
    return problem is None


def _problem(path: Path) -> str | None:
    """What is wrong with the files of a step folder, without reading their contents."""
    try:
        meta = read_meta(path)
    except CheckpointError as error:
        return str(error)
    for name, expected in meta.files.items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        found = file.stat().st_size
        if found != expected["bytes"]:
            return f"{file} is damaged: {expected['bytes']:,} bytes expected, {found:,} found"
    return None


def check_complete(path: str | Path) -> Meta:
    """The meta data of a step folder whose files are all there with their sizes.

    Raises CheckpointError with the file, its expected and found size, and the checkpoint to use in its place.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; {_instead(path)}")
    if (path / SINGLE).exists() and not _STEP.fullmatch(path.name) and not (path / META).exists():
        raise CheckpointError(
            f"{path} holds weights and no training state, as merges and converted models do; name a checkpoint of a run"
        )
    problem = _problem(path)
    if problem is not None:
        raise CheckpointError(f"{problem}; {_instead(path)}")
    return read_meta(path)


def check_hash(path: str | Path, name: str, expected: str) -> None:
    """Raise CheckpointError unless the file `name` in the folder `path` has this SHA-256."""
    path = Path(path)
    found = sha256_file(path / name)
    if found != expected:
        raise CheckpointError(
            f"{path / name} is damaged: its SHA-256 begins {found[:12]}, but was {expected[:12]} when it was"
            f" written; {_instead(path)}"
        )


def _instead(path: Path) -> str:
    others = [other for other in _step_folders(path.parent) if other != path and _problem(other) is None]
    if not others:
        return "there is no other complete checkpoint beside it"
    return f"use {others[-1]}, the newest complete checkpoint beside it"


def remove_old(run_dir: str | Path, keep: int) -> list[Path]:
    """Delete all complete checkpoints but the newest `keep`; returns the deleted ones.

    Each loses its name before its files, so that a crash leaves no half-deleted checkpoint behind. Raises
    CheckpointError for a `keep` below 1.
    """
    if keep < 1:
        raise CheckpointError(f"cannot keep {keep} checkpoints of {run_dir}; keep at least one")
    old = list_checkpoints(run_dir)[:-keep]
    for path in old:
        hidden = temporary_name(path)
        remove(hidden)
        path.rename(hidden)
        remove(hidden)
    return old
