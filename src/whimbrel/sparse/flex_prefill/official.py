"""FlexPrefill's selection as the authors' code makes it, defects included: for comparison, not for use.

The letters name the defects; this folder's README says what each does and how the corrected mode mends it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whimbrel.attend.plan import Grid, Plan
from whimbrel.attend.shapes import check_qkv
from whimbrel.errors import UnsupportedError
from whimbrel.sparse.blocks import block_means, blocks_of, per_key_head, plan_of, pool
from whimbrel.sparse.flex_prefill.divergence import js_distance_official


def select(
    q: Tensor,
    k: Tensor,
    *,
    coverage: float,
    tau: float,
    min_budget: int,
    max_budget: int | None,
    block_size: int,
    scale: float | None = None,
) -> Plan:
    """The plan for q [B, T, H, D] and k [B, T, Hkv, D]; each sequence as if it came alone.

    `scale` changes nothing here (defect m). Raises UnsupportedError unless q and k have one length.
    """
    shape = check_qkv(q, k)
    if shape.q_len != shape.k_len:
        raise UnsupportedError(
            f"flex_prefill.mode = 'official' needs as many queries as keys, got {shape.q_len} and "
            f"{shape.k_len}; use mode='corrected' for a prompt read in chunks"
        )
    grid = Grid(block_size, shape.q_len, shape.k_len)
    blocks, floor = grid.key_blocks, max(1, blocks_of(min_budget, block_size))
    if shape.k_len <= max(2, floor) * block_size:
        dims = {"batch": shape.batch, "num_heads": shape.heads, "q_len": shape.q_len, "k_len": shape.k_len}
        return Plan.dense(**dims, block_size=block_size, device=q.device)

    factor = shape.dim**-0.5
    query, keys = q.transpose(1, 2), k.transpose(1, 2)
    probe = query[:, :, -block_size:] * factor
    vertical, slash = _probe_distributions(probe, keys)
    num_vertical, num_slash = (
        _block_budget(x, coverage).clamp(floor, blocks if max_budget is None else blocks_of(max_budget, block_size))
        for x in (vertical, slash)
    )
    vertical, slash = pool(vertical, block_size), pool(slash, block_size)

    # Defect h: for bf16 inputs these logits are bf16 before the softmax.
    means = block_means(keys, block_size)[0]
    estimate = per_key_head(probe.mean(2, keepdim=True), means).squeeze(2).float().softmax(-1)
    query_aware = js_distance_official(estimate, vertical) < tau
    num_vertical = num_vertical.masked_fill(query_aware, floor)
    num_slash = num_slash.masked_fill(query_aware, floor)

    columns = _largest(vertical, num_vertical, kept=0)
    # The slash grid starts at the far end (defect d): its last block lies on the main diagonal.
    diagonals = _largest(slash, num_slash, kept=blocks - 1).flip(-1)
    causal = grid.causal(q.device)
    behind = (grid.diagonal(q.device)[:, None] - torch.arange(blocks, device=q.device)).clamp_min(0)
    chosen = (columns[:, :, None] | diagonals[:, :, behind]) & causal

    query_means = block_means(query, block_size)[0]
    rows = per_key_head(query_means * factor, means).float().masked_fill(~causal, -torch.inf).softmax(-1)
    chosen |= cover_globally(rows, coverage) & causal & query_aware[..., None, None]
    return plan_of(chosen, grid)


def _probe_distributions(probe: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Mean attention of the last queries along token columns and token diagonals, both fp32 [B, H, T].

    Entry j of the diagonals belongs to distance T - 1 - j.
    """
    rows, tokens = probe.shape[2], keys.shape[2]
    at = torch.arange(tokens - rows, tokens, device=keys.device)
    key = torch.arange(tokens, device=keys.device)
    logits = per_key_head(probe, keys).masked_fill(key > at[:, None], -torch.inf)
    attention = logits.float().softmax(-1)
    # Row r reads, at entry j, the key at distance T - 1 - j behind it; a negative key does not exist.
    source = at[:, None] - (tokens - 1 - key)
    diagonal = attention.gather(-1, source.clamp_min(0).expand_as(attention)) * (source >= 0)
    return attention.mean(2), diagonal.mean(2)


def _block_budget(distribution: Tensor, coverage: float) -> Tensor:
    """Blocks to keep. Defects a and b: tokens needed for the coverage, divided by 128 whatever the block
    size."""
    needed = (distribution.sort(-1, descending=True).values.cumsum(-1) <= coverage).sum(-1) + 1
    return needed // 128 + 1


def _largest(mass: Tensor, count: Tensor, *, kept: int) -> Tensor:
    """Mask of the `count` [B, H] largest entries of mass [B, H, n], entry `kept` always among them."""
    mass = mass.clone()
    mass[..., kept] = torch.inf
    order = mass.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(mass.shape[-1], device=mass.device).expand_as(order)
    return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, ranks < count[..., None])


def cover_globally(rows: Tensor, coverage: float) -> Tensor:
    """Blocks of all rows [B, H, n, n] that together hold at most `coverage` of all mass.

    Defect e: one threshold for all rows, so a flat row may get nothing. Defect f: the entry that crosses it
        is dropped.
    """
    flat = rows.flatten(-2)
    ordered, order = flat.sort(dim=-1, descending=True, stable=True)
    keep = ordered.cumsum(-1) <= coverage * rows.shape[-1]
    return torch.zeros_like(flat, dtype=torch.bool).scatter(-1, order, keep).view_as(rows)
