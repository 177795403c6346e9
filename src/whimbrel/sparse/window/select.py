"""First tokens and nearest tokens (the attention-sink pattern of StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

import torch
from torch import Tensor

from whimbrel.attend.plan import Grid, Plan
from whimbrel.attend.shapes import check_qkv
from whimbrel.sparse.blocks import blocks_of, plan_of


def select(
    q: Tensor, k: Tensor, *, sink_tokens: int, window_tokens: int, block_size: int, scale: float | None = None
) -> Plan:
    """Every block that holds a sink token, or a token in the window of any query of the row.

    Looks at the shapes of q [B, Tq, H, D] and k [B, Tk, Hkv, D] only, so `scale` changes nothing. Raises ConfigError
    where they do not fit together.
    """
    shape = check_qkv(q, k)
    grid = Grid(block_size, shape.q_len, shape.k_len)
    blocks = torch.arange(grid.key_blocks, device=q.device)
    diagonal = grid.diagonal(q.device)[:, None]
    # The window of a block's first query reaches farthest back.
    nearest = blocks >= (diagonal * block_size - window_tokens + 1).div(block_size, rounding_mode="floor")
    sink = blocks < blocks_of(sink_tokens, block_size)
    mask = (nearest | sink) & grid.causal(q.device)
    return plan_of(mask.expand(shape.batch, shape.heads, -1, -1), grid)
