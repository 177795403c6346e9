"""Checkpoints to be averaged, whatever wrote them: for each tensor, the boxes that it is stored in. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from whimbrel.checkpoint import dcp, torchzip
from whimbrel.checkpoint.steps import META, Meta, read_meta
from whimbrel.checkpoint.tensorfile import INDEX, ITEM_BYTES, TensorFolder, read_folder
from whimbrel.config import require
from whimbrel.errors import CheckpointError, ConfigError, UnsupportedError
from whimbrel.merge.select import position

TRAIN = "train"
OPTIMIZER = "optimizer.pt"
"""State of an optimizer beside a model, as the Trainer of transformers saves it."""
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
# State of an optimizer and of a trainer, as torch's and the common trainers' checkpoints name it.
_TRAINING = re.compile(
    r"(optim|optimizer|optimizers|optimizer_states|lr_schedulers?|scheduler|dataloader|train_state|rng_state|extra|group"
    r"|param_groups)[./]|state[./].*[./]step$"
    r"|.*[./](exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer)$"
)
# Names of two copies of one weight where config.json says that input and output embeddings are tied.
_TIED = (("model.embed_tokens.weight", "lm_head.weight"), ("transformer.wte.weight", "lm_head.weight"))


class Box(NamedTuple):
    """A box of a tensor, stored in one piece, row by row."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    start: int
    """Where its bytes begin in the file."""
    crc: int | None
    """Their CRC-32, where the format keeps one."""


class Stored(NamedTuple):
    """A tensor as a checkpoint holds it."""

    dtype: str
    """Its type as safetensors names it."""
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    """They cover the tensor without overlap."""


class SourceFile(NamedTuple):
    """What identifies a file, to see whether it changes."""

    path: Path
    size: int
    mtime_ns: int
    header_sha256: str | None


class Source(NamedTuple):
    """One checkpoint."""

    path: Path
    """Its folder, or that of its file."""
    tensors: dict[str, Stored]
    """Weights, in the order of their files."""
    training: dict[str, Stored]
    """Tensors of the optimizer and the trainer."""
    files: dict[str, SourceFile]
    aliases: dict[str, str]
    """Further names of a weight that the file holds once -> the name it has in `tensors`."""
    meta: Meta | None = None
    folder: TensorFolder | None = None
    """The safetensors files, where the weights lie in such."""
    dcp: dcp.Checkpoint | None = None
    """The distributed checkpoint, of the weights or else of the folder train/."""
    optimizer: torchzip.Archive | None = None
    """The archive optimizer.pt, where the optimizer's state lies in it."""
    step: int | None = None
    """Optimizer steps done, where the checkpoint or its name says so."""
    tokens: int | None = None
    """Training tokens seen, where the checkpoint or its run says so."""


def named_one_by_one(paths: Iterable[str | Path]) -> list[str | Path]:
    """The checkpoints of a list; ConfigError for a single path, whose letters or parts would be taken for a list."""
    if isinstance(paths, (str, Path)):
        raise ConfigError(f"sources = {str(paths)!r} is a single path; give a list of checkpoints, oldest first")
    return list(paths)


def open_sources(
    paths: Sequence[str | Path],
    *,
    rename: Sequence[tuple[str, str]] = (),
    training: bool = False,
    tokens_per_step: int | None = None,
) -> list[Source]:
    """Open checkpoints, oldest first; with `training` also the state of their optimizers.

    rename: (regular expression, replacement) pairs, applied in turn to the names of weights. tokens_per_step: tokens
    of an optimizer step, where the run does not record them.
    Raises CheckpointError for what cannot be read, ConfigError for a checkpoint that is named twice.
    """
    require(len(paths) > 0, "number of checkpoints to merge", 0, "at least one")
    opened: list[Source] = []
    owners: dict[tuple[int, int], int] = {}
    for number, path in enumerate(paths):
        source = _rename(open_source(path, training=training), rename)
        for file in source.files.values():
            status = file.path.stat()
            first = owners.setdefault((status.st_dev, status.st_ino), number)
            if first != number:
                raise ConfigError(f"source {path} is the same as source {paths[first]}; name each checkpoint once")
        step, tokens = position(path, tokens_per_step=tokens_per_step)
        opened.append(source._replace(step=step, tokens=tokens))
    return opened


def open_source(path: str | Path, *, training: bool = False) -> Source:
    """One checkpoint: a folder or file of safetensors or of torch.save, or a distributed checkpoint.

    Raises CheckpointError where it is none of these or damaged. With `training` its optimizer state is listed too.
    """
    path = Path(path)
    is_torch_file = path.is_file() and path.suffix in _TORCH_SUFFIXES
    has_safetensors = path.is_dir() and ((path / INDEX).is_file() or any(path.glob("*.safetensors")))
    if is_torch_file or (path.is_dir() and not has_safetensors and _torch_files(path)):
        source = _open_torch(path, training=training)
    elif path.is_dir() and not has_safetensors and (path / dcp.METADATA).is_file():
        source = _open_dcp(path)
    elif path.is_file() or has_safetensors:
        source = _open_safetensors(path)
    else:
        raise CheckpointError(f"{path} {_what_is_wrong(path)}")
    if path.is_dir() and (path / META).is_file():
        source = source._replace(meta=read_meta(path))
    if training and source.dcp is None and (path / TRAIN / dcp.METADATA).is_file():
        state = _open_dcp(path / TRAIN)
        files = {**source.files, **{f"{TRAIN}/{name}": file for name, file in state.files.items()}}
        return source._replace(training={**state.tensors, **state.training}, files=files, dcp=state.dcp)
    if training and source.dcp is None and (path / OPTIMIZER).is_file():
        return _with_optimizer(source, path / OPTIMIZER)
    return source


def _what_is_wrong(path: Path) -> str:
    """Why a path is no checkpoint, and what to name instead."""
    if not path.is_dir():
        return (
            "does not exist; name a checkpoint: a folder or file of safetensors or pytorch_model.bin, a distributed"
            " checkpoint of torch, or a step folder of a run"
        )
    for pattern in ("*/*.safetensors", "*/pytorch_model*.bin*", f"*/{dcp.METADATA}"):
        found = sorted(path.glob(pattern))
        if found:
            return (
                f"holds checkpoints and is none: name them, such as {found[-1].parent}, or, for those of a run, give"
                " --every and --count"
            )
    files = [file.name for file in sorted(path.iterdir()) if file.suffix in _TORCH_SUFFIXES]
    if files:
        return f"holds several files of torch.save ({', '.join(files)}); name the one with the model"
    return f"holds no checkpoint: neither safetensors, nor {BIN}, nor a distributed checkpoint ({dcp.METADATA})"


def _with_optimizer(source: Source, file: Path) -> Source:
    archive = torchzip.read_archive(file)
    state: dict[str, Stored] = {}
    for name, view in torchzip.flat(archive.value):
        stored = _torch_tensor(file, name, view, archive.payloads)
        if stored.boxes[0].crc is None:
            raise UnsupportedError(
                f"optimizer state '{name}' in {file} shares its memory with another tensor; save it with clone()"
            )
        state[name] = stored
    if not isinstance(archive.value, dict) or "param_groups" not in archive.value:
        raise CheckpointError(f"{file} is not the state of an optimizer: it holds no 'param_groups'")
    by_place = dict(sorted(state.items(), key=lambda item: _first_place(item[1])))
    files = {**source.files, OPTIMIZER: _source_file(file)}
    return source._replace(training=by_place, files=files, optimizer=archive)


def _open_safetensors(path: Path) -> Source:
    folder = read_folder(path)
    tensors = {}
    for file in folder.files.values():
        for name, entry in sorted(file.entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            tensors[name] = _whole(entry.dtype, entry.shape, file.path, entry.start, None)
    files = {name: SourceFile(*_identity(file)) for name, file in folder.files.items()}
    return Source(folder.path, tensors, {}, files, {}, folder=folder)


def _identity(file: object) -> tuple[Path, int, int, str]:
    return tuple(getattr(file, name) for name in ("path", "size", "mtime_ns", "header_sha256"))  # pyrefly: ignore


def _whole(dtype: str, shape: tuple[int, ...], path: Path, start: int, crc: int | None) -> Stored:
    return Stored(dtype, shape, (Box((0,) * len(shape), shape, path, start, crc),))


def _open_dcp(path: Path) -> Source:
    found = dcp.read_checkpoint(path)
    tensors: dict[str, Stored] = {}
    training: dict[str, Stored] = {}
    used = {blob.path for blob in found.blobs.values()}
    for name, tensor in found.tensors.items():
        boxes = tuple(Box(*chunk) for chunk in tensor.chunks if math.prod(chunk.sizes))
        used.update(box.path for box in boxes)
        kind = training if is_training(name) else tensors
        kind[name] = Stored(tensor.dtype, tensor.shape, boxes)
    by_place = dict(sorted(tensors.items(), key=lambda item: _first_place(item[1])))
    header = hashlib.sha256((path / dcp.METADATA).read_bytes()).hexdigest()
    files = {dcp.METADATA: _source_file(path / dcp.METADATA, header)}
    files |= {str(file.relative_to(path)): _source_file(file) for file in sorted(used)}
    return Source(path, by_place, training, files, {}, dcp=found)


def _first_place(stored: Stored) -> tuple[str, int]:
    return min(((str(box.path), box.start) for box in stored.boxes), default=("", 0))


def is_training(name: str) -> bool:
    """Whether a name is one of an optimizer's or a trainer's state, and not of a weight."""
    return _TRAINING.match(name) is not None


def _source_file(path: Path, header: str | None = None) -> SourceFile:
    status = path.stat()
    return SourceFile(path, status.st_size, status.st_mtime_ns, header)


def _torch_files(path: Path) -> list[Path]:
    """The archives of torch.save that make up the model in a folder."""
    if (path / BIN_INDEX).is_file():
        try:
            names = set(json.loads((path / BIN_INDEX).read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            raise CheckpointError(f"{path / BIN_INDEX} is not an index: it must hold a table 'weight_map'") from None
        if any(Path(str(name)).name != name for name in names):
            raise CheckpointError(f"{path / BIN_INDEX} names files outside its own folder")
        return [path / name for name in sorted(names)]
    if (path / BIN).is_file():
        return [path / BIN]
    found = [file for file in sorted(path.iterdir()) if file.suffix in _TORCH_SUFFIXES]
    return found if len(found) == 1 else []


def _open_torch(path: Path, *, training: bool) -> Source:
    paths = [path] if path.is_file() else _torch_files(path)
    tensors: dict[str, Stored] = {}
    aliases: dict[str, str] = {}
    for file in paths:
        if not file.is_file():
            raise CheckpointError(f"{file} does not exist, but {BIN_INDEX} names it")
        archive = torchzip.read_archive(file)
        every = dict(torchzip.flat(archive.value))
        views = {name: view for name, view in every.items() if not is_training(name)}
        if training and len(views) < len(every):
            raise UnsupportedError(
                f"{file} holds the state of an optimizer beside the weights, which is merged from step folders,"
                f" distributed checkpoints and {OPTIMIZER} only; save it apart, or leave merge.optimizer out"
                " (--optimizer)"
            )
        first: dict[torchzip.View, str] = {}
        for name, view in views.items():
            if first.setdefault(view, name) != name:
                aliases[name] = first[view]
                continue
            tensors[name] = _torch_tensor(file, name, view, archive.payloads)
        if not views:
            raise CheckpointError(f"{file} holds no tensors")
    by_place = dict(sorted(tensors.items(), key=lambda item: _first_place(item[1])))
    files = {file.name: _source_file(file) for file in paths}
    return Source(path.parent if path.is_file() else path, by_place, {}, files, aliases)


def _torch_tensor(file: Path, name: str, view: torchzip.View, payloads: Mapping[str, torchzip.Payload]) -> Stored:
    if not torchzip.is_contiguous(view):
        raise CheckpointError(
            f"tensor '{name}' in {file} is stored with strides {list(view.stride)}; save it with contiguous()"
        )
    payload, elements = payloads.get(view.key), math.prod(view.shape)
    width = ITEM_BYTES.get(view.dtype, 1)
    if payload is None or (view.offset + elements) * width > payload.size:
        raise CheckpointError(f"{file} is damaged: the storage {view.key} is missing or too short")
    whole = view.offset == 0 and elements * width == payload.size
    return _whole(view.dtype, view.shape, file, payload.start + view.offset * width, payload.crc if whole else None)


def _rename(source: Source, rules: Sequence[tuple[str, str]]) -> Source:
    if not rules:
        return source

    def new(name: str) -> str:
        for pattern, replacement in rules:
            try:
                name = re.sub(pattern, replacement, name)
            except re.error as error:
                raise ConfigError(
                    f"merge.rename = '{pattern}={replacement}' is no regular expression: {error}"
                ) from None
        return name

    tensors: dict[str, Stored] = {}
    for name, stored in source.tensors.items():
        if new(name) in tensors:
            raise ConfigError(
                f"merge.rename gives two tensors of {source.path} the name '{new(name)}'; change the rules"
            )
        tensors[new(name)] = stored
    return source._replace(tensors=tensors, aliases={new(a): new(b) for a, b in source.aliases.items()})


def tied_pairs(sources: Sequence[Source]) -> list[tuple[str, str]]:
    """Names that are one weight: those that a file of torch.save stores once, and those that config.json ties."""
    pairs = {(first, alias): None for source in sources for alias, first in source.aliases.items()}
    config = sources[-1].path / "config.json"
    if config.is_file():
        try:
            settings = json.loads(config.read_text())
        except ValueError:
            raise CheckpointError(f"{config} is not a JSON file") from None
        if settings.get("tie_word_embeddings") or settings.get("text_config", {}).get("tie_word_embeddings"):
            present = {name for source in sources for name in source.tensors}
            pairs |= {pair: None for pair in _TIED if present.issuperset(pair)}
    return list(pairs)
