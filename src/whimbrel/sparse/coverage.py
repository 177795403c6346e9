"""How much attention a plan really keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from whimbrel.attend.op import check_fit
from whimbrel.attend.plan import Plan
from whimbrel.attend.shapes import check_qkv, default_scale
from whimbrel.errors import ConfigError
from whimbrel.sparse.blocks import block_mass, heads_first


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
