"""Calls the kernel: sequences of a batch, or packed one behind the other, in one launch."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from whimbrel.attend.kernels import hopper_launch
from whimbrel.attend.kernels.forward import forward
from whimbrel.attend.plan import Plan


class Tiles(NamedTuple):
    """How a program is cut."""

    queries: int
    keys: int
    warps: int
    stages: int


def tiles(block_size: int, dim: int, itemsize: int) -> Tiles:
    """Tiles for blocks of `block_size` tokens and heads of up to `dim` elements of `itemsize` bytes.

    Two or three stages of keys and values, and the queries, must fit into the 227 KB of a Hopper multiprocessor, and
    the sums of a tile into registers: 16-bit heads up to 128 take 128 queries by 64 keys in eight warps.
    """
    if itemsize > 2:
        return Tiles(min(block_size, 64 if dim <= 128 else 32), min(block_size, 32), 4, 2)
    queries = min(block_size, 128)
    return Tiles(queries, min(block_size, 64), 8 if queries == 128 else 4, 3 if dim <= 128 else 2)


def attend_triton(q: Tensor, k: Tensor, v: Tensor, plans: Sequence[Plan], scale: float) -> tuple[Tensor, Tensor]:
    """y [tokens, H, Dv] in q's dtype and lse fp32 [tokens, H] of q [tokens, H, D], k and v [tokens, Hkv, .].

    The sequences of all plans lie one behind the other. Queries and keys are read where they lie, as long as the last
    axis is contiguous.
    """
    interpreted, dtype = not q.is_cuda, q.dtype
    if interpreted and dtype == torch.bfloat16:
        # Products in bf16 are wrong in Triton's interpreter.
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    size = plans[0].block_size
    if hopper_launch.fits_padded(q, v, size):
        wide = [hopper_launch.padded(x) for x in (q, k, v)]
        y, lse = attend_triton(wide[0], wide[1], wide[2], plans, scale)
        return y[..., : v.shape[2]].contiguous(), lse
    y = torch.empty(*q.shape[:2], v.shape[2], dtype=dtype, device=q.device)
    lse = torch.empty(*q.shape[:2], dtype=torch.float32, device=q.device)
    sequences = tuple((plan.q_len, plan.k_len) for plan in plans for _ in range(plan.batch))
    offsets, indices = _joined(plans)
    if hopper_launch.fits(q, v, size):
        factor, packed = scale * math.log2(math.e), len(plans) > 1
        bounds = torch.cat(offsets) if packed else offsets[0]
        hopper_launch.attend_hopper(q, k, v, y, lse, sequences, bounds, indices, factor, packed=packed)
        return y, lse
    _launch_plain(q, k, v, y, lse, sequences, offsets, indices, size, scale * math.log2(math.e))
    return y, lse


def _launch_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    sequences: tuple[tuple[int, int], ...],
    offsets: Sequence[Tensor],
    indices: Tensor,
    size: int,
    scale: float,
) -> None:
    """Fill y and lse, as `attend_triton` describes them, by the kernel for any device; `scale` holds log2(e).

    sequences: queries and keys of each. offsets: for each plan, where the blocks of its rows begin in `indices`.
    """
    heads, dim = q.shape[1:]
    value_dim = v.shape[2]
    table, owner = _places(sequences, heads, size, q.device)
    starts, stops = (torch.cat(parts) for parts in zip(*((x[:-1], x[1:]) for x in offsets)))
    # Long rows first, so that no long one is left when the others are done; equal ones in their order, which keeps
    # the heads that share keys together.
    work = (stops - starts).argsort(descending=True, stable=True).int()
    block_dim, block_value = (max(16, triton.next_power_of_2(x)) for x in (dim, value_dim))
    cut = tiles(size, max(block_dim, block_value), q.element_size())
    forward[(len(work) * (size // cut.queries),)](
        q,
        k,
        v,
        y,
        lse,
        work,
        owner,
        table,
        starts,
        stops,
        indices,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        scale,
        H=heads,
        GROUP=heads // k.shape[1],
        D=dim,
        V=value_dim,
        BD=block_dim,
        BV=block_value,
        SIZE=size,
        BM=cut.queries,
        BN=cut.keys,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        num_warps=cut.warps,
        num_stages=cut.stages,
    )


@functools.lru_cache(maxsize=64)
def _places(
    sequences: tuple[tuple[int, int], ...], heads: int, block_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The kernel's `table` and `owner`. All layers of a model ask for the same, and a copy to a GPU is a wait."""
    table, owner = [], []
    row = query = key = 0
    for q_len, k_len in sequences:
        table.append((row, query, q_len, key, k_len))
        rows = heads * (-(-k_len // block_size) - (k_len - q_len) // block_size)
        owner.append(rows)
        row, query, key = row + rows, query + q_len, key + k_len
    owners = torch.arange(len(owner), dtype=torch.int32).repeat_interleave(torch.tensor(owner))
    return torch.tensor(table, dtype=torch.int64).to(device), owners.to(device)


def _joined(plans: Sequence[Plan]) -> tuple[list[Tensor], Tensor]:
    """The offsets of each plan, as places in the indices of all, and these."""
    if len(plans) == 1:
        return [plans[0].offsets], plans[0].indices
    bases = itertools.accumulate((len(plan.indices) for plan in plans[:-1]), initial=0)
    offsets = [plan.offsets + base for plan, base in zip(plans, bases)]
    return offsets, torch.cat([plan.indices for plan in plans])
