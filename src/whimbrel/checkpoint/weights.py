"""The weights of a model as one safetensors file with the model's own names, tensor by tensor.

A weight that the model knows under several names is stored once, under the first. Sharded weights (DTensor)
are stored whole and may be read into any other sharding.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from whimbrel.checkpoint.steps import META, check_hash
from whimbrel.checkpoint.tensorfile import (
    ITEM_BYTES,
    Entry,
    TensorFolder,
    make_header,
    read_exactly,
    read_folder,
)
from whimbrel.checkpoint.together import on_all, on_first, rank
from whimbrel.errors import CheckpointError
from whimbrel.files import atomic_write

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MANIFESTS = (META, "merge.json")


class Weights(NamedTuple):
    """The weights of a model."""

    tensors: dict[str, Tensor]
    """Name -> parameter or persistent buffer, each once."""
    aliases: dict[str, str]
    """Further name -> the name in `tensors` of the same weight."""


def weights_of(model: nn.Module) -> Weights:
    """The parameters and persistent buffers of a model, without the prefixes of torch.compile and DDP."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for raw, value in model.state_dict(keep_vars=True).items():
        name = plain_name(model, raw)
        if not isinstance(value, Tensor):
            continue
        if id(value) in first_name:
            aliases[name] = first_name[id(value)]
        else:
            first_name[id(value)] = name
            tensors[name] = value
    return Weights(tensors, aliases)


def plain_name(model: nn.Module, name: str) -> str:
    """The name of a parameter without what torch.compile and DistributedDataParallel put into it."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        name = name.removeprefix("module.")
    return name.replace("_orig_mod.", "")


def save_weights(path: str | Path, model: nn.Module) -> str:
    """Write the model's weights to the safetensors file `path`, complete or not at all; returns its SHA-256.

    Under torch.distributed every process calls it and the first one writes; memory stays near one whole
    tensor. Raises CheckpointError for a tensor type that safetensors does not know.
    """
    tensors = weights_of(model).tensors
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"tensor '{name}' is {tensor.dtype}, which safetensors cannot hold")
    # Wide types first keeps every tensor aligned to its own width.
    names = sorted(tensors, key=lambda name: -ITEM_BYTES[_NAMES[tensors[name].dtype]])
    layout = {name: (_NAMES[tensors[name].dtype], tuple(tensors[name].shape)) for name in names}
    header, _ = make_header(layout, {"format": "pt"})
    digest = hashlib.sha256(header)

    def write() -> None:
        whole = _whole_tensors([tensors[name] for name in names])
        try:
            if rank() == 0:
                with atomic_write(path) as file:
                    file.write(header)
                    for tensor in whole:
                        data = _bytes_of(tensor)
                        file.write(data)
                        digest.update(data)
        finally:
            # The other processes gather with this one, also when its disk is full.
            for _ in whole:
                pass

    on_all(write)
    return on_first(digest.hexdigest)


def _whole_tensors(tensors: list[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        value = tensor.detach()
        yield value.full_tensor() if isinstance(value, DTensor) else value


def _bytes_of(tensor: Tensor) -> memoryview:
    return _memory(tensor.cpu().contiguous().reshape(-1))


def _memory(flat: Tensor) -> memoryview:
    """The bytes of a contiguous one-dimensional tensor in main memory, without a copy."""
    return flat.view(torch.uint8).numpy().data


def load_weights(path: str | Path, model: nn.Module, *, verify: bool = True) -> None:
    """Read weights into `model`: from a checkpoint, a merge, another folder of safetensors, or one such file.

    Values are converted to the model's dtype. With `verify`, hashes that the folder records are checked
    first. Raises CheckpointError for a truncated or altered file, and for names and shapes that do not fit
    the model; the model is unchanged then.
    """
    read_into(path, model, verify=verify, same_dtype=False)


def read_into(path: str | Path, model: nn.Module, *, verify: bool, same_dtype: bool) -> None:
    """As `load_weights`, with its errors; with `same_dtype` a model whose dtype differs from the file's is refused."""
    folder = read_folder(path)
    if verify:
        on_first(lambda: _verify(folder))
    weights = weights_of(model)
    names = _match(folder, weights)
    for name, tensor in weights.tensors.items():
        entry, where = folder.entry(names[name]), folder.file(names[name]).path
        if tuple(tensor.shape) != entry.shape:
            raise CheckpointError(
                f"tensor '{name}' has shape {list(entry.shape)} in {where}, but {list(tensor.shape)} in the model;"
                " build the model from the configuration beside the file"
            )
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"tensor '{name}' in {where} has type {entry.dtype}, which torch cannot hold")
        if same_dtype and DTYPES[entry.dtype] != tensor.dtype:
            raise CheckpointError(
                f"tensor '{name}' is {DTYPES[entry.dtype]} in {where}, but {tensor.dtype} in the model;"
                " going on exactly needs the same dtype"
            )
        if tensor.is_meta:
            raise CheckpointError(f"tensor '{name}' of the model is on the meta device; give the model memory first")
    with torch.no_grad():
        for name, tensor in weights.tensors.items():
            value = _read(folder, names[name])
            if isinstance(tensor, DTensor):
                # Every process reads the whole tensor and cuts out its own part.
                mesh, placements = tensor.device_mesh, tensor.placements
                tensor.copy_(distribute_tensor(value.to(tensor.device), mesh, placements, src_data_rank=None))
            else:
                tensor.copy_(value)


def _verify(folder: TensorFolder) -> None:
    for manifest in MANIFESTS:
        if (folder.path / manifest).is_file():
            try:
                recorded = json.loads((folder.path / manifest).read_text(encoding="utf-8"))["files"]
                hashes = {name: recorded[name]["sha256"] for name in folder.files if name in recorded}
            except (ValueError, KeyError, TypeError):
                raise CheckpointError(f"{folder.path / manifest} is damaged: it lists no files") from None
            for name, expected in hashes.items():
                check_hash(folder.path, name, expected)


def _match(folder: TensorFolder, weights: Weights) -> dict[str, str]:
    """The name in the files for each weight of the model; a tied weight may have any of its names there."""
    known = set(folder.places)
    for name in sorted(known):
        if name not in weights.tensors and name not in weights.aliases:
            raise CheckpointError(
                f"tensor '{name}' of {folder.file(name).path} is not in the model; build the model from the"
                " configuration beside the file"
            )
    names = {}
    for name in weights.tensors:
        stored = [other for other in (name, *_aliases(weights, name)) if other in known]
        if not stored:
            raise CheckpointError(
                f"tensor '{name}' of the model is missing from {folder.path}; build the model from the configuration"
                " beside the file"
            )
        names[name] = stored[0]
        for other in stored[1:]:
            if not torch.equal(_read(folder, stored[0]), _read(folder, other)):
                raise CheckpointError(
                    f"tensors '{stored[0]}' and '{other}' are one weight in the model, but differ in {folder.path}"
                )
    return names


def _aliases(weights: Weights, name: str) -> list[str]:
    return [alias for alias, first in weights.aliases.items() if first == name]


def _read(folder: TensorFolder, name: str) -> Tensor:
    entry: Entry = folder.entry(name)
    data = torch.empty(math.prod(entry.shape), dtype=DTYPES[entry.dtype])
    path = folder.file(name).path
    handle = os.open(path, os.O_RDONLY)
    try:
        read_exactly(handle, _memory(data), entry.start, path)
    finally:
        os.close(handle)
    return data.view(entry.shape)
