"""safetensors files by their bytes: where each tensor lies, and headers for new files. Imports no torch.

The format: 8 bytes of little-endian header length, a JSON header {name: {dtype, shape, data_offsets}} with
offsets from the end of the header, then the tensors without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from whimbrel.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "C64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
_LONGEST_HEADER = 100_000_000


class Entry(NamedTuple):
    """One tensor: its type, shape, and bytes [start, stop) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile(NamedTuple):
    """The header of one file, with what identifies the file."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    size: int
    mtime_ns: int
    header_sha256: str


class TensorFolder(NamedTuple):
    """The tensors of one model: its files by name, and each tensor's file."""

    path: Path
    files: dict[str, TensorFile]
    places: dict[str, str]

    def entry(self, name: str) -> Entry:
        """Where the tensor lies in its file."""
        return self.files[self.places[name]].entries[name]

    def file(self, name: str) -> TensorFile:
        """The file that holds the tensor."""
        return self.files[self.places[name]]


def read_folder(path: str | Path) -> TensorFolder:
    """The tensors of a .safetensors file, or of a folder with one such file or with several and their index.

    Raises CheckpointError for what is missing, truncated or not a safetensors file, with its path.
    """
    path = Path(path)
    if path.is_file():
        return _folder_of(path.parent, {path.name: read_file(path)})
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; name a .safetensors file or a folder that holds one")
    if (path / INDEX).is_file():
        return _read_sharded(path)
    found = sorted(path.glob("*.safetensors"))
    if (path / SINGLE).is_file():
        found = [path / SINGLE]
    if not found:
        raise CheckpointError(f"{path} holds no .safetensors file{_hint(path)}")
    if len(found) > 1:
        raise CheckpointError(
            f"{path} holds {len(found)} .safetensors files but no {INDEX} that says which belong together;"
            " name one of the files"
        )
    return _folder_of(path, {found[0].name: read_file(found[0])})


def _hint(path: Path) -> str:
    steps = sorted(path.glob("step-*"))
    if steps:
        return f"; it is a run folder, name its step folders, such as {steps[-1]}"
    if any(path.glob("*.bin")) or any(path.glob("*.pt")):
        return "; files of torch.save are not read, convert them to safetensors first"
    return "; name a folder with model.safetensors in it"


def _folder_of(path: Path, files: dict[str, TensorFile]) -> TensorFolder:
    return TensorFolder(path, files, {name: file for file in files for name in files[file].entries})


def _read_sharded(path: Path) -> TensorFolder:
    try:
        index = json.loads((path / INDEX).read_text())["weight_map"]
        places = {str(name): str(file) for name, file in index.items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{path / INDEX} is not an index: it must hold a table 'weight_map'") from None
    files: dict[str, TensorFile] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{path / INDEX} names '{name}', which is not a file of its own folder")
        files[name] = read_file(path / name)
    folder = _folder_of(path, files)
    for name, file in places.items():
        if name not in files[file].entries:
            raise CheckpointError(f"tensor '{name}' is missing from {path / file}, where {INDEX} puts it")
    for name, file in folder.places.items():
        if name not in places:
            raise CheckpointError(f"tensor '{name}' of {path / file} is not listed in {path / INDEX}")
    return folder._replace(places=places)


def read_file(path: str | Path) -> TensorFile:
    """The header of one safetensors file, checked against the length of the file.

    Raises CheckpointError where the file is missing, cut short, damaged, or none of safetensors.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            length = int.from_bytes(file.read(8), "little")
            if status.st_size < 8 or length > min(status.st_size - 8, _LONGEST_HEADER):
                raise _truncated(path, 8 + min(length, _LONGEST_HEADER), status.st_size)
            raw = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        entries = {str(name): _entry(value, 8 + length) for name, value in header.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header cannot be read ({error})") from None
    _check_extents(path, entries, 8 + length, status.st_size)
    digest = hashlib.sha256(raw).hexdigest()
    return TensorFile(path, entries, metadata, status.st_size, status.st_mtime_ns, digest)


def _entry(value: Mapping, base: int) -> Entry:
    start, stop = (int(offset) for offset in value["data_offsets"])
    return Entry(str(value["dtype"]), tuple(int(size) for size in value["shape"]), base + start, base + stop)


def _check_extents(path: Path, entries: dict[str, Entry], data_start: int, size: int) -> None:
    end = max((entry.stop for entry in entries.values()), default=data_start)
    if end > size:
        raise _truncated(path, end, size)
    if end < size:
        raise CheckpointError(f"{path} is damaged: {size:,} bytes long, but its header describes {end:,}")
    last = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != last or entry.stop < entry.start:
            raise CheckpointError(
                f"{path} is damaged: tensor '{name}' begins at byte {entry.start:,},"
                f" but the one before it ends at {last:,}"
            )
        last = entry.stop
        width = ITEM_BYTES.get(entry.dtype)
        if width is not None and entry.stop - entry.start != width * math.prod(entry.shape):
            raise CheckpointError(
                f"{path} is damaged: tensor '{name}' of {entry.dtype} {list(entry.shape)} has"
                f" {entry.stop - entry.start:,} bytes, not {width * math.prod(entry.shape):,}"
            )


def _truncated(path: Path, expected: int, found: int) -> CheckpointError:
    return CheckpointError(f"{path} is truncated: {expected:,} bytes expected, {found:,} found")


def make_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """The first bytes of a file of `tensors` (name -> dtype, shape) in this order, and where each goes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset, spans = 0, {}
    for name, (dtype, shape) in tensors.items():
        stop = offset + ITEM_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        spans[name] = (offset, stop)
        offset = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    entries = {name: Entry(*tensors[name], base + start, base + stop) for name, (start, stop) in spans.items()}
    return len(text).to_bytes(8, "little") + text, entries


def read_exactly(handle: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill `buffer` from the file's bytes at `offset`."""
    done = 0
    while done < len(buffer):
        count = os.preadv(handle, [buffer[done:]], offset + done)
        if count == 0:
            raise _truncated(path, offset + len(buffer), offset + done)
        done += count


def write_exactly(handle: int, buffer: memoryview, offset: int) -> None:
    """Write all of `buffer` to the file at `offset`."""
    done = 0
    while done < len(buffer):
        done += os.pwrite(handle, buffer[done:], offset + done)
