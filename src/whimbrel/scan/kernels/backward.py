"""Cotangents: one sweep of the states' from the last chunk to the first, then all that is token-parallel.

The sweep leaves dv, the cotangent `dr` of the second stream's error and the cotangents of the states at the end of
every chunk; the second kernel rebuilds the streams from the saved states and forms the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from whimbrel.scan.kernels.forward import chunk_gates
from whimbrel.scan.kernels.prepare import COUNTS


@triton.jit(do_not_specialize=COUNTS)
def backward_states(
    q,
    k,
    dy,
    gates,
    tiles,
    inside,
    dends,
    dstarts,
    dv,
    dr,
    pulled,
    stretch_start,
    stretch_end,
    stretch_chunk,
    tokens,
    chunks,
    stretches,
    H,
    HV,
    scale,
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
    PRECISION: tl.constexpr,
):
    """dends, dstarts as the forward's ends and starts; dv, dr as v; pulled as saved, at the chunks' ends."""
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
    b_dr = tl.zeros([BK, BV], tl.float32)
    b_ds = tl.zeros([BK, BV], tl.float32)
    if FROM:
        b_dr = tl.load(dends + plane + state, mask=kv, other=0.0)
        if TWO:
            b_ds = tl.load(dends + state, mask=kv, other=0.0)
    save = pulled + (chunk * HV + hv) * K * V + kc[:, None] * V + vc[None, :]
    save_plane = chunks.to(tl.int64) * HV * K * V
    tile = tiles + (hv.to(tl.int64) * chunks + chunk) * C * C + place[:, None] * C + place[None, :]
    tile_plane = HV * chunks.to(tl.int64) * C * C
    n = tl.cdiv(end - start, C)
    for back in range(n):
        i = n - 1 - back
        first = start + i * C
        t = first + place
        ok = t < end
        keys = (t[:, None] * H + h) * K + kc[None, :]
        b_k = tl.load(k + keys, mask=ok[:, None] & (kc[None, :] < K), other=0.0)
        b_q = tl.load(q + keys, mask=ok[:, None] & (kc[None, :] < K), other=0.0)
        values = (t[:, None] * HV + hv) * V + vc[None, :]
        some = ok[:, None] & (vc[None, :] < V)
        # In the inputs' dtype; the scale joins where it is multiplied by something else anyhow.
        b_dy = tl.load(dy + values, mask=some, other=0.0)
        until, before, last, rate1, rate2 = chunk_gates(gates, hv, HV, tokens, t, first, end, TWO)
        grow, whole = tl.exp2(until) * scale, tl.exp2(last)
        decay = tl.exp2(until)
        alpha, tail = tl.exp2(until - before), tl.exp2(last - until)
        # Scores [j, i]: how much of what token j writes token i reads.
        score = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale
        weight = tl.where(place[:, None] <= place[None, :], score, 0.0)
        weight = weight * tl.exp2(tl.minimum(until[None, :] - until[:, None], 0.0))
        reads = grow
        if TWO:
            if GATED:
                past = tl.where(place[:, None] < place[None, :], weight, 0.0).to(dtype)
                weight = weight * rate2[None, :]
                reads = grow * rate2
            else:
                past = tl.where(place[:, None] < place[None, :], score, 0.0)
                past = (past * tl.exp2(tl.minimum(before[None, :] - until[:, None], 0.0))).to(dtype)

        now = b_dr.to(dtype)
        tl.store(save + i * HV * K * V + save_plane, now, mask=kv)
        pull = tl.dot(b_k, now, input_precision=PRECISION) * tail[:, None]
        pull = tl.dot(weight.to(dtype), b_dy, pull, input_precision=PRECISION) * rate2[:, None]
        dread = (b_dy.to(tl.float32) * reads[:, None]).to(dtype)
        b_dr = tl.dot(tl.trans(b_q), dread, b_dr * whole, input_precision=PRECISION)
        if DELTA:
            b_l2 = tl.load(tile + tile_plane + i * C * C)
            inner = (pull * alpha[:, None]).to(dtype)
            pull = tl.dot(tl.trans(b_l2), inner, pull, input_precision=PRECISION)
            b_dr = tl.dot(tl.trans(b_k), (-pull * decay[:, None]).to(dtype), b_dr, input_precision=PRECISION)
        if TWO:
            tl.store(dr + values, pull.to(dtype), mask=some)
            if CLIP:
                kept = tl.load(inside + values, mask=some, other=0)
                pull = tl.where(kept != 0, pull, 0.0)
            now = b_ds.to(dtype)
            tl.store(save + i * HV * K * V, now, mask=kv)
            start_decay = tl.exp2(before)
            reads = grow
            if not GATED:
                reads = start_decay * scale
            b_l = tl.load(tile + i * C * C)
            pull1 = tl.dot(b_k, now, input_precision=PRECISION) * tail[:, None]
            pull1 = tl.dot(past, b_dy, pull1, input_precision=PRECISION)
            dread = (b_dy.to(tl.float32) * reads[:, None]).to(dtype)
            b_ds = tl.dot(tl.trans(b_q), dread, b_ds * whole, input_precision=PRECISION)
            dseen = -pull
            if DECAYED:
                dseen = dseen * alpha[:, None]
            if DELTA:
                pull1 = pull1 * rate1[:, None]
                inner = (pull1 * alpha[:, None] - dseen).to(dtype)
                pull1 = tl.dot(tl.trans(b_l), inner, pull1, input_precision=PRECISION)
                dseen = dseen * start_decay[:, None] - pull1 * decay[:, None]
            else:
                pull1 = tl.dot(tl.trans(b_l), dseen.to(dtype), pull1, input_precision=PRECISION)
                pull1 = pull1 * rate1[:, None]
                dseen = dseen * start_decay[:, None]
            b_ds = tl.dot(tl.trans(b_k), dseen.to(dtype), b_ds, input_precision=PRECISION)
            pull = pull + pull1
        tl.store(dv + values, pull.to(dtype), mask=some)
    tl.store(dstarts + plane + state, b_dr, mask=kv)
    if TWO:
        tl.store(dstarts + state, b_ds, mask=kv)


@triton.jit
def pair_sums(pairs, rate):
    """Of pairs [reader, writer] without the writer's rate: what each token reads less what is read of it; columns."""
    column = tl.sum(pairs, axis=0)
    return tl.sum(pairs * rate[None, :], axis=1) - column * rate, column


@triton.jit(do_not_specialize=COUNTS)
def backward_tokens(
    q,
    k,
    v,
    dy,
    dv,
    dr,
    gates,
    tiles,
    saved,
    pulled,
    dq,
    dk,
    dlog,
    dfirst,
    dsecond,
    chunk_start,
    chunk_end,
    tokens,
    chunks,
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
    PRECISION: tl.constexpr,
):
    """dq, dk [tokens, HV, K] per value head; dlog, dfirst, dsecond [tokens, HV] fp32; grid (chunks * HV,)."""
    pid = tl.program_id(0)
    c, hv = pid // HV, pid % HV
    start = tl.load(chunk_start + c).to(tl.int64)
    end = tl.load(chunk_end + c).to(tl.int64)
    if end <= start:
        return
    dtype: tl.constexpr = q.dtype.element_ty
    place = tl.arange(0, C)
    kc = tl.arange(0, BK)
    t = start + place
    ok = t < end
    h = hv // (HV // H)
    keys = (t[:, None] * H + h) * K + kc[None, :]
    some_keys = ok[:, None] & (kc[None, :] < K)
    b_k = tl.load(k + keys, mask=some_keys, other=0.0)
    b_q = tl.load(q + keys, mask=some_keys, other=0.0)
    until, before, last, rate1, rate2 = chunk_gates(gates, hv, HV, tokens, t, start, end, TWO)
    grow, whole = tl.exp2(until), tl.exp2(last)
    start_decay = tl.exp2(before)
    alpha, tail = tl.exp2(until - before), tl.exp2(last - until)
    save = (c.to(tl.int64) * HV + hv) * K * V
    save_plane = chunks.to(tl.int64) * HV * K * V
    tile = tiles + (hv.to(tl.int64) * chunks + c) * C * C + place[:, None] * C + place[None, :]
    tile_plane = HV * chunks.to(tl.int64) * C * C

    lower = place[:, None] > place[None, :]
    score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    # A decay scales what crosses its token: what a token reads of the past, what it leaves for the end of the chunk.
    # Pairs of tokens on one side of it must fall out exactly, so their rows and columns are sums of the same numbers.
    reads = tl.zeros([C], tl.float32)  # from the state or the pair's earlier token, less what later tokens read of it
    leaves = tl.zeros([C], tl.float32)
    spared = tl.zeros([C], tl.float32)  # of reads, what the token's own decay leaves alone
    drate1 = tl.zeros([C], tl.float32)
    drate2 = tl.zeros([C], tl.float32)
    through = tl.sum(reads, axis=0)  # from the chunk's start to its end
    b_dq = tl.zeros([C, BK], tl.float32)
    b_dk = tl.zeros([C, BK], tl.float32)
    for i_v in range((V + BV - 1) // BV):
        vc = i_v * BV + tl.arange(0, BV)
        values = (t[:, None] * HV + hv) * V + vc[None, :]
        some = ok[:, None] & (vc[None, :] < V)
        kv = (kc[:, None] < K) & (vc[None, :] < V)
        where = save + kc[:, None] * V + vc[None, :]
        dproduct = tl.zeros([C, C], tl.float32)
        left = tl.load(v + values, mask=some, other=0.0).to(tl.float32)
        b_dr = tl.load(dv + values, mask=some, other=0.0).to(tl.float32)
        if TWO:
            b_s = tl.load(saved + where, mask=kv, other=0.0)
            b_l = tl.load(tile)
            seen = tl.dot(b_k, b_s, input_precision=PRECISION)
            if DELTA:
                error = left - seen * grow[:, None]
                inner = -tl.dot(b_l, error.to(dtype), input_precision=PRECISION)
                e = (error - alpha[:, None] * inner).to(dtype)
            else:
                e = left.to(dtype)
                inner = tl.dot(b_l, (left * rate1[:, None]).to(dtype), input_precision=PRECISION)
            seen = seen * start_decay[:, None] + inner
            derror = b_dr
            b_dr = tl.load(dr + values, mask=some, other=0.0).to(tl.float32)
            dseen = -b_dr
            if DECAYED:
                left = left - seen * alpha[:, None]
            else:
                left = left - seen
            if CLIP:
                dseen = tl.where(tl.abs(left) <= clip, dseen, 0.0)
                left = tl.minimum(tl.maximum(left, -clip), clip)
            derror = derror + dseen
            if DECAYED:
                dseen = dseen * alpha[:, None]
            else:
                spared += tl.sum(seen * dseen, axis=1)
            if DELTA:
                z = tl.dot((dseen - alpha[:, None] * derror).to(dtype), tl.trans(e), input_precision=PRECISION)
                dseen = dseen * start_decay[:, None] - derror * grow[:, None]
            else:
                z = tl.dot(dseen.to(dtype), tl.trans(e), input_precision=PRECISION)
                dseen = dseen * start_decay[:, None]
            z = tl.where(lower, z * tl.exp2(tl.minimum(before[:, None] - until[None, :], 0.0)), 0.0)
            product = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
            crossing, column = pair_sums(z * product, rate1)
            reads += crossing
            drate1 += column
            dproduct += z * rate1[None, :]
            b_read = tl.dot(dseen.to(dtype), tl.trans(b_s), input_precision=PRECISION)
            reads += tl.sum(b_read * b_k.to(tl.float32), axis=1)
            b_dk += b_read
        b_r = tl.load(saved + save_plane + where, mask=kv, other=0.0)
        if DELTA:
            left = left - tl.dot(b_k, b_r, input_precision=PRECISION) * grow[:, None]
            b_l2 = tl.load(tile + tile_plane)
            left = left + alpha[:, None] * tl.dot(b_l2, left.to(dtype), input_precision=PRECISION)
        f = left.to(dtype)
        if DELTA:
            z = tl.dot((-b_dr).to(dtype), tl.trans(f), input_precision=PRECISION)
            z = tl.where(lower, z * tl.exp2(tl.minimum(until[:, None] - until[None, :], 0.0)), 0.0)
            product = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
            crossing, column = pair_sums(z * product, rate2)
            reads += crossing
            drate2 += column
            dproduct += z * rate2[None, :]
            b_read = tl.dot((-b_dr * grow[:, None]).to(dtype), tl.trans(b_r), input_precision=PRECISION)
            reads += tl.sum(b_read * b_k.to(tl.float32), axis=1)
            b_dk += b_read
        if DELTA or TWO:
            dproduct = (dproduct + tl.trans(dproduct)).to(dtype)
            b_dk = tl.dot(dproduct, b_k, b_dk, input_precision=PRECISION)

        b_dy = tl.load(dy + values, mask=some, other=0.0)
        z = tl.dot(b_dy, tl.trans(f), input_precision=PRECISION)
        fade = tl.exp2(tl.minimum(until[:, None] - until[None, :], 0.0))
        z = tl.where(place[:, None] >= place[None, :], z * fade, 0.0)
        if TWO and GATED:
            drate2 += tl.sum(z * score * rate2[None, :], axis=1)
            z = z * rate2[:, None]
        crossing, column = pair_sums(z * score, rate2)
        reads += crossing
        drate2 += column
        dscore = z * rate2[None, :]
        if TWO:
            z = tl.dot(b_dy, tl.trans(e), input_precision=PRECISION)
            if GATED:
                z = tl.where(lower, z * fade, 0.0)
            else:
                z = tl.where(lower, z * tl.exp2(tl.minimum(before[:, None] - until[None, :], 0.0)), 0.0)
                spared += tl.sum(z * score * rate1[None, :], axis=1)
            crossing, column = pair_sums(z * score, rate1)
            reads += crossing
            drate1 += column
            dscore += z * rate1[None, :]
        dscore = (dscore * scale).to(dtype)
        b_dk = tl.dot(tl.trans(dscore), b_q, b_dk, input_precision=PRECISION)
        if TWO:
            b_ds = tl.load(pulled + where, mask=kv, other=0.0)
            through += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32)) * whole
            written = tl.dot(e, tl.trans(b_ds), input_precision=PRECISION) * tail[:, None]
            wrote = tl.sum(written * b_k.to(tl.float32), axis=1)
            drate1 += wrote
            leaves += wrote * rate1
            b_dk += written * rate1[:, None]
        b_dr1 = tl.load(pulled + save_plane + where, mask=kv, other=0.0)
        through += tl.sum(b_r.to(tl.float32) * b_dr1.to(tl.float32)) * whole
        written = tl.dot(f, tl.trans(b_dr1), input_precision=PRECISION) * tail[:, None]
        wrote = tl.sum(written * b_k.to(tl.float32), axis=1)
        drate2 += wrote
        leaves += wrote * rate2
        b_dk += written * rate2[:, None]

        b_dq = tl.dot(dscore, b_k, b_dq, input_precision=PRECISION)
        back = tl.dot(b_dy, tl.trans(b_r), input_precision=PRECISION) * (grow * scale)[:, None]
        if TWO and GATED:
            drate2 += tl.sum(back * b_q.to(tl.float32), axis=1)
            back = back * rate2[:, None]
        reads += tl.sum(back * b_q.to(tl.float32), axis=1)
        b_dq += back
        if TWO:
            back = tl.dot(b_dy, tl.trans(b_s), input_precision=PRECISION)
            if GATED:
                back = back * (grow * scale)[:, None]
            else:
                back = back * (start_decay * scale)[:, None]
                spared += tl.sum(back * b_q.to(tl.float32), axis=1)
            reads += tl.sum(back * b_q.to(tl.float32), axis=1)
            b_dq += back
    at = (t[:, None] * HV + hv) * K + kc[None, :]
    tl.store(dk + at, b_dk.to(dk.dtype.element_ty), mask=some_keys)
    tl.store(dq + at, b_dq.to(dq.dtype.element_ty), mask=some_keys)

    later = tl.sum(reads, axis=0) - tl.cumsum(reads, axis=0) + reads
    earlier = tl.cumsum(leaves, axis=0) - leaves
    dlog_own = through + later + earlier - spared
    row = t * HV + hv
    tl.store(dlog + row, dlog_own, mask=ok)
    if TWO:
        tl.store(dfirst + row, drate1, mask=ok)
    tl.store(dsecond + row, drate2, mask=ok)
