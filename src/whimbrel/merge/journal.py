"""The journal of a merge under way: which pieces are on the disk, so that a merge that was killed goes on. No torch.

The unfinished result lies in a hidden folder beside its final name, `.NAME.merging`. The first line of the journal
there names the plan, and each further one a piece: the CRC-32 of what was written, and those of the stored boxes' parts
that were read. A line is written only after the bytes that it speaks of are on the disk.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from whimbrel.errors import ConfigError
from whimbrel.files import remove

JOURNAL, RESULT = "journal", "result"


class Part(NamedTuple):
    """Bytes of a stored box that were read: source, box, place in the box, their number and CRC-32."""

    source: int
    box: int
    at: int
    size: int
    crc: int


class Done(NamedTuple):
    """A piece that was merged."""

    written: tuple[int, ...]
    """CRC-32 of the bytes written, for each result."""
    parts: tuple[Part, ...]
    """What was read of boxes whose CRC-32 is known."""


class Journal:
    """The journal beside the unfinished result `folder`, held open and locked while the merge runs."""

    def __init__(self, folder: Path, handle: int, done: list[Done]) -> None:
        self.folder, self.done, self._handle = folder, done, handle

    def write(self, pieces: Sequence[Done]) -> None:
        """Note pieces whose bytes are on the disk."""
        os.write(self._handle, b"".join(_line(piece) for piece in pieces))
        os.fdatasync(self._handle)

    def keep(self, count: int, plan: str) -> None:
        """Forget all pieces but the first `count`: those after it were not found whole."""
        self.done = self.done[:count]
        os.ftruncate(self._handle, 0)
        os.lseek(self._handle, 0, os.SEEK_SET)
        os.write(self._handle, _head(plan))
        self.write(self.done)


def work_folder(out: Path) -> Path:
    """Where the unfinished result of a merge into `out` lies."""
    return out.with_name(f".{out.name}.merging")


@contextmanager
def open_journal(out: Path, plan: str) -> Iterator[Journal]:
    """The journal of a merge into `out`: that of an earlier attempt at the same plan, or a new one in a new folder.

    The folder is deleted when the block ends or fails, and kept when it is interrupted (KeyboardInterrupt, a kill), to
    go on from. Raises ConfigError where another process is at it.
    """
    folder = work_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / JOURNAL, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"merge.out = '{out}' is being written by another process; wait or choose another"
            ) from None
        except OSError as error:
            # Some network file systems have no locks; there a second writer is the user's to avoid.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
        done = _read(handle, plan)
        if done is None:
            remove(folder / RESULT)
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, _head(plan))
            done = []
        (folder / RESULT).mkdir(exist_ok=True)
        try:
            yield Journal(folder / RESULT, handle, done)
        except Exception:
            remove(folder)
            raise
        remove(folder)
    finally:
        os.close(handle)


def _head(plan: str) -> bytes:
    return json.dumps({"plan": plan}).encode() + b"\n"


def _line(piece: Done) -> bytes:
    return json.dumps([piece.written, piece.parts], separators=(",", ":")).encode() + b"\n"


def _read(handle: int, plan: str) -> list[Done] | None:
    """The pieces of a journal of this plan, up to a torn line; None for another plan's or none."""
    text = b""
    while chunk := os.read(handle, 1 << 20):
        text += chunk
    lines = text.split(b"\n")
    if lines[0] + b"\n" != _head(plan):
        return None
    done, end = [], len(lines[0]) + 1
    for line in lines[1:-1]:
        try:
            written, parts = json.loads(line)
            done.append(Done(tuple(written), tuple(Part(*part) for part in parts)))
        except (ValueError, TypeError):
            break
        end += len(line) + 1
    os.ftruncate(handle, end)
    os.lseek(handle, end, os.SEEK_SET)
    return done
