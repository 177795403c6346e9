"""Archives of torch.save by their bytes: where each tensor lies, and its CRC-32. No torch, and no pickled code is run.

An archive is a zip of stored (not compressed) records: `data.pkl` describes the object, `data/0`, `data/1`, ... are the
storages that its tensors look into. The pickle is read with a short list of allowed names, each of which stands for a
function of this module, so that a file can name tensors and nothing else.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from whimbrel.checkpoint.tensorfile import ITEM_BYTES, read_exactly
from whimbrel.errors import CheckpointError

# Names of torch's types, in torch and in safetensors.
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
    "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "complex128": "C128",
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "C128", "LongStorage": "I64", "IntStorage": "I32",
    "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip
_LONGEST_PICKLE = 1 << 30


class View(NamedTuple):
    """A tensor as the pickle describes it: a view of a storage."""

    key: str
    """Name of the storage's record below data/."""
    dtype: str
    offset: int
    """Elements before the first one."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    elements: int
    """Elements of the whole storage."""


class Payload(NamedTuple):
    """The bytes of a storage in the file."""

    start: int
    size: int
    crc: int


class Archive(NamedTuple):
    """What an archive holds."""

    value: Any
    """The unpickled object, each tensor as a View."""
    payloads: dict[str, Payload]
    """Storages by key."""


def read_archive(path: Path, start: int = 0, size: int | None = None) -> Archive:
    """The archive of torch.save in the bytes [start, start + size) of a file, by default in all of it.

    Raises CheckpointError for what is no such archive, is truncated, or names anything but tensors and plain data.
    """
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size - start if size is None else size
        window = _Window(file.fileno(), start, length, path)
        try:
            with zipfile.ZipFile(window) as archive:
                records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                return _read(path, window, archive, records)
        except zipfile.BadZipFile as error:
            raise CheckpointError(f"{path} is damaged at byte {start:,}: no archive of torch.save ({error})") from None


def _read(path: Path, window: _Window, archive: zipfile.ZipFile, records: Mapping[str, zipfile.ZipInfo]) -> Archive:
    if "data.pkl" not in records or records["data.pkl"].file_size > _LONGEST_PICKLE:
        raise CheckpointError(f"{path} is no archive of torch.save: it holds no data.pkl")
    if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
        raise CheckpointError(f"{path} was written by a big-endian machine, which is not read; convert it there")
    value = loads(archive.read(records["data.pkl"]), TENSORS, path)
    payloads = {}
    for name, info in records.items():
        if not name.startswith("data/"):
            continue
        if info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{path} is compressed; save it again with torch.save")
        header = bytearray(30)
        window.fill(info.header_offset, memoryview(header))
        # A local header is 30 bytes, then a name and padding, whose lengths are its last two fields.
        skip = 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        payload = Payload(window.start + info.header_offset + skip, info.file_size, info.CRC)
        if payload.start + payload.size > window.start + window.size:
            raise CheckpointError(f"{path} is truncated in the record {name}")
        payloads[name.removeprefix("data/")] = payload
    return Archive(value, payloads)


def crc_places(path: Path) -> dict[str, tuple[int, ...]]:
    """Where an archive says the CRC-32 of each of its storages: bytes of the file, by the storage's key."""
    places: dict[str, tuple[int, ...]] = {}
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        payloads = read_archive(path).payloads
        at = archive.start_dir  # pyrefly: ignore
        for _ in archive.infolist():
            file.seek(at)
            head = file.read(46)
            lengths = [int.from_bytes(head[i : i + 2], "little") for i in (28, 30, 32)]
            key = file.read(lengths[0]).decode().partition("/data/")[2]
            if key in payloads:
                payload = payloads[key]
                file.seek(payload.start + payload.size)
                # torch writes the sum behind the bytes, and their local header says that it comes there.
                behind = (payload.start + payload.size + 4,) if file.read(4) == b"PK\7\10" else ()
                places[key] = (at + 16, *behind)
            at += 46 + sum(lengths)
    return places


class _Window(io.RawIOBase):
    """Bytes [start, start + size) of a file, as a file for zipfile."""

    def __init__(self, handle: int, start: int, size: int, path: Path) -> None:
        self._handle, self.start, self.size, self._path, self._at = handle, start, size, path, 0

    def fill(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from the window's bytes at `offset`."""
        read_exactly(self._handle, buffer, self.start + offset, self._path)

    def readinto(self, buffer: Any) -> int:
        count = max(min(len(buffer), self.size - self._at), 0)
        self.fill(self._at, memoryview(buffer)[:count])
        self._at += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise zipfile.BadZipFile("it is too short")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


Allowed = Callable[[str, str], Any]
"""What a pickled name "module", "name" stands for; raises KeyError for names that are not allowed."""


def loads(data: bytes, allowed: Allowed, path: Path) -> Any:
    """The object of a pickle that may use the allowed names only. Raises CheckpointError for any other."""
    try:
        return _Unpickler(data, allowed, path).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle may fail in any way
        raise CheckpointError(
            f"{path} is damaged: its pickle cannot be read ({type(error).__name__}: {error})"
        ) from None


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, allowed: Allowed, path: Path) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed, self._path = allowed, path

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed(module, name)
        except KeyError:
            raise CheckpointError(
                f"{self._path} holds a Python object of type {module}.{name}, which is not loaded, since that could run"
                " any code; save tensors only"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _location, elements = pid
        if kind != "storage":
            raise CheckpointError(f"{self._path} is damaged: its pickle refers to a '{kind}'")
        return str(key), dtype, int(elements)


def _view(
    storage: tuple[str, str, int], offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> View:
    key, dtype, elements = storage
    return View(key, dtype, offset, tuple(size), tuple(stride), elements)


def _view_of_bytes(
    storage: tuple[str, str, int], offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any
) -> View:
    """`torch._utils._rebuild_tensor_v3`, for types that have no storage class: the type is the last but one."""
    key, _, num_bytes = storage
    dtype = rest[2]
    return View(key, dtype, offset, tuple(size), tuple(stride), num_bytes // ITEM_BYTES.get(dtype, 1))


def dtype_name(module: str, name: str) -> str:
    """The safetensors name of the type torch.NAME; KeyError for what is no type."""
    if module != "torch":
        raise KeyError(name)
    return DTYPES[name]


def TENSORS(module: str, name: str) -> Any:
    """The names that an archive of tensors may use."""
    names: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch", "Size"): tuple,
        ("torch._utils", "_rebuild_tensor_v2"): _view,
        ("torch._utils", "_rebuild_tensor_v3"): _view_of_bytes,
        ("torch._utils", "_rebuild_parameter"): lambda view, *_: view,
        ("torch.storage", "UntypedStorage"): "U8",
    }
    if (module, name) in names:
        return names[module, name]
    return _STORAGES[name] if module == "torch" and name in _STORAGES else dtype_name(module, name)


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, View]]:
    """The tensors of nested dictionaries, by their keys joined with dots; other values are passed over."""
    if isinstance(value, View):
        yield prefix, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from flat(item, f"{prefix}.{key}" if prefix else str(key))


def is_contiguous(view: View) -> bool:
    """Whether the tensor's elements lie one after the other, row by row."""
    expected = 1
    for size, stride in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if size != 1 and stride != expected:
            return 0 in view.shape
        expected *= size
    return True
