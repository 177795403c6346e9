"""Which requests of a batch are prefilled sparsely, and how, over keys and values in pages. Knows no vLLM.

A batch is flattened: request r has the tokens `starts[r]` to `starts[r + 1]`, the last of its `lengths[r]` positions,
whose keys and values lie in the pages that row r of the block table lists. A cache is [pages, Hkv, page size, 2 * D],
keys before values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whimbrel.config import SelectorConfig, decode, kind_class, require
from whimbrel.sparse.apply import Selector, apply_selector

KEY = "whimbrel_prefill"
"""Where the settings stand in vLLM's `additional_config`."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `additional_config["whimbrel_prefill"]` says: the table of a selector, and `min_length`."""

    selector: SelectorConfig
    min_length: int = 32_768
    """Positions from which on a request's chunk of more than one block of tokens is prefilled sparsely."""

    def __post_init__(self) -> None:
        require(self.min_length > 0, f"{KEY}.min_length", self.min_length, "a positive number of tokens")

    @classmethod
    def of(cls, table: Mapping[str, Any] | None) -> Settings:
        """Raises ConfigError for what is not known or not allowed."""
        given = dict(table or {})
        extra = {"min_length": given.pop("min_length")} if "min_length" in given else {}
        kind = kind_class(SelectorConfig.FAMILY, given.pop("kind", "row_local"))
        return cls(selector=decode(kind, given, where=f"{KEY}."), **extra)

    @property
    def least_tokens(self) -> int:
        """Tokens that a request must bring at least: a block, so that decoding and short ends stay dense."""
        return getattr(self.selector, "block_size", 128)


class Request(NamedTuple):
    """One request of a batch."""

    index: int
    start: int
    """Its first token in the batch."""
    stop: int
    length: int
    """Positions up to its last token."""


def requests(starts: Sequence[int], lengths: Sequence[int]) -> list[Request]:
    """The requests of a batch from its table of starts, one longer than the lengths."""
    return [Request(i, starts[i], starts[i + 1], length) for i, length in enumerate(lengths)]


def long_ones(batch: Sequence[Request], settings: Settings) -> list[Request]:
    """Those to be prefilled sparsely."""
    return [r for r in batch if r.stop - r.start >= settings.least_tokens and r.length >= settings.min_length]


def gather(cache: Tensor, pages: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values [1, length, Hkv, D] of the positions in these pages, copied together."""
    size = cache.shape[2]
    found = cache[pages[: -(-length // size)].long()]  # [pages, Hkv, size, 2 D]
    keys, values = found.transpose(1, 2).flatten(0, 1)[None, :length].chunk(2, -1)
    return keys, values


def prefill(
    query: Tensor,
    cache: Tensor,
    table: Tensor,
    chosen: Sequence[Request],
    selector: Selector,
    *,
    scale: float,
    output: Tensor,
) -> list[Tensor]:
    """Attention of the chosen requests, written to output [tokens, H, D]; of each the mean density of its heads.

    query [tokens, H, D]; table int [requests, pages]. Memory: the keys and values of one request at a time.
    """
    densities = []
    for request in chosen:
        keys, values = gather(cache, table[request.index], request.length)
        q = query[None, request.start : request.stop]
        out = apply_selector(q, keys.to(q.dtype), values.to(q.dtype), selector, scale=scale)
        output[request.start : request.stop] = out.y[0]
        densities.append(out.density.mean())
    return densities


class Rest(NamedTuple):
    """What is left of a batch without some requests."""

    tokens: Tensor
    """int64: places of its tokens in the batch."""
    rows: Tensor
    """int64: its requests."""
    starts: list[int]
    lengths: list[int]


def without(batch: Sequence[Request], chosen: Sequence[Request], device: torch.device) -> Rest:
    """The other requests, in their order."""
    taken = {request.index for request in chosen}
    left = [request for request in batch if request.index not in taken]
    starts = [0]
    for request in left:
        starts.append(starts[-1] + request.stop - request.start)
    places = [place for request in left for place in range(request.start, request.stop)]
    as_index = {"dtype": torch.int64, "device": device}
    rows = [request.index for request in left]
    return Rest(torch.tensor(places, **as_index), torch.tensor(rows, **as_index), starts, [r.length for r in left])
