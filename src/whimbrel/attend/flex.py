"""Attention over a plan by torch's FlexAttention: compiled on CUDA, as a masked softmax of all pairs elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from whimbrel.attend.plan import Plan


def attend_flex(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """y [B, Tq, H, Dv] and lse fp32 [B, Tq, H].

    FlexAttention's blocks begin at its first query, the plan's at absolute positions. So queries go in behind as many
    zeros as the first query block lacks.
    """
    grid = plan.grid
    front = grid.offset - grid.first_block * grid.block_size
    queries = torch.nn.functional.pad(q, (0, 0, 0, 0, front, 0)).transpose(1, 2)
    call = _compiled() if q.is_cuda else flex_attention
    y, aux = call(
        queries,
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=block_mask(plan),
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    return y[:, :, front:].transpose(1, 2), aux.lse[:, :, front:].transpose(1, 2)


def block_mask(plan: Plan) -> BlockMask:
    """The plan for FlexAttention: diagonal blocks are masked, all others whole.

    It holds int32 and bool tensors [B, H, query blocks, key blocks]: 170 MB for 32 heads of 128k tokens.
    """
    grid, mask = plan.grid, plan.to_mask()
    rows = torch.arange(grid.query_blocks, device=mask.device)
    own = rows + grid.first_block
    with_diagonal = mask[:, :, rows, own]
    whole = mask.clone()
    whole[:, :, rows, own] = False
    full_indices = whole.to(torch.int8).argsort(dim=-1, descending=True, stable=True).int()
    partial_indices = own.int()[:, None].expand(*mask.shape[:2], -1, grid.key_blocks).contiguous()
    size, first = grid.block_size, grid.first_block

    # Only diagonal blocks ask. Where it is not compiled, FlexAttention looks at nothing else, hence the second term.
    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i + first * size) & mask[b, h, i // size, j // size]

    return BlockMask.from_kv_blocks(
        with_diagonal.int(),
        partial_indices,
        whole.sum(-1, dtype=torch.int32),
        full_indices,
        BLOCK_SIZE=size,
        mask_mod=causal,
        seq_lengths=(grid.k_len - first * size, grid.k_len),
        compute_q_blocks=False,
    )


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)
