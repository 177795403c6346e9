"""The first step of selection on Hopper, in Gluon: `estimate.scores` for blocks of 128 keys, heads of 64 or 128.

One warp brings keys in through the copy engine. Two warpgroups hold half of the sampled queries each, in tiles of 64:
while the exponentials of one tile are taken, the products of the next are under way, as both take as many cycles.
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

MOST = gl.constexpr(2.0**107)
"""`estimate.MOST`."""


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
def issue(queries, keys):
    """Begin the products of 64 queries with 128 keys."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    none = gl.zeros([64, 128], gl.float32, ACC)
    return warpgroup_mma(queries, keys.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def finish(logits, j, pos, ref, out, scale, MP: gl.constexpr, MASKED: gl.constexpr):
    """Sum up block j for the queries of a tile, and write where they see it."""
    # Masked before it is scaled, so that blocks with and without a mask round alike.
    if MASKED:
        ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
        n = gl.arange(0, 128, gl.SliceLayout(0, ACC))
        logits = gl.where((j * 128 + n)[None, :] <= pos[:, None], logits, float("-inf"))
    sums = gl.sum(gl.exp2(logits * scale - ref[:, None]), 1)
    gl.store(out + j * MP, gl.minimum(sums, MOST), mask=j * 128 <= pos)


@gluon.jit
def places(out, tile, blocks, Q: gl.constexpr, MP: gl.constexpr):
    """Where the sums of a tile's queries go, for block 0."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    r = gl.arange(0, 64, gl.SliceLayout(1, ACC)) + tile * 64
    return out + gl.minimum(r // MP, Q - 1).to(gl.int64) * blocks * MP + r % MP


@gluon.jit
def several(j, i, q_s, k_s, full, free, pos_0, pos_1, ref_0, ref_1, out_0, out_1, scale, KEYS: gl.constexpr,
            MASKED: gl.constexpr, HALF: gl.constexpr, MP: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Both tiles of a half against KEYS blocks of keys from j on, the i-th of this program. Unrolled: products that are
    under way cannot be handed from one turn of a loop to the next."""
    mbarrier.wait(full.index(i % STAGES), (i // STAGES) & 1)
    now = issue(q_s.index(2 * HALF), k_s.index(i % STAGES))
    for step in gl.static_range(2 * KEYS):
        if step + 1 < 2 * KEYS:
            coming = i + (step + 1) // 2
            if step % 2 == 1:
                mbarrier.wait(full.index(coming % STAGES), (coming // STAGES) & 1)
            following = issue(q_s.index(2 * HALF + (step + 1) % 2), k_s.index(coming % STAGES))
            now = warpgroup_mma_wait(1, deps=(now,))
        else:
            now = warpgroup_mma_wait(0, deps=(now,))
            following = now
        if step % 2 == 0:
            finish(now, j + step // 2, pos_0, ref_0, out_0, scale, MP, MASKED)
        else:
            barrier()
            mbarrier.arrive(free.index((i + step // 2) % STAGES))
            finish(now, j + step // 2, pos_1, ref_1, out_1, scale, MP, MASKED)
        now = following


@gluon.jit
def half(
    q,
    k,
    at,
    units,
    out,
    q_s,
    k_s,
    pos_s,
    ref_s,
    full,
    free,
    q_time,
    q_head,
    k_time,
    before,
    begin,
    count,
    blocks,
    start,
    stop,
    scale,
    LISTED: gl.constexpr,
    GROUP: gl.constexpr,
    P: gl.constexpr,
    S: gl.constexpr,
    Q: gl.constexpr,
    D: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    HALF: gl.constexpr,
):
    """Half of the queries of a program: two tiles of 64."""
    ROW: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    MP: gl.constexpr = GROUP * P
    d = gl.arange(0, D, gl.SliceLayout(0, L))
    first_key = gl.load(k + d).to(gl.float32)
    least = 2147483647
    for tile in gl.static_range(2 * HALF, 2 * HALF + 2):
        r = gl.arange(0, 64, gl.SliceLayout(1, L)) + tile * 64
        i = begin + r // MP
        used = (r < Q * MP) & (i < count)
        i = gl.where(used, i, begin)
        row = i // S
        if LISTED:
            row = gl.load(units + row)
        pos = gl.where(used, gl.load(at + (row * S + i % S) * P + r % P), -1)
        there = (pos >= 0)[:, None]
        place = gl.maximum(pos - before, 0).to(gl.int64) * q_time + r // P % GROUP * q_head
        query = gl.load(q + place[:, None] + d[None, :], mask=there, other=0.0)
        place = gl.maximum(pos, 0).to(gl.int64) * k_time
        own_key = gl.load(k + place[:, None] + d[None, :], mask=there, other=0.0).to(gl.float32)
        wide = query.to(gl.float32)
        ref = gl.maximum(gl.sum(wide * own_key, 1), gl.sum(wide * first_key[None, :], 1)) * scale
        q_s.index(tile).store(query)
        pos_s.index(tile).store(pos)
        ref_s.index(tile).store(ref)
        least = gl.minimum(least, gl.min(gl.where(pos >= 0, pos, 2147483647), 0))
    least = least // 128
    fence_async_shared()
    barrier()
    pos_0, ref_0 = pos_s.index(2 * HALF).load(ROW), ref_s.index(2 * HALF).load(ROW)
    pos_1, ref_1 = pos_s.index(2 * HALF + 1).load(ROW), ref_s.index(2 * HALF + 1).load(ROW)
    out_0, out_1 = places(out, 2 * HALF, blocks, Q, MP), places(out, 2 * HALF + 1, blocks, Q, MP)
    # Blocks that all queries see in full, without a mask, and then the others.
    whole = start + gl.maximum(gl.minimum(stop, least) - start, 0) // KEYS * KEYS
    for j in range(start, whole, KEYS):
        several(
            j, j - start, q_s, k_s, full, free, pos_0, pos_1, ref_0, ref_1, out_0, out_1, scale, KEYS, False, HALF, MP,
            STAGES,
        )  # fmt: skip
    for j in range(whole, stop):
        several(
            j, j - start, q_s, k_s, full, free, pos_0, pos_1, ref_0, ref_1, out_0, out_1, scale, 1, True, HALF, MP,
            STAGES,
        )  # fmt: skip


COUNTS = ["before", "k_len", "room", "begin", "blocks", "first", "rows", "groups", "runs", "k_row", "k_col"]


@gluon.jit(do_not_specialize=COUNTS)
def scores(
    q,
    k,
    keys,
    at,
    units,
    filled,
    out,
    q_batch,
    q_time,
    q_head,
    k_batch,
    k_time,
    k_head,
    before,
    k_len,
    rows,
    room,
    begin,
    blocks,
    first,
    groups,
    runs,
    k_row,
    k_col,
    scale,
    LISTED: gl.constexpr,
    HKV: gl.constexpr,
    GROUP: gl.constexpr,
    P: gl.constexpr,
    S: gl.constexpr,
    Q: gl.constexpr,
    D: gl.constexpr,
    KEYS: gl.constexpr,
    RUN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """`estimate.scores`; `keys` is a descriptor of k. A program takes Q tiles and RUN blocks of keys, KEYS of them
    without a break."""
    pid = gl.program_id(0)
    run = pid % runs
    group = groups - 1 - pid // runs % groups
    pair = pid // (runs * groups)
    b = pair // HKV
    hkv = pair % HKV
    start = run * RUN
    tile = begin + group * Q
    units += pair * rows
    count = begin + room
    if LISTED:
        count = gl.minimum(count, gl.load(filled + pair) * S)
    stop = 0
    if tile < count:
        last = gl.minimum(tile + Q, count) - 1
        if LISTED:
            own = 0
            for i in range(tile // S, last // S + 1):
                own = gl.maximum(own, gl.load(units + i))
        else:
            own = last // S
        stop = gl.minimum(first + own + 1, start + RUN)
    q_s = gl.allocate_shared_memory(keys.dtype, [4, 64, D], keys.layout)
    k_s = gl.allocate_shared_memory(keys.dtype, [STAGES, 128, D], keys.layout)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    pos_s = gl.allocate_shared_memory(gl.int32, [4, 64], FLAT)
    ref_s = gl.allocate_shared_memory(gl.float32, [4, 64], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    barrier()
    if start < stop:
        query = q + b.to(gl.int64) * q_batch + (hkv * GROUP).to(gl.int64) * q_head
        key = k + b.to(gl.int64) * k_batch + hkv.to(gl.int64) * k_head
        mine = out + (pair.to(gl.int64) * room + group * Q) * blocks * (GROUP * P)
        gl.warp_specialize(
            [
                (
                    half,
                    (
                        query, key, at, units, mine, q_s, k_s, pos_s, ref_s, full, free, q_time, q_head, k_time, before,
                        tile, count, blocks, start, stop, scale, LISTED, GROUP, P, S, Q, D, KEYS, STAGES,
                        gl.constexpr(0),
                    ),
                ),
                (
                    half,
                    (
                        query, key, at, units, mine, q_s, k_s, pos_s, ref_s, full, free, q_time, q_head, k_time, before,
                        tile, count, blocks, start, stop, scale, LISTED, GROUP, P, S, Q, D, KEYS, STAGES,
                        gl.constexpr(1),
                    ),
                ),
                (bring, (keys, k_s, full, free, b * k_len + hkv * k_row, hkv * k_col, start, stop, D, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
