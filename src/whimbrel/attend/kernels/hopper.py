"""The forward on Hopper, in Gluon: the mathematics of `forward`, blocks of 128 tokens, heads of 64, 128 or 256.

One program stays on each multiprocessor and takes one row of the plan after another. One warp brings queries, keys and
values in through the copy engine; two warpgroups hold 64 queries each. While one of them takes exponentials the other
multiplies, and within each the products of a block run beside the softmax of the next. Blocks are taken in parts of
KEYS keys, the whole where it fits the shared memory, and SLOTS tiles of queries are there at a time.
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

barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
"""Triton 3.7 renamed it."""
FIELDS = gl.constexpr(6)
"""Numbers of a job that the bringing warp hands to the others: blocks, whether the first is the diagonal one, queries,
first query, first row of y, head. In this order."""
ONE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def tell(notes, place, value):
    """Put a number where the other warps can read it."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    notes.index(place).store(gl.full([1], value, gl.int32, L))


@gluon.jit
def read(notes, place):
    """The number that `tell` put there."""
    return gl.sum(notes.index(place).load(ONE), 0)


@gluon.jit
def bring(
    q,
    k,
    v,
    table,
    offsets,
    indices,
    taken,
    q_s,
    k_s,
    v_s,
    notes,
    q_full,
    q_free,
    k_full,
    k_free,
    v_full,
    v_free,
    jobs,
    programs,
    pid,
    q_row,
    q_col,
    k_row,
    k_col,
    v_row,
    v_col,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    V: gl.constexpr,
    STAGES: gl.constexpr,
    KEYS: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """Take rows of the plan until none is left, and copy in what they read.

    x_row, x_col: how many rows and columns the heads of x lie apart; one of them is 0.
    """
    job = pid
    turn = 0
    step = 0
    while job < jobs:
        after = gl.atomic_add(taken, 1) + programs
        entry = table + job * 8
        row = gl.load(entry)
        t = gl.load(entry + 1)
        valid = gl.load(entry + 2)
        first = gl.load(entry + 3)
        key = gl.load(entry + 4)
        own = gl.load(entry + 5)
        h = gl.load(entry + 6)
        start = gl.load(offsets + row)
        stop = gl.load(offsets + row + 1)
        count = (stop - start).to(gl.int32)
        last = gl.load(indices + gl.maximum(stop - 1, 0), mask=count > 0, other=-1)
        diagonal = (last == own).to(gl.int32)
        place = indices + (start - diagonal)
        hk = h // GROUP

        slot = turn % SLOTS
        mbarrier.wait(q_free.index(slot), ((turn // SLOTS) & 1) ^ 1)
        note = slot * FIELDS
        tell(notes, note, count)
        tell(notes, note + 1, diagonal)
        tell(notes, note + 2, valid)
        tell(notes, note + 3, t)
        tell(notes, note + 4, first)
        tell(notes, note + 5, h)
        barrier()
        mbarrier.expect(q_full.index(slot), 2 * 128 * D)
        for half in gl.static_range(2):
            spot = [first + half * 64 + h * q_row, h * q_col]
            tma.async_copy_global_to_shared(q, spot, q_full.index(slot), q_s.index(slot * 2 + half))
        block = own
        if diagonal == 0:
            block = last
            if count > 0:
                block = gl.load(place)
        for i in range(count):
            coming = block
            if i + 1 < count:
                coming = gl.load(place + i + 1)
            for part in gl.static_range(128 // KEYS):
                stage = step % STAGES
                phase = ((step // STAGES) & 1) ^ 1
                at = key + block * 128 + part * KEYS
                mbarrier.wait(k_free.index(stage), phase)
                mbarrier.expect(k_full.index(stage), 2 * KEYS * D)
                spot = [at + hk * k_row, hk * k_col]
                tma.async_copy_global_to_shared(k, spot, k_full.index(stage), k_s.index(stage))
                mbarrier.wait(v_free.index(stage), phase)
                mbarrier.expect(v_full.index(stage), 2 * KEYS * V)
                spot = [at + hk * v_row, hk * v_col]
                tma.async_copy_global_to_shared(v, spot, v_full.index(stage), v_s.index(stage))
                step += 1
            block = coming
        job = after
        turn += 1
    slot = turn % SLOTS
    mbarrier.wait(q_free.index(slot), ((turn // SLOTS) & 1) ^ 1)
    tell(notes, slot * FIELDS, -1)
    barrier()
    mbarrier.arrive(q_full.index(slot))


@gluon.jit
def soften(scores, top, total, scale, dtype: gl.constexpr):
    """The running softmax after `scores` [64, KEYS]: weights, and by how much what came before shrinks."""
    new = gl.maximum(top, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new[:, None])
    kept = gl.exp2(top - new)
    total = total * kept + gl.sum(weights, 1)
    return weights.to(dtype), kept, new, total


@gluon.jit
def follow(query, k_s, v_s, k_full, k_free, v_full, v_free, step, weights, out, top, total, seen, scale,
           V: gl.constexpr, STAGES: gl.constexpr, KEYS: gl.constexpr, MASKED: gl.constexpr):  # fmt: skip
    """Keys number `step` + 1, while the values before them are multiplied; if MASKED, keys up to `seen` int32 [64] of
    a second part."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    before = step % STAGES
    earlier = (step // STAGES) & 1
    step += 1
    stage = step % STAGES
    phase = (step // STAGES) & 1
    mbarrier.wait(k_full.index(stage), phase)
    scores = warpgroup_mma(
        query, k_s.index(stage).permute((1, 0)), gl.zeros([64, KEYS], gl.float32, ACC), use_acc=False,
        is_async=True,
    )  # fmt: skip
    mbarrier.wait(v_full.index(before), earlier)
    out = warpgroup_mma(weights, v_s.index(before), out, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    if MASKED:
        n = gl.arange(KEYS, 2 * KEYS, gl.SliceLayout(0, ACC))
        scores = gl.where(n[None, :] <= seen[:, None], scores, float("-inf"))
    next_weights, kept, top, total = soften(scores, top, total, scale, v_s.dtype)
    out = warpgroup_mma_wait(0, deps=(out,))
    barrier()
    mbarrier.arrive(k_free.index(stage))
    mbarrier.arrive(v_free.index(before))
    out = out * gl.convert_layout(kept, gl.SliceLayout(1, OUT))[:, None]
    return step, gl.convert_layout(next_weights, WEIGHTS), out, top, total


@gluon.jit
def compute(
    to_y,
    y,
    lse,
    q_s,
    k_s,
    v_s,
    notes,
    q_full,
    q_free,
    k_full,
    k_free,
    v_full,
    v_free,
    clean,
    scale,
    H: gl.constexpr,
    D: gl.constexpr,
    V: gl.constexpr,
    STAGES: gl.constexpr,
    KEYS: gl.constexpr,
    SLOTS: gl.constexpr,
    HALF: gl.constexpr,
):
    """Half of the queries of each row of the plan."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    dtype: gl.constexpr = to_y.dtype
    m = gl.arange(0, 64, ROW)
    n = gl.arange(0, KEYS, gl.SliceLayout(0, ACC))
    turn = 0
    step = 0
    mbarrier.wait(q_full.index(0), 0)
    count = read(notes, 0)
    while count >= 0:
        slot = turn % SLOTS
        note = slot * FIELDS
        diagonal = read(notes, note + 1)
        valid = read(notes, note + 2)
        t = read(notes, note + 3)
        first = read(notes, note + 4)
        h = read(notes, note + 5)
        query = q_s.index(slot * 2 + HALF)
        top = gl.full([64], float("-inf"), gl.float32, ROW)
        total = gl.zeros([64], gl.float32, ROW)
        out = gl.zeros([64, V], gl.float32, OUT)
        if count > 0:
            stage = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(k_full.index(stage), phase)
            scores = warpgroup_mma(
                query, k_s.index(stage).permute((1, 0)), gl.zeros([64, KEYS], gl.float32, ACC), use_acc=False,
                is_async=True,
            )  # fmt: skip
            scores = warpgroup_mma_wait(0, deps=(scores,))
            barrier()
            mbarrier.arrive(k_free.index(stage))
            if diagonal > 0:
                # Every query sees its own key here, so that the running maximum is finite from now on.
                scores = gl.where(n[None, :] <= (m + HALF * 64)[:, None], scores, float("-inf"))
                if valid < 128:
                    # Values behind the sequence have weight 0, but may be NaN.
                    if HALF == 0:
                        L: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
                        for part in gl.static_range(128 // KEYS):
                            at = step + part
                            mbarrier.wait(v_full.index(at % STAGES), (at // STAGES) & 1)
                            tile = v_s.index(at % STAGES)
                            keys = gl.arange(part * KEYS, part * KEYS + KEYS, gl.SliceLayout(1, L))
                            tile.store(gl.where((keys < valid)[:, None], tile.load(L), 0.0).to(dtype))
                        fence_async_shared()
                        barrier()
                    else:
                        mbarrier.wait(clean.index(slot), (turn // SLOTS) & 1)
            if HALF == 0:
                mbarrier.arrive(clean.index(slot))
            weights, _, top, total = soften(scores, top, total, scale, dtype)
            weights = gl.convert_layout(weights, WEIGHTS)
            if KEYS < 128:
                seen = m + HALF * 64 + (1 - diagonal) * 128
                step, weights, out, top, total = follow(
                    query, k_s, v_s, k_full, k_free, v_full, v_free, step, weights, out, top, total, seen, scale,
                    V, STAGES, KEYS, True,
                )  # fmt: skip
            for _ in range((count - 1) * (128 // KEYS)):
                step, weights, out, top, total = follow(
                    query, k_s, v_s, k_full, k_free, v_full, v_free, step, weights, out, top, total, m, scale, V,
                    STAGES, KEYS, False,
                )  # fmt: skip
            stage = step % STAGES
            mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
            out = warpgroup_mma(weights, v_s.index(stage), out, is_async=True)
            out = warpgroup_mma_wait(0, deps=(out,))
            barrier()
            mbarrier.arrive(v_free.index(stage))
            step += 1
        elif HALF == 0:
            mbarrier.arrive(clean.index(slot))
        some = total > 0  # a part of a plan may leave a row without keys
        total = gl.where(some, total, 1.0)
        out = out / gl.convert_layout(total, OUT_ROW)[:, None]
        at = m + HALF * 64
        ok = (t + at >= 0) & (at < valid)
        sums = gl.where(some, (top + gl.log2(total)) * 0.6931471805599453, float("-inf"))
        gl.store(lse + (first + at).to(gl.int64) * H + h, sums, mask=ok)
        if (t >= 0) & (valid >= 128):
            # The queries have been used; their place is that of the result.
            query.store(out.to(dtype))
            fence_async_shared()
            barrier()
            tma.async_copy_shared_to_global(to_y, [first + HALF * 64, h * V], query)
            tma.store_wait(0)
        else:
            row = gl.arange(0, 64, OUT_ROW) + HALF * 64
            c = gl.arange(0, V, gl.SliceLayout(0, OUT))
            spot = ((first + row).to(gl.int64) * H + h)[:, None] * V + c[None, :]
            gl.store(y + spot, out.to(dtype), mask=((t + row >= 0) & (row < valid))[:, None])
        barrier()
        mbarrier.arrive(q_free.index(slot))
        turn += 1
        mbarrier.wait(q_full.index(turn % SLOTS), (turn // SLOTS) & 1)
        count = read(notes, (turn % SLOTS) * FIELDS)


COUNTS = ["jobs", "programs", "q_row", "q_col", "k_row", "k_col", "v_row", "v_col"]


@gluon.jit(do_not_specialize=COUNTS)
def forward(
    q,
    k,
    v,
    to_y,
    y,
    lse,
    table,
    offsets,
    indices,
    taken,
    jobs,
    programs,
    q_row,
    q_col,
    k_row,
    k_col,
    v_row,
    v_col,
    scale,
    H: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    V: gl.constexpr,
    STAGES: gl.constexpr,
    KEYS: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """y [tokens, H, V] and lse fp32 [tokens, H]; q, k, v and to_y are descriptors, `scale` holds log2(e).

    table int32 [jobs, 8]: for each row of the plan, in the order in which they are taken, its place in offsets int64,
    whose next number is where its blocks end, its first query, negative where the block begins before the queries, the
    queries from there to the sequence's end, the first query as a row of the tensors, the sequence's first key, the
    diagonal block, and the head. taken int32 [1] is 0.
    """
    q_s = gl.allocate_shared_memory(q.dtype, [2 * SLOTS, 64, D], q.layout)
    k_s = gl.allocate_shared_memory(k.dtype, [STAGES, KEYS, D], k.layout)
    v_s = gl.allocate_shared_memory(v.dtype, [STAGES, KEYS, V], v.layout)
    notes = gl.allocate_shared_memory(gl.int32, [SLOTS * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    clean = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=2)
        mbarrier.init(clean.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    barrier()
    pid = gl.program_id(0)
    gl.warp_specialize(
        [
            (
                compute,
                (
                    to_y, y, lse, q_s, k_s, v_s, notes, q_full, q_free, k_full, k_free, v_full, v_free,
                    clean, scale, H, D, V, STAGES, KEYS, SLOTS, gl.constexpr(0),
                ),
            ),
            (
                compute,
                (
                    to_y, y, lse, q_s, k_s, v_s, notes, q_full, q_free, k_full, k_free, v_full, v_free,
                    clean, scale, H, D, V, STAGES, KEYS, SLOTS, gl.constexpr(1),
                ),
            ),
            (
                bring,
                (
                    q, k, v, table, offsets, indices, taken, q_s, k_s, v_s, notes, q_full, q_free, k_full,
                    k_free, v_full, v_free, jobs, programs, pid, q_row, q_col, k_row, k_col, v_row, v_col, GROUP,
                    D, V, STAGES, KEYS, SLOTS,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
