"""Files and folders appear complete or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from whimbrel import files
from whimbrel.errors import CheckpointError, DataError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def dead_pid() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        pass
    return child.pid


def test_atomic_write_replaces_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    files.atomic_write_text(path, "old ä")
    with files.atomic_write(path) as file:
        file.write(b"new")
        assert path.read_text(encoding="utf-8") == "old ä"
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_write_vanishes_on_error(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with files.atomic_write(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_atomic_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with files.atomic_folder(out) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a").write_text("1")
        assert not out.exists()
    assert (out / "deep" / "a").read_text() == "1"
    with pytest.raises(FileExistsError), files.atomic_folder(out):
        pass
    with files.atomic_folder(out, overwrite=True) as folder:
        (folder / "b").write_text("2")
        assert (out / "deep" / "a").exists()
    assert names(out) == ["b"]
    assert names(tmp_path) == ["out"]


def test_atomic_folder_vanishes_on_error(tmp_path: Path) -> None:
    def fail() -> None:
        with files.atomic_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == []


def test_replacing_where_names_cannot_be_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    for content in "12":
        with files.atomic_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / content).write_text(content)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["2"]


def test_leftovers(tmp_path: Path) -> None:
    dead, alive = dead_pid(), os.getppid()
    for name in (f".a.tmp-{dead}", f".b.tmp-{alive}", f".c.old-{dead}", f".d.old-{dead}", "d", ".e.tmp-x", "f.tmp-1"):
        (tmp_path / name).mkdir()
    files.remove_leftovers(tmp_path, "x*")
    assert len(names(tmp_path)) == 7
    files.remove_leftovers(tmp_path)
    # c had lost its name before its successor was there, d had been replaced already.
    assert names(tmp_path) == [f".b.tmp-{alive}", ".e.tmp-x", "c", "d", "f.tmp-1"]
    files.remove_leftovers(tmp_path, only_dead=False)
    assert names(tmp_path) == [".e.tmp-x", "c", "d", "f.tmp-1"]
    files.remove_leftovers(tmp_path / "absent")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_free_bytes_of_a_folder_to_be(tmp_path: Path) -> None:
    assert files.free_bytes(tmp_path / "x" / "y" / "z") > 0


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EFBIG, "the file size limit is reached"),
    ],
)
def test_full_disk_is_one_line(number: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 5000)

    def write() -> None:
        with files.disk_space(tmp_path, 1234, "shards", DataError):
            try:
                raise OSError(number, os.strerror(number))
            except OSError as error:
                raise RuntimeError("wrapped") from error

    with pytest.raises(DataError) as caught:
        write()
    assert str(caught.value) == (
        f"cannot write shards: {reason} at {tmp_path} (1,234 bytes needed, 5,000 free);"
        " nothing that was there is changed; free some space or choose another folder"
    )


def test_too_little_space_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 10)
    with (
        pytest.raises(CheckpointError, match=r"too little free space at .* \(11 bytes needed, 10 free\)"),
        files.disk_space(tmp_path, 11, "x", CheckpointError),
    ):
        pytest.fail("must not begin")


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "denied"), ValueError("other")])
def test_other_errors_pass_through(error: Exception, tmp_path: Path) -> None:
    def write() -> None:
        with files.disk_space(tmp_path, 1, "x", CheckpointError):
            raise error

    check: Callable[[], object] = write
    with pytest.raises(type(error)) as caught:
        check()
    assert caught.value is error
