"""The streaming average: read N checkpoints once, in file order and in bounded memory, write one or several.

The plan cuts the result into pieces. A thread takes a piece, reads its bytes from every source, sums them in the order
of the sources, rounds, and writes, while other threads wait for the disk. Pieces do not depend
on each other, so the bytes written are the same for any number of threads, any size of piece, and after an
interruption.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import mmap
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import whimbrel
from whimbrel.checkpoint.crc import Pieces
from whimbrel.checkpoint.tensorfile import ITEM_BYTES, read_exactly, write_exactly
from whimbrel.config import MergeConfig, encode, require
from whimbrel.errors import CheckpointError, ConfigError
from whimbrel.files import disk_space, publish_folder, remove_leftovers, sha256_file
from whimbrel.merge.blocks import BLOCK, Averager, BadValue
from whimbrel.merge.config import merge_config
from whimbrel.merge.journal import Done, Journal, Part, open_journal, work_folder
from whimbrel.merge.outputs import MANIFEST, Layout, finish_folder, make_layout, write_step_meta
from whimbrel.merge.plan import Extent, Item, Piece, Read, Rules, Slot, cut, list_items, make_extents, reads
from whimbrel.merge.pma import Number, Weights
from whimbrel.merge.sources import Source, Stored, named_one_by_one, open_sources, tied_pairs

Progress = Callable[[int, int], None]

# Larger ones leave the caches before they are summed, smaller ones cost the disk its order (docs/log.md).
_LARGEST_PIECE = 4 * 2**20
# As far as kernels read ahead.
_STRETCH = 8 * 2**20
_SMALLEST_PIECE = 64 * 2**10
_COMPARED_PIECE = 4 * 2**20
# Seconds between two times that what was written goes to the disk and into the journal.
_SYNC_SECONDS = 2.0
_SAMPLE_BYTES = 64 * 2**20
# Threads that read and sum, unless told otherwise: one for each processor, while pieces stay large.
_MOST_WORKERS = 4
_WORKERS_PIECE = 512 * 2**10
_DEFAULT = Rules()


class Target(NamedTuple):
    """One of the averages that a pass over the sources forms."""

    name: str
    """Its folder below the result's; "" for the result itself."""
    members: tuple[int, ...]
    """Numbers of its sources, oldest first."""
    config: MergeConfig
    """Its method."""


class MergeReport(NamedTuple):
    """What a merge did."""

    out: Path
    """The folder written."""
    sources: tuple[Path, ...]
    """What was averaged, oldest first."""
    weights: Weights
    """Their weights; of several results those of the first."""
    tensors: int
    """Tensors in the result."""
    read_bytes: int
    """Bytes of tensors read."""
    written_bytes: int
    """Bytes of files of tensors written."""
    seconds: float
    """Wall time of the whole merge."""
    resumed_bytes: int
    """Bytes that an earlier, interrupted attempt had read already; not in `read_bytes`."""


class MergePlan(NamedTuple):
    """What a merge would do."""

    sources: tuple[Path, ...]
    """What would be averaged, oldest first."""
    weights: Weights
    """Their weights; of several results those of the first."""
    tensors: int
    """Tensors in the result."""
    read_bytes: int
    """Bytes of tensors to read."""
    write_bytes: int
    """Bytes of files of tensors to write."""
    buffer_bytes: int
    """Memory for all buffers; the interpreter and its libraries come on top."""
    disk_rate: float
    """Bytes a second at which the newest source was read for a moment, in order."""
    seconds: float
    """Bytes to read and write at that rate."""


class _Result(NamedTuple):
    target: Target
    weights: Weights


class _Job(NamedTuple):
    """A merge that was checked and planned."""

    sources: list[Source]
    results: list[_Result]
    rules: Rules
    layout: Layout
    extents: list[Extent]
    piece: int
    workers: int
    buffers: int

    def needed(self, item: Item) -> list[int]:
        """The sources that a tensor is read from."""
        if item.policy == "newest":
            return sorted({result.target.members[-1] for result in self.results})
        return list(range(len(self.sources)))

    @property
    def read_bytes(self) -> int:
        """Bytes of all extents in all sources that they need."""
        return sum(extent.size * len(self.needed(extent.item)) for extent in self.extents)

    @property
    def written_bytes(self) -> int:
        """Bytes of all files of tensors of all results."""
        return self.layout.written_bytes * len(self.results)


def merge_checkpoints(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    method: str | MergeConfig = "sma",
    alpha: float | None = None,
    weights: Sequence[Number] | None = None,
    dtype: str | None = None,
    tied: Sequence[tuple[str, str]] = (),
    rename: Sequence[tuple[str, str]] = (),
    newest: Sequence[str] = (),
    integers: Literal["equal", "newest", "max"] = "equal",
    router_bias: Literal["average", "newest"] = "average",
    optimizer: Literal["average", "newest", "reset"] | None = None,
    format: Literal["safetensors", "dcp"] = "safetensors",
    accumulate: str = "float64",
    tokens_per_step: int | None = None,
    memory_limit: int = 256 * 2**20,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write the weighted average of checkpoints of one run to the folder `out`, complete or not at all.

    sources: oldest first; each a step folder, another folder of safetensors (one file, or several with an index), a
    distributed checkpoint of torch (sharded in any way), a folder of pytorch_model.bin, or one such file. method: a
    kind of `whimbrel.merge.KINDS`, or a config; `alpha` is the option of `ema` and `ema-corrected` (0.2 if left out),
    `weights` that of `explicit`, one for each source.

    dtype: type of the float tensors of the result ("float32", "bfloat16", ...); theirs if left out. tied: pairs of
    names that are one weight. A source may hold either or both; copies that differ are refused. rename: regular
    expressions and replacements for the names of weights. newest: regular expressions of names to copy from the
    newest source. integers: integer and bool tensors must be equal in all sources, or come from the newest, or are
    the largest. router_bias: whether balancing biases of routers are averaged or the newest. optimizer: with
    "average", "newest" or "reset" the result of step folders, of checkpoints of transformers' Trainer (optimizer.pt) or
    of distributed checkpoints (with format "dcp") is one that a run can go on from. format: "safetensors" or "dcp".
    accumulate: type of the sums; "float64" is exact for 16-bit sources. tokens_per_step: tokens of an optimizer step,
    for `merge.json`, where the run does not record them.

    memory_limit: bytes of all buffers, whatever the size of the model and the number of sources. workers: threads, 2
    to 8 by default, as many as the buffers allow; the result does not depend on it. progress: called with the bytes
    read so far and in all.

    A merge that was killed is taken up where it was when it is called again with the same arguments. The files beside
    the weights (config.json, tokenizer.json, ...) come from the newest source; `merge.json` records sources, exact
    weights and checksums. Bytes that carry a CRC-32 (all but safetensors) are checked against it.

    Raises ConfigError for arguments, CheckpointError for sources that are damaged, do not match, hold NaN or
    infinities (each with tensor and source named) and for a full disk, UnsupportedError for 8-bit floats.
    """
    sources = named_one_by_one(sources)
    config = merge_config(method, alpha=alpha, weights=weights)
    rules = Rules(
        dtype=dtype, accumulate=accumulate, format=format, tied=tuple(tied), rename=tuple(rename),
        newest=tuple(newest), integers=integers, router_bias=router_bias, optimizer=optimizer,
    )  # fmt: skip
    target = Target("", tuple(range(len(sources))), config)
    return merge_many(
        sources, out, [target], rules=rules, tokens_per_step=tokens_per_step, memory_limit=memory_limit,
        workers=workers, overwrite=overwrite, progress=progress,
    )  # fmt: skip


def merge_many(
    sources: Sequence[str | Path],
    out: str | Path,
    targets: Sequence[Target],
    *,
    rules: Rules = _DEFAULT,
    tokens_per_step: int | None = None,
    memory_limit: int = 256 * 2**20,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write several averages of the same checkpoints in one pass over them: `out` gets a folder for each of `targets`.

    Everything else as `merge_checkpoints`; the whole of `out` appears at once. `optimizer` is for one result only.
    """
    begin = time.perf_counter()
    sources, out = named_one_by_one(sources), Path(out)
    _check_out(out, sources, overwrite)
    job = _prepare(sources, targets, rules, memory_limit, workers, tokens_per_step)
    remove_leftovers(out.parent, glob.escape(out.name))
    journal_of = open_journal(out, _fingerprint(job))
    allocated = _allocated(work_folder(out))
    needed = max(job.written_bytes + 2**20 - allocated, 0)
    with disk_space(out, needed, f"merge {out}", CheckpointError), journal_of as journal:
        resumed = _Pass(job, journal, progress).run()
        _check_unchanged(job.sources)
        publish_folder(journal.folder, out, overwrite=overwrite)
    seconds = time.perf_counter() - begin
    tensors = len({slot.item.name for slot in job.layout.slots})
    paths = tuple(Path(source) for source in sources)
    read = job.read_bytes - resumed
    return MergeReport(out, paths, job.results[0].weights, tensors, read, job.written_bytes, seconds, resumed)


def plan_merge(
    sources: Sequence[str | Path],
    targets: Sequence[Target],
    *,
    rules: Rules = _DEFAULT,
    memory_limit: int = 256 * 2**20,
    workers: int | None = None,
) -> MergePlan:
    """What `merge_many` would do, after all checks that need no data; reads a moment to see how fast the disk is."""
    job = _prepare(sources, targets, rules, memory_limit, workers)
    rate = disk_rate(job.sources[-1])
    seconds = (job.read_bytes + job.written_bytes) / max(rate, 1.0)
    tensors = len({slot.item.name for slot in job.layout.slots})
    return MergePlan(
        tuple(Path(source) for source in sources), job.results[0].weights, tensors, job.read_bytes,
        job.written_bytes, job.buffers, rate, seconds,
    )  # fmt: skip


def disk_rate(source: Source) -> float:
    """Bytes a second at which the largest file of a source is read in order, from the disk; 64 MiB of it are tried."""
    path = max((file.path for file in source.files.values()), key=lambda path: path.stat().st_size)
    size = min(path.stat().st_size, _SAMPLE_BYTES)
    buffer = memoryview(bytearray(4 * 2**20))
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, size, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        for start in range(0, size, len(buffer)):
            read_exactly(handle, buffer[: min(len(buffer), size - start)], start, path)
        return size / max(time.perf_counter() - begin, 1e-9)
    finally:
        os.close(handle)


def _prepare(
    paths: Sequence[str | Path],
    targets: Sequence[Target],
    rules: Rules,
    memory_limit: int,
    workers: int | None,
    tokens_per_step: int | None = None,
) -> _Job:
    if rules.optimizer is not None and len(targets) > 1:
        raise ConfigError(f"merge.optimizer = '{rules.optimizer}' is for a single result; merge those one by one")
    training = rules.optimizer is not None
    sources = open_sources(paths, rename=rules.rename, training=training, tokens_per_step=tokens_per_step)
    results = [_Result(target, target.config.weights(len(target.members))) for target in targets]
    for result in results:
        _check_order([sources[member] for member in result.target.members], result.weights)
    tied = [*rules.tied, *(pair for pair in tied_pairs(sources) if pair not in rules.tied)]
    items, state = list_items(sources, rules, tied)
    _check_tied(sources, tied)
    layout = make_layout(items, state, sources[-1], rules)
    extents = make_extents(layout.slots)
    wider = max([ITEM_BYTES[item.out_dtype] // ITEM_BYTES[item.dtype] for item in items], default=1)
    num_outputs = len(targets) * max(wider, 1)
    if workers is None:
        most = memory_limit // ((len(sources) + num_outputs + 1) * _WORKERS_PIECE)
        workers = max(2, min(_MOST_WORKERS, len(os.sched_getaffinity(0)), most))
    require(workers >= 1, "merge.workers", workers, "at least one thread")
    piece, buffers = _piece_bytes(memory_limit, workers, len(sources), num_outputs)
    return _Job(sources, results, rules, layout, extents, piece, workers, buffers)


def _check_out(out: Path, sources: Sequence[str | Path], overwrite: bool) -> None:
    if out.suffix == ".safetensors":
        raise ConfigError(f"merge.out = '{out}' names a file; name the folder to write instead")
    for source in sources:
        if out.exists() and Path(source).exists() and Path(source).resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"merge.out = '{out}' would replace the source {source}; choose another folder")
    if out.exists() and not overwrite:
        raise ConfigError(
            f"merge.out = '{out}' exists; choose another folder, or replace it with --overwrite (overwrite=True)"
        )
    if out.exists() and not (out / MANIFEST).is_file() and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"merge.out = '{out}' is not a merge and is not overwritten; choose another folder")


def _check_order(opened: list[Source], weights: Weights) -> None:
    """Where order matters and the steps are known, they must rise."""
    if len(set(weights.values)) <= 1:
        return
    known = [(source.path, source.step) for source in opened if source.step is not None]
    for (path_before, before), (path, after) in pairwise(known):
        if after < before:
            raise ConfigError(
                f"{path} (step {after}) comes after {path_before} (step {before}); name the checkpoints from oldest to"
                " newest"
            )


def _piece_bytes(memory_limit: int, workers: int, num_sources: int, num_outputs: int) -> tuple[int, int]:
    """Bytes to read from each source at a time, so that all buffers fit the limit, and what these take."""
    # One share more holds bytes that are to be spread over a piece.
    shares = workers * (num_sources + num_outputs + 1)
    scratch = workers * 64 * BLOCK
    least = shares * _SMALLEST_PIECE + scratch
    allowed = f"at least {least} bytes ({-(-least // 2**20)} MiB) for {num_sources} sources and {workers} threads"
    require(memory_limit >= least, "merge.memory_limit", memory_limit, allowed)
    piece = min(_LARGEST_PIECE, (memory_limit - scratch) // shares // 8 * 8)
    return piece, shares * piece + scratch


def _fingerprint(job: _Job) -> str:
    """What the bytes of the result, and their cutting into pieces, depend on."""
    described = {
        "whimbrel": whimbrel.__version__,
        "sources": [
            [str(source.path.resolve()), [(name, *file[1:]) for name, file in source.files.items()]]
            for source in job.sources
        ],
        "results": [(result.target.name, result.target.members, result.weights.texts()) for result in job.results],
        "rules": asdict(job.rules),
        "piece": job.piece,
    }
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _allocated(folder: Path) -> int:
    """Bytes on the disk of what an interrupted merge has left in `folder`."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def _check_tied(sources: Sequence[Source], tied: Sequence[tuple[str, str]]) -> None:
    for a, b in tied:
        for source in sources:
            if a in source.tensors and b in source.tensors and not _equal(source.tensors[a], source.tensors[b]):
                raise CheckpointError(f"tensors '{a}' and '{b}' are tied, but differ in {source.path}")


def _equal(one: Stored, other: Stored) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    handles = _Handles()
    with handles.closing():
        both = Item("", one.dtype, one.dtype, one.shape, "equal", (one, other))
        extents = make_extents([Slot(both, (0,) * len(one.shape), one.shape, "", 0)])
        buffers = _Buffers(2, _COMPARED_PIECE, 0, [])
        for piece in cut(extents, _COMPARED_PIECE):
            for number in range(2):
                buffers.fill(piece, number, handles)
            if buffers.data(piece, 0) != buffers.data(piece, 1):
                return False
    return True


class _Handles:
    """Files open for reading, as many as the process may well hold; others are opened for each read."""

    def __init__(self) -> None:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._room = max((limit if limit != resource.RLIM_INFINITY else 4096) // 2 - 64, 0)
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    @contextmanager
    def use(self, path: Path) -> Iterator[int]:
        """A handle for reading `path` from its beginning to its end."""
        with self._lock:
            handle = self._open.get(path)
            if handle is None and len(self._open) < self._room:
                handle = self._open[path] = self._new(path)
        if handle is not None:
            yield handle
            return
        handle = self._new(path)
        try:
            yield handle
        finally:
            os.close(handle)

    @staticmethod
    def _new(path: Path) -> int:
        handle = os.open(path, os.O_RDONLY)
        # The kernel then reads twice as far ahead, which is what keeps the disk busy while pieces are summed.
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return handle

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close all of them at the end of the block, and leave nothing of them in the page cache."""
        try:
            yield
        finally:
            for handle in self._open.values():
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(handle)


class _Buffers:
    """The memory of one thread."""

    def __init__(self, num_sources: int, piece: int, wider: int, averagers: list[Averager]) -> None:
        # Rows a multiple of large powers of two apart would share few places of the caches.
        room = -(-piece // 4096) * 4096 + 64
        self.inputs = np.frombuffer(mmap.mmap(-1, num_sources * room), np.uint8).reshape(num_sources, room)
        self._spread = memoryview(mmap.mmap(-1, room))
        self.output = bytearray(piece * wider)
        self.averagers = averagers

    def fill(self, piece: Piece, source: int, handles: _Handles) -> list[tuple[Read, int]]:
        """Put the piece's bytes of a source into its row; returns the CRC-32 of reads of boxes that have one."""
        size, width = piece.stop - piece.start, ITEM_BYTES[piece.extent.item.dtype]
        row = self.inputs[source, :size]
        stored = piece.extent.item.stored[source].boxes
        crcs: list[tuple[Read, int]] = []
        for read in reads(piece, source):
            whole = row.data[read.offset :] if read.into is None else self._spread
            data = whole[: read.size]
            with handles.use(read.path) as handle:
                read_exactly(handle, data, read.start, read.path)
                _forget(handle, read)
            if stored[read.box].crc is not None:
                crcs.append((read, zlib.crc32(data)))
            if read.into is not None:
                item = f"V{width}"
                row.view(item).reshape(piece.sizes)[read.into] = np.frombuffer(data, item).reshape(read.sizes)
        return crcs

    def data(self, piece: Piece, source: int) -> memoryview:
        """The piece's bytes of a source that `fill` has read."""
        return self.inputs[source, : piece.stop - piece.start].data


def _forget(handle: int, read: Read) -> None:
    """Take out of the page cache what was read, in whole stretches, so that other programs keep what they have there.

    Parts of them are left until the last read in a stretch: what the kernel read at once it would have to take apart.
    """
    first, last = (place // _STRETCH * _STRETCH for place in (read.start, read.start + read.size))
    if last > first:
        os.posix_fadvise(handle, first, last - first, os.POSIX_FADV_DONTNEED)


class _Pass:
    """One pass over the sources, which writes all results into the journal's folder."""

    def __init__(self, job: _Job, journal: Journal, progress: Progress | None) -> None:
        self._job, self._journal, self._progress = job, journal, progress
        self._handles = _Handles()
        # One piece is read at a time: disks and the kernel's reading ahead are fastest with files read in order.
        self._reading = threading.Lock()
        self._local = threading.local()
        self._files: dict[tuple[int, str], int] = {}
        self._hashes = {
            (k, file): hashlib.sha256() for k in range(len(job.results)) for file in job.layout.places.values()
        }
        self._boxes: dict[tuple[int, str, int], Pieces] = {}
        self._crcs: list[dict[int, Pieces]] = [{} for _ in job.results]
        self._slot_crcs: list[dict[int, int]] = [{} for _ in job.results]
        self._unsynced: list[Done] = []
        self._synced = time.monotonic()
        self._done_bytes = 0

    def run(self) -> int:
        """Write all files but the results' names; returns the bytes that an earlier attempt had read."""
        job = self._job
        pieces = list(cut(job.extents, job.piece))
        with ExitStack() as stack:
            stack.enter_context(self._handles.closing())
            for number, result in enumerate(job.results):
                for file, size in job.layout.sizes.items():
                    self._files[number, file] = _create(self._folder(result) / file, size, stack)
                for file, heads in job.layout.heads.items():
                    for place, data in heads:
                        write_exactly(self._files[number, file], memoryview(data), place)
                        if (number, file) in self._hashes:
                            self._hashes[number, file].update(data)
            resumed = self._take_up(pieces)
            first = len(self._journal.done)
            syncer = stack.enter_context(ThreadPoolExecutor(1))
            pool = stack.enter_context(ThreadPoolExecutor(job.workers))
            stack.callback(pool.shutdown, cancel_futures=True)
            waiting: deque[tuple[Piece, Future[Done]]] = deque()
            sync: Future[None] | None = None
            for piece in pieces[first:]:
                waiting.append((piece, pool.submit(self._merge, piece)))
                if len(waiting) > 2 * job.workers:
                    sync = self._take(*waiting.popleft(), syncer, sync)
            while waiting:
                sync = self._take(*waiting.popleft(), syncer, sync)
            if sync is not None:
                sync.result()
        self._finish()
        return resumed

    def _folder(self, result: _Result) -> Path:
        return self._journal.folder / result.target.name

    def _merge(self, piece: Piece) -> Done:
        """Merge one piece for every result."""
        job, extent = self._job, piece.extent
        if not hasattr(self._local, "buffers"):
            averagers = [Averager(result.weights, job.rules.accumulate) for result in job.results]
            wider = max(ITEM_BYTES[e.item.out_dtype] // ITEM_BYTES[e.item.dtype] for e in job.extents)
            self._local.buffers = _Buffers(len(job.sources), job.piece, max(wider, 1), averagers)
        buffers: _Buffers = self._local.buffers
        parts: list[Part] = []
        with self._reading:
            for source in job.needed(extent.item):
                crcs = buffers.fill(piece, source, self._handles)
                parts += [Part(source, read.box, read.at, read.size, crc) for read, crc in crcs]
        written = []
        for number, result in enumerate(job.results):
            out = memoryview(buffers.output)[: _out_bytes(extent, piece.stop - piece.start)]
            self._combine(piece, result.target.members, buffers, buffers.averagers[number], out)
            slot = extent.slots[0]
            write_exactly(self._files[number, slot.file], out, slot.start + _out_bytes(extent, piece.start))
            written.append(zlib.crc32(out))
        return Done(tuple(written), tuple(parts))

    def _combine(
        self, piece: Piece, members: tuple[int, ...], buffers: _Buffers, averager: Averager, out: memoryview
    ) -> None:
        item, newest = piece.extent.item, buffers.data(piece, members[-1])
        if item.policy == "newest":
            out[:] = newest
        elif item.policy == "max":
            kind = {"I": "i", "U": "u", "B": "u"}[item.dtype[0]]
            dtype = f"<{kind}{ITEM_BYTES[item.dtype]}"
            arrays = [np.frombuffer(buffers.data(piece, member), dtype) for member in members]
            np.maximum.reduce(arrays, out=np.frombuffer(out, arrays[0].dtype))
        elif item.policy == "equal":
            for member in members:
                data = buffers.data(piece, member)
                if data != newest:
                    raise self._unequal(piece, data, newest, member, members[-1])
            out[:] = newest
        else:
            # A complex number is two floats, and its parts are averaged as such.
            dtype, out_dtype = ("F32", "F32") if item.dtype == "C64" else (item.dtype, item.out_dtype)
            try:
                averager.average(buffers.inputs, members, dtype, out, out_dtype)
            except BadValue as bad:
                raise self._describe(bad, piece, ITEM_BYTES[dtype], members) from None

    def _tensor_at(self, piece: Piece, byte: int) -> str:
        """The tensor that a byte of the piece belongs to."""
        starts = piece.extent.starts
        number = next(i for i in reversed(range(len(starts))) if starts[i] <= piece.start + byte)
        return piece.extent.slots[number].item.name

    def _describe(self, bad: BadValue, piece: Piece, width: int, members: tuple[int, ...]) -> CheckpointError:
        name = self._tensor_at(piece, bad.element * width)
        if bad.source is None:
            return CheckpointError(
                f"tensor '{name}': an average of {bad.value:.4g} is too large for {piece.extent.item.out_dtype};"
                " choose a wider type for the result"
            )
        path = self._job.sources[members[bad.source]].path
        return CheckpointError(f"tensor '{name}' holds {bad.value} in {path}; leave that checkpoint out of the merge")

    def _unequal(self, piece: Piece, one: memoryview, other: memoryview, source: int, newest: int) -> CheckpointError:
        differing = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
        name, sources = self._tensor_at(piece, differing), self._job.sources
        return CheckpointError(
            f"tensor '{name}' ({piece.extent.item.dtype}) differs between {sources[source].path} and"
            f" {sources[newest].path}; integers and booleans are not averaged, they must be equal"
            " (or say which to take: --integers newest or max)"
        )

    def _take(
        self, piece: Piece, future: Future[Done], syncer: ThreadPoolExecutor, sync: Future[None] | None
    ) -> Future[None] | None:
        """Account for a merged piece, in order; every few seconds put what was written on the disk."""
        done = future.result()
        self._count(piece, done)
        self._unsynced.append(done)
        if time.monotonic() - self._synced > _SYNC_SECONDS and (sync is None or sync.done()):
            if sync is not None:
                sync.result()
            self._synced = time.monotonic()
            sync = syncer.submit(self._sync, self._unsynced)
            self._unsynced = []
        return sync

    def _sync(self, pieces: list[Done]) -> None:
        for handle in self._files.values():
            os.fdatasync(handle)
        self._journal.write(pieces)

    def _count(self, piece: Piece, done: Done) -> None:
        """Check what was read against stored CRC-32s, hash what was written, say how far it is."""
        extent = piece.extent
        for part in done.parts:
            self._check(part, extent)
        size = _out_bytes(extent, piece.stop - piece.start)
        start = extent.slots[0].start + _out_bytes(extent, piece.start)
        file = extent.slots[0].file
        for number in range(len(self._job.results)):
            if (number, file) in self._hashes:
                data = os.pread(self._files[number, file], size, start)
                self._hashes[number, file].update(data)
            else:
                crcs = self._crcs[number].setdefault(extent.number, Pieces(_out_bytes(extent, extent.size)))
                whole = crcs.add(start - extent.slots[0].start, size, done.written[number])
                if whole is not None:
                    self._slot_crcs[number][extent.number] = whole
        self._done_bytes += (piece.stop - piece.start) * len(self._job.needed(extent.item))
        if self._progress is not None:
            self._progress(self._done_bytes, self._job.read_bytes)

    def _check(self, part: Part, extent: Extent) -> None:
        item, source = extent.item, self._job.sources[part.source]
        box = item.stored[part.source].boxes[part.box]
        # By the tensor, not the slot: a box may be spread over several of them.
        key = (part.source, item.name, part.box)
        size = ITEM_BYTES[item.dtype] * int(np.prod(box.sizes, dtype=np.int64))
        pieces = self._boxes.setdefault(key, Pieces(size))
        found = pieces.add(part.at, part.size, part.crc)
        if found is None:
            return
        del self._boxes[key]
        if found != box.crc:
            raise CheckpointError(
                f"tensor '{item.name}' of {source.path} is damaged: the CRC-32 of its {size:,} bytes at"
                f" {box.start:,} in {box.path} is {found:08x}, but was {box.crc:08x} when they were written"
            )

    def _take_up(self, pieces: list[Piece]) -> int:
        """Check and count the pieces of an earlier attempt; returns the bytes of the sources that they stand for."""
        for count, (piece, done) in enumerate(zip(pieces, self._journal.done)):
            slot, extent = piece.extent.slots[0], piece.extent
            size, start = _out_bytes(extent, piece.stop - piece.start), slot.start + _out_bytes(extent, piece.start)
            found = tuple(
                zlib.crc32(os.pread(self._files[number, slot.file], size, start))
                for number in range(len(self._job.results))
            )
            if found != done.written:
                self._journal.keep(count, _fingerprint(self._job))
                break
            self._count(piece, done)
        return self._done_bytes

    def _finish(self) -> None:
        job = self._job
        for number, result in enumerate(job.results):
            newest = job.sources[result.target.members[-1]]
            folder = self._folder(result)
            finish_folder(folder, job.layout, self._slot_crcs[number], newest, job.rules.optimizer)
            hashes = {file: digest.hexdigest() for (k, file), digest in self._hashes.items() if k == number}
            _write_manifest(folder, job, result, hashes)
            if job.rules.optimizer is not None and newest.meta is not None:
                write_step_meta(folder, newest.meta, hashes)
        if len(job.results) > 1:
            _write_contents(self._journal.folder, job)


def _out_bytes(extent: Extent, size: int) -> int:
    """Bytes of the result for `size` bytes of a source."""
    return size // ITEM_BYTES[extent.item.dtype] * ITEM_BYTES[extent.item.out_dtype]


def _create(path: Path, size: int, stack: ExitStack) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    stack.callback(os.close, handle)
    try:
        # A disk that is too small shows now, not after hours of reading.
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
    return handle


def _check_unchanged(sources: Sequence[Source]) -> None:
    for source in sources:
        for file in source.files.values():
            status = file.path.stat()
            if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                raise CheckpointError(f"{file.path} changed while it was merged; start again")


def _write_manifest(folder: Path, job: _Job, result: _Result, hashes: Mapping[str, str]) -> None:
    """Record what was averaged and what came out; `files` is as in a checkpoint's meta.json."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": hashes.get(name) or sha256_file(folder / name)}
        for name in names
    }
    rules = {name: value for name, value in asdict(job.rules).items() if value not in (None, ())}
    sums = job.rules.accumulate
    manifest: dict[str, Any] = {
        "format": 1,
        "whimbrel": whimbrel.__version__,
        "method": encode(result.target.config),
        "arithmetic": f"{sums} sums of "
        + ("integer weights, one division" if result.weights.integers() else "float64 weights")
        + ", each result rounded once to nearest even",
        "dtype": job.rules.dtype,
        "rules": rules,
        "sources": [
            {
                "path": str(source.path.resolve()),
                "weight": weight,
                "step": source.step,
                "tokens": source.tokens,
                "files": {
                    name: {"bytes": file.size, "mtime_ns": file.mtime_ns, "header_sha256": file.header_sha256}
                    for name, file in source.files.items()
                },
            }
            for source, weight in zip(
                (job.sources[m] for m in result.target.members), result.weights.texts(), strict=True
            )
        ],
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _write_contents(folder: Path, job: _Job) -> None:
    """Which merges a sweep's folder holds."""
    merges = {
        result.target.name: {
            "method": encode(result.target.config),
            "sources": [str(job.sources[member].path.resolve()) for member in result.target.members],
            "weights": result.weights.texts(),
        }
        for result in job.results
    }
    manifest = {"format": 1, "whimbrel": whimbrel.__version__, "merges": merges, "files": {}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
