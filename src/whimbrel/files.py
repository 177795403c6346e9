"""Files and folders that appear complete or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<pid>\d+)")
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached",
}


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write to, which replaces `path` when the block ends well and vanishes if it does not.

    The bytes are on the disk before the name changes, so after a crash `path` is the old or the new file.
    Missing parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8, in one step."""
    with atomic_write(path) as file:
        file.write(text.encode())


@contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to fill, which becomes `path` when the block ends well and vanishes when it does not.

    With `overwrite` an existing `path` is replaced at the very end; without, FileExistsError comes at once.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    remove(temporary)
    temporary.mkdir()
    try:
        yield temporary
        publish_folder(temporary, path, overwrite=overwrite)
    except BaseException:
        remove(temporary)
        raise


def temporary_name(path: Path) -> Path:
    """Where this process writes what will become `path`: hidden, beside it, on the same file system."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def publish_folder(temporary: Path, path: Path, *, overwrite: bool = False) -> None:
    """Sync everything in the folder `temporary` and give it the name `path`.

    An existing `path` is swapped out in one step where the system can; elsewhere it is first moved to
    `.NAME.old-PID`, from where `remove_leftovers` brings it back should the process die in between.
    """
    fsync_tree(temporary)
    if not (path.exists() and overwrite):
        os.rename(temporary, path)
    elif _exchange(temporary, path):
        remove(temporary)
    else:
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        os.rename(path, old)
        os.rename(temporary, path)
        remove(old)
    fsync_folder(path.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names atomically (Linux renameat2); False where this is not to be had."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(a), here, os.fsencode(b), swap) == 0


def remove_leftovers(folder: str | Path, pattern: str = "*", *, only_dead: bool = True) -> None:
    """Delete what crashed writers left in `folder` for names that match the glob `pattern`.

    With `only_dead`, temporaries of other processes that still live on this machine are kept. Pass False
    where the folder has one writer by design, such as the run folder of a training run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    for entry in sorted(folder.glob(f".{pattern}.*-*")):
        match = _LEFTOVER.fullmatch(entry.name)
        if match is None or (only_dead and _is_other_live_process(int(match["pid"]))):
            continue
        target = folder / match["name"]
        if match["kind"] == "old" and not target.exists():
            os.rename(entry, target)
        else:
            remove(entry)


def _is_other_live_process(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def remove(path: Path) -> None:
    """Delete a file or a folder with all it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.unlink()


def fsync_file(path: str | Path) -> None:
    """Put a file's bytes on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_folder(path: str | Path) -> None:
    """Put a folder's list of names on the disk; renames inside it last only after this."""
    fsync_file(path)


def fsync_tree(path: str | Path) -> None:
    """Put all files and folders below `path`, and `path` itself, on the disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            fsync_file(os.path.join(folder, name))
        fsync_folder(folder)


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: str | Path) -> int:
    """Bytes that may still be written beside `path`; folders that do not exist yet are looked through."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@contextmanager
def disk_space(path: str | Path, needed: int, what: str, error: type[Exception]) -> Iterator[None]:
    """Raise `error` where `needed` bytes do not fit beside `path`, or where the disk fills up in the block.

    `what` names the thing written. The message is one line; failures of other kinds pass through.
    """
    require_space(path, needed, what, error)
    with full_disk_as(error, path, needed, what):
        yield


def require_space(path: str | Path, needed: int, what: str, error: type[Exception]) -> None:
    """Raise `error` where `needed` bytes do not fit beside `path`."""
    free = free_bytes(path)
    if free < needed:
        raise error(_full_message(path, what, "too little free space", needed, free))


@contextmanager
def full_disk_as(error: type[Exception], path: str | Path, needed: int, what: str) -> Iterator[None]:
    """Raise `error` in place of the failure of a disk, quota or file size limit used up in the block."""
    try:
        yield
    except Exception as caught:
        full = full_disk_error(caught)
        if full is None:
            raise
        raise error(_full_message(path, what, _FULL[full.errno or 0], needed, free_bytes(path))) from caught


def _full_message(path: str | Path, what: str, reason: str, needed: int, free: int) -> str:
    return (
        f"cannot write {what}: {reason} at {path} ({needed:,} bytes needed, {free:,} free);"
        " nothing that was there is changed; free some space or choose another folder"
    )


def full_disk_error(error: BaseException) -> OSError | None:
    """The failure to write for lack of room that is `error` or lies behind it, if there is one."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, OSError) and link.errno in _FULL:
            return link
        link = link.__cause__ or link.__context__
    return None
