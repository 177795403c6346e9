"""Reading for a pass over the sources: files open, buffers, in order, and out of the page cache again."""

from __future__ import annotations

import mmap
import os
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from whimbrel.checkpoint.tensorfile import ITEM_BYTES, read_exactly
from whimbrel.errors import CheckpointError
from whimbrel.merge.plan import Item, Piece, Read, Slot, cut, make_extents, reads
from whimbrel.merge.sources import Source, Stored

# As far as kernels read ahead.
_STRETCH = 8 * 2**20
_SAMPLE_BYTES = 64 * 2**20
_COMPARED_PIECE = 4 * 2**20


class Handles:
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


class Buffers:
    """The memory of one thread."""

    def __init__(self, num_sources: int, piece: int) -> None:
        # Rows a multiple of large powers of two apart would share few places of the caches.
        room = -(-piece // 4096) * 4096 + 64
        self.inputs = np.frombuffer(mmap.mmap(-1, num_sources * room), np.uint8).reshape(num_sources, room)
        self._spread = memoryview(mmap.mmap(-1, room))

    def fill(self, piece: Piece, source: int, handles: Handles) -> list[tuple[Read, int | None]]:
        """Put the piece's bytes of a source into its row.

        Returns what was read of boxes that have a CRC-32, and its own where it is known already; `checksum` has it of
        the others, which need not wait for it before the next piece is read.
        """
        size, width = piece.stop - piece.start, ITEM_BYTES[piece.extent.item.dtype]
        row = self.inputs[source, :size]
        stored = piece.extent.item.stored[source].boxes
        checked: list[tuple[Read, int | None]] = []
        for read in reads(piece, source):
            whole = row.data[read.offset :] if read.into is None else self._spread
            data = whole[: read.size]
            with handles.use(read.path) as handle:
                read_exactly(handle, data, read.start, read.path)
                _forget(handle, read)
            if stored[read.box].crc is not None:
                checked.append((read, None if read.into is None else zlib.crc32(data)))
            if read.into is not None:
                item = f"V{width}"
                row.view(item).reshape(piece.sizes)[read.into] = np.frombuffer(data, item).reshape(read.sizes)
        return checked

    def checksum(self, source: int, read: Read) -> int:
        """CRC-32 of a read that lies in one stretch of its source's row."""
        return zlib.crc32(self.inputs[source, read.offset : read.offset + read.size].data)

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


def same_bytes(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors have the same type, shape and bytes; reads both, in bounded memory."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    handles = Handles()
    with handles.closing():
        both = Item("", one.dtype, one.dtype, one.shape, "equal", (one, other))
        extents = make_extents([Slot(both, (0,) * len(one.shape), one.shape, "", 0)])
        buffers = Buffers(2, _COMPARED_PIECE)
        for piece in cut(extents, _COMPARED_PIECE):
            for number in range(2):
                buffers.fill(piece, number, handles)
            if buffers.data(piece, 0) != buffers.data(piece, 1):
                return False
    return True


def check_unchanged(sources: Sequence[Source]) -> None:
    """Raise CheckpointError if a file of a source has another size or time than when it was opened."""
    for source in sources:
        for file in source.files.values():
            status = file.path.stat()
            if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                raise CheckpointError(f"{file.path} changed while it was merged; start again")
