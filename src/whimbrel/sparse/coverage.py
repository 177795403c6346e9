"""How much attention a plan really keeps, what can be proved about it from statistics, and what it lacks."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from whimbrel.attend.op import check_fit
from whimbrel.attend.plan import Plan
from whimbrel.attend.shapes import check_qkv, default_scale
from whimbrel.errors import ConfigError
from whimbrel.sparse.blocks import (
    block_mass,
    cover_rows,
    heads_first,
    per_key_head,
    rows_needed,
)
from whimbrel.sparse.statistics import KeyStatistics, check_statistics, key_statistics


class Audit(NamedTuple):
    """What a plan was found to keep, for some queries."""

    rows: Tensor
    """int64 [R]: the queries looked at, as indices into q's time axis."""
    achieved: Tensor
    """[B, H, R]: exact softmax mass inside the plan."""
    certified: Tensor
    """[B, H, R]: what `bounds` proves of it, never more than `achieved` but for rounding."""

    def summary(self) -> dict[str, float]:
        """Least, 5th percentile and mean of `achieved` over heads and queries, and the mean of `certified`."""
        found = self.achieved.detach().double().flatten()
        return {
            "min": float(found.min()),
            "p5": float(found.quantile(0.05)),
            "mean": float(found.mean()),
            "certified": float(self.certified.detach().double().mean()),
        }


class Bounds(NamedTuple):
    """Between which shares the coverage of queries lies, proved without a look at the keys left out."""

    low: Tensor
    """[B, H, R]."""
    high: Tensor
    """[B, H, R]."""


def coverage(q: Tensor, k: Tensor, plan: Plan, *, scale: float | None = None, rows: Tensor | None = None) -> Tensor:
    """Exact softmax mass inside the plan, per query: [B, H, R] in fp32 (fp64 for fp64 inputs).

    Args:
        q: [B, Tq, H, D], the last Tq positions.
        k: [B, Tk, Hkv, D].
        plan: a plan for these tensors.
        scale: factor on q . k; 1 / sqrt(D) by default.
        rows: int64 [R], ascending indices into q's time axis; all queries by default. Every query costs one
            dense row of logits, so sample rows of long prompts.

    Raises ConfigError where plan and tensors do not fit, or a row lies outside q or out of order.
    """
    shape = check_qkv(q, k)
    check_fit(plan, shape, q.device)
    grid = plan.grid
    if rows is None:
        rows = torch.arange(grid.q_len, device=q.device)
    if rows.dim() != 1 or rows.is_floating_point() or len(rows) == 0:
        raise ConfigError(f"rows is {rows.dtype} of shape {tuple(rows.shape)}; give a list of at least one int64 index")
    if int(rows.min()) < 0 or int(rows.max()) >= grid.q_len or bool((rows.diff() < 0).any()):
        raise ConfigError(
            f"rows runs from {int(rows.min())} to {int(rows.max())}; give ascending indices from 0 to {grid.q_len - 1}"
        )
    scale = default_scale(shape.dim, scale)
    query, keys, chosen = heads_first(q), heads_first(k), plan.to_mask()
    parts = []
    for part in rows.split(max(1, grid.block_size)):
        at = part + grid.offset
        seen = keys[:, :, : int(at[-1]) + 1]
        mass = block_mass(query[:, :, part], seen, at, block_size=grid.block_size, scale=scale, first=int(at[0]))
        inside = chosen[:, :, at // grid.block_size - grid.first_block, : mass.shape[-1]]
        parts.append((mass * inside).sum(-1))
    return torch.cat(parts, -1)


def bounds(
    q: Tensor,
    k: Tensor,
    plan: Plan,
    lse: Tensor,
    *,
    scale: float | None = None,
    rows: Tensor | None = None,
    statistics: KeyStatistics | None = None,
) -> Bounds:
    """What statistics of the key blocks prove about the coverage of a plan.

    Args:
        q, k, plan, scale, rows: as for `coverage`.
        lse: [B, Tq, H], of attention over the plan; `attend` returns it.
        statistics: of all keys of k in the blocks of the plan, where they are at hand; else they are computed.

    A block left out holds keys with mean c, all within the radius r of c and within a box. The mean of exp over them is
    at least exp(scale q . c) (Jensen), and at most that of the chord of exp over the range of their logits, which is
    the narrower of ball and box, at the same mean. Costs a product of each query with three vectors of every block. The
    lower bound is loose where keys scatter in many dimensions: pair it with an audit.
    """
    shape = check_qkv(q, k)
    check_fit(plan, shape, q.device)
    grid = plan.grid
    rows = torch.arange(grid.q_len, device=q.device) if rows is None else rows
    query = heads_first(q[:, rows]) * default_scale(shape.dim, scale)
    if statistics is None:
        statistics = key_statistics(k, grid.block_size)
    check_statistics(statistics, k, grid.block_size)
    means, least, most, radius = statistics[2:]
    middle = per_key_head(query, means)
    up, down = query.clamp_min(0), query.clamp_max(0)
    ball = query.norm(dim=-1, keepdim=True) * radius.repeat_interleave(shape.heads // k.shape[2], 1).unsqueeze(2)
    above = torch.minimum(per_key_head(up, most) + per_key_head(down, least), ball).clamp_min(1e-6)
    below = torch.minimum(-per_key_head(up, least) - per_key_head(down, most), ball).clamp_min(1e-6)
    chord = above + ((above * (-above - below).exp() + below) / (above + below)).log()
    at = rows + grid.offset
    whole = torch.arange(grid.key_blocks, device=q.device) < (at // grid.block_size)[:, None]
    dropped = whole & ~plan.to_mask()[:, :, at // grid.block_size - grid.first_block]
    base = middle + statistics.counts.log() - lse[:, rows].transpose(1, 2).unsqueeze(-1)
    low, high = (
        (1 + x.masked_fill(~dropped, -math.inf).clamp_max(80).exp().sum(-1)).reciprocal() for x in (base + chord, base)
    )
    return Bounds(low, high)


def lacking(
    q: Tensor,
    k: Tensor,
    plan: Plan,
    *,
    coverage: float,
    row_share: float = 0.95,
    audit_rows: int = 16,
    scale: float | None = None,
) -> Plan | None:
    """The blocks that a plan lacks, as a part to be merged with it; None where it lacks none.

    Every query block is audited: `audit_rows` of its queries, evenly spaced and none of those that a selector samples,
    must keep `coverage` for the share `row_share` of them. Where they do not, the block's queries are all computed, and
    it gets as many more blocks, largest first, as it takes until the share `row_share` of them is covered. So a query
    block is repaired from its own queries and earlier keys alone.
    """
    shape = check_qkv(q, k)
    check_fit(plan, shape, q.device)
    grid, size = plan.grid, plan.block_size
    scale = default_scale(shape.dim, scale)
    query, keys, chosen = heads_first(q), heads_first(k), plan.to_mask()
    added = torch.zeros_like(chosen)
    causal = grid.causal(q.device)
    for row in range(grid.query_blocks):
        first, stop = grid.query_span(row)
        at = torch.arange(first, stop, device=q.device) + grid.offset
        own = grid.first_block + row
        seen, kept = keys[:, :, : stop + grid.offset], chosen[:, :, row, : own + 1]
        some = _audited(at, size, audit_rows)
        mass = partial(block_mass, k_BHTD=seen, block_size=size, scale=scale)
        found = (mass(query[:, :, some - grid.offset], positions=some) * kept.unsqueeze(2)).sum(-1)
        short = (found >= coverage).sum(-1) < rows_needed(len(some), row_share)
        if bool(short.any()):
            here = mass(query[:, :, first:stop], positions=at)
            more = cover_rows(here, coverage, row_share, allowed=causal[row, : own + 1], forced=kept)
            added[:, :, row, : own + 1] = more & ~kept & short.unsqueeze(-1)
    if not bool(added.any()):
        return None
    return Plan.from_mask(added, block_size=size, q_len=grid.q_len, k_len=grid.k_len, is_part=True)


def _audited(at: Tensor, block_size: int, audit_rows: int) -> Tensor:
    """Evenly spaced positions of a block, halfway between those that selectors sample; the last if there is none."""
    stride = max(1, block_size // audit_rows)
    found = at[at % block_size % stride == max(0, stride // 2 - 1)]
    return found if len(found) else at[-1:]
