"""Blocks for each query block from its own queries and earlier keys (derived in this folder's README)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from whimbrel.attend.plan import Grid, Plan
from whimbrel.attend.shapes import check_qkv, default_scale
from whimbrel.errors import ConfigError, UnsupportedError
from whimbrel.sparse.blocks import (
    JUDGED_AT,
    PILOT_ROWS,
    PROBE_ROWS,
    always_kept,
    block_mass,
    blocks_of,
    cover_rows,
    doubtful,
    heads_first,
    margin,
    per_key_head,
    plan_of,
    within_budget,
)
from whimbrel.sparse.kernels import proven, unfit
from whimbrel.sparse.statistics import KeyStatistics, check_statistics, key_statistics


def select(
    q: Tensor,
    k: Tensor,
    *,
    coverage: float,
    row_share: float,
    estimate: str,
    probe_rows: int | None,
    min_budget: int,
    max_budget: int | None,
    block_size: int,
    impl: str = "auto",
    scale: float | None = None,
    statistics: KeyStatistics | None = None,
) -> Plan:
    """The plan for q [B, Tq, H, D], the last Tq positions, and k [B, Tk, Hkv, D].

    statistics: of all keys of k in blocks of `block_size`, for estimate="mean" where they are at hand.

    The choice for a query block does not change with what follows it, nor with where the prompt is cut, as
    long as the cuts lie on block borders. Every query block is computed with shapes that depend on its place
    alone, so not even rounding differs.

    Raises ConfigError where q and k do not fit together, UnsupportedError for impl="triton" where it cannot run.
    """
    shape = check_qkv(q, k)
    grid = Grid(block_size, shape.q_len, shape.k_len)
    scale = default_scale(shape.dim, scale)
    budget = {
        "least": blocks_of(min_budget, block_size),
        "most": None if max_budget is None else blocks_of(max_budget, block_size),
    }
    if statistics is not None and estimate != "mean":
        raise ConfigError(f"row_local: estimate='{estimate}' reads no statistics of keys; leave them out")
    why = unfit(q, block_size)
    if impl == "triton" and why is not None:
        raise UnsupportedError(f"row_local: impl='triton' cannot run here: {why}; use impl='auto'")
    if impl == "triton" or (impl == "auto" and estimate != "mean" and why is None and proven(q)):
        from whimbrel.sparse.kernels.launch import sampled_plan

        rows = block_size if estimate == "exact" else probe_rows
        return sampled_plan(q, k, grid, probe_rows=rows, coverage=coverage, row_share=row_share, scale=scale, **budget)
    query, keys = heads_first(q), heads_first(k)
    means = _means(k, block_size, estimate, statistics)

    causal, forced = grid.causal(q.device), always_kept(grid, q.device)
    sizes = shape.batch, shape.heads, grid.query_blocks, grid.key_blocks
    chosen = torch.zeros(sizes, dtype=torch.bool, device=q.device)
    for row in range(grid.query_blocks):
        seen = slice(grid.first_block + row + 1)
        own = forced[row, seen]
        mass = partial(_mass, query, keys, means, grid, row, estimate=estimate, scale=scale)
        choose = partial(_choose, row_share=row_share, allowed=causal[row, seen], forced=own, **budget)
        if estimate == "sampled" and probe_rows is None:
            found = _look_twice(mass, choose, coverage, own)
        else:
            found = choose(mass(probe_rows if estimate == "sampled" else None), coverage)
        chosen[:, :, row, seen] = found
    return plan_of(chosen, grid)


def _look_twice(
    mass: Callable[[int], Tensor], choose: Callable[[Tensor, float], Tensor], coverage: float, forced: Tensor
) -> Tensor:
    """bool [B, H, n]: what few sampled queries choose, and more of them for heads in which these do not tell.

    mass: number of sampled queries -> masses [B, H, R, n]. choose: masses and coverage -> bool [B, H, n].
    """
    pilot = mass(PILOT_ROWS)
    found = choose(pilot, JUDGED_AT + margin(JUDGED_AT))
    unsure = doubtful(pilot, found, forced, margin(JUDGED_AT))
    if coverage != JUDGED_AT:
        found = choose(pilot, coverage + margin(coverage))
    if bool(unsure.any()):
        found = torch.where(unsure.unsqueeze(-1), choose(mass(PROBE_ROWS), coverage), found)
    return found


def _means(k: Tensor, block_size: int, estimate: str, statistics: KeyStatistics | None) -> Tensor:
    """Mean keys [B, Hkv, blocks, D]; none where the estimate asks for none."""
    if estimate != "mean":
        return k.new_empty(0)
    if statistics is None:
        statistics = key_statistics(k, block_size)
    check_statistics(statistics, k, block_size)
    return statistics.means


def _mass(
    query: Tensor, keys: Tensor, means: Tensor, grid: Grid, row: int, rows: int | None, *, estimate: str, scale: float
) -> Tensor:
    """Masses [B, H, R, n] of the blocks that `rows` queries of a query block see, all of its queries by default."""
    first, stop = grid.query_span(row)
    own, size = grid.first_block + row, grid.block_size
    at = torch.arange(first, stop, device=query.device) + grid.offset
    at = at if rows is None else _sample(at, size, rows)
    some = query[:, :, at - grid.offset]
    if estimate == "mean":
        here = keys[:, :, own * size : stop + grid.offset]
        return _mean_mass(some, means[:, :, :own], here, at - own * size, size, scale)
    # Only keys up to the block's last query take part, so that later ones cannot change a rounding.
    earlier = keys[:, :, : stop + grid.offset]
    return block_mass(some, earlier, at, block_size=size, scale=scale, first=first + grid.offset)


def _choose(
    mass: Tensor, coverage: float, *, row_share: float, allowed: Tensor, forced: Tensor, least: int, most: int | None
) -> Tensor:
    """bool [B, H, n]: the fewest blocks that hold the coverage, within the budget."""
    keep = cover_rows(mass, coverage, row_share, allowed=allowed, forced=forced)
    return within_budget(keep, mass.mean(2), allowed=allowed, forced=forced, least=least, most=most)


def _sample(at: Tensor, block_size: int, probe_rows: int) -> Tensor:
    """Evenly spaced positions of a block, the last one included: fixed places, whichever part of it is at
    hand."""
    stride = -(-block_size // probe_rows)
    chosen = at % block_size % stride == stride - 1
    chosen[-1] = True
    return at[chosen]


def _mean_mass(rows: Tensor, means: Tensor, here: Tensor, within: Tensor, block_size: int, scale: float) -> Tensor:
    """Estimated mass [B, H, R, earlier blocks + 1] of rows [B, H, R, D] at places `within` [R] of their own
    block.

    An earlier block counts as `block_size` keys at its mean; the own block, keys `here` [B, Hkv, <= size, D],
    exactly.
    """
    earlier = per_key_head(rows * scale, means) + math.log(block_size)
    hidden = torch.arange(here.shape[2], device=rows.device) > within[:, None]
    own = per_key_head(rows * scale, here).masked_fill(hidden, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([earlier, own], -1).softmax(-1)
