"""The backward of one stream whose state adds, on Hopper, in Gluon: `hopper_backward` without the delta rule.

Nothing is solved for, so what a chunk's products need is known as soon as its tiles are there, but for scores: two
rounds of products instead of five. The second of two streams goes first. It leaves the cotangent of what was read of
the first stream's state, the residual's through the clip and with the other sign, where the values' will stand.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from whimbrel.scan.kernels.hopper import (
    ROWS,
    add,
    barrier,
    keep_rows,
    load_gates,
    new_barrier,
    opaque,
    publish,
    put,
    widen,
)
from whimbrel.scan.kernels.hopper_backward import (
    ALPHA,
    BEFORE,
    FRESH,
    GROW,
    HALVES,
    RATE,
    TAIL,
    UNTIL,
    WEIGHT,
    keep_gates,
    keep_sum,
    multiply,
    whole_sum,
)
from whimbrel.scan.kernels.prepare import COUNTS


@gluon.jit
def fading(table, half, RISE: gl.constexpr, STRICT: gl.constexpr, L: gl.constexpr):
    """By how much what token j wrote has decayed when token i reads; nothing where i comes before j."""
    row = gl.arange(0, 64, gl.SliceLayout(1, L))[:, None]
    col = gl.arange(0, 64, gl.SliceLayout(0, L))[None, :]
    rise = table[RISE].index(half).load(gl.SliceLayout(1, L))[:, None]
    fade = gl.exp2(gl.minimum(rise - table[UNTIL].index(half).load(gl.SliceLayout(0, L))[None, :], 0.0))
    return gl.where(row > col, fade, 0.0) if STRICT else gl.where(row >= col, fade, 0.0)


@gluon.jit(do_not_specialize=COUNTS)
def backward_adding(
    q,
    k,
    x,
    dy,
    saved,
    dx,
    dq,
    dk,
    gates,
    dends,
    local,
    carried,
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
    GATHER: gl.constexpr,
):
    """As `backward_stream`, in chunks of 64; grid (stretches * HV,). `clip` bounds residuals as they are stored."""
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
    RISE: gl.constexpr = BEFORE if FIRST else UNTIL
    READS: gl.constexpr = FRESH if FIRST and not GATED else GROW
    STREAM: gl.constexpr = 0 if FIRST else 1
    DROPS: gl.constexpr = GROW if DECAYED else FRESH
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
    # Scores and the tile of keys; once they are read, dx.
    tiles_s = gl.allocate_shared_memory(dtype, [2, 64, 64], TILE)
    dx_s = tiles_s._reinterpret(dtype, [1, 64, V], TILE)
    pairs_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    if FIRST:
        work_s = gl.allocate_shared_memory(dtype, [1, 64, V], TILE)
        z_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    if K == V:
        dq_s, dk_s = one_s, two_s
    else:
        dq_s = gl.allocate_shared_memory(dtype, [1, 64, K], TILE)
        dk_s = gl.allocate_shared_memory(dtype, [1, 64, K], TILE)
    # What the second stream left of dq and dk.
    if V == 128:
        shares_s = pull_s._reinterpret(dtype, [2, 64, K], TILE)
    else:
        shares_s = gl.allocate_shared_memory(dtype, [2, 64, K], TILE)
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
    asked_s = gl.allocate_shared_memory(gl.float32, [1, 2, 64], HALVES)
    found_s = gl.allocate_shared_memory(gl.float32, [1, 2, 64], HALVES)
    seen_s = gl.allocate_shared_memory(gl.float32, [1, 2, 64], HALVES)
    wrote_s = gl.allocate_shared_memory(gl.float32, [1, 2, 64], HALVES)
    read_s = gl.allocate_shared_memory(gl.float32, [1, 2, 64], HALVES)
    pair_s = gl.allocate_shared_memory(gl.float32, [1, 2, 64], HALVES)
    below_s = gl.allocate_shared_memory(gl.float32, [1, 4, 64], HALVES)
    # One for each copy, for the same reason.
    has_k, has_q, has_x, has_dy = new_barrier(), new_barrier(), new_barrier(), new_barrier()
    has_state, has_work, has_dq, has_dk = new_barrier(), new_barrier(), new_barrier(), new_barrier()
    barrier()

    col_v = gl.arange(0, V, gl.SliceLayout(0, LV))
    block = gl.arange(0, K, RV)[:, None] * V + col_v[None, :]
    at = ((STREAM * stretches.to(gl.int64) + s) * HV + hv) * (K * V)
    if GATHER:
        at = ((STREAM * (stretches // parts).to(gl.int64) + s // parts) * HV + hv) * (K * V)
    if FROM:
        ds = gl.load(dends + at + block)
    else:
        ds = gl.zeros([K, V], gl.float32, LV)
    if GATHER:
        final = s - s % parts + parts - 1
        for other in range(final - s):
            owner = (STREAM * stretches.to(gl.int64) + final - other) * HV + hv
            ds = ds * gl.load(carried + owner) + gl.load(local + owner * (K * V) + block)
    gate_row = gates + hv.to(gl.int64) * tokens
    rate_row = gate_row + (2 - FIRST) * (HV * tokens.to(gl.int64))
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
        if FIRST:
            mbarrier.expect(has_work, 128 * V)
        barrier()
        tma.async_copy_global_to_shared(k, [begin, key_col], has_k, k_s.index(0))
        tma.async_copy_global_to_shared(q, [begin, key_col], has_q, q_s.index(0))
        tma.async_copy_global_to_shared(x, [begin, value_col], has_x, x_s.index(0))
        tma.async_copy_global_to_shared(dy, [begin, value_col], has_dy, dy_s.index(0))
        tma.async_copy_global_to_shared(saved, [save_row + (n - 1) * HV * K, 0], has_state, state_s.index(0))
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
        rounded = ds.to(dtype)
        pull_s.index(o).store(rounded)
        tma.store_wait(0)
        mbarrier.wait(has_k, phase)
        mbarrier.wait(has_q, phase)
        mbarrier.wait(has_x, phase)
        mbarrier.wait(has_dy, phase)
        mbarrier.wait(has_state, phase)
        if FIRST:
            mbarrier.wait(has_work, phase)
            mbarrier.expect(has_dq, 128 * K)
            mbarrier.expect(has_dk, 128 * K)
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
        if FIRST:
            keys = multiply(k_s.index(o), k_s.index(o).permute((1, 0)), LC, 64, 64)
        pull = multiply(k_s.index(o), pull_s.index(o), LV, 64, V)
        key = multiply(x_s.index(o), pull_s.index(o).permute((1, 0)), LK, 64, K)
        # <state, its cotangent> at the chunk's end but for the decay. The cotangent as it was stored: to read what it
        # was rounded from is to wait for all products.
        pair = widen(state_s.index(o).load(LV)) * widen(rounded)
        pair_s.index(0).permute((1, 0)).store(gl.sum(gl.sum(pair.reshape([K // 64, 64, 2, V // 2]), axis=0), axis=2))
        weight = table[WEIGHT].index(phase).load(RV) * table[READS].index(phase).load(RV)
        one_s.index(o).store((widen(dy_s.index(o).load(LV)) * weight[:, None]).to(dtype))
        if FIRST:
            drops = table[DROPS].index(phase).load(RV)
            two_s.index(o).store((widen(work_s.index(o).load(LV)) * drops[:, None]).to(dtype))
        fade = fading(table, phase, RISE, FIRST, LC)
        # What a query reads of the first stream, or its key, has decayed by its own token too.
        weight = table[WEIGHT].index(phase).load(RC)[:, None]
        if FIRST and GATED:
            weight = weight * table[ALPHA].index(phase).load(RC)[:, None]
        score = warpgroup_mma_wait(3 if FIRST else 2, deps=(score,))
        score = score * fade
        tiles_s.index(o).store((score * weight).to(dtype))
        if FIRST:
            keys = warpgroup_mma_wait(2, deps=(keys,))
            keys = keys * fade
            if DECAYED:
                keys = keys * table[ALPHA].index(phase).load(RC)[:, None]
            lower = keys.to(dtype)
        dp = multiply(dy_s.index(o), x_s.index(o).permute((1, 0)), LC, 64, 64)
        if FIRST:
            z = multiply(work_s.index(o), x_s.index(o).permute((1, 0)), LC, 64, 64)
            pull, key = warpgroup_mma_wait(2, deps=(pull, key))
        else:
            pull, key = warpgroup_mma_wait(1, deps=(pull, key))
        pull = pull * table[TAIL].index(phase).load(RV)[:, None]
        keep_sum(wrote_s, key * widen(k_s.index(o).load(LK)), K)
        key = key * (table[TAIL].index(phase).load(RK) * table[RATE].index(phase).load(RK))[:, None]
        rates = table[RATE].index(phase).load(COL)[None, :]
        fade = fade * rates
        dp = warpgroup_mma_wait(1 if FIRST else 0, deps=(dp,))
        pairs = dp * score
        keep_sum(asked_s, pairs * rates, 64)
        pairs = pairs * weight
        pairs_s.index(o).store((dp * fade * weight).to(dtype))
        if FIRST:
            z = warpgroup_mma_wait(0, deps=(z,))
            keys = z * keys
            keep_sum(seen_s, keys * rates, 64)
            pairs += keys
            z = z * fade
            if DECAYED:
                z = z * table[ALPHA].index(phase).load(RC)[:, None]
            z_s.index(o).store(z.to(dtype))
        below_s.index(0).store(gl.sum(pairs.reshape([4, 16, 64]), axis=1))
        if FIRST:
            # Last, as the second store to one place waits for all threads.
            tiles_s.index(o + 1).store(lower)
        publish()

        o = opaque(0)
        pull = warpgroup_mma(tiles_s.index(o).permute((1, 0)), dy_s.index(o), pull, is_async=True)
        if FIRST:
            pull = warpgroup_mma(tiles_s.index(o + 1).permute((1, 0)), work_s.index(o), pull, is_async=True)
        if WEIGHTED:
            query = multiply(dy_s.index(o), state_s.index(o).permute((1, 0)), LK, 64, K)
        else:
            query = multiply(one_s.index(o), state_s.index(o).permute((1, 0)), LK, 64, K)
        if FIRST:
            found = multiply(two_s.index(o), state_s.index(o).permute((1, 0)), LK, 64, K)
        ds = warpgroup_mma(q_s.index(o).permute((1, 0)), one_s.index(o), ds * whole, is_async=True)
        if FIRST:
            ds = warpgroup_mma(k_s.index(o).permute((1, 0)), two_s.index(o), ds, is_async=True)
        key = warpgroup_mma(pairs_s.index(o).permute((1, 0)), q_s.index(o), key, is_async=True)
        if FIRST:
            key = warpgroup_mma(z_s.index(o), k_s.index(o), key, is_async=True)
            key = warpgroup_mma(z_s.index(o).permute((1, 0)), k_s.index(o), key, is_async=True)
            t = gl.arange(0, 64, LAST)
            earlier = gl.load(dlog + (first + t).to(gl.int64) * HV + hv, mask=t < rows, other=0.0)
            tma.async_copy_global_to_shared(dk, [first, own_col], has_dk, shares_s.index(o + 1))
        # Asked for here, to be there by the end of the chunk.
        until, before, rate, last, ok = load_gates(gate_row, rate_row, gl.where(more, prior, first), end, LINE)
        pull = warpgroup_mma_wait(7 if FIRST else 3, deps=(pull,))
        pull = pull * table[RATE].index(phase).load(RV)[:, None]
        if FIRST:
            pull = pull - widen(work_s.index(o).load(LV))
        elif TWO:
            pull = -pull
            if CLIP:
                pull = gl.where(gl.abs(widen(x_s.index(o).load(LV))) <= clip, pull, 0.0)
        given = pull.to(dtype)
        query = warpgroup_mma_wait(6 if FIRST else 2, deps=(query,))
        keep_sum(read_s, query * widen(q_s.index(o).load(LK)), K)
        if WEIGHTED:
            query = query * (table[WEIGHT].index(phase).load(RK) * table[READS].index(phase).load(RK))[:, None]
        if FIRST:
            found = warpgroup_mma_wait(5, deps=(found,))
            keep_sum(found_s, found * widen(k_s.index(o).load(LK)), K)
        ds = warpgroup_mma_wait(3 if FIRST else 1, deps=(ds,))
        if more:
            mbarrier.expect(has_x, 128 * V)
            mbarrier.expect(has_dy, 128 * V)
            mbarrier.expect(has_state, 2 * K * V)
            if FIRST:
                mbarrier.expect(has_work, 128 * V)
        barrier()

        o = opaque(0)
        query = warpgroup_mma(pairs_s.index(o), k_s.index(o), query, is_async=True)
        if FIRST:
            tma.async_copy_global_to_shared(dq, [first, own_col], has_dq, shares_s.index(o))
        if more:
            tma.async_copy_global_to_shared(saved, [save_row + (i - 1) * HV * K, 0], has_state, state_s.index(o))
            tma.async_copy_global_to_shared(x, [prior, value_col], has_x, x_s.index(o))
            tma.async_copy_global_to_shared(dy, [prior, value_col], has_dy, dy_s.index(o))
            if FIRST:
                tma.async_copy_global_to_shared(dx, [prior, value_col], has_work, work_s.index(o))
        dx_s.index(o).store(given)
        key = warpgroup_mma_wait(1, deps=(key,))
        if FIRST:
            mbarrier.wait(has_dk, phase)
            key += found + widen(shares_s.index(o + 1).load(LK))
        dk_s.index(o).store(key.to(dtype))
        query = warpgroup_mma_wait(0, deps=(query,))
        if FIRST:
            mbarrier.wait(has_dq, phase)
            query += widen(shares_s.index(o).load(LK))
        dq_s.index(o).store(query.to(dtype))
        keep_gates(table, 1 - phase, until, before, rate, last, ok, scale, WEIGHTED)
        if more:
            mbarrier.expect(has_k, 128 * K)
            mbarrier.expect(has_q, 128 * K)
        publish()

        o = opaque(0)
        put(dx_s.index(o), dx, dx_memory, first, value_col, rows, HV * V, V, 8)
        put(dq_s.index(o), dq, dq_memory, first, own_col, rows, HV * K, K, 8)
        put(dk_s.index(o), dk, dk_memory, first, own_col, rows, HV * K, K, 8)
        if more:
            tma.async_copy_global_to_shared(k, [prior, key_col], has_k, k_s.index(o))
            tma.async_copy_global_to_shared(q, [prior, key_col], has_q, q_s.index(o))
        # A decay scales what crosses its token: what later tokens read of the past, what earlier ones leave for the end
        # of the chunk. Pairs on one side fall out exactly, as their rows and columns are sums of the same numbers.
        t = gl.arange(0, 64, LAST)
        rates = table[RATE].index(phase).load(LAST)
        read = whole_sum(read_s, LAST)
        asked = whole_sum(asked_s, LAST)
        wrote = whole_sum(wrote_s, LAST) * table[TAIL].index(phase).load(LAST)
        leaves = wrote * rates
        lines = below_s._reinterpret(gl.float32, [4, 64], ROWS)
        below = lines.index(0).load(LAST) + lines.index(1).load(LAST)
        below += lines.index(2).load(LAST) + lines.index(3).load(LAST)
        wrote += below
        if WEIGHTED:
            # Both without the rate, by which the output takes them.
            read = read * (table[READS].index(phase).load(LAST) * scale) + asked * scale
            wrote += read
            read = read * rates
        else:
            asked = asked * table[WEIGHT].index(phase).load(LAST)
            if FIRST and GATED:
                asked = asked * table[ALPHA].index(phase).load(LAST)
            read += asked
        reads = read - below * rates
        if FIRST:
            seen = whole_sum(found_s, LAST) + whole_sum(seen_s, LAST)
            reads += seen
        # All reads less those before a token are those from it on.
        change = leaves - reads
        dgate = gl.sum(reads + whole_sum(pair_s, LAST) * whole, axis=0)
        dgate += gl.associative_scan(change, 0, add) - change
        place = (first + t).to(gl.int64) * HV + hv
        held = t < rows
        if FIRST:
            if not DECAYED:
                dgate -= seen
            if not GATED:
                dgate -= read
            dgate += earlier
        gl.store(dlog + place, dgate, mask=held)
        gl.store(drate + place, wrote, mask=held)
    tma.store_wait(0)
    if s % parts == 0:
        # The start of the sequence; nobody asks for those of other stretches.
        o = opaque(0)
        place = ((STREAM * (stretches // parts).to(gl.int64) + s // parts) * HV + hv) * (K * V)
        gl.store(dstarts + place + (gl.arange(0, K, RV)[:, None] + o) * V + col_v[None, :], ds)
