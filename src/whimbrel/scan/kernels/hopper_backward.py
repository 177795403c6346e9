"""The delta rule's backward of one stream on Hopper, in Gluon: cotangents of all that it was given, in one walk.

Two warpgroups hold the state's cotangent in registers, half of the value columns each, and everything else of a chunk
is in shared memory, so one program fills a multiprocessor. What the forward formed inside the chunk is formed again
from the saved state, the rest of the chunk follows from both, and nothing but the results is written. Two streams take
two passes, the second stream first: it leaves the residual's cotangent where the values' will stand, and its share of
the gradients of queries and keys.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from whimbrel.scan.kernels.hopper import (
    ROWS,
    add,
    barrier,
    count_chunks,
    keep_rows,
    load_gates,
    load_state,
    new_barrier,
    opaque,
    product,
    publish,
    put,
    store_state,
    widen,
)
from whimbrel.scan.kernels.prepare import COUNTS

# Places in the table of gates that a chunk keeps.
UNTIL, BEFORE, RATE, WEIGHT = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2), gl.constexpr(3)
GROW, ALPHA, FRESH, TAIL = gl.constexpr(4), gl.constexpr(5), gl.constexpr(6), gl.constexpr(7)
HALVES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def multiply(a, b, L: gl.constexpr, M: gl.constexpr, N: gl.constexpr):
    """a @ b in shared memory, started but not waited for."""
    return warpgroup_mma(a, b, gl.zeros([M, N], gl.float32, L), use_acc=False, is_async=True)


@gluon.jit
def keep_sum(halves, x, N: gl.constexpr):
    """Sums of x [64, N] over each warpgroup's half of the columns; no warp waits for another."""
    halves.index(0).permute((1, 0)).store(gl.sum(x.reshape([64, 2, N // 2]), axis=2))


@gluon.jit
def whole_sum(halves, L: gl.constexpr):
    lines = halves._reinterpret(gl.float32, [2, 64], ROWS)
    return lines.index(0).load(L) + lines.index(1).load(L)


@gluon.jit
def keep_gates(table, half, until, before, rate, last, ok, scale, WEIGHTED: gl.constexpr):
    weight = ok * scale
    if WEIGHTED:
        weight = weight * rate
    table[UNTIL].index(half).store(until)
    table[BEFORE].index(half).store(before)
    table[RATE].index(half).store(rate)
    table[WEIGHT].index(half).store(weight)
    table[GROW].index(half).store(gl.exp2(until))
    table[ALPHA].index(half).store(gl.exp2(until - before))
    table[FRESH].index(half).store(gl.exp2(before))
    table[TAIL].index(half).store(gl.exp2(last - until))


@gluon.jit(do_not_specialize=COUNTS)
def backward_stream(
    q,
    k,
    x,
    dy,
    tiles,
    saved,
    dx,
    dq,
    dk,
    gates,
    dends,
    dstarts,
    dx_memory,
    dq_memory,
    dk_memory,
    dlog,
    drate,
    stretch_start,
    stretch_end,
    stretch_chunk,
    tokens,
    chunks,
    stretches,
    parts,
    H,
    HV,
    scale,
    clip,
    K: gl.constexpr,
    V: gl.constexpr,
    FIRST: gl.constexpr,
    TWO: gl.constexpr,
    GATED: gl.constexpr,
    DECAYED: gl.constexpr,
    CLIP: gl.constexpr,
    FROM: gl.constexpr,
    KEPT: gl.constexpr,
):
    """One stream of `backward_states` and `backward_tokens` in chunks of 64; grid (stretches * HV,).

    q, k, x, dy, tiles, saved, dx, dq and dk are descriptors: of blocks [64, K], [64, V], [64, 64] and [K, V].
    x is what the stream was given and dx its cotangent: the residual for the second stream, v for the first, or for the
    only one. KEPT: x is the delta rule's error, which the forward left, so nothing is solved for. `clip` bounds
    residuals.
    The first finds the residual's cotangent where it puts its own. The second or only stream writes dq, dk and dlog,
    the first adds to them.
    """
    LV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, V // 2, 16])
    LK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, K // 2, 16])
    LC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
    RV: gl.constexpr = gl.SliceLayout(1, LV)
    RK: gl.constexpr = gl.SliceLayout(1, LK)
    RC: gl.constexpr = gl.SliceLayout(1, LC)
    COL: gl.constexpr = gl.SliceLayout(0, LC)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    LAST: gl.constexpr = gl.BlockedLayout([2], [32], [8], [0])
    TILE: gl.constexpr = q.layout
    WEIGHTED: gl.constexpr = TWO and GATED and not FIRST  # the output takes this stream times its rate
    RISE: gl.constexpr = BEFORE if FIRST and not GATED else UNTIL
    READS: gl.constexpr = FRESH if FIRST and not GATED else GROW
    STREAM: gl.constexpr = 0 if FIRST else 1
    APART: gl.constexpr = WEIGHTED or (FIRST and not GATED)  # the queries' pairs count in a sum of their own too
    dtype: gl.constexpr = q.dtype
    pid = gl.program_id(0)
    hv, s = pid % HV, pid // HV
    start = gl.load(stretch_start + s)
    end = gl.load(stretch_end + s)
    chunk = gl.load(stretch_chunk + s)
    n = gl.cdiv(end - start, 64)

    k_s = gl.allocate_shared_memory(dtype, [1, 64, K], TILE)
    q_s = gl.allocate_shared_memory(dtype, [1, 64, K], TILE)
    x_s = gl.allocate_shared_memory(dtype, [1, 64, V], TILE)
    dy_s = gl.allocate_shared_memory(dtype, [1, 64, V], TILE)
    state_s = gl.allocate_shared_memory(dtype, [1, K, V], TILE)
    pull_s = gl.allocate_shared_memory(dtype, [1, K, V], TILE)
    one_s = gl.allocate_shared_memory(dtype, [1, 64, V], TILE)
    two_s = gl.allocate_shared_memory(dtype, [1, 64, V], TILE)
    # Holds the residual's cotangent at first, where there is one.
    work_s = gl.allocate_shared_memory(dtype, [1, 64, V], TILE)
    p_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    l_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    if FIRST:
        z_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    else:
        z_s = work_s._reinterpret(dtype, [1, 64, 64], TILE)
    # The delta rule's error, and dx, which may take the place of x once no product reads it any more.
    if KEPT:
        e_s, dx_s = x_s, two_s
    else:
        e_s = gl.allocate_shared_memory(dtype, [1, 64, V], TILE)
        dx_s = x_s if FIRST else two_s
    if K == V:
        dq_s, dk_s = one_s, two_s
    else:
        dq_s = gl.allocate_shared_memory(dtype, [1, 64, K], TILE)
        dk_s = gl.allocate_shared_memory(dtype, [1, 64, K], TILE)
    # Each in a place of its own, so that nothing waits between stores to two of them.
    table = (
        gl.allocate_shared_memory(gl.float32, [2, 64], ROWS),
        gl.allocate_shared_memory(gl.float32, [2, 64], ROWS),
        gl.allocate_shared_memory(gl.float32, [2, 64], ROWS),
        gl.allocate_shared_memory(gl.float32, [2, 64], ROWS),
        gl.allocate_shared_memory(gl.float32, [2, 64], ROWS),
        gl.allocate_shared_memory(gl.float32, [2, 64], ROWS),
        gl.allocate_shared_memory(gl.float32, [2, 64], ROWS),
        gl.allocate_shared_memory(gl.float32, [2, 64], ROWS),
    )
    row_s = gl.allocate_shared_memory(gl.float32, [1, 2, 64], HALVES)
    asked_s = gl.allocate_shared_memory(gl.float32, [1, 2, 64], HALVES)
    found_s = gl.allocate_shared_memory(gl.float32, [1, 2, 64], HALVES)
    seen_s = gl.allocate_shared_memory(gl.float32, [1, 2, 64], HALVES)
    wrote_s = gl.allocate_shared_memory(gl.float32, [1, 2, 64], HALVES)
    read_s = gl.allocate_shared_memory(gl.float32, [1, 2, 64], HALVES)
    pair_s = gl.allocate_shared_memory(gl.float32, [1, 2, 64], HALVES)
    below_s = gl.allocate_shared_memory(gl.float32, [1, 4, 64], HALVES)
    # One for each copy, for the same reason.
    has_k, has_q, has_x, has_dy, has_state = new_barrier(), new_barrier(), new_barrier(), new_barrier(), new_barrier()
    has_tile, has_work, has_dq, has_dk = new_barrier(), new_barrier(), new_barrier(), new_barrier()
    barrier()

    col_v = gl.arange(0, V, gl.SliceLayout(0, LV))
    tile = gl.arange(0, K, RV)[:, None] * V + col_v[None, :]
    if FROM:
        ds = gl.load(dends + ((STREAM * stretches.to(gl.int64) + s) * HV + hv) * (K * V) + tile)
    else:
        ds = gl.zeros([K, V], gl.float32, LV)
    gate_row = gates + hv.to(gl.int64) * tokens
    rate_row = gate_row + (2 - FIRST) * (HV * tokens.to(gl.int64))
    tile_row = ((STREAM * HV + hv) * chunks + chunk) * 64
    save_row = (((STREAM if TWO else 0) * chunks + chunk) * HV + hv) * K
    key_col = hv // (HV // H) * K
    own_col = hv * K
    value_col = hv * V

    if n > 0:
        begin = start + (n - 1) * 64
        mbarrier.expect(has_k, 128 * K)
        mbarrier.expect(has_q, 128 * K)
        mbarrier.expect(has_x, 128 * V)
        mbarrier.expect(has_dy, 128 * V)
        mbarrier.expect(has_state, 2 * K * V)
        mbarrier.expect(has_tile, 8192)
        if FIRST:
            mbarrier.expect(has_work, 128 * V)
        barrier()
        tma.async_copy_global_to_shared(k, [begin, key_col], has_k, k_s.index(0))
        tma.async_copy_global_to_shared(q, [begin, key_col], has_q, q_s.index(0))
        tma.async_copy_global_to_shared(saved, [save_row + (n - 1) * HV * K, 0], has_state, state_s.index(0))
        tma.async_copy_global_to_shared(x, [begin, value_col], has_x, x_s.index(0))
        tma.async_copy_global_to_shared(dy, [begin, value_col], has_dy, dy_s.index(0))
        tma.async_copy_global_to_shared(tiles, [tile_row + (n - 1) * 64, 0], has_tile, l_s.index(0))
        if FIRST:
            tma.async_copy_global_to_shared(dx, [begin, value_col], has_work, work_s.index(0))
    until, before, rate, last, ok = load_gates(gate_row, rate_row, start + gl.maximum(n - 1, 0) * 64, end, LINE)
    keep_gates(table, 0, until, before, rate, last, ok, scale, WEIGHTED)

    for back in range(n):
        i = n - 1 - back
        phase = back & 1
        more = i > 0
        first = start + i * 64
        prior = first - 64
        rows = end - first
        whole = gl.exp2(last)
        o = opaque(0)
        pull_s.index(o).store(ds.to(dtype))
        tma.store_wait(0)
        mbarrier.wait(has_k, phase)
        mbarrier.wait(has_q, phase)
        mbarrier.wait(has_x, phase)
        mbarrier.wait(has_dy, phase)
        mbarrier.wait(has_state, phase)
        mbarrier.wait(has_tile, phase)
        if FIRST:
            mbarrier.wait(has_work, phase)
        if rows < 64:
            keep_rows(k_s.index(o), rows, 8)
            keep_rows(q_s.index(o), rows, 8)
            keep_rows(x_s.index(o), rows, 8)
            keep_rows(dy_s.index(o), rows, 8)
            if FIRST:
                keep_rows(work_s.index(o), rows, 8)
        publish()
        o = opaque(0)
        score = multiply(q_s.index(o), k_s.index(o).permute((1, 0)), LC, 64, 64)
        if not KEPT:
            seen = multiply(k_s.index(o), state_s.index(o), LV, 64, V)
        pull = multiply(k_s.index(o), pull_s.index(o), LV, 64, V)
        one_s.index(o).store(
            (
                widen(dy_s.index(o).load(LV))
                * (table[WEIGHT].index(phase).load(RV) * table[READS].index(phase).load(RV))[:, None]
            ).to(dtype)
        )
        row_c = gl.arange(0, 64, RC)
        col = gl.arange(0, 64, COL)
        fade = gl.exp2(
            gl.minimum(table[RISE].index(phase).load(RC)[:, None] - table[UNTIL].index(phase).load(COL)[None, :], 0.0)
        )
        if FIRST:
            fade = gl.where(row_c[:, None] > col[None, :], fade, 0.0)
        else:
            fade = gl.where(row_c[:, None] >= col[None, :], fade, 0.0)
        if not KEPT:
            score = warpgroup_mma_wait(2, deps=(score,))
        else:
            score = warpgroup_mma_wait(1, deps=(score,))
        score = score * fade
        p_s.index(o).store((score * table[WEIGHT].index(phase).load(RC)[:, None]).to(dtype))
        if not KEPT:
            work = x_s.index(o).load(LV)
            seen = warpgroup_mma_wait(1, deps=(seen,))
            work = widen(work) - seen * table[GROW].index(phase).load(RV)[:, None]
            two_s.index(o).store(work.to(dtype))
        pull = warpgroup_mma_wait(0, deps=(pull,))
        pull = pull * table[TAIL].index(phase).load(RV)[:, None]
        publish()

        o = opaque(0)
        if not KEPT:
            inner = multiply(l_s.index(o), two_s.index(o), LV, 64, V)
        pull = warpgroup_mma(p_s.index(o).permute((1, 0)), dy_s.index(o), pull, is_async=True)
        ds = warpgroup_mma(q_s.index(o).permute((1, 0)), one_s.index(o), ds * whole, is_async=True)
        alpha = table[ALPHA].index(phase).load(RV)
        if not KEPT:
            inner = warpgroup_mma_wait(2, deps=(inner,))
            e_s.index(o).store((work + inner * alpha[:, None]).to(dtype))
        if FIRST:
            dseen = -widen(work_s.index(o).load(LV))
            given = widen(x_s.index(o).load(LV))
            seen = seen * table[FRESH].index(phase).load(RV)[:, None] - inner
            if DECAYED:
                seen = seen * alpha[:, None]
            if CLIP:
                dseen = gl.where(gl.abs(given - seen) <= clip, dseen, 0.0)
            if not DECAYED:
                keep_sum(seen_s, seen * dseen, V)
        pull = warpgroup_mma_wait(1, deps=(pull,))
        pull = pull * table[RATE].index(phase).load(RV)[:, None]
        work = pull * alpha[:, None]
        if FIRST:
            dread = dseen
            if DECAYED:
                dread = dseen * alpha[:, None]
            work = work - dread
        work_s.index(o).store(work.to(dtype))
        ds = warpgroup_mma_wait(0, deps=(ds,))
        publish()

        o = opaque(0)
        pull = warpgroup_mma(l_s.index(o).permute((1, 0)), work_s.index(o), pull, is_async=True)
        dp = multiply(dy_s.index(o), e_s.index(o).permute((1, 0)), LC, 64, 64)
        key = multiply(e_s.index(o), pull_s.index(o).permute((1, 0)), LK, 64, K)
        # Asked for here, to be there by the end of the chunk; earlier, and they would take registers that are wanting.
        until, before, rate, last, ok = load_gates(gate_row, rate_row, gl.where(more, prior, first), end, LINE)
        pull = warpgroup_mma_wait(2, deps=(pull,))
        drop = pull * table[GROW].index(phase).load(RV)[:, None]
        if FIRST:
            dx_s.index(o).store((pull - dseen).to(dtype))
            lift = dread - pull * table[ALPHA].index(phase).load(RV)[:, None]
            two_s.index(o).store(lift.to(dtype))
            drop = dread * table[FRESH].index(phase).load(RV)[:, None] - drop
        else:
            dx_s.index(o).store(pull.to(dtype))
            drop = -drop
        one_s.index(o).store(drop.to(dtype))
        dp = warpgroup_mma_wait(1, deps=(dp,))
        pairs = dp * score
        if APART:
            keep_sum(asked_s, pairs * table[RATE].index(phase).load(COL)[None, :], 64)
        dp = dp * fade * table[RATE].index(phase).load(COL)[None, :]
        p_s.index(o).store((dp * table[WEIGHT].index(phase).load(RC)[:, None]).to(dtype))
        pairs = pairs * table[WEIGHT].index(phase).load(RC)[:, None]
        written = k_s.index(o).load(LK)
        key = warpgroup_mma_wait(0, deps=(key,))
        key = key * table[TAIL].index(phase).load(RK)[:, None]
        keep_sum(wrote_s, key * widen(written), K)
        key = key * table[RATE].index(phase).load(RK)[:, None]
        if more:
            mbarrier.expect(has_tile, 8192)
            if FIRST:
                mbarrier.expect(has_work, 128 * V)
        publish()

        o = opaque(0)
        put(dx_s.index(o), dx, dx_memory, first, value_col, rows, HV * V, V, 8)
        if more:
            tma.async_copy_global_to_shared(tiles, [tile_row + (i - 1) * 64, 0], has_tile, l_s.index(o))
            if FIRST:
                tma.async_copy_global_to_shared(dx, [prior, value_col], has_work, work_s.index(o))
        z = multiply(two_s.index(o), e_s.index(o).permute((1, 0)), LC, 64, 64)
        keys = multiply(k_s.index(o), k_s.index(o).permute((1, 0)), LC, 64, 64)
        found = multiply(one_s.index(o), state_s.index(o).permute((1, 0)), LK, 64, K)
        query = multiply(dy_s.index(o), state_s.index(o).permute((1, 0)), LK, 64, K)
        # <state, its cotangent> at the chunk's end but for the decay, in rounded numbers.
        pair = widen(state_s.index(o).load(LV)) * widen(pull_s.index(o).load(LV))
        pair_s.index(0).permute((1, 0)).store(gl.sum(gl.sum(pair.reshape([K // 64, 64, 2, V // 2]), axis=3), axis=0))
        ds = warpgroup_mma(k_s.index(o).permute((1, 0)), one_s.index(o), ds, is_async=True)
        z, keys = warpgroup_mma_wait(3, deps=(z, keys))
        row_c = gl.arange(0, 64, RC)
        col = gl.arange(0, 64, COL)
        rise: gl.constexpr = BEFORE if FIRST else UNTIL
        fade = gl.exp2(
            gl.minimum(table[rise].index(phase).load(RC)[:, None] - table[UNTIL].index(phase).load(COL)[None, :], 0.0)
        )
        if not FIRST:
            z = -z  # dx stands where the first stream has the other sign
        z = gl.where(row_c[:, None] > col[None, :], z * fade, 0.0)
        pairs += z * keys
        z_s.index(o).store((z * table[RATE].index(phase).load(COL)[None, :]).to(dtype))
        found = warpgroup_mma_wait(2, deps=(found,))
        keep_sum(found_s, found * widen(k_s.index(o).load(LK)), K)
        key += found
        query, ds = warpgroup_mma_wait(0, deps=(query, ds))
        keep_sum(row_s, pairs * table[RATE].index(phase).load(COL)[None, :], 64)
        keep_sum(read_s, query * widen(q_s.index(o).load(LK)), K)
        query = query * (table[WEIGHT].index(phase).load(RK) * table[READS].index(phase).load(RK))[:, None]
        below_s.index(0).store(gl.sum(pairs.reshape([4, 16, 64]), axis=1))
        tma.store_wait(0)
        if FIRST:
            mbarrier.expect(has_dq, 128 * K)
            mbarrier.expect(has_dk, 128 * K)
        if more:
            mbarrier.expect(has_state, 2 * K * V)
            mbarrier.expect(has_x, 128 * V)
            mbarrier.expect(has_dy, 128 * V)
        publish()

        o = opaque(0)
        query = warpgroup_mma(p_s.index(o), k_s.index(o), query, is_async=True)
        key = warpgroup_mma(p_s.index(o).permute((1, 0)), q_s.index(o), key, is_async=True)
        key = warpgroup_mma(z_s.index(o), k_s.index(o), key, is_async=True)
        key = warpgroup_mma(z_s.index(o).permute((1, 0)), k_s.index(o), key, is_async=True)
        if FIRST:
            t = gl.arange(0, 64, LAST)
            earlier = gl.load(dlog + (first + t).to(gl.int64) * HV + hv, mask=t < rows, other=0.0)
            tma.async_copy_global_to_shared(dq, [first, own_col], has_dq, dq_s.index(o))
            tma.async_copy_global_to_shared(dk, [first, own_col], has_dk, dk_s.index(o))
        if more:
            tma.async_copy_global_to_shared(saved, [save_row + (i - 1) * HV * K, 0], has_state, state_s.index(o))
            tma.async_copy_global_to_shared(x, [prior, value_col], has_x, x_s.index(o))
            tma.async_copy_global_to_shared(dy, [prior, value_col], has_dy, dy_s.index(o))
        query = warpgroup_mma_wait(3, deps=(query,))
        if FIRST:
            mbarrier.wait(has_dq, phase)
            mbarrier.wait(has_dk, phase)
            query += widen(dq_s.index(o).load(LK))
        dq_s.index(o).store(query.to(dtype))
        key = warpgroup_mma_wait(0, deps=(key,))
        if FIRST:
            key += widen(dk_s.index(o).load(LK))
        dk_s.index(o).store(key.to(dtype))
        keep_gates(table, 1 - phase, until, before, rate, last, ok, scale, WEIGHTED)
        if more:
            mbarrier.expect(has_k, 128 * K)
            mbarrier.expect(has_q, 128 * K)
        publish()

        o = opaque(0)
        put(dq_s.index(o), dq, dq_memory, first, own_col, rows, HV * K, K, 8)
        put(dk_s.index(o), dk, dk_memory, first, own_col, rows, HV * K, K, 8)
        if more:
            tma.async_copy_global_to_shared(k, [prior, key_col], has_k, k_s.index(o))
            tma.async_copy_global_to_shared(q, [prior, key_col], has_q, q_s.index(o))
        # A decay scales what crosses its token: what later tokens read of the past, what earlier ones leave for the end
        # of the chunk. Pairs on one side fall out exactly, as their rows and columns are sums of the same numbers.
        t = gl.arange(0, 64, LAST)
        rates = table[RATE].index(phase).load(LAST)
        read = whole_sum(read_s, LAST) * (table[READS].index(phase).load(LAST) * scale)
        wrote = whole_sum(wrote_s, LAST)
        leaves = wrote * rates
        lines = below_s._reinterpret(gl.float32, [4, 64], ROWS)
        below = lines.index(0).load(LAST) + lines.index(1).load(LAST)
        below += lines.index(2).load(LAST) + lines.index(3).load(LAST)
        wrote += below
        reads = whole_sum(row_s, LAST) + whole_sum(found_s, LAST) - below * rates
        if WEIGHTED:
            reads += read * rates
            wrote += read + whole_sum(asked_s, LAST) * scale
        else:
            reads += read
        # All reads less those before a token are those from it on.
        change = leaves - reads
        dgate = gl.sum(reads + whole_sum(pair_s, LAST) * whole, axis=0)
        dgate += gl.associative_scan(change, 0, add) - change
        place = (first + t).to(gl.int64) * HV + hv
        held = t < rows
        if FIRST:
            if not DECAYED:
                dgate -= whole_sum(seen_s, LAST)
            if not GATED:
                dgate -= read + whole_sum(asked_s, LAST) * table[WEIGHT].index(phase).load(LAST)
            dgate += earlier
        gl.store(dlog + place, dgate, mask=held)
        gl.store(drate + place, wrote, mask=held)
    tma.store_wait(0)
    if s % parts == 0:
        # The start of the sequence; nobody asks for those of other stretches.
        o = opaque(0)
        place = ((STREAM * (stretches // parts).to(gl.int64) + s // parts) * HV + hv) * (K * V)
        gl.store(dstarts + place + (gl.arange(0, K, RV)[:, None] + o) * V + col_v[None, :], ds)


@gluon.jit(do_not_specialize=COUNTS)
def reach(
    q,
    k,
    dy,
    tiles,
    gates,
    dstarts,
    dresidual,
    clipped,
    stretch_start,
    stretch_end,
    stretch_chunk,
    tokens,
    chunks,
    stretches,
    H,
    HV,
    scale,
    below,
    K: gl.constexpr,
    V: gl.constexpr,
    FIRST: gl.constexpr,
    TWO: gl.constexpr,
    GATED: gl.constexpr,
    DECAYED: gl.constexpr,
    CLIP: gl.constexpr,
):
    """Cotangents of the start states of one stream's stretches, as if there were none of their end states.

    Grid (stretches * HV * V / 64,), of one warpgroup each; q, k, dy and tiles are descriptors of [64, 64] blocks. The
    first stream reads the residual in `clipped`, its cotangent in `dresidual`; the clip let through what is at most
    `below`.
    """
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    TILE: gl.constexpr = q.layout
    KT: gl.constexpr = K // 64
    NV: gl.constexpr = V // 64
    BYTES: gl.constexpr = 8192 * (2 * KT + 2)
    STREAM: gl.constexpr = 0 if FIRST else 1
    dtype: gl.constexpr = q.dtype
    pid = gl.program_id(0)
    i_v, hv, s = pid % NV, (pid // NV) % HV, pid // (NV * HV)
    start = gl.load(stretch_start + s)
    end = gl.load(stretch_end + s)
    chunk = gl.load(stretch_chunk + s)
    n = gl.cdiv(end - start, 64)
    row = gl.arange(0, 64, gl.SliceLayout(1, ACC))
    col = gl.arange(0, 64, gl.SliceLayout(0, ACC))

    k_s = gl.allocate_shared_memory(dtype, [2 * KT, 64, 64], TILE)
    q_s = gl.allocate_shared_memory(dtype, [2 * KT, 64, 64], TILE)
    dy_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    l_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    state_s = gl.allocate_shared_memory(dtype, [KT, 64, 64], TILE)
    p_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    one = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(full.index(0), count=1)
    mbarrier.init(full.index(1), count=1)
    barrier()

    at = ((STREAM * stretches.to(gl.int64) + s) * HV + hv) * (K * V) + i_v * 64 + row[:, None] * V + col[None, :]
    s0, s1 = load_state(dstarts, at, V, KT, False, ACC)
    gate_row = gates + hv.to(gl.int64) * tokens
    gate_plane = HV * tokens.to(gl.int64)
    tile_row = ((STREAM * HV + hv) * chunks + chunk) * 64
    key_col = hv // (HV // H) * K
    value_col = hv * V + i_v * 64

    n, _ = count_chunks(gate_row, start, end, n, True)
    some = n > 0
    begin = start + (n - 1) * 64
    mbarrier.expect(full.index(0), BYTES, pred=some)
    for j in gl.static_range(KT):
        tma.async_copy_global_to_shared(k, [begin, key_col + j * 64], full.index(0), k_s.index(j), pred=some)
        tma.async_copy_global_to_shared(q, [begin, key_col + j * 64], full.index(0), q_s.index(j), pred=some)
    tma.async_copy_global_to_shared(dy, [begin, value_col], full.index(0), dy_s.index(0), pred=some)
    tma.async_copy_global_to_shared(tiles, [tile_row + (n - 1) * 64, 0], full.index(0), l_s.index(0), pred=some)

    for back in range(n):
        i = n - 1 - back
        par = back & 1
        then = full.index(1 - par)
        more = i > 0
        here = par * KT
        there = KT - here
        first = start + i * 64
        prior = first - 64
        t = first + row
        ok = t < end
        last = gl.load(gate_row + gl.minimum(first + 64, end) - 1)
        until = gl.load(gate_row + t, mask=ok, other=0.0)
        before = gl.load(gate_row + t - 1, mask=ok & (row > 0), other=0.0)
        rate = gl.load(gate_row + (2 - FIRST) * gate_plane + t, mask=ok, other=0.0)
        tc = first + col
        rise_c = gl.load(gate_row + tc, mask=tc < end, other=0.0)
        if FIRST and not GATED:
            rise_c = gl.load(gate_row + tc - 1, mask=(tc < end) & (col > 0), other=0.0)
        if FIRST:
            values = (t[:, None].to(gl.int64) * HV + hv) * V + i_v * 64 + col[None, :]
            passed = gl.load(dresidual + values, mask=ok[:, None], other=0.0)
            if CLIP:
                left = gl.load(clipped + values, mask=ok[:, None], other=0.0)

        o = opaque(0)
        state_s.index(o).store(s0.to(dtype))
        if KT == 2:
            state_s.index(o + 1).store(s1.to(dtype))
        publish()
        mbarrier.expect(then, BYTES, pred=more)
        for j in gl.static_range(KT):
            tma.async_copy_global_to_shared(k, [prior, key_col + j * 64], then, k_s.index(there + j), pred=more)
            tma.async_copy_global_to_shared(q, [prior, key_col + j * 64], then, q_s.index(there + j), pred=more)
        mbarrier.wait(full.index(par), (back >> 1) & 1)
        # Scores [j, i]: how much of what token j writes token i reads.
        score = product(k_s, q_s, KT, ACC, here + o, here + o, B_T=True)
        pull = product(k_s, state_s, KT, ACC, here + o, o)
        until = gl.where(ok, until, last)
        before = gl.where(ok, before, last)
        grow, alpha = gl.exp2(until), gl.exp2(until - before)
        start_decay = gl.exp2(before)
        tail, whole = gl.exp2(last - until), gl.exp2(last)
        # Rows past the end may hold another sequence's cotangents.
        given = gl.where(ok[:, None], dy_s.index(o).load(ACC).to(gl.float32) * scale, 0.0)
        if TWO and GATED and not FIRST:
            given = given * rate[:, None]
        if FIRST and not GATED:
            reads = start_decay
        else:
            reads = grow
        one.index(o).store(given.to(dtype))
        rise_c = gl.where(tc < end, rise_c, last)
        score = warpgroup_mma_wait(KT, deps=(score,))
        fade = gl.exp2(gl.minimum(rise_c[None, :] - until[:, None], 0.0))
        if FIRST:
            read_by = row[:, None] < col[None, :]
        else:
            read_by = row[:, None] <= col[None, :]
        p_s.index(o).store(gl.where(read_by, score * fade, 0.0).to(dtype))
        pull = warpgroup_mma_wait(0, deps=(pull,))
        pull = pull * tail[:, None]
        barrier()
        tma.async_copy_global_to_shared(dy, [prior, value_col], then, dy_s.index(0), pred=more)
        if FIRST:
            dseen = -passed.to(gl.float32)
            if CLIP:
                dseen = gl.where(gl.abs(left.to(gl.float32)) <= below, dseen, 0.0)
            if DECAYED:
                dseen = dseen * alpha[:, None]
        state_s.index(o).store((given * reads[:, None]).to(dtype))
        publish()
        o = opaque(0)
        pull = warpgroup_mma(p_s.index(o), one.index(o), pull, is_async=True)
        s0 = warpgroup_mma(q_s.index(here + o).permute((1, 0)), state_s.index(o), s0 * whole, is_async=True)
        if KT == 2:
            s1 = warpgroup_mma(q_s.index(here + o + 1).permute((1, 0)), state_s.index(o), s1 * whole, is_async=True)
        pull, s0, s1 = warpgroup_mma_wait(0, deps=(pull, s0, s1))
        work = pull * (rate * alpha)[:, None]
        if FIRST:
            work = work - dseen
        barrier()
        one.index(o).store(work.to(dtype))
        publish()
        o = opaque(0)
        pull = warpgroup_mma(l_s.index(o).permute((1, 0)), one.index(o), pull * rate[:, None], is_async=True)
        pull = warpgroup_mma_wait(0, deps=(pull,))
        dread = -pull * grow[:, None]
        if FIRST:
            dread = dread + dseen * start_decay[:, None]
        state_s.index(o).store(dread.to(dtype))
        publish()
        tma.async_copy_global_to_shared(tiles, [tile_row + (i - 1) * 64, 0], then, l_s.index(0), pred=more)
        s0 = warpgroup_mma(k_s.index(here + o).permute((1, 0)), state_s.index(o), s0, is_async=True)
        if KT == 2:
            s1 = warpgroup_mma(k_s.index(here + o + 1).permute((1, 0)), state_s.index(o), s1, is_async=True)
        s0, s1 = warpgroup_mma_wait(0, deps=(s0, s1))
    store_state(dstarts, at, s0, s1, V, KT)
