"""The streaming average: read N checkpoints once, in file order and in bounded memory, write one.

Extents of consecutive tensors are cut into pieces; a thread takes a piece, reads its bytes from every source,
sums them in the order of the sources, rounds, and writes. Pieces do not depend on each other, so the bytes
written are the same for any number of threads and any size of piece.
"""

from __future__ import annotations

import bisect
import errno
import glob
import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import whimbrel
from whimbrel.checkpoint.steps import META, Meta, read_meta
from whimbrel.checkpoint.tensorfile import (
    INDEX,
    ITEM_BYTES,
    SINGLE,
    Entry,
    TensorFolder,
    make_header,
    read_exactly,
    read_folder,
    write_exactly,
)
from whimbrel.config import MergeConfig, encode, require
from whimbrel.errors import CheckpointError, ConfigError, UnsupportedError, nearest
from whimbrel.files import atomic_folder, disk_space, remove_leftovers, sha256_file
from whimbrel.merge.blocks import BLOCK, FLOATS, Averager, BadValue
from whimbrel.merge.config import merge_config
from whimbrel.merge.pma import Number, Weights

MANIFEST = "merge.json"
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
Progress = Callable[[int, int], None]

_COPIED_SUFFIXES = (".json", ".toml", ".txt", ".model", ".jinja")
_NOT_COPIED = (MANIFEST, META, INDEX, "trainer_state.json")
_EXACT = {"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
_LARGEST_PIECE = 4 * 2**20
_SMALLEST_PIECE = 64 * 2**10


class MergeReport(NamedTuple):
    """What a merge did."""

    out: Path
    """The folder written."""
    sources: tuple[Path, ...]
    """What was averaged, oldest first."""
    weights: Weights
    """Their weights."""
    tensors: int
    """Tensors in the result."""
    read_bytes: int
    """Bytes of tensors read."""
    written_bytes: int
    """Bytes of tensors written."""
    seconds: float
    """Wall time of the whole merge."""


class _Source(NamedTuple):
    folder: TensorFolder
    meta: Meta | None


class _Extent(NamedTuple):
    """Elements of one type that lie consecutively in every source and in the result."""

    dtype: str
    out_dtype: str
    elements: int
    names: tuple[str, ...]
    starts: tuple[int, ...]
    reads: tuple[tuple[Path, int], ...]
    out_file: str
    out_offset: int


class _Plan(NamedTuple):
    headers: dict[str, bytes]
    sizes: dict[str, int]
    extents: list[_Extent]
    tensors: int


def merge_checkpoints(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    method: str | MergeConfig = "sma",
    alpha: float | None = None,
    weights: Sequence[Number] | None = None,
    dtype: str | None = None,
    tied: Sequence[tuple[str, str]] = (),
    memory_limit: int = 256 * 2**20,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write the weighted average of checkpoints of one run to the folder `out`, complete or not at all.

    sources: step folders, other folders of safetensors (one file, or several with an index), or files; oldest
    first. method: a kind of `whimbrel.merge.KINDS`, or a config; `alpha` is the option of `ema` and
    `ema-corrected` (0.2 if left out), `weights` that of `explicit`, one for each source. dtype: type of the
    float tensors of the result ("float32", "bfloat16", ...); theirs if left out. tied: pairs of names that
    are one weight. A source may hold either or both; copies that differ are refused. memory_limit: bytes of
    all buffers, whatever the size of the model and the number of sources. workers: threads, 2 to 4 by
    default; the result does not depend on it. progress: called with the bytes read so far and in all.

    Floats are averaged in float64 and rounded once. Integer and bool tensors must be equal in all sources.
    The files beside the weights (config.toml, tokenizer.json, ...) come from the newest source; `merge.json`
    records sources, exact weights and checksums.

    Raises ConfigError for arguments, CheckpointError for sources that are damaged, do not match, hold NaN or
    infinities (each with tensor and source named) and for a full disk, UnsupportedError for 8-bit floats.
    """
    begin = time.perf_counter()
    config = merge_config(method, alpha=alpha, weights=weights)
    out = Path(out)
    _check_out(out, sources, overwrite)
    opened = _open_sources(sources)
    numbers = config.weights(len(opened))
    _check_order(opened, numbers)
    plan = _make_plan([source.folder for source in opened], _out_dtype(dtype), tied)
    workers = max(2, min(4, os.cpu_count() or 1)) if workers is None else workers
    require(workers >= 1, "merge.workers", workers, "at least one thread")
    piece = _piece_bytes(memory_limit, workers, len(opened))
    remove_leftovers(out.parent, glob.escape(out.name))
    written = sum(plan.sizes.values())
    with (
        disk_space(out, written + 2**20, f"merge {out}", CheckpointError),
        atomic_folder(out, overwrite=overwrite) as folder,
    ):
        _stream(plan, opened, numbers, folder, workers, piece, progress)
        _check_unchanged(opened)
        _copy_companions(opened[-1].folder, folder)
        _write_index(opened[-1].folder, plan, folder)
        _write_manifest(folder, opened, config, numbers, dtype)
    read = sum(_extent_bytes(extent) * len(opened) for extent in plan.extents)
    paths = tuple(Path(source) for source in sources)
    return MergeReport(out, paths, numbers, plan.tensors, read, written, time.perf_counter() - begin)


def _check_out(out: Path, sources: Sequence[str | Path], overwrite: bool) -> None:
    if out.suffix == ".safetensors":
        raise ConfigError(f"merge.out = '{out}' names a file; name the folder to write instead")
    for source in sources:
        if out.exists() and Path(source).exists() and Path(source).resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"merge.out = '{out}' would replace the source {source}; choose another folder")
    if out.exists() and not overwrite:
        raise ConfigError(f"merge.out = '{out}' exists; choose another folder or allow overwriting")
    if out.exists() and not (out / MANIFEST).is_file() and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"merge.out = '{out}' is not a merge and is not overwritten; choose another folder")


def _open_sources(sources: Sequence[str | Path]) -> list[_Source]:
    require(len(sources) > 0, "number of checkpoints to merge", 0, "at least one")
    opened: list[_Source] = []
    owners: dict[tuple[int, int], int] = {}
    for number, source in enumerate(sources):
        folder = read_folder(source)
        for file in folder.files.values():
            status = file.path.stat()
            first = owners.setdefault((status.st_dev, status.st_ino), number)
            if first != number:
                raise ConfigError(f"source {source} is the same as source {sources[first]}; name each checkpoint once")
        is_step = Path(source).is_dir() and (folder.path / META).is_file()
        opened.append(_Source(folder, read_meta(folder.path) if is_step else None))
    return opened


def _check_order(opened: list[_Source], weights: Weights) -> None:
    """Where order matters and the steps are known, they must rise."""
    if len(set(weights.values)) <= 1:
        return
    known = [source for source in opened if source.meta is not None]
    for before, after in pairwise(known):
        if before.meta is not None and after.meta is not None and after.meta.step < before.meta.step:
            raise ConfigError(
                f"{after.folder.path} (step {after.meta.step}) comes after {before.folder.path}"
                f" (step {before.meta.step}); name the checkpoints from oldest to newest"
            )


def _out_dtype(dtype: str | None) -> str | None:
    if dtype is not None and dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise ConfigError(f"merge.dtype = '{dtype}' is not known{nearest(dtype, DTYPES)}; use {known}")
    return None if dtype is None else DTYPES[dtype]


def _piece_bytes(memory_limit: int, workers: int, num_sources: int) -> int:
    """Bytes to read from each source at a time, so that all buffers of all threads fit the limit."""
    # The result of a piece may be up to four times as wide as its source (bfloat16 to float64).
    shares = workers * (num_sources + 4)
    scratch = workers * 64 * BLOCK
    least = shares * _SMALLEST_PIECE + scratch
    allowed = f"at least {least} bytes for {num_sources} sources and {workers} threads"
    require(memory_limit >= least, "merge.memory_limit", memory_limit, allowed)
    return min(_LARGEST_PIECE, (memory_limit - scratch) // shares // 8 * 8)


def _make_plan(folders: list[TensorFolder], out_dtype: str | None, tied: Sequence[tuple[str, str]]) -> _Plan:
    newest = folders[-1]
    partner = {a: b for pair in tied for a, b in (pair, pair[::-1])}
    _check_names(folders, partner)
    _check_tied(folders, tied)
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    extents: list[_Extent] = []
    for stored_name, file in newest.files.items():
        file_name = stored_name if len(newest.files) > 1 else SINGLE
        in_order = sorted(file.entries, key=lambda name: file.entries[name].start)
        stored_as = {name: [_stored_name(folder, name, partner) for folder in folders] for name in in_order}
        layout = {
            name: (_result_dtype(name, folders, stored_as[name], out_dtype), file.entries[name].shape)
            for name in in_order
        }
        headers[file_name], places = make_header(layout, file.metadata)
        sizes[file_name] = max([len(headers[file_name]), *(place.stop for place in places.values())])
        for name in in_order:
            reads = tuple(_place(folder, own) for folder, own in zip(folders, stored_as[name], strict=True))
            _append(extents, name, file.entries[name], reads, file_name, places[name])
    return _Plan(headers, sizes, extents, len(newest.places))


def _stored_name(folder: TensorFolder, name: str, partner: Mapping[str, str]) -> str:
    """The name under which `folder` holds the tensor: its own or that of its tied partner."""
    return name if name in folder.places else partner.get(name, name)


def _check_names(folders: list[TensorFolder], partner: Mapping[str, str]) -> None:
    newest = folders[-1]
    for folder in folders[:-1]:
        for one, other in ((newest, folder), (folder, newest)):
            for name in one.places:
                if _stored_name(other, name, partner) not in other.places:
                    raise CheckpointError(f"tensor '{name}' is in {one.path} but not in {other.path}")


def _check_tied(folders: list[TensorFolder], tied: Sequence[tuple[str, str]]) -> None:
    for pair in tied:
        for folder in folders:
            if all(name in folder.places for name in pair) and not _equal_tensors(folder, *pair):
                raise CheckpointError(f"tensors '{pair[0]}' and '{pair[1]}' are tied, but differ in {folder.path}")
        if not any(name in folders[-1].places for name in pair):
            raise ConfigError(f"merge.tied names '{pair[0]}' and '{pair[1]}', but {folders[-1].path} has neither")


def _equal_tensors(folder: TensorFolder, a: str, b: str) -> bool:
    one, other = folder.entry(a), folder.entry(b)
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for start in range(0, one.stop - one.start, _LARGEST_PIECE):
        size = min(_LARGEST_PIECE, one.stop - one.start - start)
        left, right = bytearray(size), bytearray(size)
        _read(folder.file(a).path, memoryview(left), one.start + start)
        _read(folder.file(b).path, memoryview(right), other.start + start)
        if left != right:
            return False
    return True


def _result_dtype(name: str, folders: list[TensorFolder], stored_as: list[str], out_dtype: str | None) -> str:
    """The type of a tensor in the result, after a check that all sources agree on it."""
    newest, entry = folders[-1], folders[-1].entry(name)
    for folder, own in zip(folders, stored_as, strict=True):
        other = folder.entry(own)
        if other.shape != entry.shape:
            raise CheckpointError(
                f"tensor '{name}' has shape {list(other.shape)} in {folder.path},"
                f" but {list(entry.shape)} in {newest.path}"
            )
        if other.dtype != entry.dtype:
            raise CheckpointError(
                f"tensor '{name}' is {other.dtype} in {folder.path}, but {entry.dtype} in {newest.path};"
                " convert one of them first"
            )
    if entry.dtype not in (*FLOATS, *_EXACT, "C64"):
        raise UnsupportedError(
            f"tensor '{name}' in {newest.path} is {entry.dtype}, whose codes cannot be averaged;"
            " merge a copy of the checkpoint in bfloat16 or wider"
        )
    return out_dtype if out_dtype is not None and entry.dtype in FLOATS else entry.dtype


def _place(folder: TensorFolder, name: str) -> tuple[Path, int]:
    return folder.file(name).path, folder.entry(name).start


def _append(
    extents: list[_Extent],
    name: str,
    entry: Entry,
    reads: tuple[tuple[Path, int], ...],
    out_file: str,
    place: Entry,
) -> None:
    """Add a tensor to the last extent if it goes on there, else as a new one."""
    # A complex number is two floats, and its parts are averaged as such.
    dtype, out_dtype = ("F32", "F32") if entry.dtype == "C64" else (entry.dtype, place.dtype)
    elements = (entry.stop - entry.start) // ITEM_BYTES[dtype]
    if elements == 0:
        return
    last = extents[-1] if extents else None
    if last is not None and (last.dtype, last.out_dtype, last.out_file) == (dtype, out_dtype, out_file):
        after = _extent_bytes(last)
        if reads == tuple((path, offset + after) for path, offset in last.reads):
            extents[-1] = last._replace(
                elements=last.elements + elements,
                names=(*last.names, name),
                starts=(*last.starts, last.elements),
            )
            return
    extents.append(_Extent(dtype, out_dtype, elements, (name,), (0,), reads, out_file, place.start))


def _extent_bytes(extent: _Extent) -> int:
    return extent.elements * ITEM_BYTES[extent.dtype]


def _read(path: Path, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from the file's bytes at `offset`."""
    # Opened anew for every piece: sources times shards may exceed the files that a process can hold open.
    handle = os.open(path, os.O_RDONLY)
    try:
        read_exactly(handle, buffer, offset, path)
    finally:
        os.close(handle)


class _Worker:
    """The buffers of one thread."""

    def __init__(self, num_sources: int, piece: int, weights: Weights) -> None:
        self.inputs = [bytearray(piece) for _ in range(num_sources)]
        self.output = bytearray(4 * piece)
        self.averager = Averager(weights)


def _stream(
    plan: _Plan,
    opened: list[_Source],
    weights: Weights,
    folder: Path,
    num_workers: int,
    piece: int,
    progress: Progress | None,
) -> None:
    """Write the files of the result."""
    sources = [source.folder for source in opened]
    total = sum(_extent_bytes(extent) for extent in plan.extents) * len(sources)
    local = threading.local()
    done = 0
    with ExitStack() as stack:
        outputs = {
            name: _create(folder / name, header, plan.sizes[name], stack) for name, header in plan.headers.items()
        }

        def work(extent: _Extent, start: int, stop: int) -> int:
            if not hasattr(local, "worker"):
                local.worker = _Worker(len(sources), piece, weights)
            return _merge_piece(extent, start, stop, sources, local.worker, outputs[extent.out_file])

        pool = stack.enter_context(ThreadPoolExecutor(num_workers))
        stack.callback(pool.shutdown, cancel_futures=True)
        waiting: deque[Future[int]] = deque()
        for extent, start, stop in _pieces(plan.extents, piece):
            waiting.append(pool.submit(work, extent, start, stop))
            if len(waiting) > 2 * num_workers:
                done = _report(waiting.popleft(), done, total, progress)
        while waiting:
            done = _report(waiting.popleft(), done, total, progress)


def _pieces(extents: list[_Extent], piece: int) -> Iterator[tuple[_Extent, int, int]]:
    for extent in extents:
        step = piece // ITEM_BYTES[extent.dtype]
        for start in range(0, extent.elements, step):
            yield extent, start, min(start + step, extent.elements)


def _report(future: Future[int], done: int, total: int, progress: Progress | None) -> int:
    done += future.result()
    if progress is not None:
        progress(done, total)
    return done


def _create(path: Path, header: bytes, size: int, stack: ExitStack) -> int:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    stack.callback(os.close, handle)
    try:
        # A disk that is too small shows now, not after hours of reading.
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
    write_exactly(handle, memoryview(header), 0)
    return handle


def _merge_piece(
    extent: _Extent,
    start: int,
    stop: int,
    sources: list[TensorFolder],
    worker: _Worker,
    output: int,
) -> int:
    """Merge elements [start, stop) of an extent; returns the bytes read."""
    width = ITEM_BYTES[extent.dtype]
    inputs = [memoryview(buffer)[: (stop - start) * width] for buffer in worker.inputs]
    for (path, offset), buffer in zip(extent.reads, inputs, strict=True):
        _read(path, buffer, offset + start * width)
    out_width = ITEM_BYTES[extent.out_dtype]
    result = memoryview(worker.output)[: (stop - start) * out_width]
    if extent.dtype in FLOATS:
        try:
            worker.averager.average(inputs, extent.dtype, result, extent.out_dtype)
        except BadValue as bad:
            raise _describe(bad, extent, start, sources) from None
    else:
        for number, buffer in enumerate(inputs):
            if buffer != inputs[-1]:
                raise _unequal(extent, start, inputs, number, sources)
        result[:] = inputs[-1]
    write_exactly(output, result, extent.out_offset + start * out_width)
    return len(inputs) * (stop - start) * width


def _tensor_at(extent: _Extent, element: int) -> str:
    return extent.names[bisect.bisect_right(extent.starts, element) - 1]


def _describe(bad: BadValue, extent: _Extent, start: int, sources: list[TensorFolder]) -> CheckpointError:
    name = _tensor_at(extent, start + bad.element)
    if bad.source is None:
        return CheckpointError(
            f"tensor '{name}': an average of {bad.value:.4g} is too large for {extent.out_dtype};"
            " choose a wider type for the result"
        )
    return CheckpointError(
        f"tensor '{name}' holds {bad.value} in {sources[bad.source].path}; leave that checkpoint out of the merge"
    )


def _unequal(
    extent: _Extent, start: int, inputs: list[memoryview], number: int, sources: list[TensorFolder]
) -> CheckpointError:
    width = ITEM_BYTES[extent.dtype]
    differing = next(i for i, (a, b) in enumerate(zip(inputs[number], inputs[-1], strict=True)) if a != b)
    name = _tensor_at(extent, start + differing // width)
    return CheckpointError(
        f"tensor '{name}' ({extent.dtype}) differs between {sources[number].path} and {sources[-1].path};"
        " integers and booleans are not averaged, they must be equal"
    )


def _check_unchanged(opened: list[_Source]) -> None:
    for source in opened:
        for file in source.folder.files.values():
            status = file.path.stat()
            if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                raise CheckpointError(f"{file.path} changed while it was merged; start again")


def _copy_companions(newest: TensorFolder, folder: Path) -> None:
    """Copy what belongs to the weights of the newest source: configuration, tokenizer."""
    for file in sorted(newest.path.iterdir()):
        if file.is_file() and file.suffix in _COPIED_SUFFIXES and file.name not in _NOT_COPIED:
            shutil.copyfile(file, folder / file.name)


def _write_index(newest: TensorFolder, plan: _Plan, folder: Path) -> None:
    if len(newest.files) > 1:
        data = sum(plan.sizes[name] - len(plan.headers[name]) for name in plan.sizes)
        index = {"metadata": {"total_size": data}, "weight_map": newest.places}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _write_manifest(
    folder: Path, opened: list[_Source], config: MergeConfig, weights: Weights, dtype: str | None
) -> None:
    """Record what was averaged and what came out; `files` is as in a checkpoint's meta.json."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in sorted(folder.iterdir())
    }
    manifest: dict[str, Any] = {
        "format": 1,
        "whimbrel": whimbrel.__version__,
        "method": encode(config),
        "arithmetic": "float64 sums of "
        + ("integer weights, one division" if weights.integers() else "float64 weights")
        + ", each result rounded once to nearest even",
        "dtype": dtype,
        "sources": [
            {
                "path": str(source.folder.path.resolve()),
                "weight": weight,
                "step": source.meta.step if source.meta else None,
                "tokens": source.meta.tokens if source.meta else None,
                "files": {
                    name: {"bytes": file.size, "mtime_ns": file.mtime_ns, "header_sha256": file.header_sha256}
                    for name, file in source.folder.files.items()
                },
            }
            for source, weight in zip(opened, weights.texts(), strict=True)
        ],
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
