"""Where a stretch's states end by the delta rule, on Hopper, in Gluon: what is needed to hand a state on.

Less of a chunk is needed than in `hopper_forward`, so that three programs share a multiprocessor.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from whimbrel.scan.kernels.hopper import (
    NOTHING,
    ROWS,
    barrier,
    count_chunks,
    keep_rows,
    load_gates,
    opaque,
    product,
    publish,
    store_state,
    widen,
)
from whimbrel.scan.kernels.prepare import COUNTS


@gluon.jit(do_not_specialize=COUNTS)
def stretch_ends(
    k,
    x,
    tiles,
    gates,
    local,
    carried,
    stretch_start,
    stretch_end,
    stretch_chunk,
    tokens,
    chunks,
    stretches,
    H,
    HV,
    K: gl.constexpr,
    V: gl.constexpr,
    FIRST: gl.constexpr,
    TWO: gl.constexpr,
    MAPS: gl.constexpr,
):
    """Of one stream of every stretch, in chunks of 64: its end state from a start of zero, to `local`.

    k, x and tiles are descriptors of [64, 64] blocks; x is what the stream was given. With MAPS `carried`
    [2, stretches, HV, K, K] gets the matrices that take a start to its end, of this stream, or with TWO of both, which
    do not depend on values. Grid (stretches * HV * (V + maps * K) / 64,).
    """
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    TILE: gl.constexpr = k.layout
    KT: gl.constexpr = K // 64
    NV: gl.constexpr = V // 64
    dtype: gl.constexpr = k.dtype
    k_s = gl.allocate_shared_memory(dtype, [2 * KT, 64, 64], TILE)
    x_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    state_s = gl.allocate_shared_memory(dtype, [KT, 64, 64], TILE)
    l_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    one_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    until_s = gl.allocate_shared_memory(gl.float32, [1, 64], ROWS)
    before_s = gl.allocate_shared_memory(gl.float32, [1, 64], ROWS)
    rate_s = gl.allocate_shared_memory(gl.float32, [1, 64], ROWS)
    full = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for b in gl.static_range(3):
        mbarrier.init(full.index(b), count=1)
    barrier()
    own = full.index(2)

    pid = gl.program_id(0)
    ends = stretches * HV * NV
    values = pid < ends
    stream = 0 if FIRST else 1
    place = pid
    wide = NV
    if MAPS:
        rest = gl.maximum(pid - ends, 0)
        maps = stretches * HV * KT
        place = gl.where(values, pid, rest % maps)
        wide = gl.where(values, NV, KT)
        if TWO:
            stream = gl.where(values, stream, rest // maps)
    part, hv, s = place % wide, (place // wide) % HV, place // (wide * HV)
    start = gl.load(stretch_start + s)
    end = gl.load(stretch_end + s)
    chunk = gl.load(stretch_chunk + s)
    n = gl.cdiv(end - start, 64)
    row = gl.arange(0, 64, ROW)
    col = gl.arange(0, 64, gl.SliceLayout(0, ACC))
    gate_row = gates + hv.to(gl.int64) * tokens
    rate_row = gate_row + (1 + stream) * (HV * tokens.to(gl.int64))
    tile_row = ((stream * HV + hv) * chunks + chunk) * 64
    key_col = hv // (HV // H) * K
    value_col = hv * V + part * 64
    owner = (stream * stretches.to(gl.int64) + s) * HV + hv

    # The end state needs only the chunks after what has decayed to nothing.
    count, decay = count_chunks(gate_row, start, end, n, False)
    begin = n - count
    gone = decay <= NOTHING
    s0 = gl.zeros([64, 64], gl.float32, ACC)
    s1 = gl.zeros([64, 64], gl.float32, ACC)
    if MAPS:
        begin = gl.where(gone & (pid >= ends), n, begin)
        unit = gl.where(gone | values, 0.0, 1.0)
        diagonal = gl.where(row[:, None] == col[None, :], unit, 0.0)
        s0 += gl.where(part == 0, diagonal, 0.0)
        s1 += gl.where(part == 1, diagonal, 0.0)

    some = begin < n
    entry = start + begin * 64
    mbarrier.expect(full.index(0), 8192 * KT, pred=some)
    for j in gl.static_range(KT):
        tma.async_copy_global_to_shared(k, [entry, key_col + j * 64], full.index(0), k_s.index(j), pred=some)
    # A program of a matrix reads some values too, and makes nothing of them.
    mbarrier.expect(own, 16384, pred=some)
    tma.async_copy_global_to_shared(x, [entry, value_col], own, x_s.index(0), pred=some)
    tma.async_copy_global_to_shared(tiles, [tile_row + begin * 64, 0], own, l_s.index(0), pred=some)
    entry_until, entry_before, entry_rate, last, _ = load_gates(gate_row, rate_row, entry, end, LINE)
    until_s.index(0).store(entry_until)
    before_s.index(0).store(entry_before)
    rate_s.index(0).store(entry_rate)
    for i in range(begin, n):
        c = i - begin
        slot = c & 1
        more = i + 1 < n
        here = slot * KT
        first = start + i * 64
        after = first + 64
        rows = end - first
        whole = gl.exp2(last)
        o = opaque(0)
        state_s.index(o).store(s0.to(dtype))
        if KT == 2:
            state_s.index(o + 1).store(s1.to(dtype))
        publish()
        # Asked for here, to be there by the end of the chunk.
        next_until, next_before, next_rate, next_last, _ = load_gates(
            gate_row, rate_row, gl.where(more, after, first), end, LINE
        )
        # Every warp is past the last chunk here, so its keys' slot is free.
        mbarrier.expect(full.index(1 - slot), 8192 * KT, pred=more)
        for j in gl.static_range(KT):
            tma.async_copy_global_to_shared(
                k, [after, key_col + j * 64], full.index(1 - slot), k_s.index(KT - here + j), pred=more
            )
        mbarrier.wait(full.index(slot), (c >> 1) & 1)
        mbarrier.wait(own, slot)
        if rows < 64:
            for j in gl.static_range(KT):
                keep_rows(k_s.index(here + j), rows, 4)
            keep_rows(x_s.index(0), rows, 4)
            publish()
        seen = product(k_s, state_s, KT, ACC, here + o, o)
        until, before, rate = until_s.index(o).load(ROW), before_s.index(o).load(ROW), rate_s.index(o).load(ROW)
        work = widen(x_s.index(o).load(ACC))
        if MAPS:
            work = gl.where(values, work, 0.0)
        seen = warpgroup_mma_wait(0, deps=(seen,))
        work = work - seen * gl.exp2(until)[:, None]
        one_s.index(o).store(work.to(dtype))
        publish()
        o = opaque(0)
        inner = warpgroup_mma(
            l_s.index(o), one_s.index(o), gl.zeros([64, 64], gl.float32, ACC), use_acc=False, is_async=True
        )
        inner = warpgroup_mma_wait(0, deps=(inner,))
        work = work + inner * gl.exp2(until - before)[:, None]
        state_s.index(o).store((work * (rate * gl.exp2(last - until))[:, None]).to(dtype))
        publish()
        o = opaque(0)
        mbarrier.expect(own, 16384, pred=more)
        tma.async_copy_global_to_shared(x, [after, value_col], own, x_s.index(0), pred=more)
        tma.async_copy_global_to_shared(tiles, [tile_row + (i + 1) * 64, 0], own, l_s.index(0), pred=more)
        s0 = warpgroup_mma(k_s.index(here + o).permute((1, 0)), state_s.index(o), s0 * whole, is_async=True)
        if KT == 2:
            s1 = warpgroup_mma(k_s.index(here + o + 1).permute((1, 0)), state_s.index(o), s1 * whole, is_async=True)
        until_s.index(0).store(next_until)
        before_s.index(0).store(next_before)
        rate_s.index(0).store(next_rate)
        last = next_last
        s0, s1 = warpgroup_mma_wait(0, deps=(s0, s1))
    if MAPS:
        if values:
            store_state(local, owner * (K * V) + part * 64 + row[:, None] * V + col[None, :], s0, s1, V, KT)
        else:
            store_state(carried, owner * (K * K) + part * 64 + row[:, None] * K + col[None, :], s0, s1, K, KT)
    else:
        store_state(local, owner * (K * V) + part * 64 + row[:, None] * V + col[None, :], s0, s1, V, KT)
