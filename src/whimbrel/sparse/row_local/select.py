"""Blocks for each query block from its own queries and earlier keys (derived in this folder's README)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from whimbrel.attend.plan import Grid, Plan
from whimbrel.attend.shapes import check_qkv, default_scale
from whimbrel.errors import UnsupportedError
from whimbrel.sparse.blocks import (
    always_kept,
    block_mass,
    block_means,
    blocks_of,
    cover_rows,
    heads_first,
    per_key_head,
    plan_of,
    within_budget,
)
from whimbrel.sparse.kernels import proven, unfit


def select(
    q: Tensor,
    k: Tensor,
    *,
    coverage: float,
    row_share: float,
    estimate: str,
    probe_rows: int,
    min_budget: int,
    max_budget: int | None,
    block_size: int,
    impl: str = "auto",
    scale: float | None = None,
) -> Plan:
    """The plan for q [B, Tq, H, D], the last Tq positions, and k [B, Tk, Hkv, D].

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
    why = unfit(q, block_size)
    if impl == "triton" and why is not None:
        raise UnsupportedError(f"row_local: impl='triton' cannot run here: {why}; use impl='auto'")
    if impl == "triton" or (impl == "auto" and estimate != "mean" and why is None and proven(q)):
        from whimbrel.sparse.kernels.launch import sampled_plan

        rows = block_size if estimate == "exact" else probe_rows
        return sampled_plan(q, k, grid, probe_rows=rows, coverage=coverage, row_share=row_share, scale=scale, **budget)
    query, keys = heads_first(q), heads_first(k)
    means = block_means(keys, block_size)[0]

    causal, forced = grid.causal(q.device), always_kept(grid, q.device)
    mass = query.new_zeros(shape.batch, shape.heads, grid.query_blocks, grid.key_blocks)
    chosen = torch.zeros_like(mass, dtype=torch.bool)
    for row in range(grid.query_blocks):
        first, stop = grid.query_span(row)
        at = torch.arange(first, stop, device=q.device) + grid.offset
        if estimate == "sampled":
            at = _sample(at, block_size, probe_rows)
        rows = query[:, :, at - grid.offset]
        own = grid.first_block + row
        if estimate == "mean":
            here = keys[:, :, own * block_size : stop + grid.offset]
            found = _mean_mass(rows, means[:, :, :own], here, at - own * block_size, block_size, scale)
        else:
            # Only keys up to the block's last query take part, so that later ones cannot change a rounding.
            earlier = keys[:, :, : stop + grid.offset]
            found = block_mass(rows, earlier, at, block_size=block_size, scale=scale, first=first + grid.offset)
        mass[:, :, row, : own + 1] = found.mean(2)
        seen = slice(own + 1)
        chosen[:, :, row, seen] = cover_rows(
            found, coverage, row_share, allowed=causal[row, seen], forced=forced[row, seen]
        )
    return plan_of(within_budget(chosen, mass, allowed=causal, forced=forced, **budget), grid)


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
