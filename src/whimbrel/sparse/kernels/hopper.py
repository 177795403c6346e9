"""The first step of `estimate` on Hopper, in Gluon: blocks of 128 keys, heads of 64 or 128 elements.

One warp brings keys in through the copy engine for 256 sampled queries, which four warpgroups share out: exponentials
take as many cycles as products, so some have to multiply while the others do not.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from whimbrel.attend.kernels.hopper import barrier


@gluon.jit
def bring(k, k_s, full, free, row, column, start, stop, D: gl.constexpr, STAGES: gl.constexpr):
    """Copy in the key blocks from `start` to `stop`."""
    for j in range(start, stop):
        i = j - start
        stage = i % STAGES
        mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), 2 * 128 * D)
        tma.async_copy_global_to_shared(k, [row + j * 128, column], full.index(stage), k_s.index(stage))


@gluon.jit
def estimate(
    q,
    at,
    lse,
    k_s,
    q_s,
    full,
    free,
    q_time,
    q_head,
    before,
    pair,
    group,
    tiles,
    blocks,
    first,
    start,
    stop,
    scale,
    GROUP: gl.constexpr,
    P: gl.constexpr,
    S: gl.constexpr,
    Q: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    PART: gl.constexpr,
):
    """64 of the 256 queries of a program: log2 of the sum of exp2 over the keys of each block that they see."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    MP: gl.constexpr = GROUP * P
    queries = q_s.index(PART)
    r = gl.arange(0, 64, gl.SliceLayout(1, L)) + PART * 64
    d = gl.arange(0, D, gl.SliceLayout(0, L))
    tile = group * Q + r // MP
    used = (r < Q * MP) & (tile < tiles)
    pos = gl.load(at + gl.minimum(tile, tiles - 1) * P + r % P)
    place = (pos - before).to(gl.int64) * q_time + r // P % GROUP * q_head
    queries.store(gl.load(q + place[:, None] + d[None, :], mask=(used & (pos >= 0))[:, None], other=0.0))
    fence_async_shared()
    barrier()

    n = gl.arange(0, 128, gl.SliceLayout(0, ACC))
    r = gl.arange(0, 64, ROW) + PART * 64
    tile = group * Q + r // MP
    used = (r < Q * MP) & (tile < tiles)
    tile = gl.minimum(tile, tiles - 1)
    pos = gl.load(at + tile * P + r % P)
    own = first + tile // S
    least = gl.min(own, 0)
    own = gl.where(used, own, -1)
    out = lse + (pair * tiles + tile) * blocks * MP + r % MP
    for j in range(start, stop):
        i = j - start
        stage = i % STAGES
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        none = gl.zeros([64, 128], gl.float32, ACC)
        scores = warpgroup_mma(queries, k_s.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        barrier()
        mbarrier.arrive(free.index(stage))
        # Masked before it is scaled, so that blocks with and without a mask round alike.
        if j >= least:
            # The first key stays, so that nothing is NaN where a query sees none; what sees none is not stored.
            scores = gl.where(((j * 128 + n)[None, :] <= pos[:, None]) | (n == 0)[None, :], scores, float("-inf"))
        top = gl.max(scores, 1) * scale
        sums = top + gl.log2(gl.sum(gl.exp2(scores * scale - top[:, None]), 1))
        gl.store(out + j * MP, sums, mask=j <= own)


COUNTS = ["before", "tiles", "blocks", "first", "groups", "runs", "k_batch", "k_row", "k_col"]


@gluon.jit(do_not_specialize=COUNTS)
def block_lse(
    q,
    k,
    at,
    lse,
    q_batch,
    q_time,
    q_head,
    before,
    k_batch,
    k_row,
    k_col,
    tiles,
    blocks,
    first,
    groups,
    runs,
    scale,
    HKV: gl.constexpr,
    GROUP: gl.constexpr,
    P: gl.constexpr,
    S: gl.constexpr,
    Q: gl.constexpr,
    D: gl.constexpr,
    RUN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """lse as `estimate.block_lse` gives it; k is a descriptor. A program takes Q tiles and RUN blocks of keys."""
    pid = gl.program_id(0)
    run = pid % runs
    group = groups - 1 - pid // runs % groups
    pair = (pid // (runs * groups)).to(gl.int64)
    b = pair // HKV
    hkv = (pair % HKV).to(gl.int32)
    start = run * RUN
    last = first + gl.minimum(group * Q + Q - 1, tiles - 1) // S
    stop = gl.minimum(last + 1, start + RUN)
    q_s = gl.allocate_shared_memory(k.dtype, [4, 64, D], k.layout)
    k_s = gl.allocate_shared_memory(k.dtype, [STAGES, 128, D], k.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=4)
    barrier()
    if start < stop:
        query = q + b * q_batch + (hkv * GROUP).to(gl.int64) * q_head
        row = b.to(gl.int32) * k_batch + hkv * k_row
        gl.warp_specialize(
            [
                (
                    estimate,
                    (
                        query, at, lse, k_s, q_s, full, free, q_time, q_head, before, pair, group, tiles, blocks,
                        first, start, stop, scale, GROUP, P, S, Q, D, STAGES, gl.constexpr(0),
                    ),
                ),
                (
                    estimate,
                    (
                        query, at, lse, k_s, q_s, full, free, q_time, q_head, before, pair, group, tiles, blocks,
                        first, start, stop, scale, GROUP, P, S, Q, D, STAGES, gl.constexpr(1),
                    ),
                ),
                (
                    estimate,
                    (
                        query, at, lse, k_s, q_s, full, free, q_time, q_head, before, pair, group, tiles, blocks,
                        first, start, stop, scale, GROUP, P, S, Q, D, STAGES, gl.constexpr(2),
                    ),
                ),
                (
                    estimate,
                    (
                        query, at, lse, k_s, q_s, full, free, q_time, q_head, before, pair, group, tiles, blocks,
                        first, start, stop, scale, GROUP, P, S, Q, D, STAGES, gl.constexpr(3),
                    ),
                ),
                (bring, (k, k_s, full, free, row, hkv * k_col, start, stop, D, STAGES)),
            ],
            [4, 4, 4, 1],
            [112, 112, 112, 24],
        )  # fmt: skip
