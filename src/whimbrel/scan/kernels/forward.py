"""The states go through the chunks: one program per stretch of a sequence, value head and block of value columns.

Few value columns a program keep both states and what a chunk needs of them in registers; tokens are rows, so that a
gate is one value a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from whimbrel.scan.kernels.prepare import COUNTS


@triton.jit
def chunk_gates(gates, hv, HV, tokens, t, start, end, TWO: tl.constexpr):
    """Gates of one chunk: sums of log2 decay up to each token (with, without it), at the end; both rates."""
    ok = t < end
    row = gates + hv.to(tl.int64) * tokens + t
    plane = HV * tokens.to(tl.int64)
    last = tl.load(gates + hv.to(tl.int64) * tokens + tl.minimum(start + t.shape[0], end) - 1)
    until = tl.load(row, mask=ok, other=0.0)
    until = tl.where(ok, until, last)
    before = tl.load(row - 1, mask=ok & (t > start), other=0.0)
    before = tl.where(ok, before, last)
    rate2 = tl.load(row + 2 * plane, mask=ok, other=0.0)
    if TWO:
        rate1 = tl.load(row + plane, mask=ok, other=0.0)
    else:
        rate1 = rate2
    return until, before, last, rate1, rate2


@triton.jit(do_not_specialize=COUNTS)
def forward(
    q,
    k,
    v,
    gates,
    tiles,
    starts,
    ends,
    y,
    inside,
    saved,
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
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DELTA: tl.constexpr,
    TWO: tl.constexpr,
    GATED: tl.constexpr,
    DECAYED: tl.constexpr,
    CLIP: tl.constexpr,
    FROM: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y [tokens, HV, V]; starts, ends [2, stretches, HV, K, V] fp32; saved [2, chunks, HV, K, V]; inside as y."""
    pid = tl.program_id(0)
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v, hv, s = pid % NV, (pid // NV) % HV, pid // (NV * HV)
    start = tl.load(stretch_start + s).to(tl.int64)
    end = tl.load(stretch_end + s).to(tl.int64)
    chunk = tl.load(stretch_chunk + s).to(tl.int64)
    dtype: tl.constexpr = q.dtype.element_ty
    place = tl.arange(0, C)
    kc = tl.arange(0, BK)
    vc = i_v * BV + tl.arange(0, BV)
    kv = (kc[:, None] < K) & (vc[None, :] < V)
    h = hv // (HV // H)
    state = (s.to(tl.int64) * HV + hv) * K * V + kc[:, None] * V + vc[None, :]
    plane = stretches.to(tl.int64) * HV * K * V
    b_r = tl.zeros([BK, BV], tl.float32)
    b_s = tl.zeros([BK, BV], tl.float32)
    if FROM:
        b_r = tl.load(starts + plane + state, mask=kv, other=0.0)
        if TWO:
            b_s = tl.load(starts + state, mask=kv, other=0.0)
    save = saved + (chunk * HV + hv) * K * V + kc[:, None] * V + vc[None, :]
    save_plane = chunks.to(tl.int64) * HV * K * V
    tile = tiles + (hv.to(tl.int64) * chunks + chunk) * C * C + place[:, None] * C + place[None, :]
    tile_plane = HV * chunks.to(tl.int64) * C * C
    for i in range(tl.cdiv(end - start, C)):
        first = start + i * C
        t = first + place
        ok = t < end
        keys = (t[:, None] * H + h) * K + kc[None, :]
        b_k = tl.load(k + keys, mask=ok[:, None] & (kc[None, :] < K), other=0.0)
        b_q = tl.load(q + keys, mask=ok[:, None] & (kc[None, :] < K), other=0.0)
        until, before, last, rate1, rate2 = chunk_gates(gates, hv, HV, tokens, t, first, end, TWO)
        grow, whole = tl.exp2(until), tl.exp2(last)
        alpha, tail = tl.exp2(until - before), tl.exp2(last - until)
        values = (t[:, None] * HV + hv) * V + vc[None, :]
        some = ok[:, None] & (vc[None, :] < V)
        b_v = tl.load(v + values, mask=some, other=0.0).to(tl.float32)
        score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        weight = tl.where(place[:, None] >= place[None, :], score, 0.0)
        weight = weight * tl.exp2(tl.minimum(until[:, None] - until[None, :], 0.0))
        reads = grow
        if TWO:
            b_l = tl.load(tile + i * C * C)
            old = b_s.to(dtype)
            if SAVE:
                tl.store(save + i * HV * K * V, old, mask=kv)
            seen = tl.dot(b_k, old, input_precision=PRECISION)
            start_decay = tl.exp2(before)
            if DELTA:
                write = b_v - seen * grow[:, None]
                inner = -tl.dot(b_l, write.to(dtype), input_precision=PRECISION)
                write = (write - alpha[:, None] * inner) * rate1[:, None]
            else:
                write = b_v * rate1[:, None]
                inner = tl.dot(b_l, write.to(dtype), input_precision=PRECISION)
            seen = seen * start_decay[:, None] + inner
            if DECAYED:
                seen = seen * alpha[:, None]
            b_v = b_v - seen
            if CLIP:
                if SAVE:
                    tl.store(inside + values, (tl.abs(b_v) <= clip).to(tl.int8), mask=some)
                b_v = tl.minimum(tl.maximum(b_v, -clip), clip)
            if GATED:
                past = tl.where(place[:, None] > place[None, :], weight, 0.0)
                out = tl.dot(b_q, old, input_precision=PRECISION) * grow[:, None]
                # The second read's factor goes into its scores, so that both reads share one accumulator.
                weight = weight * rate2[:, None]
                reads = grow * rate2
            else:
                past = tl.where(place[:, None] > place[None, :], score, 0.0)
                past = past * tl.exp2(tl.minimum(before[:, None] - until[None, :], 0.0))
                out = tl.dot(b_q, old, input_precision=PRECISION) * start_decay[:, None]
            out = tl.dot(past.to(dtype), write.to(dtype), out, input_precision=PRECISION)
            b_s = tl.dot(tl.trans(b_k), (write * tail[:, None]).to(dtype), b_s * whole, input_precision=PRECISION)
        old = b_r.to(dtype)
        if SAVE:
            tl.store(save + i * HV * K * V + save_plane, old, mask=kv)
        if DELTA:
            b_v = b_v - tl.dot(b_k, old, input_precision=PRECISION) * grow[:, None]
            b_l2 = tl.load(tile + tile_plane + i * C * C)
            b_v = b_v + alpha[:, None] * tl.dot(b_l2, b_v.to(dtype), input_precision=PRECISION)
        b_v = b_v * rate2[:, None]
        read = tl.dot(b_q, old, input_precision=PRECISION) * reads[:, None]
        if TWO:
            read = read + out
        read = tl.dot(weight.to(dtype), b_v.to(dtype), read, input_precision=PRECISION)
        tl.store(y + values, (read * scale).to(dtype), mask=some)
        b_r = tl.dot(tl.trans(b_k), (b_v * tail[:, None]).to(dtype), b_r * whole, input_precision=PRECISION)
    tl.store(ends + plane + state, b_r, mask=kv)
    if TWO:
        tl.store(ends + state, b_s, mask=kv)
