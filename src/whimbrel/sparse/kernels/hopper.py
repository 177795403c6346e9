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
def finish(logits, j, tile, out, pos_s, ref_s, scale, MP: gl.constexpr, MASKED: gl.constexpr):
    """Sum up block j for the queries of a tile, and write where they see it."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    pos = pos_s.index(tile).load(ROW)
    # Masked before it is scaled, so that blocks with and without a mask round alike.
    if MASKED:
        n = gl.arange(0, 128, gl.SliceLayout(0, ACC))
        logits = gl.where((j * 128 + n)[None, :] <= pos[:, None], logits, float("-inf"))
    sums = gl.sum(gl.exp2(logits * scale - ref_s.index(tile).load(ROW)[:, None]), 1)
    gl.store(out + j * MP, gl.minimum(sums, MOST), mask=j * 128 <= pos)


@gluon.jit
def places(out, tile, blocks, Q: gl.constexpr, MP: gl.constexpr):
    """Where the sums of a tile's queries go, for block 0."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    r = gl.arange(0, 64, gl.SliceLayout(1, ACC)) + tile * 64
    return out + gl.minimum(r // MP, Q - 1).to(gl.int64) * blocks * MP + r % MP


@gluon.jit
def several(j, i, out, q_s, k_s, pos_s, ref_s, full, free, blocks, scale, KEYS: gl.constexpr,
            MASKED: gl.constexpr, HALF: gl.constexpr, TILES: gl.constexpr, Q: gl.constexpr, MP: gl.constexpr,
            STAGES: gl.constexpr):  # fmt: skip
    """All tiles of a half against KEYS blocks of keys from j on, the i-th of this program. Unrolled: products that are
    under way cannot be handed from one turn of a loop to the next."""
    mbarrier.wait(full.index(i % STAGES), (i // STAGES) & 1)
    now = issue(q_s.index(HALF * TILES), k_s.index(i % STAGES))
    for step in gl.static_range(KEYS * TILES):
        tile = step % TILES
        if step + 1 < KEYS * TILES:
            coming = i + (step + 1) // TILES
            if (step + 1) % TILES == 0:
                mbarrier.wait(full.index(coming % STAGES), (coming // STAGES) & 1)
            following = issue(q_s.index(HALF * TILES + (step + 1) % TILES), k_s.index(coming % STAGES))
            now = warpgroup_mma_wait(1, deps=(now,))
        else:
            now = warpgroup_mma_wait(0, deps=(now,))
            following = now
        if tile == TILES - 1:
            barrier()
            mbarrier.arrive(free.index((i + step // TILES) % STAGES))
        place = places(out, HALF * TILES + tile, blocks, Q, MP)
        finish(now, j + step // TILES, HALF * TILES + tile, place, pos_s, ref_s, scale, MP, MASKED)
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
    TILES: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    HALF: gl.constexpr,
):
    """TILES times 64 of the queries of a program."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    MP: gl.constexpr = GROUP * P
    d = gl.arange(0, D, gl.SliceLayout(0, L))
    first_key = gl.load(k + d).to(gl.float32)
    least = 2147483647
    for t in gl.static_range(TILES):
        tile = HALF * TILES + t
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
    # Blocks that all queries see in full, without a mask, and then the others.
    whole = start + gl.maximum(gl.minimum(stop, least) - start, 0) // KEYS * KEYS
    for j in range(start, whole, KEYS):
        several(
            j, j - start, out, q_s, k_s, pos_s, ref_s, full, free, blocks, scale, KEYS, False, HALF, TILES, Q, MP,
            STAGES,
        )  # fmt: skip
    for j in range(whole, stop):
        several(
            j, j - start, out, q_s, k_s, pos_s, ref_s, full, free, blocks, scale, 1, True, HALF, TILES, Q, MP, STAGES
        )  # fmt: skip


COUNTS = ["before", "k_len", "room", "begin", "blocks", "first", "rows", "groups", "runs", "span", "k_row", "k_col"]


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
    span,
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
    TILES: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """`estimate.scores`; `keys` is a descriptor of k. A program takes Q tiles and `span` blocks of keys, KEYS of them
    without a break."""
    pid = gl.program_id(0)
    run = pid % runs
    group = groups - 1 - pid // runs % groups
    pair = pid // (runs * groups)
    b = pair // HKV
    hkv = pair % HKV
    start = run * span
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
        stop = gl.minimum(first + own + 1, start + span)
    q_s = gl.allocate_shared_memory(keys.dtype, [2 * TILES, 64, D], keys.layout)
    k_s = gl.allocate_shared_memory(keys.dtype, [STAGES, 128, D], keys.layout)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    pos_s = gl.allocate_shared_memory(gl.int32, [2 * TILES, 64], FLAT)
    ref_s = gl.allocate_shared_memory(gl.float32, [2 * TILES, 64], FLAT)
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
                        tile, count, blocks, start, stop, scale, LISTED, GROUP, P, S, Q, D, TILES, KEYS, STAGES,
                        gl.constexpr(0),
                    ),
                ),
                (
                    half,
                    (
                        query, key, at, units, mine, q_s, k_s, pos_s, ref_s, full, free, q_time, q_head, k_time, before,
                        tile, count, blocks, start, stop, scale, LISTED, GROUP, P, S, Q, D, TILES, KEYS, STAGES,
                        gl.constexpr(1),
                    ),
                ),
                (bring, (keys, k_s, full, free, b * k_len + hkv * k_row, hkv * k_col, start, stop, D, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
