"""States handed from stretch to stretch where sequences are cut for want of heads; the page has the equations."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from whimbrel.launches import launch

COLUMNS = 16
"""Columns of the state that a program carries: too few for Hopper's matrix instructions, which Triton miscompiles in
places."""


@triton.jit(do_not_specialize=["parts", "HV"])
def hand_over(
    out,
    local,
    carried,
    given,
    beyond,
    parts,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BACK: tl.constexpr,
    GIVEN: tl.constexpr,
    BEYOND: tl.constexpr,
):
    """One sequence, value head and block of columns; grid (N * HV * V / BV,).

    out of the first stretch is `given` [N, HV, K, V], or zero; of each further one, local + by @ out of the one before,
    with `by` and `local` of the one before. BACK goes from the last stretch to the first, with `by` transposed. BEYOND:
    `beyond` [N, HV, K, V] is what the last of them hands on. States are held transposed, so that nothing but the
    matrices, which can be asked for early, goes through memory.
    """
    pid = tl.program_id(0)
    blocks: tl.constexpr = (V + BV - 1) // BV
    i_v, hv, n = pid % blocks, (pid // blocks) % HV, pid // (blocks * HV)
    col, row = i_v * BV + tl.arange(0, BV), tl.arange(0, BK)
    tile = row[None, :] * V + col[:, None]
    inside = (row[None, :] < K) & (col[:, None] < V)
    inner, outer = row[:, None], row[None, :]
    square = (inner < K) & (outer < K)
    if BACK:
        matrix = inner * K + outer
    else:
        matrix = outer * K + inner
    state = tl.zeros([BV, BK], tl.float32)
    if GIVEN:
        state = tl.load(given + (n * HV + hv).to(tl.int64) * K * V + tile, mask=inside, other=0.0)
    for step in range(parts - 1):
        place = step
        if BACK:
            place = parts - 1 - step
        at = ((n * parts + place) * HV + hv).to(tl.int64)
        by = tl.load(carried + at * K * K + matrix, mask=square, other=0.0)
        total = tl.load(local + at * K * V + tile, mask=inside, other=0.0)
        tl.store(out + at * K * V + tile, state, mask=inside)
        state = tl.dot(state, by, total, input_precision="tf32x3")
    place = parts - 1
    if BACK:
        place = 0
    at = ((n * parts + place) * HV + hv).to(tl.int64)
    tl.store(out + at * K * V + tile, state, mask=inside)
    if BEYOND:
        by = tl.load(carried + at * K * K + matrix, mask=square, other=0.0)
        total = tl.load(local + at * K * V + tile, mask=inside, other=0.0)
        state = tl.dot(state, by, total, input_precision="tf32x3")
        tl.store(beyond + (n * HV + hv).to(tl.int64) * K * V + tile, state, mask=inside)


def carry(
    local: Tensor,
    carried: Tensor,
    given: Tensor | None,
    parts: int,
    *,
    back: bool,
    out: Tensor,
    beyond: Tensor | None = None,
) -> None:
    """Fill `out` with the start states of all stretches, or with the cotangents of their end states when going `back`.

    local [N * parts, HV, K, V] fp32: the end states of the stretches from a start of zero (back: the cotangents of
    their start states without one of their ends); carried [N * parts, HV, K, K] fp32: what takes a start state to the
    end; given [N, HV, K, V] fp32: the first stretch's start (back: the last one's cotangent); beyond, like given: where
    the last one's end is put (back: the first one's cotangent of its start), None for nowhere.
    """
    stretches, value_heads, key_dim, value_dim = local.shape
    launch(
        hand_over,
        stretches // parts * value_heads * triton.cdiv(value_dim, COLUMNS),
        out,
        local,
        carried,
        local if given is None else given,
        out if beyond is None else beyond,
        parts,
        value_heads,
        K=key_dim,
        V=value_dim,
        BK=max(16, triton.next_power_of_2(key_dim)),
        BV=COLUMNS,
        BACK=back,
        GIVEN=given is not None,
        BEYOND=beyond is not None,
        num_warps=8,
        num_stages=2,
    )
