"""Checkpoints of torch.distributed.checkpoint by their bytes: where each box of each tensor lies, and new ones.

Reading imports no torch, needs no process group, and runs no pickled code: `.metadata` may name the classes of the
format only. Writing imports torch, for the classes that the new `.metadata` is made of.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from whimbrel.checkpoint.tensorfile import ITEM_BYTES
from whimbrel.checkpoint.torchzip import DTYPES, View, dtype_name, is_contiguous, loads, read_archive
from whimbrel.errors import CheckpointError, UnsupportedError

METADATA = ".metadata"
_CLASSES = (
    "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
    "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
# A chunk stays below this, so that its archive needs none of the zip format's extensions for large files.
LARGEST_CHUNK = 1 << 31


class Chunk(NamedTuple):
    """A box of a tensor, stored in one piece, row by row."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    start: int
    crc: int


class Blob(NamedTuple):
    """An object that is no tensor, as bytes that are not looked into."""

    path: Path
    start: int
    size: int


class Tensor(NamedTuple):
    """A tensor's type, shape, and the boxes that it is stored in."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class Checkpoint(NamedTuple):
    """What a checkpoint holds, by name."""

    tensors: dict[str, Tensor]
    blobs: dict[str, Blob]
    planner_data: Any


def read_checkpoint(folder: Path) -> Checkpoint:
    """Where everything lies in a folder that torch.distributed.checkpoint has written with its FileSystemWriter.

    Raises CheckpointError for what is missing, truncated, damaged, or names Python objects; UnsupportedError for
    files that an extension has compressed.
    """
    path = folder / METADATA
    metadata = loads(path.read_bytes(), _allowed, path)
    try:
        places = {
            (index.fqn, tuple(getattr(index, "offset", None) or ())): info
            for index, info in metadata.storage_data.items()
        }
        described = dict(metadata.state_dict_metadata)
    except AttributeError as error:
        raise CheckpointError(f"{path} is damaged: it is not the metadata of a checkpoint ({error})") from None
    tensors: dict[str, Tensor] = {}
    blobs: dict[str, Blob] = {}
    for name, item in described.items():
        if type(item).__name__ == "BytesStorageMetadata":
            file, start, size = _place(folder, name, places.get((name, ())))
            blobs[name] = Blob(file, start, size)
            continue
        dtype, shape = item.properties.state[0], tuple(item.size)
        chunks = [
            _chunk(folder, name, dtype, tuple(box.offsets), tuple(box.sizes), places.get((name, tuple(box.offsets))))
            for box in item.chunks
        ]
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
            raise CheckpointError(f"tensor '{name}' of {folder} is incomplete: its chunks do not cover {list(shape)}")
        tensors[name] = Tensor(dtype, shape, tuple(chunks))
    return Checkpoint(tensors, blobs, getattr(metadata, "planner_data", None))


def _place(folder: Path, name: str, info: Any) -> tuple[Path, int, int]:
    if info is None:
        raise CheckpointError(f"{folder / METADATA} does not say where '{name}' lies")
    if getattr(info, "transform_descriptors", None):
        raise UnsupportedError(
            f"'{name}' in {folder} is stored through {', '.join(map(str, info.transform_descriptors))}; save it without"
            " storage extensions"
        )
    file = Path(os.path.normpath(folder / info.relative_path))
    if not file.is_relative_to(folder):
        raise CheckpointError(f"{folder / METADATA} names '{info.relative_path}', which is not in its own folder")
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist, but {METADATA} beside it names it")
    if file.stat().st_size < info.offset + info.length:
        raise CheckpointError(
            f"{file} is truncated: {info.offset + info.length:,} bytes expected, {file.stat().st_size:,} found"
        )
    return file, info.offset, info.length


def _chunk(folder: Path, name: str, dtype: str, offsets: tuple[int, ...], sizes: tuple[int, ...], info: Any) -> Chunk:
    file, start, size = _place(folder, name, info)
    archive = read_archive(file, start, size)
    view = archive.value
    if not isinstance(view, View) or (view.dtype, view.shape) != (dtype, sizes):
        raise CheckpointError(
            f"{file} is damaged at byte {start:,}: it does not hold the {dtype} {list(sizes)} of '{name}'"
        )
    payload = archive.payloads.get(view.key)
    width = ITEM_BYTES.get(dtype)
    odd = width is not None and payload is not None and payload.size != math.prod(sizes) * width
    if payload is None or odd or not is_contiguous(view):
        raise CheckpointError(f"tensor '{name}' in {file} is not stored row by row; save it with contiguous()")
    return Chunk(offsets, sizes, file, payload.start, payload.crc)


class _Record:
    """Stands for a class of the format: holds what is set on it."""

    def __init__(self, *args: object) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


def _allowed(module: str, name: str) -> Any:
    if module.startswith("torch.distributed.checkpoint") and name in (*_CLASSES, "_StorageInfo"):
        return type(name, (_Record,), {})
    names: dict[tuple[str, str], Any] = {
        ("torch", "Size"): tuple,
        ("torch.serialization", "_get_layout"): str,
        ("pathlib", "PosixPath"): _Record,
        ("pathlib", "WindowsPath"): _Record,
        ("collections", "OrderedDict"): collections.OrderedDict,
    }
    return names[module, name] if (module, name) in names else dtype_name(module, name)


class NewChunk(NamedTuple):
    """An archive of torch.save around a payload that is still to be written."""

    name: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    """Where the archive begins in its file."""
    records: tuple[tuple[str, bytes], ...]
    """The small records before the payload."""

    @property
    def payload(self) -> int:
        """Where the tensor's own bytes begin in the file."""
        return self.start + len(self._head(0))

    @property
    def payload_bytes(self) -> int:
        """How many they are."""
        return math.prod(self.sizes) * ITEM_BYTES[self.dtype]

    @property
    def size(self) -> int:
        """Bytes of the whole archive."""
        return len(self._head(0)) + self.payload_bytes + len(self.tail(0))

    def head(self, crc: int) -> bytes:
        """The archive's bytes before the payload, whose CRC-32 is `crc`."""
        return self._head(crc)

    def _head(self, crc: int) -> bytes:
        parts, at = [], 0
        for name, size, value, body in self._entries(crc):
            parts.append(_local(name, size, value, at) + body)
            at += len(parts[-1])
        return b"".join(parts)

    def tail(self, crc: int) -> bytes:
        """The archive's directory, which comes after the payload."""
        parts, at = [], 0
        for name, size, value, body in self._entries(crc):
            parts.append(_central(name, size, value, at))
            at += len(_local(name, size, value, at)) + len(body)
        directory = b"".join(parts)
        count = len(parts)
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), at + self.payload_bytes, 0)
        return directory + end

    def _entries(self, crc: int) -> list[tuple[str, int, int, bytes]]:
        small = [(name, len(body), zlib.crc32(body), body) for name, body in self.records]
        return [*small, ("archive/data/0", self.payload_bytes, crc, b"")]


def _local(name: str, size: int, crc: int, at: int) -> bytes:
    # Padding in an extra field puts the record's bytes at a multiple of 64 of the archive, as torch does.
    padding = -(at + 30 + len(name) + 4) % 64
    header = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 33, crc, size, size, len(name), padding + 4)
    return header + name.encode() + b"FB" + struct.pack("<H", padding) + b"Z" * padding


def _central(name: str, size: int, crc: int, at: int) -> bytes:
    fields = (20, 20, 0, 0, 0, 33, crc, size, size, len(name), 0, 0, 0, 0, 0, at)
    return struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields) + name.encode()


def new_chunk(name: str, dtype: str, offsets: Sequence[int], sizes: Sequence[int], file: str, start: int) -> NewChunk:
    """The archive for a box of the tensor `name`, to lie at byte `start` of `file`."""
    records = (
        ("archive/data.pkl", _tensor_pickle(dtype, tuple(sizes))),
        ("archive/byteorder", b"little"),
        ("archive/version", b"3\n"),
    )
    return NewChunk(name, dtype, tuple(offsets), tuple(sizes), file, start, records)


class _Storage(NamedTuple):
    dtype: str
    elements: int


class _Pickler(pickle.Pickler):
    """Pickles a tensor that has no memory yet."""

    def persistent_id(self, obj: Any) -> Any:
        import torch

        if not isinstance(obj, _Storage):
            return None
        kind = {"F64": "Double", "F32": "Float", "F16": "Half", "BF16": "BFloat16", "C64": "ComplexFloat",
                "I64": "Long", "I32": "Int", "I16": "Short", "I8": "Char", "U8": "Byte", "BOOL": "Bool"}  # fmt: skip
        if obj.dtype not in kind:
            raise UnsupportedError(f"tensors of type {obj.dtype} are not written to a distributed checkpoint")
        return "storage", getattr(torch, f"{kind[obj.dtype]}Storage"), "0", "cpu", obj.elements

    def reducer_override(self, obj: Any) -> Any:
        from torch._utils import _rebuild_tensor_v2

        if not isinstance(obj, _NewTensor):
            return NotImplemented
        strides = [math.prod(obj.shape[i + 1 :]) for i in range(len(obj.shape))]
        storage = _Storage(obj.dtype, math.prod(obj.shape))
        return _rebuild_tensor_v2, (storage, 0, obj.shape, tuple(strides), False, collections.OrderedDict())


class _NewTensor:
    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape


def _tensor_pickle(dtype: str, shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=2).dump(_NewTensor(dtype, shape))
    return file.getvalue()


def new_metadata(
    chunks: Sequence[NewChunk],
    shapes: Mapping[str, tuple[int, ...]],
    blobs: Mapping[str, tuple[str, int, int]],
    planner_data: Any,
) -> bytes:
    """The `.metadata` of a checkpoint of these chunks, and of blobs (name -> file, start, bytes)."""
    import torch
    from torch.distributed.checkpoint import metadata as m
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    types: dict[str, Any] = {ours: getattr(torch, name, None) for name, ours in DTYPES.items()}
    boxes: dict[str, list[NewChunk]] = {}
    for chunk in chunks:
        boxes.setdefault(chunk.name, []).append(chunk)
    described: dict[str, Any] = {
        name: m.TensorStorageMetadata(
            m.TensorProperties(dtype=types[own[0].dtype]),
            torch.Size(shapes[name]),
            [m.ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in own],
        )
        for name, own in boxes.items()
    }
    storage: dict[Any, Any] = {
        m.MetadataIndex(chunk.name, torch.Size(chunk.offsets), index): _StorageInfo(chunk.file, chunk.start, chunk.size)
        for own in boxes.values()
        for index, chunk in enumerate(own)
    }
    for name, (file, start, size) in blobs.items():
        described[name] = m.BytesStorageMetadata()
        storage[m.MetadataIndex(name)] = _StorageInfo(file, start, size)
    known = planner_data if isinstance(planner_data, dict) else {}
    planner = {name: known.get(name, (name,)) for name in described}
    return pickle.dumps(m.Metadata(described, planner_data=planner, storage_data=storage))
