"""The sweeps over the states on Hopper, in Gluon: the mathematics of `forward` and `backward_states`, stream by stream.

One warpgroup holds one state of 64 value columns in registers; all else is [64, 64] tiles in shared memory, few enough
for two programs on a multiprocessor, so that one computes while the other waits. Tiles of the next chunk are copied
in as soon as their place is free. Two streams take two passes: what the second needs of the first (the residual, the
first's share of the output or of the gradient) goes through memory in the inputs' dtype.
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

from whimbrel.scan.kernels.prepare import COUNTS

barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
"""Triton 3.7 renamed it."""
END = gl.constexpr(1)
MAP = gl.constexpr(2)
ROWS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def product(a, b, KT: gl.constexpr, ACC: gl.constexpr, a0=0, b0=0, B_T: gl.constexpr = False):
    """sum over KT tiles of a[a0 + i] @ b[b0 + i], started but not waited for; B_T takes b's tiles transposed."""
    acc = gl.zeros([64, 64], gl.float32, ACC)
    for i in gl.static_range(KT):
        y = b.index(b0 + i)
        if B_T:
            y = y.permute((1, 0))
        acc = warpgroup_mma(a.index(a0 + i), y, acc, use_acc=i > 0, is_async=True)
    return acc


@gluon.jit
def opaque(x):
    """x, of which the compiler knows nothing: what is computed from it is computed where it is used.

    Without it the addresses of all tiles are computed before a loop and kept, which is more than there are registers.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def publish():
    """Make what the threads stored in shared memory visible to the matrix units and the copy engine."""
    fence_async_shared()
    barrier()


@gluon.jit
def keep_rows(tile, rows, WARPS: gl.constexpr):
    """Zeros in the rows of a tile [64, N] from `rows` on: they hold another sequence, or nothing."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
    row = gl.arange(0, 64, gl.SliceLayout(1, L))
    x = tile.load(L)
    tile.store(gl.where((row < rows)[:, None], x, 0.0).to(x.dtype))


@gluon.jit
def put(tile, matrix, memory, first, column, rows, stride, N: gl.constexpr, WARPS: gl.constexpr):
    """A tile [64, N] to the rows from `first` on, or as many as there are; `matrix` is the descriptor of `memory`."""
    if rows >= 64:
        tma.async_copy_shared_to_global(matrix, [first, column], tile)
    else:
        L: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
        row = gl.arange(0, 64, gl.SliceLayout(1, L))
        col = gl.arange(0, N, gl.SliceLayout(0, L))
        place = (first + row)[:, None].to(gl.int64) * stride + column + col[None, :]
        gl.store(memory + place, tile.load(L), mask=(row < rows)[:, None])


@gluon.jit
def load_state(states, at, V: gl.constexpr, KT: gl.constexpr, FROM: gl.constexpr, ACC: gl.constexpr):
    """The two halves of a state along K, [64, 64] each; the second is unused where K is 64."""
    x0 = gl.zeros([64, 64], gl.float32, ACC)
    x1 = gl.zeros([64, 64], gl.float32, ACC)
    if FROM:
        x0 = gl.load(states + at)
        if KT == 2:
            x1 = gl.load(states + 64 * V + at)
    return x0, x1


@gluon.jit
def store_state(states, at, x0, x1, V: gl.constexpr, KT: gl.constexpr):
    gl.store(states + at, x0)
    if KT == 2:
        gl.store(states + 64 * V + at, x1)


@gluon.jit
def load_gates(gate_row, rate_row, first, end, L: gl.constexpr):
    """Of a chunk: the decay summed until and before each token, the rate, and the sum over the chunk."""
    row = gl.arange(0, 64, L)
    ok = first + row < end
    last = gl.load(gate_row + gl.maximum(gl.minimum(first + 64, end) - 1, 0))
    until = gl.load(gate_row + first + row, mask=ok, other=0.0)
    before = gl.load(gate_row + first + row - 1, mask=ok & (row > 0), other=0.0)
    rate = gl.load(rate_row + first + row, mask=ok, other=0.0)
    return gl.where(ok, until, last), gl.where(ok, before, last), rate, last, gl.where(ok, 1.0, 0.0)


@gluon.jit
def total_decay(gate_row, start, end, i):
    """The sum of the log2 decay over chunk i of a stretch."""
    return gl.load(gate_row + gl.minimum(start + i * 64 + 64, end) - 1)


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
    ends,
    y_memory,
    residual_memory,
    inside,
    decays,
    stretch_start,
    stretch_end,
    stretch_chunk,
    tokens,
    chunks,
    stretches,
    H,
    HV,
    scale,
    clip,
    K: gl.constexpr,
    V: gl.constexpr,
    FIRST: gl.constexpr,
    DELTA: gl.constexpr,
    TWO: gl.constexpr,
    GATED: gl.constexpr,
    DECAYED: gl.constexpr,
    CLIP: gl.constexpr,
    FROM: gl.constexpr,
    SAVE: gl.constexpr,
    MASK: gl.constexpr,
    ONLY: gl.constexpr,
):
    """One stream of `forward` in chunks of 64; q, k, x, tiles, saved, y and residual are descriptors.

    x is v for the first or only stream, the residual for the second. The first leaves the residual and its share of
    y; the second adds to that y. ONLY = END gives just the end states of the stretches, from zero, and their decays
    [2, stretches, HV]; ONLY = MAP the matrices [K, V = K] that take a stretch's start state to its end.
    """
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    TILE: gl.constexpr = q.layout
    KT: gl.constexpr = K // 64
    NV: gl.constexpr = V // 64
    # A state that adds is written without looking at what is in it.
    HAS_TILE: gl.constexpr = DELTA or (FIRST and not ONLY)
    ADDS: gl.constexpr = TWO and not FIRST and not ONLY
    BYTES: gl.constexpr = 8192 * (KT + (0 if ONLY == MAP else 1) + (1 if HAS_TILE else 0))
    QUERIES: gl.constexpr = 8192 * (KT + (1 if ADDS else 0))
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
    q_s = gl.allocate_shared_memory(dtype, [KT, 64, 64], TILE)
    x_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    l_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    state_s = gl.allocate_shared_memory(dtype, [KT, 64, 64], TILE)
    p_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    one = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    y_s = gl.allocate_shared_memory(dtype, [2 if ADDS else 1, 64, 64], TILE)
    if FIRST and not ONLY:
        left_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    until_s = gl.allocate_shared_memory(gl.float32, [1, 64], ROWS)
    before_s = gl.allocate_shared_memory(gl.float32, [1, 64], ROWS)
    rate_s = gl.allocate_shared_memory(gl.float32, [1, 64], ROWS)
    full = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for b in gl.static_range(3):
        mbarrier.init(full.index(b), count=1)
    barrier()

    at = ((STREAM * stretches.to(gl.int64) + s) * HV + hv) * (K * V) + i_v * 64 + row[:, None] * V + col[None, :]
    s0, s1 = load_state(starts, at, V, KT, FROM, ACC)
    gate_row = gates + hv.to(gl.int64) * tokens
    begin = 0
    if ONLY:
        # What has decayed by 2^-32 is nothing: the end state needs only the chunks after that.
        decay = 0.0
        begin = n
        while (begin > 0) & (decay > -32.0):
            begin -= 1
            decay += total_decay(gate_row, start, end, begin)
        gone = decay <= -32.0
        if ONLY == END and not DELTA:
            place = (STREAM * stretches.to(gl.int64) + s) * HV + hv
            gl.store(decays + place, gl.where(gone, 0.0, gl.exp2(decay)))
        if ONLY == MAP:
            begin = gl.where(gone, n, begin)
            unit = gl.where(gone, 0.0, 1.0)
            diagonal = gl.where(row[:, None] == col[None, :], unit, 0.0)
            if i_v == 0:
                s0 += diagonal
            else:
                s1 += diagonal
    rate_row = gate_row + (2 - FIRST) * (HV * tokens.to(gl.int64))
    tile_row = ((STREAM * HV + hv) * chunks + chunk) * 64
    save_row = ((STREAM * chunks + chunk) * HV + hv) * K
    key_col = hv // (HV // H) * K
    value_col = hv * V + i_v * 64

    some = begin < n
    entry = start + begin * 64
    mbarrier.expect(full.index(0), BYTES, pred=some)
    for j in gl.static_range(KT):
        tma.async_copy_global_to_shared(k, [entry, key_col + j * 64], full.index(0), k_s.index(j), pred=some)
    if ONLY != MAP:
        tma.async_copy_global_to_shared(x, [entry, value_col], full.index(0), x_s.index(0), pred=some)
    if HAS_TILE:
        tma.async_copy_global_to_shared(tiles, [tile_row + begin * 64, 0], full.index(0), l_s.index(0), pred=some)

    asked = full.index(2)
    if not ONLY:
        mbarrier.expect(asked, QUERIES, pred=some)
        for j in gl.static_range(KT):
            tma.async_copy_global_to_shared(q, [entry, key_col + j * 64], asked, q_s.index(j), pred=some)
        if ADDS:
            tma.async_copy_global_to_shared(y, [entry, value_col], asked, y_s.index(0), pred=some)

    entry_until, entry_before, entry_rate, last, _ = load_gates(gate_row, rate_row, entry, end, LINE)
    until_s.index(0).store(entry_until)
    before_s.index(0).store(entry_before)
    rate_s.index(0).store(entry_rate)
    for i in range(begin, n):
        par = (i - begin) & 1
        then = full.index(1 - par)
        more = i + 1 < n
        here = par * KT
        there = KT - here
        first = start + i * 64
        after = first + 64
        t = first + row
        rows = end - first
        whole = gl.exp2(last)

        o = opaque(0)
        state_s.index(o).store(s0.to(dtype))
        if KT == 2:
            state_s.index(o + 1).store(s1.to(dtype))
        if FIRST and not ONLY:
            tma.store_wait(1)
        publish()
        # Asked for here, to be there by the end of the chunk.
        next_until, next_before, next_rate, next_last, _ = load_gates(
            gate_row, rate_row, gl.where(more, after, first), end, LINE
        )
        # Every warp is past the last chunk here, so its keys' place is free.
        mbarrier.expect(then, BYTES, pred=more)
        for j in gl.static_range(KT):
            tma.async_copy_global_to_shared(k, [after, key_col + j * 64], then, k_s.index(there + j), pred=more)
        if SAVE:
            for j in gl.static_range(KT):
                tma.async_copy_shared_to_global(saved, [save_row + i * HV * K + j * 64, i_v * 64], state_s.index(j))
        mbarrier.wait(full.index(par), ((i - begin) >> 1) & 1)
        if not ONLY:
            mbarrier.wait(asked, (i - begin) & 1)
        if rows < 64:
            for j in gl.static_range(KT):
                keep_rows(k_s.index(here + j), rows, 4)
                if not ONLY:
                    keep_rows(q_s.index(j), rows, 4)
            if ONLY != MAP:
                keep_rows(x_s.index(0), rows, 4)
            publish()
        if HAS_TILE:
            seen = product(k_s, state_s, KT, ACC, here + o, o)
        if not ONLY:
            score = product(q_s, k_s, KT, ACC, o, here + o, B_T=True)
        until, before, rate = until_s.index(o).load(ROW), before_s.index(o).load(ROW), rate_s.index(o).load(ROW)
        grow, alpha = gl.exp2(until), gl.exp2(until - before)
        start_decay = gl.exp2(before)
        tail = gl.exp2(last - until)
        if HAS_TILE:
            seen = warpgroup_mma_wait(0 if ONLY else KT, deps=(seen,))
        if ONLY == MAP:
            work = -seen * grow[:, None]
        elif DELTA:
            work = x_s.index(o).load(ACC).to(gl.float32) - seen * grow[:, None]
        else:
            work = x_s.index(o).load(ACC).to(gl.float32) * rate[:, None]
        if HAS_TILE:
            one.index(o).store(work.to(dtype))
            publish()
            o = opaque(0)
            inner = warpgroup_mma(
                l_s.index(o), one.index(o), gl.zeros([64, 64], gl.float32, ACC), use_acc=False, is_async=True
            )
        if not ONLY:
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
            out = product(q_s, state_s, KT, ACC, o, o)
            if HAS_TILE:
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
                left = x_s.index(o).load(ACC).to(gl.float32) - seen
                if CLIP:
                    if MASK:
                        values = (t[:, None].to(gl.int64) * HV + hv) * V + i_v * 64 + col[None, :]
                        gl.store(inside + values, (gl.abs(left) <= clip).to(gl.int8), mask=(t < end)[:, None])
                    left = gl.minimum(gl.maximum(left, -clip), clip)
                left_s.index(o).store(left.to(dtype))
        elif HAS_TILE:
            inner = warpgroup_mma_wait(0, deps=(inner,))
        if DELTA:
            work = (work + inner * alpha[:, None]) * rate[:, None]
        if not ONLY:
            tma.store_wait(0)
        barrier()
        if HAS_TILE:
            tma.async_copy_global_to_shared(tiles, [tile_row + (i + 1) * 64, 0], then, l_s.index(0), pred=more)
        if ONLY != MAP:
            tma.async_copy_global_to_shared(x, [after, value_col], then, x_s.index(0), pred=more)
        if not ONLY:
            mbarrier.expect(asked, QUERIES, pred=more)
            for j in gl.static_range(KT):
                tma.async_copy_global_to_shared(q, [after, key_col + j * 64], asked, q_s.index(j), pred=more)
            if ADDS:
                tma.async_copy_global_to_shared(y, [after, value_col], asked, y_s.index(1 - par), pred=more)
        one.index(o).store(work.to(dtype))
        state_s.index(o).store((work * tail[:, None]).to(dtype))
        publish()
        o = opaque(0)
        if FIRST and not ONLY:
            put(left_s.index(o), residual, residual_memory, first, value_col, rows, HV * V, 64, 4)
        s0 = warpgroup_mma(k_s.index(here + o).permute((1, 0)), state_s.index(o), s0 * whole, is_async=True)
        if KT == 2:
            s1 = warpgroup_mma(k_s.index(here + o + 1).permute((1, 0)), state_s.index(o), s1 * whole, is_async=True)
        if ONLY:
            s0, s1 = warpgroup_mma_wait(0, deps=(s0, s1))
        else:
            out = warpgroup_mma(p_s.index(o), one.index(o), out, is_async=True)
            out, s0, s1 = warpgroup_mma_wait(0, deps=(out, s0, s1))
            out = out * scale
            if ADDS:
                if GATED:
                    out = out * rate[:, None]
                out += y_s.index(par).load(ACC).to(gl.float32)
                y_s.index(par).store(out.to(dtype))
            else:
                y_s.index(o).store(out.to(dtype))
            publish()
            o = opaque(0)
            put(y_s.index(par if ADDS else o), y, y_memory, first, value_col, rows, HV * V, 64, 4)
        until_s.index(0).store(next_until)
        before_s.index(0).store(next_before)
        rate_s.index(0).store(next_rate)
        last = next_last
    if not ONLY:
        tma.store_wait(0)
    store_state(ends, at, s0, s1, V, KT)


@gluon.jit(do_not_specialize=COUNTS)
def backward_stream(
    q,
    k,
    dy,
    tiles,
    pulled,
    gates,
    dends,
    dstarts,
    dresidual,
    inside,
    dx,
    stretch_start,
    stretch_end,
    stretch_chunk,
    tokens,
    chunks,
    stretches,
    H,
    HV,
    scale,
    K: gl.constexpr,
    V: gl.constexpr,
    FIRST: gl.constexpr,
    DELTA: gl.constexpr,
    TWO: gl.constexpr,
    GATED: gl.constexpr,
    DECAYED: gl.constexpr,
    CLIP: gl.constexpr,
    FROM: gl.constexpr,
    ONLY: gl.constexpr,
):
    """One stream of `backward_states` in chunks of 64; q, k, dy, tiles and pulled are descriptors of matrices.

    dx is the cotangent of what the stream was given: of the residual for the second stream, of v for the first, which
    reads the second's in `dresidual`, or for the only one. ONLY gives just the cotangents of the stretches' start
    states, as if there were none of their end states.
    """
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    TILE: gl.constexpr = q.layout
    KT: gl.constexpr = K // 64
    NV: gl.constexpr = V // 64
    HAS_TILE: gl.constexpr = DELTA or FIRST
    BYTES: gl.constexpr = 8192 * (2 * KT + 1 + (1 if HAS_TILE else 0))
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
    s0, s1 = load_state(dends, at, V, KT, FROM, ACC)
    gate_row = gates + hv.to(gl.int64) * tokens
    gate_plane = HV * tokens.to(gl.int64)
    tile_row = ((STREAM * HV + hv) * chunks + chunk) * 64
    save_row = ((STREAM * chunks + chunk) * HV + hv) * K
    key_col = hv // (HV // H) * K
    value_col = hv * V + i_v * 64

    if ONLY:
        # As in the forward: chunks behind a decay by 2^-32 give nothing to the start.
        decay = 0.0
        whole_stretch = n
        n = 0
        while (n < whole_stretch) & (decay > -32.0):
            decay += total_decay(gate_row, start, end, n)
            n += 1
    some = n > 0
    begin = start + (n - 1) * 64
    mbarrier.expect(full.index(0), BYTES, pred=some)
    for j in gl.static_range(KT):
        tma.async_copy_global_to_shared(k, [begin, key_col + j * 64], full.index(0), k_s.index(j), pred=some)
        tma.async_copy_global_to_shared(q, [begin, key_col + j * 64], full.index(0), q_s.index(j), pred=some)
    tma.async_copy_global_to_shared(dy, [begin, value_col], full.index(0), dy_s.index(0), pred=some)
    if HAS_TILE:
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
        tc = first + col
        last = gl.load(gate_row + gl.minimum(first + 64, end) - 1)
        until = gl.load(gate_row + t, mask=ok, other=0.0)
        before = gl.load(gate_row + t - 1, mask=ok & (row > 0), other=0.0)
        rate = gl.load(gate_row + (2 - FIRST) * gate_plane + t, mask=ok, other=0.0)
        rise_c = gl.load(gate_row + tc, mask=tc < end, other=0.0)
        if FIRST and not GATED:
            rise_c = gl.load(gate_row + tc - 1, mask=(tc < end) & (col > 0), other=0.0)

        o = opaque(0)
        state_s.index(o).store(s0.to(dtype))
        if KT == 2:
            state_s.index(o + 1).store(s1.to(dtype))
        publish()
        mbarrier.expect(then, BYTES, pred=more)
        for j in gl.static_range(KT):
            tma.async_copy_global_to_shared(k, [prior, key_col + j * 64], then, k_s.index(there + j), pred=more)
            tma.async_copy_global_to_shared(q, [prior, key_col + j * 64], then, q_s.index(there + j), pred=more)
        for j in gl.static_range(0 if ONLY else KT):
            tma.async_copy_shared_to_global(pulled, [save_row + i * HV * K + j * 64, i_v * 64], state_s.index(j))
        mbarrier.wait(full.index(par), (back >> 1) & 1)
        # Scores [j, i]: how much of what token j writes token i reads.
        score = product(k_s, q_s, KT, ACC, here + o, here + o, B_T=True)
        pull = product(k_s, state_s, KT, ACC, here + o, o)
        until = gl.where(ok, until, last)
        before = gl.where(ok, before, last)
        rise_c = gl.where(tc < end, rise_c, last)
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
        score = warpgroup_mma_wait(KT, deps=(score,))
        fade = gl.exp2(gl.minimum(rise_c[None, :] - until[:, None], 0.0))
        if FIRST:
            read_by = row[:, None] < col[None, :]
        else:
            read_by = row[:, None] <= col[None, :]
        p_s.index(o).store(gl.where(read_by, score * fade, 0.0).to(dtype))
        pull = warpgroup_mma_wait(0, deps=(pull,))
        pull = pull * tail[:, None]
        tma.store_wait(0)
        barrier()
        tma.async_copy_global_to_shared(dy, [prior, value_col], then, dy_s.index(0), pred=more)
        state_s.index(o).store((given * reads[:, None]).to(dtype))
        publish()
        o = opaque(0)
        pull = warpgroup_mma(p_s.index(o), one.index(o), pull, is_async=True)
        s0 = warpgroup_mma(q_s.index(here + o).permute((1, 0)), state_s.index(o), s0 * whole, is_async=True)
        if KT == 2:
            s1 = warpgroup_mma(q_s.index(here + o + 1).permute((1, 0)), state_s.index(o), s1 * whole, is_async=True)
        values = (t[:, None].to(gl.int64) * HV + hv) * V + i_v * 64 + col[None, :]
        if FIRST:
            passed = gl.load(dresidual + values, mask=ok[:, None], other=0.0).to(gl.float32)
            if CLIP:
                kept = gl.load(inside + values, mask=ok[:, None], other=0)
                passed = gl.where(kept != 0, passed, 0.0)
            dseen = -passed
            if DECAYED:
                dseen = dseen * alpha[:, None]
        pull, s0, s1 = warpgroup_mma_wait(0, deps=(pull, s0, s1))
        if DELTA or not FIRST:
            pull = pull * rate[:, None]
        if HAS_TILE:
            if FIRST:
                if DELTA:
                    work = pull * alpha[:, None] - dseen
                else:
                    work = dseen
            else:
                work = pull * alpha[:, None]
            barrier()
            one.index(o).store(work.to(dtype))
            publish()
            o = opaque(0)
            pull = warpgroup_mma(l_s.index(o).permute((1, 0)), one.index(o), pull, is_async=True)
            pull = warpgroup_mma_wait(0, deps=(pull,))
            if FIRST:
                if DELTA:
                    dread = dseen * start_decay[:, None] - pull * grow[:, None]
                else:
                    pull = pull * rate[:, None]
                    dread = dseen * start_decay[:, None]
            else:
                dread = -pull * grow[:, None]
            state_s.index(o).store(dread.to(dtype))
            publish()
            tma.async_copy_global_to_shared(tiles, [tile_row + (i - 1) * 64, 0], then, l_s.index(0), pred=more)
            s0 = warpgroup_mma(k_s.index(here + o).permute((1, 0)), state_s.index(o), s0, is_async=True)
            if KT == 2:
                s1 = warpgroup_mma(k_s.index(here + o + 1).permute((1, 0)), state_s.index(o), s1, is_async=True)
            if not ONLY:
                if FIRST:
                    pull = pull + passed
                gl.store(dx + values, pull.to(dtype), mask=ok[:, None])
            s0, s1 = warpgroup_mma_wait(0, deps=(s0, s1))
        elif not ONLY:
            gl.store(dx + values, pull.to(dtype), mask=ok[:, None])
    store_state(dstarts, at, s0, s1, V, KT)
