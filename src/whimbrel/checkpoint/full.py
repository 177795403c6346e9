"""Whole checkpoints: everything a run needs to go on bit for bit, in a folder that is complete or absent.

A step folder holds model.safetensors (weights), train/ (optimizer state and `extra`, written by
torch.distributed.checkpoint, with state.json for what is not a tensor), config.toml, tokenizer.json and
meta.json.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

import whimbrel
from whimbrel.checkpoint import optimizer as optimizer_state
from whimbrel.checkpoint.steps import META, Meta, check_complete, check_hash, remove_old, step_dir, write_meta
from whimbrel.checkpoint.tensorfile import SINGLE
from whimbrel.checkpoint.together import is_joined, on_all, on_first, rank, world_size
from whimbrel.checkpoint.weights import read_into, save_weights, weights_of
from whimbrel.errors import CheckpointError
from whimbrel.files import (
    full_disk_as,
    full_disk_error,
    publish_folder,
    remove,
    remove_leftovers,
    require_space,
    sha256_file,
    temporary_name,
)

TRAIN, STATE, MORE = "train", "train/state.json", "more"

Extra = dict[str, Tensor | int | float | str]


def save_checkpoint(
    run_dir: str | Path,
    *,
    step: int,
    tokens: int,
    model: nn.Module,
    optimizer: Optimizer,
    extra: Mapping[str, Tensor | float | str],
    config_toml: str,
    tokenizer_path: str | Path | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save everything a run needs to go on as RUN/step-NNNNNN, complete or not at all; returns the folder.

    `step` counts optimizer steps, `tokens` training tokens. `extra` holds what else the run needs (position
    in the data, `rng_state()`); every process saves its own and gets it back. `tensors` are more of the run's
    state, sharded (DTensor) or the same in every process, which `load_tensors` reads. Under torch.distributed
    every process calls this with the same arguments otherwise. A checkpoint of the same step is replaced.

    Raises CheckpointError, in one line, where the disk is too small or the state cannot be saved; checkpoints
    that were there before stay as they are.
    """
    final = step_dir(run_dir, step)
    what = f"checkpoint {final}"
    saved, layout = optimizer_state.pack(model, optimizer)
    own_extra = {name: value for name, value in extra.items() if isinstance(value, Tensor)}
    saved |= {f"extra/{rank()}/{name}": value for name, value in own_extra.items()}
    saved |= {f"{MORE}/{name}": value for name, value in (tensors or {}).items()}
    needed = _estimate([*weights_of(model).tensors.values(), *saved.values()])
    with full_disk_as(CheckpointError, run_dir, needed, what):
        temporary = on_first(lambda: _begin(final, needed, what))
        try:
            weights_hash = save_weights(temporary / SINGLE, model)
            _save_tensors(temporary / TRAIN, saved)
            described = on_all(lambda: _describe_extra(extra))
            hashes = {SINGLE: weights_hash}
            for part in on_all(lambda: _hash_own(temporary)):
                hashes |= part

            def finish() -> None:
                state = {"optimizer": layout, "extra": described}
                (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
                (temporary / "config.toml").write_text(config_toml, encoding="utf-8")
                if tokenizer_path is not None:
                    shutil.copyfile(tokenizer_path, temporary / "tokenizer.json")
                files = _list_files(temporary, hashes)
                versions = whimbrel.__version__, torch.__version__
                write_meta(temporary, Meta(step, tokens, world_size(), *versions, files))
                publish_folder(temporary, final, overwrite=True)

            on_first(finish)
        except BaseException:
            if rank() == 0:
                remove(temporary)
            raise
    return final


def _begin(final: Path, needed: int, what: str) -> Path:
    final.parent.mkdir(parents=True, exist_ok=True)
    # A run folder has one writer, so whatever unfinished step folder lies in it is a crash's.
    remove_leftovers(final.parent, "step-*", only_dead=False)
    require_space(final.parent, needed, what, CheckpointError)
    temporary = temporary_name(final)
    temporary.mkdir()
    return temporary


def _estimate(tensors: list[Tensor]) -> int:
    """Bytes on disk, with some for headers."""
    return sum(tensor.numel() * tensor.element_size() + 2048 for tensor in tensors) + 2**20


def _describe_extra(extra: Mapping[str, Tensor | float | str]) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for name, value in extra.items():
        if isinstance(value, Tensor):
            described[name] = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        elif isinstance(value, (int, float, str)):
            described[name] = {"value": value}
        else:
            raise CheckpointError(
                f"extra['{name}'] is a {type(value).__name__}; only tensors, numbers and texts can be saved"
            )
    return described


@contextmanager
def _torch_checkpoint() -> Iterator[None]:
    """Raise the first process's own error in place of torch's collection, which is not even an Exception."""
    try:
        with warnings.catch_warnings():
            # A single process is a case that is meant here, not an oversight.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
            yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, Exception):
            raise cause from None
        raise CheckpointError(str(cause)) from None


class _Writer(dcp.FileSystemWriter):
    """torch's writer, but a full disk is reported as such and not as the odd file position that it leads to."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            full = full_disk_error(error)
            if full is None:
                raise
            # A fresh one: what an exception was raised from is lost on the way to another process.
            raise OSError(full.errno, full.strerror) from None


def _save_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    on_first(lambda: folder.mkdir(exist_ok=True))
    with _torch_checkpoint():
        dcp.save(tensors, storage_writer=_Writer(folder), no_dist=not is_joined())


def _hash_own(folder: Path) -> dict[str, str]:
    """Hashes of the files in train/ that this process has written."""
    pattern = "*" if world_size() == 1 else f"__{rank()}_*"
    files = [*(folder / TRAIN).glob(pattern)]
    if rank() == 0 and world_size() > 1:
        files.append(folder / TRAIN / ".metadata")
    return {str(file.relative_to(folder)): sha256_file(file) for file in files}


def _list_files(folder: Path, hashes: dict[str, str]) -> dict[str, dict[str, Any]]:
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != META):
        name = str(file.relative_to(folder))
        files[name] = {"bytes": file.stat().st_size, "sha256": hashes.get(name) or sha256_file(file)}
    return files


def load_checkpoint(path: str | Path, *, model: nn.Module, optimizer: Optimizer, verify: bool = True) -> Extra:
    """Put the state of the step folder `path` into `model` and `optimizer`; returns this process's `extra`.

    The number of processes and the sharding may differ from those that saved; then a process takes the extra
    of saved process `rank modulo saved processes`, with a warning. `verify` checks the hash of every file
    first.

    Raises CheckpointError where a file is missing, truncated or altered (naming the checkpoint to use
    instead), and where names, shapes, dtypes or parameter groups do not fit.
    """
    path = Path(path)
    meta = on_first(lambda: check_complete(path))
    if verify:
        names = sorted(meta.files)[rank() :: world_size()]
        on_all(lambda: [check_hash(path, name, meta.files[name]["sha256"]) for name in names])
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    tensors = optimizer_state.allocate(model, optimizer, state["optimizer"])
    source = rank() % meta.world_size
    described = state["extra"][source]
    if meta.world_size != world_size() and any("shape" in value for value in described.values()):
        warnings.warn(
            f"{path} was saved by {meta.world_size} processes; process {rank()} of {world_size()} takes the"
            f" random state and other tensors of process {source}",
            stacklevel=2,
        )
    extra_tensors = {
        f"extra/{source}/{name}": torch.empty(value["shape"], dtype=getattr(torch, value["dtype"]))
        for name, value in described.items()
        if "shape" in value
    }
    read_into(path / SINGLE, model, verify=False, same_dtype=True)
    wanted = {**tensors, **extra_tensors}
    with _torch_checkpoint():
        dcp.load(wanted, storage_reader=dcp.FileSystemReader(path / TRAIN), no_dist=not is_joined())
    optimizer_state.unpack(optimizer, state["optimizer"], tensors)
    return {
        name: extra_tensors[f"extra/{source}/{name}"] if "shape" in value else value["value"]
        for name, value in described.items()
    }


def load_tensors(path: str | Path, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors `into`, in place, from those of these names that `save_checkpoint` was given as `tensors`.

    Their sharding may differ from the one they were saved with. Hashes are not checked: `load_checkpoint` does.
    Raises CheckpointError where a name is missing or a shape differs; some tensors may be filled by then.
    """
    wanted = {f"{MORE}/{name}": value for name, value in into.items()}
    with _torch_checkpoint():
        reader = dcp.FileSystemReader(Path(path) / TRAIN)
        known = reader.read_metadata().state_dict_metadata
        for name, value in wanted.items():
            size = getattr(known.get(name), "size", None)
            if size != value.shape:
                held = "is missing from" if size is None else f"has shape {list(size)}, not {list(value.shape)}, in"
                raise CheckpointError(f"tensor '{name.removeprefix(MORE + '/')}' {held} {path}")
        dcp.load(wanted, storage_reader=reader, no_dist=not is_joined())


def prune(run_dir: str | Path, keep: int) -> list[Path]:
    """Delete all complete checkpoints of a run but the newest `keep`; returns the deleted folders.

    Under torch.distributed every process calls it and the first one deletes.
    """
    return on_first(lambda: remove_old(run_dir, keep))
