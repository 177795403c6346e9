"""FlexPrefill's selection as the paper states it (arXiv 2502.20766, algorithms 1 to 4), on exact block
masses."""

from __future__ import annotations

import torch
from torch import Tensor

from whimbrel.attend.plan import Grid, Plan
from whimbrel.attend.shapes import check_qkv, default_scale
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
from whimbrel.sparse.flex_prefill.divergence import js_distance

POOLED_ROWS = 4
"""Queries of a block that stand for it where a head is query-aware."""


def select(
    q: Tensor,
    k: Tensor,
    *,
    coverage: float,
    row_share: float,
    tau: float,
    min_budget: int,
    max_budget: int | None,
    block_size: int,
    scale: float | None = None,
) -> Plan:
    """The plan for q [B, Tq, H, D], the last Tq positions, and k [B, Tk, Hkv, D].

    Of the probe, which is the last complete block of positions and what follows it as far as they are queries, a
    share `row_share` holds at least `coverage` inside the plan, for every head, unless `max_budget` cuts it. Other
    rows get the pattern found there, or an estimate of their own.
    """
    shape = check_qkv(q, k)
    grid = Grid(block_size, shape.q_len, shape.k_len)
    scale = default_scale(shape.dim, scale)
    query, keys = heads_first(q), heads_first(k)

    start = max(probe_start(grid), grid.offset)
    positions = torch.arange(start, grid.k_len, device=q.device)
    probe = query[:, :, start - grid.offset :]
    mass = block_mass(probe, keys, positions, block_size=block_size, scale=scale, first=start)
    vertical = mass.mean(2)
    diagonal = slash_mass(mass, positions // block_size)

    key_means = block_means(keys, block_size)[0]
    seen = visible_keys(positions, grid).to(keys.dtype).mean(0)
    probe_logits = per_key_head(probe.mean(2, keepdim=True) * scale, key_means).squeeze(2) + seen.log()
    query_aware = js_distance(probe_logits.softmax(-1), vertical) < tau

    causal, forced = grid.causal(q.device), always_kept(grid, q.device)
    pooled = _pooled_mass(query, key_means, grid, scale)
    aware = cover_rows(pooled, coverage, row_share, allowed=causal, forced=forced)
    pooled = pooled.mean(3)
    for block in range(start // block_size, grid.key_blocks):
        # The probe's own rows are known exactly, so no estimate stands for them. These are two blocks at most.
        rows, at = slice(max(0, block * block_size - start), (block + 1) * block_size - start), block - grid.first_block
        pooled[:, :, at] = mass[:, :, rows].mean(2)
        aware[:, :, at] = cover_rows(mass[:, :, rows], coverage, row_share, allowed=causal[at], forced=forced[at])
    behind = (grid.diagonal(q.device)[:, None] - torch.arange(grid.key_blocks, device=q.device)).clamp_min(0)
    everywhere = torch.ones_like(forced[0])
    columns, diagonals = (
        cover_rows(x, coverage, row_share, allowed=everywhere, forced=~everywhere) for x in (mass, diagonal)
    )
    vertical_slash = ((columns[:, :, None] | diagonals[:, :, behind]) & causal) | forced

    chosen = torch.where(query_aware[..., None, None], aware, vertical_slash)
    ranking = torch.where(query_aware[..., None, None], pooled, vertical[:, :, None] + diagonal.mean(2)[:, :, behind])
    chosen = within_budget(
        chosen,
        ranking,
        allowed=causal,
        forced=forced,
        least=blocks_of(min_budget, block_size),
        most=None if max_budget is None else blocks_of(max_budget, block_size),
    )
    return plan_of(chosen, grid)


def probe_start(grid: Grid) -> int:
    """Absolute position where the probe begins: the last complete block, or 0 where there is none."""
    return max(0, grid.k_len // grid.block_size - 1) * grid.block_size


def slash_mass(mass: Tensor, own_block: Tensor) -> Tensor:
    """Mass of every row's block diagonals: [B, H, R, n] and the rows' own blocks [R] -> [B, H, R, n].

    Entry s is the mass of the key block s blocks behind a row's own.
    """
    back = own_block[:, None] - torch.arange(mass.shape[-1], device=mass.device)
    return mass.gather(-1, back.clamp_min(0).expand_as(mass)) * (back >= 0)


def visible_keys(positions: Tensor, grid: Grid) -> Tensor:
    """Keys of every block that queries at these positions see: [..., R] -> [..., R, key blocks]."""
    starts = torch.arange(grid.key_blocks, device=positions.device) * grid.block_size
    return (positions[..., None] + 1 - starts).clamp(0, grid.block_size)


def _pooled_mass(query: Tensor, key_means: Tensor, grid: Grid, scale: float) -> Tensor:
    """Estimated mass [B, H, query blocks, POOLED_ROWS, key blocks]: softmax of query . mean key + log(keys seen).

    The queries of a block are evenly spaced, its first and its last among them: the first sees least of its own block,
    and so needs most of the others.
    """
    start = grid.diagonal(query.device) * grid.block_size
    first, stop = start.clamp_min(grid.offset), (start + grid.block_size).clamp_max(grid.k_len)
    steps = torch.arange(POOLED_ROWS, device=query.device)
    at = first[:, None] + (stop - first - 1)[:, None] * steps // (POOLED_ROWS - 1)
    logits = per_key_head(query[:, :, at.flatten() - grid.offset] * scale, key_means).unflatten(2, at.shape)
    return (logits + visible_keys(at, grid).to(query.dtype).log()).softmax(-1)
