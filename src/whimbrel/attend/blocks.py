"""Attention over a plan in plain PyTorch that computes selected blocks only."""

from __future__ import annotations

import torch
from torch import Tensor

from whimbrel.attend.plan import Plan

_SLAB_LOGITS = 1 << 19
"""Logits computed at a time: 2 MB in fp32, so that most stay in the second-level cache between the two products."""

LEAST_EXPONENT = -87.0
"""Least exponent of a weight. e^-87 is lost when added to a sum that holds a 1, in fp64 too, so it stands for
the zero of a masked key. On a CPU exp of less, -inf too, takes three to seven times longer: its result is
subnormal."""


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """y [B, Tq, H, Dv] and lse [B, Tq, H] in fp32 (fp64 for fp64 inputs).

    Query blocks that select the same number of key blocks are computed together: their keys and values are gathered
    into one contiguous run each, and one softmax follows. A row's last block is its diagonal, the only one that needs
    a mask; padded keys lie in the final block behind every query, so the same mask hides them. In a part of a plan,
    rows without their diagonal need no mask, and rows without blocks have y 0 and lse -inf.
    """
    grid, size, device = plan.grid, plan.block_size, q.device
    batch, _, heads, _ = q.shape
    kv_heads = k.shape[2]
    front = grid.offset - grid.first_block * size
    q_blocks = _in_blocks(q, front, grid.query_blocks, size).mul_(scale)
    k_blocks = _in_blocks(k, 0, grid.key_blocks, size)
    v_blocks = _in_blocks(v, 0, grid.key_blocks, size)

    # First block of each row's key head among k_blocks, which are ordered batch, key head, block.
    head = torch.arange(batch * heads, device=device)
    kv_head = head // heads * kv_heads + head % heads // (heads // kv_heads)
    first_block = (kv_head * grid.key_blocks).repeat_interleave(grid.query_blocks)

    future = q_blocks.new_full((size, size), -torch.inf).triu_(1)
    y = v_blocks.new_zeros(len(q_blocks), size, v.shape[-1])
    lse = v_blocks.new_full((len(q_blocks), size), -torch.inf)
    has_diagonal = plan.has_diagonal()[:, None, None] if plan.is_part else None
    for count, members in _rows_by_count(plan):
        for rows in members.split(max(1, _SLAB_LOGITS // (size * size * count))):
            entries = plan.offsets[rows, None] + torch.arange(count, device=device)
            chosen = (first_block[rows, None] + plan.indices[entries]).flatten()
            keys = k_blocks.index_select(0, chosen).view(len(rows), count * size, -1)
            values = v_blocks.index_select(0, chosen).view(len(rows), count * size, -1)
            logits = torch.bmm(q_blocks[rows], keys.mT)
            logits[..., -size:].add_(future if has_diagonal is None else future.where(has_diagonal[rows], 0))
            top = logits.detach().amax(-1, keepdim=True)
            weights = logits.sub_(top).clamp_(min=LEAST_EXPONENT).exp_()
            total = weights.sum(-1, keepdim=True)
            y[rows] = torch.bmm(weights, values) / total
            lse[rows] = (top + total.log()).squeeze(-1)

    y = y.view(batch, heads, -1, v.shape[-1])[:, :, front : front + grid.q_len].transpose(1, 2)
    lse = lse.view(batch, heads, -1)[:, :, front : front + grid.q_len].transpose(1, 2)
    return y, lse


def _in_blocks(x: Tensor, front: int, count: int, size: int) -> Tensor:
    """[B, T, H, D] -> [B * H * count, size, D], `front` zeros before and zeros behind; fp32, or fp64 if x is."""
    batch, time, heads, dim = x.shape
    out = x.new_zeros(batch, heads, count * size, dim, dtype=torch.promote_types(x.dtype, torch.float32))
    out[:, :, front : front + time] = x.transpose(1, 2)
    return out.view(-1, size, dim)


def _rows_by_count(plan: Plan) -> list[tuple[int, Tensor]]:
    """Rows grouped by how many blocks they select, if any: (blocks, rows int64), fewest first, rows in their order."""
    counts, order = plan.offsets.diff().sort(stable=True)
    values, sizes = counts.unique_consecutive(return_counts=True)
    groups = zip(values.tolist(), order.split(sizes.tolist()), strict=True)
    return [(count, rows) for count, rows in groups if count]
