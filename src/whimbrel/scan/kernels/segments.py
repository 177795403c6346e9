"""Where chunks and stretches of the sequences lie among the tokens, as small tensors on the device.

Batch rows are sequences of equal length, so that dense and packed inputs are one case: tokens [B * T] with edges.
A stretch is what one program walks through: a sequence, or a part of it where there are few heads.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Chunks and stretches; ends are exclusive, and a place that holds no token has end <= start."""

    chunk_start: Tensor
    """int32 [chunks]: the first token."""
    chunk_end: Tensor
    """int32 [chunks]."""
    stretch_start: Tensor
    """int32 [N * splits]: the first token; the stretches of one sequence follow each other."""
    stretch_end: Tensor
    """int32 [N * splits]."""
    stretch_chunk: Tensor
    """int32 [N * splits]: the first chunk."""


def count_chunks(tokens: int, sequences: int, chunk: int) -> int:
    """Places for chunks: enough for any lengths of `sequences` sequences that add up to `tokens`."""
    return tokens // chunk + sequences


def segments(
    cu_seqlens: Tensor | None, batch: int, time: int, chunk: int, splits: int, device: torch.device
) -> Segments:
    """The table for [batch, time] inputs or, with cu_seqlens [N + 1], for N sequences packed along time.

    Nothing waits for the device: a packed sequence n begins at chunk edges[n] // chunk + n, which leaves room.
    """
    if cu_seqlens is None:
        return _dense(batch, time, chunk, splits, device)
    return _table(cu_seqlens.to(device, torch.int64).clamp(0, time), time, chunk, splits)


@lru_cache(maxsize=64)
def _dense(batch: int, time: int, chunk: int, splits: int, device: torch.device) -> Segments:
    table = _table(torch.arange(batch + 1) * time, batch * time, chunk, splits)
    return Segments(*(x.to(device) for x in table))


def _table(edges: Tensor, tokens: int, chunk: int, splits: int) -> Segments:
    sequences = edges.numel() - 1
    number = torch.arange(sequences, device=edges.device)
    first = edges[:-1] // chunk + number
    place = torch.arange(count_chunks(tokens, sequences, chunk), device=edges.device)
    owner = torch.searchsorted(first, place, right=True) - 1
    start = edges[owner] + (place - first[owner]) * chunk
    end = torch.minimum(start + chunk, edges[owner + 1])
    length = edges.diff()
    step = (length + chunk * splits - 1) // (chunk * splits)
    part = torch.arange(splits, device=edges.device)
    stretch_chunk = first[:, None] + step[:, None] * part
    stretch_start = torch.minimum(edges[:-1, None] + step[:, None] * chunk * part, edges[1:, None])
    stretch_end = torch.minimum(stretch_start + step[:, None] * chunk, edges[1:, None])
    return Segments(*(x.flatten().to(torch.int32) for x in (start, end, stretch_start, stretch_end, stretch_chunk)))
