"""The streaming average: read N checkpoints once, in file order and in bounded memory, write one or several.

The plan cuts the result into pieces. A thread takes a piece, reads its bytes from every source, sums them in the order
of the sources, rounds, and writes, while the next piece is read. Pieces do not depend on each other, so the bytes
written are the same for any number of threads, any size of piece, and after an interruption.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import whimbrel
from whimbrel.checkpoint.crc import Pieces
from whimbrel.checkpoint.tensorfile import ITEM_BYTES, write_exactly
from whimbrel.config import MergeConfig, encode
from whimbrel.errors import CheckpointError, ConfigError
from whimbrel.files import disk_space, publish_folder, remove_leftovers, sha256_file
from whimbrel.merge.blocks import Averager, BadValue
from whimbrel.merge.config import merge_config
from whimbrel.merge.job import Job, Result, Target, fingerprint, prepare
from whimbrel.merge.journal import Done, Journal, Part, open_journal, work_folder
from whimbrel.merge.outputs import MANIFEST, finish_folder, write_step_meta
from whimbrel.merge.plan import Extent, Piece, Rules, cut
from whimbrel.merge.pma import Number, Weights
from whimbrel.merge.reading import Buffers, Handles, check_unchanged, disk_rate
from whimbrel.merge.sources import named_one_by_one

Progress = Callable[[int, int], None]

# Seconds between two times that what was written goes to the disk and into the journal.
_SYNC_SECONDS = 2.0
_DEFAULT = Rules()


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
    job = prepare(sources, targets, rules, memory_limit, workers, tokens_per_step)
    remove_leftovers(out.parent, glob.escape(out.name))
    journal_of = open_journal(out, fingerprint(job))
    allocated = _allocated(work_folder(out))
    needed = max(job.written_bytes + 2**20 - allocated, 0)
    with disk_space(out, needed, f"merge {out}", CheckpointError), journal_of as journal:
        resumed = _Pass(job, journal, progress).run()
        check_unchanged(job.sources)
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
    job = prepare(sources, targets, rules, memory_limit, workers)
    rate = disk_rate(job.sources[-1])
    seconds = (job.read_bytes + job.written_bytes) / max(rate, 1.0)
    tensors = len({slot.item.name for slot in job.layout.slots})
    return MergePlan(
        tuple(Path(source) for source in sources), job.results[0].weights, tensors, job.read_bytes,
        job.written_bytes, job.buffers, rate, seconds,
    )  # fmt: skip


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


def _allocated(folder: Path) -> int:
    """Bytes on the disk of what an interrupted merge has left in `folder`."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


class _OfThread(threading.local):
    """What a thread that merges owns; made when it first asks for it."""

    def __init__(self, job: Job) -> None:
        self.buffers = Buffers(len(job.sources), job.piece)
        self.averagers = [Averager(result.weights, job.rules.accumulate) for result in job.results]
        wider = max(ITEM_BYTES[e.item.out_dtype] // ITEM_BYTES[e.item.dtype] for e in job.extents)
        self.output = bytearray(job.piece * max(wider, 1))


class _Pass:
    """One pass over the sources, which writes all results into the journal's folder."""

    def __init__(self, job: Job, journal: Journal, progress: Progress | None) -> None:
        self._job, self._journal, self._progress = job, journal, progress
        self._handles = Handles()
        # One piece is read at a time: disks and the kernel's reading ahead are fastest with files read in order.
        self._reading = threading.Lock()
        self._own = _OfThread(job)
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
            for number in range(len(job.results)):
                self._begin_files(number, stack)
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

    def _begin_files(self, number: int, stack: ExitStack) -> None:
        """Create the files of a result, which `stack` closes, with what comes before their tensors."""
        for file, size in self._job.layout.sizes.items():
            self._files[number, file] = _create(self._folder(self._job.results[number]) / file, size, stack)
        for file, heads in self._job.layout.heads.items():
            for place, data in heads:
                write_exactly(self._files[number, file], memoryview(data), place)
                if (number, file) in self._hashes:
                    self._hashes[number, file].update(data)

    def _folder(self, result: Result) -> Path:
        return self._journal.folder / result.target.name

    def _merge(self, piece: Piece) -> Done:
        """Merge one piece for every result."""
        job, extent = self._job, piece.extent
        buffers, parts = self._own.buffers, list[Part]()
        with self._reading:
            filled = [(source, buffers.fill(piece, source, self._handles)) for source in job.needed(extent.item)]
        for source, checked in filled:
            for read, known in checked:
                crc = buffers.checksum(source, read) if known is None else known
                parts.append(Part(source, read.box, read.at, read.size, crc))
        written = []
        for number, result in enumerate(job.results):
            out = memoryview(self._own.output)[: _out_bytes(extent, piece.stop - piece.start)]
            self._combine(piece, result.target.members, buffers, self._own.averagers[number], out)
            slot = extent.slots[0]
            write_exactly(self._files[number, slot.file], out, slot.start + _out_bytes(extent, piece.start))
            written.append(zlib.crc32(out))
        return Done(tuple(written), tuple(parts))

    def _combine(
        self, piece: Piece, members: tuple[int, ...], buffers: Buffers, averager: Averager, out: memoryview
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
                self._journal.keep(count, fingerprint(self._job))
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


def _write_manifest(folder: Path, job: Job, result: Result, hashes: Mapping[str, str]) -> None:
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


def _write_contents(folder: Path, job: Job) -> None:
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
