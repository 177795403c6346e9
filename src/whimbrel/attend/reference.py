"""Attention over a plan as the definition has it: a masked softmax in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from whimbrel.attend.plan import Plan


def attend_reference(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """y [B, Tq, H, Dv] and lse [B, Tq, H], both fp64. Memory grows with Tq * Tk: for small inputs.

    A query without keys, as a part of a plan may leave it, has y 0 and lse -inf.
    """
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.double() for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    mask = token_mask(plan)
    logits = logits.masked_fill(~mask, -torch.inf)
    weights = logits.softmax(-1)
    if plan.is_part:
        weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0)
    y = torch.einsum("bhij,bjhd->bihd", weights, v)
    return y, logits.logsumexp(-1).transpose(1, 2)


def token_mask(plan: Plan) -> Tensor:
    """bool [batch, heads, q_len, k_len]: the token pairs that a plan attends to."""
    grid, device = plan.grid, plan.offsets.device
    queries = torch.arange(grid.offset, grid.k_len, device=device)
    keys = torch.arange(grid.k_len, device=device)
    blocks = plan.to_mask()[:, :, queries // grid.block_size - grid.first_block]
    return blocks[..., keys // grid.block_size] & (keys <= queries[:, None])
