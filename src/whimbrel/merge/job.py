"""What a merge is to do: sources opened, checked against each other, and the size of its pieces."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import whimbrel
from whimbrel.checkpoint.tensorfile import ITEM_BYTES
from whimbrel.config import MergeConfig, require
from whimbrel.errors import CheckpointError, ConfigError
from whimbrel.merge.blocks import BLOCK
from whimbrel.merge.outputs import Layout, make_layout
from whimbrel.merge.plan import Extent, Item, Rules, list_items, make_extents
from whimbrel.merge.pma import Weights
from whimbrel.merge.reading import same_bytes
from whimbrel.merge.sources import Source, open_sources, tied_pairs

# Larger ones leave the caches before they are summed, smaller ones cost the disk its order (docs/log.md).
_LARGEST_PIECE = 4 * 2**20
_SMALLEST_PIECE = 64 * 2**10
# Threads that read and sum, unless told otherwise: one for each processor, while pieces stay large.
_MOST_WORKERS = 4
_WORKERS_PIECE = 512 * 2**10


class Target(NamedTuple):
    """One of the averages that a pass over the sources forms."""

    name: str
    """Its folder below the result's; "" for the result itself."""
    members: tuple[int, ...]
    """Numbers of its sources, oldest first."""
    config: MergeConfig
    """Its method."""


class Result(NamedTuple):
    """A target and the weights of its members."""

    target: Target
    weights: Weights


class Job(NamedTuple):
    """A merge that was checked and planned."""

    sources: list[Source]
    results: list[Result]
    rules: Rules
    layout: Layout
    extents: list[Extent]
    piece: int
    workers: int
    buffers: int

    def needed(self, item: Item) -> list[int]:
        """The sources that a tensor is read from."""
        if item.policy == "newest":
            return sorted({result.target.members[-1] for result in self.results})
        return list(range(len(self.sources)))

    @property
    def read_bytes(self) -> int:
        """Bytes of all extents in all sources that they need."""
        return sum(extent.size * len(self.needed(extent.item)) for extent in self.extents)

    @property
    def written_bytes(self) -> int:
        """Bytes of all files of tensors of all results."""
        return self.layout.written_bytes * len(self.results)


def prepare(
    paths: Sequence[str | Path],
    targets: Sequence[Target],
    rules: Rules,
    memory_limit: int,
    workers: int | None,
    tokens_per_step: int | None = None,
) -> Job:
    """Open and check the sources, lay the results out, and choose threads and the size of pieces.

    memory_limit: bytes of all buffers. workers: threads; as many as processors and buffers allow if None. Raises
    ConfigError for arguments and for an order against the steps, CheckpointError for sources that do not match.
    """
    if rules.optimizer is not None and len(targets) > 1:
        raise ConfigError(f"merge.optimizer = '{rules.optimizer}' is for a single result; merge those one by one")
    training = rules.optimizer is not None
    sources = open_sources(paths, rename=rules.rename, training=training, tokens_per_step=tokens_per_step)
    results = [Result(target, target.config.weights(len(target.members))) for target in targets]
    for result in results:
        _check_order([sources[member] for member in result.target.members], result.weights)
    tied = [*rules.tied, *(pair for pair in tied_pairs(sources) if pair not in rules.tied)]
    items, state = list_items(sources, rules, tied)
    _check_tied(sources, tied)
    layout = make_layout(items, state, sources[-1], rules)
    extents = make_extents(layout.slots)
    wider = max([ITEM_BYTES[item.out_dtype] // ITEM_BYTES[item.dtype] for item in items], default=1)
    num_outputs = len(targets) * max(wider, 1)
    if workers is None:
        most = memory_limit // ((len(sources) + num_outputs + 1) * _WORKERS_PIECE)
        workers = max(2, min(_MOST_WORKERS, len(os.sched_getaffinity(0)), most))
    require(workers >= 1, "merge.workers", workers, "at least one thread")
    piece, buffers = _piece_bytes(memory_limit, workers, len(sources), num_outputs)
    return Job(sources, results, rules, layout, extents, piece, workers, buffers)


def _check_order(opened: list[Source], weights: Weights) -> None:
    """Where order matters and the steps are known, they must rise."""
    if len(set(weights.values)) <= 1:
        return
    known = [(source.path, source.step) for source in opened if source.step is not None]
    for (path_before, before), (path, after) in pairwise(known):
        if after < before:
            raise ConfigError(
                f"{path} (step {after}) comes after {path_before} (step {before}); name the checkpoints from oldest to"
                " newest"
            )


def _piece_bytes(memory_limit: int, workers: int, num_sources: int, num_outputs: int) -> tuple[int, int]:
    """Bytes to read from each source at a time, so that all buffers fit the limit, and what these take."""
    # One share more holds bytes that are to be spread over a piece.
    shares = workers * (num_sources + num_outputs + 1)
    scratch = workers * 64 * BLOCK
    least = shares * _SMALLEST_PIECE + scratch
    allowed = f"at least {least} bytes ({-(-least // 2**20)} MiB) for {num_sources} sources and {workers} threads"
    require(memory_limit >= least, "merge.memory_limit", memory_limit, allowed)
    piece = min(_LARGEST_PIECE, (memory_limit - scratch) // shares // 8 * 8)
    return piece, shares * piece + scratch


def fingerprint(job: Job) -> str:
    """What the bytes of the result, and their cutting into pieces, depend on."""
    described = {
        "whimbrel": whimbrel.__version__,
        "sources": [
            [str(source.path.resolve()), [(name, *file[1:]) for name, file in source.files.items()]]
            for source in job.sources
        ],
        "results": [(result.target.name, result.target.members, result.weights.texts()) for result in job.results],
        "rules": asdict(job.rules),
        "piece": job.piece,
    }
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _check_tied(sources: Sequence[Source], tied: Sequence[tuple[str, str]]) -> None:
    for a, b in tied:
        for source in sources:
            if a in source.tensors and b in source.tensors and not same_bytes(source.tensors[a], source.tensors[b]):
                raise CheckpointError(f"tensors '{a}' and '{b}' are tied, but differ in {source.path}")
