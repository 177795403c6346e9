"""What is token-parallel in the backward, on Hopper: the mathematics of `backward_tokens`, one stream a pass.

One warpgroup takes one chunk of one value head. First comes what the keys get, over the blocks of value columns, then
what the queries get, so that only one of the two gradients is in the registers at a time.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from whimbrel.scan.kernels.hopper import barrier, opaque, product, publish
from whimbrel.scan.kernels.prepare import COUNTS


@gluon.jit
def times(a, b, acc):
    """acc + a @ b^T, started but not waited for."""
    return warpgroup_mma(a, b.permute((1, 0)), acc, is_async=True)


@gluon.jit(do_not_specialize=COUNTS)
def backward_tokens_stream(
    q,
    k,
    x,
    dy,
    dx,
    tiles,
    saved,
    pulled,
    gates,
    dresidual,
    dq,
    dk,
    dlog,
    drate,
    chunk_start,
    chunk_end,
    tokens,
    chunks,
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
):
    """One stream of `backward_tokens` in chunks of 64; q, k, x, dy, dx, tiles, saved and pulled are descriptors.

    x is what the stream was given and dx its cotangent, both as in `forward_stream` and `backward_stream`. The second
    or only stream writes dq, dk and dlog, the first adds to them.
    """
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    COL: gl.constexpr = gl.SliceLayout(0, ACC)
    TILE: gl.constexpr = q.layout
    KT: gl.constexpr = K // 64
    NV: gl.constexpr = V // 64
    HAS_TILE: gl.constexpr = DELTA or FIRST
    STREAM: gl.constexpr = 0 if FIRST else 1
    dtype: gl.constexpr = q.dtype
    pid = gl.program_id(0)
    c, hv = pid // HV, pid % HV
    start = gl.load(chunk_start + c)
    end = gl.load(chunk_end + c)
    if end <= start:
        return
    k_s = gl.allocate_shared_memory(dtype, [KT, 64, 64], TILE)
    q_s = gl.allocate_shared_memory(dtype, [KT, 64, 64], TILE)
    state_s = gl.allocate_shared_memory(dtype, [KT, 64, 64], TILE)
    pull_s = gl.allocate_shared_memory(dtype, [KT, 64, 64], TILE)
    e_s = gl.allocate_shared_memory(dtype, [NV, 64, 64], TILE)
    # What the stream was given and its cotangent; in the second half dy, for one and for two blocks of columns.
    in_s = gl.allocate_shared_memory(dtype, [2, 64, 64], TILE)
    l_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    work_s = gl.allocate_shared_memory(dtype, [1, 64, 64], TILE)
    full = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for b in gl.static_range(3):
        mbarrier.init(full.index(b), count=1)
    barrier()
    common, some, late = full.index(0), full.index(1), full.index(2)

    key_col = hv // (HV // H) * K
    state_row = ((STREAM * chunks + c) * HV + hv) * K
    mbarrier.expect(common, 8192 * (KT + (1 if HAS_TILE else 0)))
    for j in gl.static_range(KT):
        tma.async_copy_global_to_shared(k, [start, key_col + j * 64], common, k_s.index(j))
    if HAS_TILE:
        tma.async_copy_global_to_shared(tiles, [((STREAM * HV + hv) * chunks + c) * 64, 0], common, l_s.index(0))

    row = gl.arange(0, 64, ROW)
    col = gl.arange(0, 64, COL)
    t = start + row
    ok = t < end
    tc = start + col
    gate_row = gates + hv.to(gl.int64) * tokens
    gate_plane = HV * tokens.to(gl.int64)
    last = gl.load(gate_row + gl.minimum(start + 64, end) - 1)
    until = gl.load(gate_row + t, mask=ok, other=0.0)
    before = gl.load(gate_row + t - 1, mask=ok & (row > 0), other=0.0)
    rate = gl.load(gate_row + (2 - FIRST) * gate_plane + t, mask=ok, other=0.0)
    until = gl.where(ok, until, last)
    before = gl.where(ok, before, last)

    zero = gl.zeros([64, 64], gl.float32, ACC)
    dk0, dk1, z = zero, zero, zero
    own = gl.zeros([64], gl.float32, ROW)
    own_seen, wrote = own, own
    whole_pair = gl.sum(own, axis=0)
    for i_v in gl.static_range(NV):
        barrier()
        mbarrier.expect(some, 8192 * (2 * KT + 2))
        value_col = hv * V + i_v * 64
        for j in gl.static_range(KT):
            tma.async_copy_global_to_shared(saved, [state_row + j * 64, i_v * 64], some, state_s.index(j))
        tma.async_copy_global_to_shared(x, [start, value_col], some, in_s.index(0))
        tma.async_copy_global_to_shared(dx, [start, value_col], some, in_s.index(1))
        for j in gl.static_range(KT):
            tma.async_copy_global_to_shared(pulled, [state_row + j * 64, i_v * 64], some, pull_s.index(j))
        if i_v == 0:
            mbarrier.expect(late, 8192 * KT)
            for j in gl.static_range(KT):
                tma.async_copy_global_to_shared(q, [start, key_col + j * 64], late, q_s.index(j))
            mbarrier.wait(common, 0)
        if FIRST:
            values = (t[:, None].to(gl.int64) * HV + hv) * V + i_v * 64 + col[None, :]
            dseen = -gl.load(dresidual + values, mask=ok[:, None], other=0.0).to(gl.float32)
        mbarrier.wait(some, i_v & 1)

        o = opaque(0)
        e = e_s.index(o + i_v)
        grow, alpha = gl.exp2(until), gl.exp2(until - before)
        if HAS_TILE:
            seen = product(k_s, state_s, KT, ACC, o, o)
            seen = warpgroup_mma_wait(0, deps=(seen,))
            work = in_s.index(o).load(ACC).to(gl.float32)
            if DELTA:
                work = work - seen * grow[:, None]
            else:
                work = work * rate[:, None]
            work_s.index(o).store(work.to(dtype))
            publish()
            inner = warpgroup_mma(l_s.index(o), work_s.index(o), zero, use_acc=False, is_async=True)
            inner = warpgroup_mma_wait(0, deps=(inner,))
        o = opaque(0)
        given = in_s.index(o).load(ACC).to(gl.float32)
        if DELTA:
            e.store((work + inner * alpha[:, None]).to(dtype))
        else:
            e.store(given.to(dtype))
        barrier()
        if FIRST:
            start_decay = gl.exp2(before)
            if DELTA:
                seen = seen * start_decay[:, None] - inner
            else:
                seen = seen * start_decay[:, None] + inner
            if CLIP:
                if DECAYED:
                    inside = gl.abs(given - seen * alpha[:, None]) <= clip
                else:
                    inside = gl.abs(given - seen) <= clip
                dseen = gl.where(inside, dseen, 0.0)
            derror = gl.where(ok[:, None], in_s.index(o + 1).load(ACC).to(gl.float32), 0.0) + dseen
            own -= gl.sum(given * derror, axis=1)
            if DECAYED:
                dseen = dseen * alpha[:, None]
            own_seen += gl.sum(seen * dseen, axis=1)
            barrier()
            if DELTA:
                work_s.index(o).store((dseen - derror * alpha[:, None]).to(dtype))
                in_s.index(o).store((dseen * start_decay[:, None] - derror * grow[:, None]).to(dtype))
            else:
                work_s.index(o).store(dseen.to(dtype))
                in_s.index(o).store((dseen * start_decay[:, None]).to(dtype))
            publish()
            o = opaque(0)
            z = times(work_s.index(o), e, z)
            dk0 = times(in_s.index(o), state_s.index(o), dk0)
            if KT == 2:
                dk1 = times(in_s.index(o), state_s.index(o + 1), dk1)
            z, dk0, dk1 = warpgroup_mma_wait(0, deps=(z, dk0, dk1))
        else:
            derror = gl.where(ok[:, None], in_s.index(o + 1).load(ACC).to(gl.float32), 0.0)
            own -= gl.sum(gl.where(ok[:, None], given * derror, 0.0), axis=1)
            if DELTA:
                work_s.index(o).store((-derror * grow[:, None]).to(dtype))
                publish()
                o = opaque(0)
                z = times(in_s.index(o + 1), e, z)
                dk0 = times(work_s.index(o), state_s.index(o), dk0)
                if KT == 2:
                    dk1 = times(work_s.index(o), state_s.index(o + 1), dk1)
                z, dk0, dk1 = warpgroup_mma_wait(0, deps=(z, dk0, dk1))
            else:
                publish()
        tail = gl.exp2(last - until)
        for j in gl.static_range(KT):
            o = opaque(j)
            written = times(e, pull_s.index(o), zero)
            pair = state_s.index(o).load(ACC).to(gl.float32) * pull_s.index(o).load(ACC).to(gl.float32)
            whole_pair += gl.sum(gl.sum(pair, axis=1), axis=0)
            written = warpgroup_mma_wait(0, deps=(written,))
            written = written * tail[:, None]
            wrote += gl.sum(written * k_s.index(o).load(ACC).to(gl.float32), axis=1)
            if j == 0:
                dk0 += written * rate[:, None]
            else:
                dk1 += written * rate[:, None]

    # The states of the last block of columns are still here; those of the first come again, with dy.
    barrier()
    mbarrier.expect(common, 8192 * NV)
    for i_v in gl.static_range(NV):
        tma.async_copy_global_to_shared(dy, [start, hv * V + i_v * 64], common, in_s.index(i_v))
    if NV == 2:
        mbarrier.expect(some, 8192 * KT)
        for j in gl.static_range(KT):
            tma.async_copy_global_to_shared(saved, [state_row + j * 64, 0], some, pull_s.index(j))
    ending = whole_pair * gl.exp2(last) + gl.sum(wrote * rate, axis=0)
    until_c = gl.load(gate_row + tc, mask=tc < end, other=0.0)
    until_c = gl.where(tc < end, until_c, last)
    rate_c = gl.load(gate_row + (2 - FIRST) * gate_plane + tc, mask=tc < end, other=0.0)
    lower = (row[:, None] > col[None, :]) & ok[:, None]
    drate_c = gl.zeros([64], gl.float32, COL)
    o = opaque(0)
    if HAS_TILE:
        scores = product(k_s, k_s, KT, ACC, o, o, B_T=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        if FIRST:
            z = gl.where(lower, z * gl.exp2(gl.minimum(before[:, None] - until_c[None, :], 0.0)), 0.0)
        else:
            z = gl.where(lower, -z * gl.exp2(gl.minimum(until[:, None] - until_c[None, :], 0.0)), 0.0)
        drate_c += gl.sum(z * scores, axis=0)
        work_s.index(o).store((z * rate_c[None, :]).to(dtype))
        publish()
        o = opaque(0)
        flipped = work_s.index(o).permute((1, 0))
        dk0 = warpgroup_mma(work_s.index(o), k_s.index(o), dk0, is_async=True)
        dk0 = warpgroup_mma(flipped, k_s.index(o), dk0, is_async=True)
        if KT == 2:
            dk1 = warpgroup_mma(work_s.index(o), k_s.index(o + 1), dk1, is_async=True)
            dk1 = warpgroup_mma(flipped, k_s.index(o + 1), dk1, is_async=True)
        dk0, dk1 = warpgroup_mma_wait(0, deps=(dk0, dk1))
    mbarrier.wait(late, 0)
    mbarrier.wait(common, 1)
    o = opaque(0)
    scores = product(q_s, k_s, KT, ACC, o, o, B_T=True)
    z = product(in_s, e_s, NV, ACC, o, o, B_T=True)
    scores, z = warpgroup_mma_wait(0, deps=(scores, z))
    if FIRST and not GATED:
        fade = gl.exp2(gl.minimum(before[:, None] - until_c[None, :], 0.0))
    else:
        fade = gl.exp2(gl.minimum(until[:, None] - until_c[None, :], 0.0))
    if FIRST:
        z = gl.where(lower, z * fade, 0.0)
    else:
        z = gl.where((row[:, None] >= col[None, :]) & ok[:, None], z * fade, 0.0)
    # <dy, what the output takes from this stream>, without the output's own weight.
    read = gl.sum(z * scores * rate_c[None, :], axis=1)
    if TWO and GATED and not FIRST:
        z = z * rate[:, None]
    drate_c += gl.sum(z * scores, axis=0) * scale
    barrier()
    work_s.index(o).store((z * (rate_c * scale)[None, :]).to(dtype))
    publish()
    o = opaque(0)
    flipped = work_s.index(o).permute((1, 0))
    dk0 = warpgroup_mma(flipped, q_s.index(o), dk0, is_async=True)
    if KT == 2:
        dk1 = warpgroup_mma(flipped, q_s.index(o + 1), dk1, is_async=True)
    dk0, dk1 = warpgroup_mma_wait(0, deps=(dk0, dk1))
    at = (t[:, None].to(gl.int64) * HV + hv) * K + col[None, :]
    if FIRST:
        dk0 += gl.load(dk + at, mask=ok[:, None], other=0.0).to(gl.float32)
    gl.store(dk + at, dk0.to(dk.dtype.element_ty), mask=ok[:, None])
    if KT == 2:
        if FIRST:
            dk1 += gl.load(dk + at + 64, mask=ok[:, None], other=0.0).to(gl.float32)
        gl.store(dk + at + 64, dk1.to(dk.dtype.element_ty), mask=ok[:, None])

    if FIRST and not GATED:
        reads = gl.exp2(before)
    else:
        reads = gl.exp2(until)
    if NV == 2:
        mbarrier.wait(some, 0)
    for j in gl.static_range(KT):
        o = opaque(0)
        half = times(in_s.index(o + NV - 1), state_s.index(o + j), zero)
        if NV == 2:
            half = times(in_s.index(o), pull_s.index(o + j), half)
        half = warpgroup_mma_wait(0, deps=(half,))
        half = half * reads[:, None]
        queries = q_s.index(o + j).load(ACC).to(gl.float32)
        read += gl.sum(half * queries, axis=1)
        half = half * scale
        if TWO and GATED and not FIRST:
            half = half * rate[:, None]
        half = warpgroup_mma(work_s.index(o), k_s.index(o + j), half, is_async=True)
        half = warpgroup_mma_wait(0, deps=(half,))
        own += gl.sum(half * queries, axis=1)
        if FIRST:
            half += gl.load(dq + at + j * 64, mask=ok[:, None], other=0.0).to(gl.float32)
        gl.store(dq + at + j * 64, half.to(dq.dtype.element_ty), mask=ok[:, None])

    # Sums of everything from the token on; of the predictions at the key, from the next token on.
    own_c = gl.convert_layout(gl.where(ok, own, 0.0), COL)
    later = gl.where(col[None, :] >= row[:, None], own_c[None, :], 0.0)
    if FIRST:
        seen_c = gl.convert_layout(gl.where(ok, own_seen, 0.0), COL)
        later += gl.where(col[None, :] > row[:, None], seen_c[None, :], 0.0)
    total = gl.sum(later, axis=1) + ending
    place = t.to(gl.int64) * HV + hv
    if FIRST:
        if DECAYED:
            total += own_seen
        if not GATED:
            total -= read * scale
        total += gl.load(dlog + place, mask=ok, other=0.0)
    gl.store(dlog + place, total, mask=ok)
    wrote += gl.convert_layout(drate_c, ROW)
    if TWO and GATED and not FIRST:
        wrote += read * scale
    gl.store(drate + place, wrote, mask=ok)
