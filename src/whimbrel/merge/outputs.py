"""How a merge lies on the disk: files of safetensors with an index, or a distributed checkpoint. No torch but for the
latter's metadata."""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import whimbrel
from whimbrel.checkpoint import dcp, torchzip
from whimbrel.checkpoint.steps import META, Meta, write_meta
from whimbrel.checkpoint.tensorfile import INDEX, ITEM_BYTES, SINGLE, make_header
from whimbrel.files import sha256_file
from whimbrel.merge.plan import Item, Rules, Slot, training_kind
from whimbrel.merge.sources import BIN_INDEX, OPTIMIZER, TRAIN, Source, is_training

MANIFEST = "merge.json"
# Configuration and tokenizer belong to the weights. Where the optimizer is asked for, a checkpoint of transformers'
# Trainer is to go on from its schedule, random state and position too.
_COMPANIONS = ("*.json", "*.toml", "*.txt", "*.model", "*.jinja")
_TRAINER_FILES = ("trainer_state.json", "training_args.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth")
_NOT_COPIED = (MANIFEST, META, INDEX, BIN_INDEX, "trainer_state.json")
_SHARD_BYTES = 5_000_000_000
# Rows of one chunk of a distributed checkpoint, so that a reader can spread the work.
_CHUNK_BYTES = min(1 << 30, dcp.LARGEST_CHUNK)


class Layout(NamedTuple):
    """The files of a result and where each tensor goes in them."""

    slots: list[Slot]
    """In the order of the files."""
    heads: dict[str, list[tuple[int, bytes]]]
    """For each file, what is known beforehand: (place, bytes)."""
    sizes: dict[str, int]
    """Bytes of each file."""
    places: dict[str, str]
    """Name of a weight -> its file, for the index of safetensors."""
    chunks: dict[str, list[dcp.NewChunk]]
    """For each folder of a distributed checkpoint ("." or train/), its chunks; their slots come in the same order."""
    blobs: dict[str, dict[str, tuple[str, int, int]]]
    """For each such folder, the objects that are no tensors: name -> file, start, bytes."""
    archives: dict[str, Path]
    """Files that are an archive of the newest source but for the bytes of tensors: name -> that archive."""

    @property
    def written_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())


def make_layout(items: Sequence[Item], training: Sequence[Item], newest: Source, rules: Rules) -> Layout:
    """Where the weights `items` and the state `training` go."""
    layout = Layout([], {}, {}, {}, {}, {}, {})
    kept = _kept_blobs(newest, rules.optimizer)
    if rules.format == "safetensors":
        _add_safetensors(layout, items, newest)
        if training and newest.optimizer is not None:
            _add_archive(layout, training, newest.path / OPTIMIZER)
        elif training:
            _add_dcp(layout, TRAIN, training, kept)
    else:
        _add_dcp(layout, ".", [*items, *training], kept)
    return layout


def _add_safetensors(layout: Layout, items: Sequence[Item], newest: Source) -> None:
    by_name = {item.name: item for item in items}
    for file, names, metadata in _shards(items, newest):
        shapes = {name: (by_name[name].out_dtype, by_name[name].shape) for name in names}
        header, entries = make_header(shapes, metadata)
        layout.heads[file] = [(0, header)]
        layout.sizes[file] = max([len(header), *(entry.stop for entry in entries.values())])
        for name in names:
            item = by_name[name]
            layout.slots.append(Slot(item, (0,) * len(item.shape), item.shape, file, entries[name].start))
            layout.places[name] = file


def _shards(items: Sequence[Item], newest: Source) -> list[tuple[str, list[str], Mapping[str, str]]]:
    """File, its tensors in order, its metadata: as the newest source has them, or cut by size."""
    if newest.folder is not None:
        by_file: dict[Path, list[str]] = {}
        for name, stored in newest.tensors.items():
            by_file.setdefault(stored.boxes[0].path, []).append(name)
        files = newest.folder.files
        single = len(files) == 1
        return [(SINGLE if single else name, by_file.get(file.path, []), file.metadata) for name, file in files.items()]
    shards: list[list[str]] = [[]]
    size = 0
    for item in items:
        own = math.prod(item.shape) * ITEM_BYTES[item.out_dtype]
        if size + own > _SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(item.name)
        size += own
    if len(shards) == 1:
        return [(SINGLE, shards[0], {"format": "pt"})]
    stem = SINGLE.removesuffix(".safetensors")
    return [
        (f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors", names, {"format": "pt"})
        for i, names in enumerate(shards, start=1)
    ]


def _add_archive(layout: Layout, items: Sequence[Item], archive: Path) -> None:
    """As the archive: what lies between its tensors (the pickle, the frames of records) is taken from it."""
    size, at = archive.stat().st_size, 0
    heads = layout.heads.setdefault(archive.name, [])
    with open(archive, "rb") as file:
        for item in sorted(items, key=lambda item: item.stored[-1].boxes[0].start):
            start = item.stored[-1].boxes[0].start
            layout.slots.append(Slot(item, (0,) * len(item.shape), item.shape, archive.name, start))
            file.seek(at)
            heads.append((at, file.read(start - at)))
            at = start + math.prod(item.shape) * ITEM_BYTES[item.dtype]
        file.seek(at)
        heads.append((at, file.read()))
    layout.sizes[archive.name] = size
    layout.archives[archive.name] = archive


def _add_dcp(layout: Layout, folder: str, items: Sequence[Item], kept: Mapping[str, dcp.Blob]) -> None:
    chunks: list[dcp.NewChunk] = []
    number, at = 0, 0
    prefix = "" if folder == "." else f"{folder}/"
    for item in items:
        for offsets, sizes in _row_boxes(item.shape, _CHUNK_BYTES // ITEM_BYTES[item.out_dtype]):
            if at > _SHARD_BYTES:
                number, at = number + 1, 0
            chunk = dcp.new_chunk(item.name, item.out_dtype, offsets, sizes, f"__0_{number}.distcp", at)
            chunks.append(chunk)
            layout.slots.append(Slot(item, offsets, sizes, prefix + chunk.file, chunk.payload))
            at += chunk.size
            layout.sizes[prefix + chunk.file] = at
    layout.chunks[folder] = chunks
    layout.blobs[folder] = {}
    for name, blob in kept.items():
        file = f"__0_{number}.distcp"
        with open(blob.path, "rb") as source:
            source.seek(blob.start)
            data = source.read(blob.size)
        layout.blobs[folder][name] = (file, at, blob.size)
        layout.heads.setdefault(prefix + file, []).append((at, data))
        at += blob.size
        layout.sizes[prefix + file] = at


def _kept_blobs(newest: Source, optimizer: str | None) -> dict[str, dcp.Blob]:
    """The objects of a distributed checkpoint that go with the result; all but the state of parameters on a reset."""
    if newest.dcp is None:
        return {}

    def is_kept(name: str) -> bool:
        if optimizer == "reset":
            return training_kind(name) == "other"
        return optimizer is not None or not is_training(name)

    return {name: blob for name, blob in newest.dcp.blobs.items() if is_kept(name)}


def _row_boxes(shape: tuple[int, ...], most: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The tensor in ranges of rows of at most `most` elements, one row at the least."""
    if not shape or math.prod(shape) <= most:
        return [((0,) * len(shape), shape)]
    rows = max(most // math.prod(shape[1:]), 1)
    rest = (0,) * (len(shape) - 1)
    return [((r, *rest), (min(rows, shape[0] - r), *shape[1:])) for r in range(0, shape[0], rows)]


def finish_folder(folder: Path, layout: Layout, crcs: Mapping[int, int], newest: Source, optimizer: str | None) -> None:
    """Write what comes after the tensors: frames of archives, metadata, index, and the newest source's companions.

    crcs: number of a slot -> CRC-32 of its bytes, for the slots of distributed checkpoints and archives.
    """
    for name in layout.chunks:
        _frame_chunks(folder, layout, name, crcs, newest)
    for file, archive in layout.archives.items():
        _write_crcs(folder / file, archive, layout, crcs)
    _copy_companions(newest.path, folder, _COMPANIONS, _NOT_COPIED)
    if optimizer is not None and newest.optimizer is not None:
        _copy_companions(newest.path, folder, _TRAINER_FILES, ())
        if optimizer == "reset":
            _write_empty_state(folder, newest.path / OPTIMIZER)
    _write_index(folder, layout)
    if optimizer is not None and (newest.path / TRAIN / "state.json").is_file():
        _write_state(folder, newest, optimizer)


def _frame_chunks(folder: Path, layout: Layout, name: str, crcs: Mapping[int, int], newest: Source) -> None:
    """Put heads and tails about the chunks of the distributed checkpoint `name`, and write its metadata."""
    number = {(slot.item.name, slot.file, slot.start): i for i, slot in enumerate(layout.slots)}
    prefix = "" if name == "." else f"{name}/"
    for chunk in layout.chunks[name]:
        crc = crcs.get(number[chunk.name, prefix + chunk.file, chunk.payload], zlib.crc32(b""))
        handle = os.open(folder / prefix / chunk.file, os.O_WRONLY)
        try:
            os.pwrite(handle, chunk.head(crc), chunk.start)
            os.pwrite(handle, chunk.tail(crc), chunk.payload + chunk.payload_bytes)
        finally:
            os.close(handle)
    shapes = {slot.item.name: slot.item.shape for slot in layout.slots}
    planner = newest.dcp.planner_data if newest.dcp is not None else None
    metadata = dcp.new_metadata(layout.chunks[name], shapes, layout.blobs[name], planner)
    (folder / prefix / dcp.METADATA).write_bytes(metadata)


def _write_crcs(file: Path, archive: Path, layout: Layout, crcs: Mapping[int, int]) -> None:
    """Put the CRC-32s of the new tensors into a copy of an archive of torch.save."""
    places = torchzip.crc_places(archive)
    payloads = {payload.start: key for key, payload in torchzip.read_archive(archive).payloads.items()}
    with open(file, "r+b") as written:
        for i, slot in enumerate(layout.slots):
            if slot.file != file.name or i not in crcs:
                continue
            for place in places[payloads[slot.start]]:
                written.seek(place)
                written.write(crcs[i].to_bytes(4, "little"))


def _write_index(folder: Path, layout: Layout) -> None:
    """Which file holds which tensor, where safetensors lie in several."""
    shards = sorted(set(layout.places.values()))
    if len(shards) > 1:
        total = sum(layout.sizes[file] - len(layout.heads[file][0][1]) for file in shards)
        index = {"metadata": {"total_size": total}, "weight_map": layout.places}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _write_state(folder: Path, newest: Source, optimizer: str) -> None:
    """What of a step folder's training state is no tensor; without the optimizer's own where it is reset."""
    state = json.loads((newest.path / TRAIN / "state.json").read_text(encoding="utf-8"))
    if optimizer == "reset":
        state["optimizer"]["state"] = {}
    (folder / TRAIN / "state.json").write_text(json.dumps(state), encoding="utf-8")


def write_step_meta(folder: Path, meta: Meta, hashes: Mapping[str, str]) -> None:
    """Make the folder a step that a run can go on from; its step and tokens are the newest source's."""
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": hashes.get(name) or sha256_file(folder / name)}
        for name in sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    }
    write_meta(folder, meta._replace(whimbrel=whimbrel.__version__, files=files))


def _write_empty_state(folder: Path, archive: Path) -> None:
    """The options of an optimizer without its state."""
    import torch

    state = torch.load(archive, map_location="cpu", weights_only=True, mmap=True)
    torch.save({**state, "state": {}}, folder / archive.name)


def _copy_companions(newest: Path, folder: Path, patterns: Sequence[str], but: Collection[str]) -> None:
    """Copy files of the newest source that belong to the result."""
    for file in sorted(newest.iterdir()):
        if file.is_file() and file.name not in but and any(file.match(pattern) for pattern in patterns):
            shutil.copyfile(file, folder / file.name)
