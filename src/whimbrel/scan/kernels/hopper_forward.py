"""The forward on Hopper, in Gluon: the mathematics of `forward`, stream by stream.

One warpgroup holds one state of 64 value columns in registers; all else is [64, 64] tiles in shared memory. Two streams
of one sequence go together: a warpgroup for each in one program, the second a chunk behind the first, which hands it
the residual and its share of the output; keys and queries are copied in once for both. One stream alone leaves room
for two programs on a multiprocessor, so that one computes while the other waits. Tiles of a chunk are copied in as soon
as their place is free.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from whimbrel.scan.kernels.hopper import (
    ROWS,
    barrier,
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


@gluon.jit
def read(x, WIDE: gl.constexpr):
    """x in fp32."""
    return widen(x) if WIDE else x.to(gl.float32)


@gluon.jit
def walk(
    q,
    k,
    x,
    tiles,
    saved,
    y,
    residual,
    gates,
    starts,
    local,
    ends,
    y_memory,
    residual_memory,
    decays,
    k_s,
    q_s,
    x_s,
    l_s,
    state_s,
    p_s,
    one_s,
    y_s,
    left_s,
    share_s,
    until_s,
    before_s,
    rate_s,
    keys,
    queries,
    has_x,
    has_tile,
    has_y,
    ready,
    done,
    start,
    end,
    chunk,
    s,
    hv,
    i_v,
    tokens,
    chunks,
    stretches,
    parts,
    H,
    HV,
    scale,
    clip,
    below,
    K: gl.constexpr,
    V: gl.constexpr,
    FIRST: gl.constexpr,
    DELTA: gl.constexpr,
    TWO: gl.constexpr,
    GATED: gl.constexpr,
    DECAYED: gl.constexpr,
    CLIP: gl.constexpr,
    FROM: gl.constexpr,
    GATHER: gl.constexpr,
    SAVE: gl.constexpr,
    LINKED: gl.constexpr,
):
    """One stream of one value head over a stretch, for 64 value columns.

    LINKED: the other stream runs beside this one. The first puts residual and share of y into `left_s` and `share_s`,
    two places each, and says so in `ready`; the second says in `done` that it has read them, and asks for the keys and
    queries of later chunks when both are through with a place. With SAVE the residual goes to memory, and for the
    delta rule in its place the second stream's error.
    GATHER: the start is put together from `starts`, of the sequence, and what the stretches before leave: `local` and
    `decays` of `stretch_ends`. `ends` are those of sequences.
    """
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    KT: gl.constexpr = K // 64
    # A state that adds is written without looking at what is in it.
    HAS_TILE: gl.constexpr = DELTA or FIRST
    ADDS: gl.constexpr = TWO and not FIRST
    HAS_X: gl.constexpr = not (LINKED and not FIRST)
    HAS_Y: gl.constexpr = ADDS and not LINKED
    KEYS: gl.constexpr = 3 if LINKED else 2
    # Without the delta rule, what is written is known before the state is: its products need not wait. A second stream
    # has too few of them to gain, and beside each other two streams fill the time already.
    EARLY: gl.constexpr = not DELTA and FIRST and not LINKED
    # The backward of a second stream then need not solve for its error again.
    LEAVES: gl.constexpr = LINKED and DELTA and SAVE
    WIDE: gl.constexpr = SAVE or not LINKED  # else it takes registers that are wanting
    STREAM: gl.constexpr = 0 if FIRST else 1
    dtype: gl.constexpr = q.dtype
    n = gl.cdiv(end - start, 64)
    row = gl.arange(0, 64, ROW)
    col = gl.arange(0, 64, gl.SliceLayout(0, ACC))
    at = ((STREAM * stretches.to(gl.int64) + s) * HV + hv) * (K * V) + i_v * 64 + row[:, None] * V + col[None, :]
    if GATHER:
        tile = i_v * 64 + row[:, None] * V + col[None, :]
        owner = (STREAM * (stretches // parts).to(gl.int64) + s // parts) * HV + hv
        s0, s1 = load_state(starts, owner * (K * V) + tile, V, KT, FROM, ACC)
        for other in range(s - s % parts, s):
            place = (STREAM * stretches.to(gl.int64) + other) * HV + hv
            x0, x1 = load_state(local, place * (K * V) + tile, V, KT, True, ACC)
            by = gl.load(decays + place)
            s0 = s0 * by + x0
            s1 = s1 * by + x1
    else:
        s0, s1 = load_state(starts, at, V, KT, FROM, ACC)
    gate_row = gates + hv.to(gl.int64) * tokens
    rate_row = gate_row + (2 - FIRST) * (HV * tokens.to(gl.int64))
    tile_row = ((STREAM * HV + hv) * chunks + chunk) * 64
    save_row = (((STREAM if TWO else 0) * chunks + chunk) * HV + hv) * K
    key_col = hv // (HV // H) * K
    value_col = hv * V + i_v * 64

    some = n > 0
    if FIRST or not LINKED:
        for p in gl.static_range(KEYS if LINKED else 1):
            mbarrier.expect(keys.index(p), 8192 * KT, pred=p < n)
            mbarrier.expect(queries.index(p), 8192 * KT, pred=p < n)
            for j in gl.static_range(KT):
                spot = [start + p * 64, key_col + j * 64]
                tma.async_copy_global_to_shared(k, spot, keys.index(p), k_s.index(p * KT + j), pred=p < n)
                tma.async_copy_global_to_shared(q, spot, queries.index(p), q_s.index(p * KT + j), pred=p < n)
    if HAS_X:
        mbarrier.expect(has_x, 8192, pred=some)
        tma.async_copy_global_to_shared(x, [start, value_col], has_x, x_s.index(0), pred=some)
    if HAS_TILE:
        mbarrier.expect(has_tile, 8192, pred=some)
        tma.async_copy_global_to_shared(tiles, [tile_row, 0], has_tile, l_s.index(0), pred=some)
    if HAS_Y:
        mbarrier.expect(has_y, 8192, pred=some)
        tma.async_copy_global_to_shared(y, [start, value_col], has_y, y_s.index(0), pred=some)
    entry_until, entry_before, entry_rate, last, _ = load_gates(gate_row, rate_row, start, end, LINE)
    until_s.index(0).store(entry_until)
    before_s.index(0).store(entry_before)
    rate_s.index(0).store(entry_rate)
    if EARLY:
        barrier()
    for i in range(n):
        par = i & 1
        turn = (i >> 1) & 1
        more = i + 1 < n
        slot = i % KEYS
        round = (i // KEYS) & 1
        here = slot * KT
        if LINKED:
            asked, queried = here, round
        else:
            asked, queried = 0, par
        first = start + i * 64
        after = first + 64
        rows = end - first
        whole = gl.exp2(last)

        o = opaque(0)
        state_s.index(o).store(s0.to(dtype))
        if KT == 2:
            state_s.index(o + 1).store(s1.to(dtype))
        if FIRST:
            tma.store_wait(1)
        if LINKED and not FIRST:
            given = left_s.index(par)
        else:
            given = x_s.index(o)
        if EARLY:
            mbarrier.wait(has_x, par)
            mbarrier.wait(has_tile, par)
            if rows < 64:
                keep_rows(x_s.index(0), rows, 4)
                barrier()
            rate = rate_s.index(o).load(ROW)
            work = read(given.load(ACC), WIDE) * rate[:, None]
            one_s.index(o).store(work.to(dtype))
        if not LINKED:
            mbarrier.expect(keys.index(1 - slot), 8192 * KT, pred=more)
        publish()
        # Asked for here, to be there by the end of the chunk.
        next_until, next_before, next_rate, next_last, _ = load_gates(
            gate_row, rate_row, gl.where(more, after, first), end, LINE
        )
        if not LINKED:
            # Every warp is past the last chunk here, so its keys' slot is free.
            for j in gl.static_range(KT):
                tma.async_copy_global_to_shared(
                    k, [after, key_col + j * 64], keys.index(1 - slot), k_s.index(KT - here + j), pred=more
                )
        if SAVE:
            for j in gl.static_range(KT):
                tma.async_copy_shared_to_global(saved, [save_row + i * HV * K + j * 64, i_v * 64], state_s.index(j))
        if LINKED and not FIRST:
            mbarrier.wait(ready.index(par), turn)
        mbarrier.wait(keys.index(slot), round)
        mbarrier.wait(queries.index(slot if LINKED else 0), queried)
        if HAS_X and not EARLY:
            mbarrier.wait(has_x, par)
        if HAS_TILE and not EARLY:
            mbarrier.wait(has_tile, par)
        if HAS_Y:
            mbarrier.wait(has_y, par)
        if rows < 64:
            if FIRST or not LINKED:
                for j in gl.static_range(KT):
                    keep_rows(k_s.index(here + j), rows, 4)
                    keep_rows(q_s.index(asked + j), rows, 4)
            if HAS_X and not EARLY:
                keep_rows(x_s.index(0), rows, 4)
            publish()
        if EARLY:
            score = product(q_s, k_s, KT, ACC, asked + o, here + o, B_T=True)
        if HAS_TILE:
            seen = product(k_s, state_s, KT, ACC, here + o, o)
        if EARLY:
            inner = warpgroup_mma(
                l_s.index(o), one_s.index(o), gl.zeros([64, 64], gl.float32, ACC), use_acc=False, is_async=True
            )
            out = product(q_s, state_s, KT, ACC, asked + o, o)
        else:
            score = product(q_s, k_s, KT, ACC, asked + o, here + o, B_T=True)
        until, before, rate = until_s.index(o).load(ROW), before_s.index(o).load(ROW), rate_s.index(o).load(ROW)
        grow, alpha = gl.exp2(until), gl.exp2(until - before)
        start_decay = gl.exp2(before)
        tail = gl.exp2(last - until)
        if HAS_TILE and not EARLY:
            seen = warpgroup_mma_wait(KT, deps=(seen,))
        if DELTA:
            work = read(given.load(ACC), WIDE) - seen * grow[:, None]
        elif not EARLY:
            work = read(given.load(ACC), WIDE) * rate[:, None]
        if HAS_TILE and not EARLY:
            one_s.index(o).store(work.to(dtype))
            publish()
            o = opaque(0)
            inner = warpgroup_mma(
                l_s.index(o), one_s.index(o), gl.zeros([64, 64], gl.float32, ACC), use_acc=False, is_async=True
            )
        if EARLY:
            score = warpgroup_mma_wait(2 * KT + 1, deps=(score,))
        else:
            score = warpgroup_mma_wait(1 if HAS_TILE else 0, deps=(score,))
        if FIRST:
            if GATED:
                reads, rise = grow, until
            else:
                reads, rise = start_decay, before
            seen_by = row[:, None] > col[None, :]
        else:
            reads, rise = grow, until
            seen_by = row[:, None] >= col[None, :]
        until_c = until_s.index(o).load(gl.SliceLayout(0, ACC))
        fade = gl.exp2(gl.minimum(rise[:, None] - until_c[None, :], 0.0))
        p_s.index(o).store(gl.where(seen_by, score * fade, 0.0).to(dtype))
        if not EARLY:
            out = product(q_s, state_s, KT, ACC, asked + o, o)
        if EARLY:
            seen, inner, out = warpgroup_mma_wait(0, deps=(seen, inner, out))
        elif HAS_TILE:
            inner, out = warpgroup_mma_wait(0, deps=(inner, out))
        else:
            out = warpgroup_mma_wait(0, deps=(out,))
        out = out * reads[:, None]
        if FIRST:
            if DELTA:
                seen = seen * start_decay[:, None] - inner
            else:
                seen = seen * start_decay[:, None] + inner
            if DECAYED:
                seen = seen * alpha[:, None]
            left = read(x_s.index(o).load(ACC), WIDE) - seen
            if CLIP:
                # None within the bound is rounded up to it, so that what is stored says where the clip was active.
                most = gl.where(gl.abs(left) <= clip, below, clip)
                left = gl.minimum(gl.maximum(left, -most), most)
            if LINKED:
                mbarrier.wait(done.index(par), 1 - turn, pred=i >= 2)
                left_s.index(par).store(left.to(dtype))
            else:
                left_s.index(o).store(left.to(dtype))
        if DELTA:
            work = work + inner * alpha[:, None]
            if LEAVES and not FIRST:
                left_s.index(par).store(work.to(dtype))
            work = work * rate[:, None]
        if EARLY:
            # Again, since it would take registers that products want.
            work = read(given.load(ACC), WIDE) * rate[:, None]
        tma.store_wait(0)
        # Before the barrier, so that none is needed between these and the copies.
        if HAS_X:
            mbarrier.expect(has_x, 8192, pred=more)
        if HAS_TILE:
            mbarrier.expect(has_tile, 8192, pred=more)
        if HAS_Y:
            mbarrier.expect(has_y, 8192, pred=more)
        if not LINKED:
            mbarrier.expect(queries.index(0), 8192 * KT, pred=more)
        barrier()
        if HAS_X:
            tma.async_copy_global_to_shared(x, [after, value_col], has_x, x_s.index(0), pred=more)
        if HAS_TILE:
            tma.async_copy_global_to_shared(tiles, [tile_row + (i + 1) * 64, 0], has_tile, l_s.index(0), pred=more)
        if HAS_Y:
            tma.async_copy_global_to_shared(y, [after, value_col], has_y, y_s.index(1 - par), pred=more)
        if not LINKED:
            for j in gl.static_range(KT):
                tma.async_copy_global_to_shared(q, [after, key_col + j * 64], queries.index(0), q_s.index(j), pred=more)
        if not EARLY:
            one_s.index(o).store(work.to(dtype))
        state_s.index(o).store((work * tail[:, None]).to(dtype))
        publish()
        o = opaque(0)
        if EARLY:
            # Every warp has read this chunk's; here, so that the next chunk finds its own from the start.
            until_s.index(0).store(next_until)
            before_s.index(0).store(next_before)
            rate_s.index(0).store(next_rate)
        if LINKED:
            if SAVE and FIRST != LEAVES:
                put(left_s.index(par), residual, residual_memory, first, value_col, rows, HV * V, 64, 4)
        elif FIRST:
            put(left_s.index(o), residual, residual_memory, first, value_col, rows, HV * V, 64, 4)
        s0 = warpgroup_mma(k_s.index(here + o).permute((1, 0)), state_s.index(o), s0 * whole, is_async=True)
        if KT == 2:
            s1 = warpgroup_mma(k_s.index(here + o + 1).permute((1, 0)), state_s.index(o), s1 * whole, is_async=True)
        out = warpgroup_mma(p_s.index(o), one_s.index(o), out, is_async=True)
        out, s0, s1 = warpgroup_mma_wait(0, deps=(out, s0, s1))
        out = out * scale
        if ADDS and GATED:
            out = out * rate[:, None]
        if LINKED and FIRST:
            share_s.index(par).store(out.to(dtype))
            barrier()
            mbarrier.arrive(ready.index(par), count=1)
        else:
            if LINKED:
                out += read(share_s.index(par).load(ACC), WIDE)
                y_s.index(o).store(out.to(dtype))
                if LEAVES:
                    tma.store_wait(0)
                later = i + KEYS < n
                mbarrier.expect(keys.index(slot), 8192 * KT, pred=later)
                mbarrier.expect(queries.index(slot), 8192 * KT, pred=later)
                publish()
                mbarrier.arrive(done.index(par), count=1)
                o = opaque(0)
                put(y_s.index(o), y, y_memory, first, value_col, rows, HV * V, 64, 4)
                for j in gl.static_range(KT):
                    spot = [first + KEYS * 64, key_col + j * 64]
                    tma.async_copy_global_to_shared(k, spot, keys.index(slot), k_s.index(here + j), pred=later)
                    tma.async_copy_global_to_shared(q, spot, queries.index(slot), q_s.index(here + j), pred=later)
            elif ADDS:
                out += read(y_s.index(par).load(ACC), WIDE)
                y_s.index(par).store(out.to(dtype))
                publish()
                put(y_s.index(par), y, y_memory, first, value_col, rows, HV * V, 64, 4)
            else:
                y_s.index(o).store(out.to(dtype))
                publish()
                o = opaque(0)
                put(y_s.index(o), y, y_memory, first, value_col, rows, HV * V, 64, 4)
        if not EARLY:
            until_s.index(0).store(next_until)
            before_s.index(0).store(next_before)
            rate_s.index(0).store(next_rate)
        last = next_last
    tma.store_wait(0)
    if (s + 1) % parts == 0:
        # The end of the sequence; other stretches' ends were known before they were walked.
        place = ((STREAM * (stretches // parts).to(gl.int64) + s // parts) * HV + hv) * (K * V) + i_v * 64
        store_state(ends, place + row[:, None] * V + col[None, :], s0, s1, V, KT)


@gluon.jit(do_not_specialize=COUNTS)
def forward_stream(
    q,
    k,
    x,
    tiles,
    saved,
    y,
    residual,
    gates,
    starts,
    local,
    ends,
    y_memory,
    residual_memory,
    decays,
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
    below,
    K: gl.constexpr,
    V: gl.constexpr,
    FIRST: gl.constexpr,
    DELTA: gl.constexpr,
    TWO: gl.constexpr,
    GATED: gl.constexpr,
    DECAYED: gl.constexpr,
    CLIP: gl.constexpr,
    FROM: gl.constexpr,
    GATHER: gl.constexpr,
    SAVE: gl.constexpr,
):
    """One stream in chunks of 64; grid (stretches * HV * V / 64,); q, k, x, tiles, saved, y, residual are descriptors.

    x is v for the first or only stream, the residual for the second. The first leaves the residual and its share of
    y; the second adds to that y.
    """
    TILE: gl.constexpr = q.layout
    KT: gl.constexpr = K // 64
    NV: gl.constexpr = V // 64
    dtype: gl.constexpr = q.dtype
    pid = gl.program_id(0)
    i_v, hv, s = pid % NV, (pid // NV) % HV, pid // (NV * HV)
    start = gl.load(stretch_start + s)
    end = gl.load(stretch_end + s)
    chunk = gl.load(stretch_chunk + s)
    k_s = gl.allocate_shared_memory(dtype, [2 * KT, 64, 64], TILE)
    q_s = gl.allocate_shared_memory(dtype, [KT, 64, 64], TILE)
    x_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    l_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    state_s = gl.allocate_shared_memory(dtype, [KT, 64, 64], TILE)
    p_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    one_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    y_s = gl.allocate_shared_memory(dtype, [2 if TWO and not FIRST else 1, 64, 64], TILE)
    if FIRST:
        left_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    else:
        left_s = x_s
    share_s = y_s
    until_s = gl.allocate_shared_memory(gl.float32, [1, 64], ROWS)
    before_s = gl.allocate_shared_memory(gl.float32, [1, 64], ROWS)
    rate_s = gl.allocate_shared_memory(gl.float32, [1, 64], ROWS)
    keys = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    queries = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(keys.index(0), count=1)
    mbarrier.init(keys.index(1), count=1)
    mbarrier.init(queries.index(0), count=1)
    has_x, has_tile, has_y = new_barrier(), new_barrier(), new_barrier()
    ready, done = keys, keys
    barrier()
    walk(
        q,
        k,
        x,
        tiles,
        saved,
        y,
        residual,
        gates,
        starts,
        local,
        ends,
        y_memory,
        residual_memory,
        decays,
        k_s,
        q_s,
        x_s,
        l_s,
        state_s,
        p_s,
        one_s,
        y_s,
        left_s,
        share_s,
        until_s,
        before_s,
        rate_s,
        keys,
        queries,
        has_x,
        has_tile,
        has_y,
        ready,
        done,
        start,
        end,
        chunk,
        s,
        hv,
        i_v,
        tokens,
        chunks,
        stretches,
        parts,
        H,
        HV,
        scale,
        clip,
        below,
        K,
        V,
        FIRST,
        DELTA,
        TWO,
        GATED,
        DECAYED,
        CLIP,
        FROM,
        GATHER,
        SAVE,
        False,
    )


@gluon.jit(do_not_specialize=COUNTS)
def forward_streams(
    q,
    k,
    x,
    tiles,
    saved,
    y,
    residual,
    gates,
    starts,
    local,
    ends,
    y_memory,
    residual_memory,
    decays,
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
    below,
    K: gl.constexpr,
    V: gl.constexpr,
    DELTA: gl.constexpr,
    TWO: gl.constexpr,
    GATED: gl.constexpr,
    DECAYED: gl.constexpr,
    CLIP: gl.constexpr,
    FROM: gl.constexpr,
    SAVE: gl.constexpr,
):
    """Both streams, as `forward_stream` takes them one by one; nothing of the residual goes to memory without SAVE."""
    TILE: gl.constexpr = q.layout
    KT: gl.constexpr = K // 64
    NV: gl.constexpr = V // 64
    dtype: gl.constexpr = q.dtype
    pid = gl.program_id(0)
    i_v, hv, s = pid % NV, (pid // NV) % HV, pid // (NV * HV)
    start = gl.load(stretch_start + s)
    end = gl.load(stretch_end + s)
    chunk = gl.load(stretch_chunk + s)
    k_s = gl.allocate_shared_memory(dtype, [3 * KT, 64, 64], TILE)
    q_s = gl.allocate_shared_memory(dtype, [3 * KT, 64, 64], TILE)
    x_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    l_s_1 = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    if DELTA:
        l_s_2 = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    else:
        l_s_2 = l_s_1
    state_s_1 = gl.allocate_shared_memory(dtype, [KT, 64, 64], TILE)
    state_s_2 = gl.allocate_shared_memory(dtype, [KT, 64, 64], TILE)
    p_s_1 = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    p_s_2 = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    one_s_1 = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    one_s_2 = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    y_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    left_s = gl.allocate_shared_memory(dtype, [2, 64, 64], TILE)
    share_s = gl.allocate_shared_memory(dtype, [2, 64, 64], TILE)
    until_s_1 = gl.allocate_shared_memory(gl.float32, [1, 64], ROWS)
    until_s_2 = gl.allocate_shared_memory(gl.float32, [1, 64], ROWS)
    before_s_1 = gl.allocate_shared_memory(gl.float32, [1, 64], ROWS)
    before_s_2 = gl.allocate_shared_memory(gl.float32, [1, 64], ROWS)
    rate_s_1 = gl.allocate_shared_memory(gl.float32, [1, 64], ROWS)
    rate_s_2 = gl.allocate_shared_memory(gl.float32, [1, 64], ROWS)
    keys = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    queries = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for b in gl.static_range(3):
        mbarrier.init(keys.index(b), count=1)
        mbarrier.init(queries.index(b), count=1)
    for b in gl.static_range(2):
        mbarrier.init(ready.index(b), count=1)
        mbarrier.init(done.index(b), count=1)
    has_x, has_tile_1, has_tile_2 = new_barrier(), new_barrier(), new_barrier()
    barrier()
    gl.warp_specialize(
        [
            (
                walk,
                (
                    q,
                    k,
                    x,
                    tiles,
                    saved,
                    y,
                    residual,
                    gates,
                    starts,
                    local,
                    ends,
                    y_memory,
                    residual_memory,
                    decays,
                    k_s,
                    q_s,
                    x_s,
                    l_s_1,
                    state_s_1,
                    p_s_1,
                    one_s_1,
                    y_s,
                    left_s,
                    share_s,
                    until_s_1,
                    before_s_1,
                    rate_s_1,
                    keys,
                    queries,
                    has_x,
                    has_tile_1,
                    has_tile_1,
                    ready,
                    done,
                    start,
                    end,
                    chunk,
                    s,
                    hv,
                    i_v,
                    tokens,
                    chunks,
                    stretches,
                    parts,
                    H,
                    HV,
                    scale,
                    clip,
                    below,
                    K,
                    V,
                    gl.constexpr(True),
                    DELTA,
                    TWO,
                    GATED,
                    DECAYED,
                    CLIP,
                    FROM,
                    gl.constexpr(False),
                    SAVE,
                    gl.constexpr(True),
                ),
            ),
            (
                walk,
                (
                    q,
                    k,
                    x,
                    tiles,
                    saved,
                    y,
                    residual,
                    gates,
                    starts,
                    local,
                    ends,
                    y_memory,
                    residual_memory,
                    decays,
                    k_s,
                    q_s,
                    x_s,
                    l_s_2,
                    state_s_2,
                    p_s_2,
                    one_s_2,
                    y_s,
                    left_s,
                    share_s,
                    until_s_2,
                    before_s_2,
                    rate_s_2,
                    keys,
                    queries,
                    has_x,
                    has_tile_2,
                    has_tile_2,
                    ready,
                    done,
                    start,
                    end,
                    chunk,
                    s,
                    hv,
                    i_v,
                    tokens,
                    chunks,
                    stretches,
                    parts,
                    H,
                    HV,
                    scale,
                    clip,
                    below,
                    K,
                    V,
                    gl.constexpr(False),
                    DELTA,
                    TWO,
                    GATED,
                    DECAYED,
                    CLIP,
                    FROM,
                    gl.constexpr(False),
                    SAVE,
                    gl.constexpr(True),
                ),
            ),
        ],
        [4],
        [248],
    )
