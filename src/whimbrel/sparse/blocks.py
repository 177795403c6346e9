"""What selectors share: exact and mean statistics of blocks, and the choice of the fewest blocks for a
coverage."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from whimbrel.attend.blocks import LEAST_EXPONENT
from whimbrel.attend.plan import Grid, Plan
from whimbrel.sparse.kernels import proven

_SLAB_LOGITS = 1 << 19
"""Logits held at a time on a CPU, 2 MB in fp32: about what the second-level cache takes."""
_SLAB_LOGITS_CUDA = 1 << 25
"""The same on a GPU, 128 MB: few launches, and little beside the keys of the lengths that need it."""

PILOT_ROWS, PROBE_ROWS = 4, 16
"""Queries of a block that are looked at first, and where they do not tell enough."""
JUDGED_AT = 0.95
"""Coverage at which it is judged whether they tell enough: one for all, so that who asks for more loses no block."""


def heads_first(x: Tensor) -> Tensor:
    """[B, T, H, D] -> contiguous [B, H, T, D] in fp32, or in fp64 if x is."""
    return x.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def per_key_head(q_BHRD: Tensor, k_BHTD: Tensor) -> Tensor:
    """q [B, H, R, D] . k [B, Hkv, T, D] for every query head and its key head: [B, H, R, T], k is not
    repeated."""
    batch, heads, rows, dim = q_BHRD.shape
    kv_heads, keys = k_BHTD.shape[1:3]
    grouped = q_BHRD.reshape(batch, kv_heads, heads // kv_heads * rows, dim)
    return (grouped @ k_BHTD.mT).view(batch, heads, rows, keys)


def pool(x: Tensor, block_size: int) -> Tensor:
    """Sums over runs of `block_size` along the last axis, [..., T] -> [..., blocks]; the last run may be short."""
    whole = x.shape[-1] // block_size * block_size
    sums = x[..., :whole].unflatten(-1, (-1, block_size)).sum(-1)
    return sums if whole == x.shape[-1] else torch.cat([sums, x[..., whole:].sum(-1, keepdim=True)], -1)


def block_mass(
    q_BHRD: Tensor, k_BHTD: Tensor, positions: Tensor, *, block_size: int, scale: float, first: int = 0
) -> Tensor:
    """Exact attention mass of every key block for some queries: [B, H, R, ceil(T / block_size)], rows sum to 1.

    `positions` int64 [R]: absolute positions of the queries, none below `first`; keys behind a query get no mass.
    """
    logits_at_once = _SLAB_LOGITS_CUDA if q_BHRD.is_cuda else _SLAB_LOGITS
    slab = max(1, logits_at_once // (q_BHRD.shape[0] * q_BHRD.shape[1] * k_BHTD.shape[2]))
    parts = []
    for q, at in zip(q_BHRD.split(slab, 2), positions.split(slab), strict=True):
        logits = per_key_head(q * scale, k_BHTD)
        keys = torch.arange(first, k_BHTD.shape[2], device=at.device)
        logits[..., first:].masked_fill_(keys > at[:, None], -torch.inf)
        weights = logits.sub_(logits.amax(-1, keepdim=True)).clamp_(min=LEAST_EXPONENT).exp_()
        sums = pool(weights, block_size)
        parts.append(sums / sums.sum(-1, keepdim=True))
    return torch.cat(parts, 2)


def block_means(x_BHTD: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Mean over each block of positions, [B, H, blocks, D], and the positions in it, [blocks] in x's
    dtype."""
    sums = pool(x_BHTD.mT, block_size).mT
    counts = pool(x_BHTD.new_ones(x_BHTD.shape[2]), block_size)
    return sums / counts[:, None], counts


def always_kept(grid: Grid, device: torch.device) -> Tensor:
    """bool [query blocks, key blocks]: the first block (attention sinks), the diagonal, and the block before
    it."""
    behind = grid.diagonal(device)[:, None] - torch.arange(grid.key_blocks, device=device)
    kept = (behind == 0) | (behind == 1)
    kept[:, 0] = True
    return kept


def plan_of(mask: Tensor, grid: Grid) -> Plan:
    """The plan of a mask, bool [B, H, query blocks, key blocks]; a GPU does not wait for it where kernels are
    proven."""
    if proven(mask):
        from whimbrel.sparse.kernels.launch import plan_of_mask

        return plan_of_mask(mask, grid)
    return Plan.from_mask(mask, block_size=grid.block_size, q_len=grid.q_len, k_len=grid.k_len)


def blocks_of(tokens: int, block_size: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // block_size)


def per_million(share: float) -> int:
    """A share as a whole number, so that every device counts alike."""
    return round(share * 1_000_000)


def margin(coverage: float) -> float:
    """What PILOT_ROWS queries must hold beyond `coverage`, so that others are as likely to hold it as where PROBE_ROWS
    queries do: as measured, docs/log.md."""
    lost = max(0.0, 1 - coverage)
    return min(0.4 * lost, 0.09 * math.sqrt(lost))


def rows_needed(rows: int, row_share: float) -> int:
    """How many of `rows` queries are at least the share `row_share` of them; one at least."""
    return max(1, -(-per_million(row_share) * rows // 1_000_000))


def cover_rows(mass: Tensor, coverage: float, row_share: float, *, allowed: Tensor, forced: Tensor) -> Tensor:
    """bool [..., n]: entries in order of their mean mass, the forced ones first, as few as it takes until at least
    `row_share` of the rows of mass [..., R, n] keep `coverage`, each by itself.

    The entry that crosses the threshold is kept, and equal ones are taken in order. `coverage` 1 keeps everything
    allowed, whatever rounding does to sums. The masks broadcast against [..., n].
    """
    mean = mass.mean(-2)
    allowed = allowed.expand_as(mean)
    if coverage >= 1:
        return allowed
    order = _ranking(mean, allowed, forced)
    sorted_mass = (mass * allowed.unsqueeze(-2)).gather(-1, order.unsqueeze(-2).expand_as(mass)).double()
    before = sorted_mass.cumsum(-1) - sorted_mass
    lacking = (before >= coverage).sum(-2) < rows_needed(mass.shape[-2], row_share)
    return (torch.zeros_like(allowed).scatter(-1, order, lacking) | forced) & allowed


def doubtful(mass: Tensor, keep: Tensor, forced: Tensor, margin: float) -> Tensor:
    """bool [...]: whether a choice `keep` [..., n] from masses [..., R, n] of PILOT_ROWS queries needs a second look.

    It does where queries are missing, or where a query would hold less by more than twice the margin, on average, had
    the others chosen without it, down to the same mean mass. Where nearly all blocks are kept nothing is to be found.
    """
    rows, blocks = mass.shape[-2:]
    if rows < PILOT_ROWS:
        return keep.new_ones(keep.shape[:-1])
    mean = mass.mean(-2)
    threshold = mean.masked_fill(~keep | forced, torch.inf).amin(-1, keepdim=True)
    others = (mean.unsqueeze(-2) * rows - mass) / (rows - 1)
    inside = forced | (others >= threshold.unsqueeze(-1))
    lost = (mass * (keep.unsqueeze(-2).to(mass.dtype) - inside.to(mass.dtype))).sum(-1).mean(-1)
    return (lost > 2 * margin) & (keep.sum(-1) * 16 < blocks * 15)


def within_budget(
    keep: Tensor, mass: Tensor, *, allowed: Tensor, forced: Tensor, least: int, most: int | None
) -> Tensor:
    """`keep` with the `least` entries of largest mass added, then cut to the `most` largest; forced ones stay.

    keep, mass: bool and float [..., n]. allowed, forced: bool of a shape that broadcasts to theirs.
    """
    if least <= 0 and most is None:
        return keep
    allowed = allowed.expand_as(mass)
    order = _ranking(mass, allowed, forced)
    ranked = keep.gather(-1, order)
    ranked[..., :least] = True
    if most is not None:
        ranked &= ranked.cumsum(-1) <= most
    return (torch.zeros_like(keep).scatter(-1, order, ranked) | forced) & allowed


def _ranking(mass: Tensor, allowed: Tensor, forced: Tensor) -> Tensor:
    first = mass.masked_fill(forced, torch.inf).masked_fill(~allowed, -torch.inf)
    return first.argsort(dim=-1, descending=True, stable=True)
