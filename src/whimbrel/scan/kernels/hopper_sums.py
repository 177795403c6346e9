"""What stretches ask of one another where states add, on Hopper, in Gluon: sums over their tokens, without a walk.

The end of a stretch from a start of zero is the sum of what its tokens write, and the cotangent of its start, as if
nothing came of its end, the sum of what they ask for; each with the decay on its way.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from whimbrel.scan.kernels.hopper import (
    NOTHING,
    barrier,
    count_chunks,
    keep_rows,
    opaque,
    publish,
    store_state,
    widen,
)
from whimbrel.scan.kernels.prepare import COUNTS


@gluon.jit
def read_gates(gate_row, rate_row, first, end, L: gl.constexpr):
    """As `load_gates`, of the chunk at `first`, but for what tells which rows there are."""
    row = gl.arange(0, 64, L)
    ok = first + row < end
    last = gl.load(gate_row + gl.minimum(first + 64, end) - 1)
    until = gl.load(gate_row + first + row, mask=ok, other=0.0)
    before = gl.load(gate_row + first + row - 1, mask=ok & (row > 0), other=0.0)
    rate = gl.load(rate_row + first + row, mask=ok, other=0.0)
    return gl.where(ok, until, last), gl.where(ok, before, last), rate, last


@gluon.jit(do_not_specialize=COUNTS)
def stretch_sums(
    a,
    x,
    b,
    z,
    gates,
    sums,
    carried,
    stretch_start,
    stretch_end,
    tokens,
    stretches,
    H,
    HV,
    scale,
    K: gl.constexpr,
    V: gl.constexpr,
    FIRST: gl.constexpr,
    TWO: gl.constexpr,
    GATED: gl.constexpr,
    DECAYED: gl.constexpr,
    BACK: gl.constexpr,
):
    """Of one stream of every stretch, in chunks of 64, to `sums`; grid (stretches * HV * V / 64,) of one warpgroup.

    a, x, b and z are descriptors of [64, 64] blocks. Ends: a are the keys, x what the stream was given, and `carried`
    [2, stretches, HV] gets the decays of the stretches. With BACK starts' cotangents: a are the queries, x is dy, and
    for the first stream b are the keys and z the cotangent of what was read with them.
    """
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    TILE: gl.constexpr = a.layout
    KT: gl.constexpr = K // 64
    NV: gl.constexpr = V // 64
    PAIR: gl.constexpr = BACK and FIRST
    STAGES: gl.constexpr = 2 if PAIR else 4
    BYTES: gl.constexpr = 8192 * (KT + 1) * (2 if PAIR else 1)
    dtype: gl.constexpr = a.dtype
    pid = gl.program_id(0)
    part, hv, s = pid % NV, (pid // NV) % HV, pid // (NV * HV)
    start = gl.load(stretch_start + s)
    end = gl.load(stretch_end + s)
    n = gl.cdiv(end - start, 64)
    gate_row = gates + hv.to(gl.int64) * tokens
    rate_row = gate_row + (2 - FIRST) * (HV * tokens.to(gl.int64))
    key_col = hv // (HV // H) * K
    value_col = hv * V + part * 64
    owner = ((0 if FIRST else 1) * stretches.to(gl.int64) + s) * HV + hv

    a_s = gl.allocate_shared_memory(dtype, [STAGES * KT, 64, 64], TILE)
    x_s = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], TILE)
    if PAIR:
        b_s = gl.allocate_shared_memory(dtype, [STAGES * KT, 64, 64], TILE)
        z_s = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], TILE)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for p in gl.static_range(STAGES):
        mbarrier.init(full.index(p), count=1)
    barrier()

    count, decay = count_chunks(gate_row, start, end, n, BACK)
    if not BACK:
        gl.store(carried + owner, gl.where(decay <= NOTHING, 0.0, gl.exp2(decay)))
    step = -64 if BACK else 64
    begin = start + (count - 1 if BACK else n - count) * 64
    for p in gl.static_range(STAGES - 1):
        some = p < count
        mbarrier.expect(full.index(p), BYTES, pred=some)
        for j in gl.static_range(KT):
            spot = [begin + p * step, key_col + j * 64]
            tma.async_copy_global_to_shared(a, spot, full.index(p), a_s.index(p * KT + j), pred=some)
            if PAIR:
                tma.async_copy_global_to_shared(b, spot, full.index(p), b_s.index(p * KT + j), pred=some)
        tma.async_copy_global_to_shared(x, [begin + p * step, value_col], full.index(p), x_s.index(p), pred=some)
        if PAIR:
            tma.async_copy_global_to_shared(z, [begin + p * step, value_col], full.index(p), z_s.index(p), pred=some)
    until, before, rate, last = read_gates(gate_row, rate_row, gl.maximum(begin, start), end, ROW)
    s0 = gl.zeros([64, 64], gl.float32, ACC)
    s1 = gl.zeros([64, 64], gl.float32, ACC)
    for c in range(count):
        slot = c % STAGES
        here = slot * KT
        first = begin + c * step
        rows = end - first
        mbarrier.wait(full.index(slot), (c // STAGES) & 1)
        if rows < 64:
            for j in gl.static_range(KT):
                keep_rows(a_s.index(here + j), rows, 4)
                if PAIR:
                    keep_rows(b_s.index(here + j), rows, 4)
            keep_rows(x_s.index(slot), rows, 4)
            if PAIR:
                keep_rows(z_s.index(slot), rows, 4)
            barrier()
        whole = gl.exp2(last)
        if BACK:
            weight = scale * gl.exp2(before if FIRST and not GATED else until)
            if TWO and GATED and not FIRST:
                weight = weight * rate
        else:
            weight = rate * gl.exp2(last - until)
        x_s.index(slot).store((widen(x_s.index(slot).load(ACC)) * weight[:, None]).to(dtype))
        if PAIR:
            weight = gl.exp2(until if DECAYED else before)
            z_s.index(slot).store((widen(z_s.index(slot).load(ACC)) * weight[:, None]).to(dtype))
        publish()
        # Every warp is past the last chunk's products here, so its place is free.
        o = opaque(0)
        later = c + STAGES - 1 < count
        free = (c + STAGES - 1) % STAGES
        spot_row = first + (STAGES - 1) * step
        mbarrier.expect(full.index(free), BYTES, pred=later)
        for j in gl.static_range(KT):
            spot = [spot_row, key_col + j * 64]
            tma.async_copy_global_to_shared(a, spot, full.index(free), a_s.index(free * KT + j), pred=later)
            if PAIR:
                tma.async_copy_global_to_shared(b, spot, full.index(free), b_s.index(free * KT + j), pred=later)
        tma.async_copy_global_to_shared(x, [spot_row, value_col], full.index(free), x_s.index(free), pred=later)
        if PAIR:
            tma.async_copy_global_to_shared(z, [spot_row, value_col], full.index(free), z_s.index(free), pred=later)
        s0 = warpgroup_mma(a_s.index(here + o).permute((1, 0)), x_s.index(slot), s0 * whole, is_async=True)
        if KT == 2:
            s1 = warpgroup_mma(a_s.index(here + o + 1).permute((1, 0)), x_s.index(slot), s1 * whole, is_async=True)
        if PAIR:
            s0 = warpgroup_mma(b_s.index(here + o).permute((1, 0)), z_s.index(slot), s0, is_async=True)
            if KT == 2:
                s1 = warpgroup_mma(b_s.index(here + o + 1).permute((1, 0)), z_s.index(slot), s1, is_async=True)
        until, before, rate, last = read_gates(
            gate_row, rate_row, gl.where(c + 1 < count, first + step, first), end, ROW
        )
        s0, s1 = warpgroup_mma_wait(0, deps=(s0, s1))
    row, col = gl.arange(0, 64, ROW), gl.arange(0, 64, gl.SliceLayout(0, ACC))
    store_state(sums, owner * (K * V) + part * 64 + row[:, None] * V + col[None, :], s0, s1, V, KT)
