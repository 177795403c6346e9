"""Attention over a plan: a program takes one query tile of one row of the plan, the rows with most blocks first.

The diagonal block comes first and alone carries a mask. It holds every query's own key, so that from then on the
running maximum is finite and the blocks before it need neither masks nor guards.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def take(top, total, acc, b_v, scores, scale, PRECISION: tl.constexpr):
    """The running softmax after `scores` [BM, BN] and their values [BN, BV]; `scale` holds log2(e)."""
    new = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new[:, None])
    kept = tl.exp2(top - new)
    total = total * kept + tl.sum(weights, 1)
    acc = tl.dot(weights.to(b_v.dtype), b_v, acc * kept[:, None], input_precision=PRECISION)
    return new, total, acc


@triton.jit
def forward(
    q,
    k,
    v,
    y,
    lse,
    work,
    owner,
    table,
    starts,
    stops,
    indices,
    q_time,
    q_head,
    k_time,
    k_head,
    v_time,
    v_head,
    scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    SIZE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y [tokens, H, V] and lse fp32 [tokens, H] of q [tokens, H, D], k [tokens, H / GROUP, D] and v.

    work int32 [rows]: rows in the order they are taken. owner int32 [rows]: a row's sequence. table int64
    [sequences, 5]: first row, first query, number of queries, first key, number of keys. starts, stops int64 [rows]:
    where a row's blocks lie in `indices`. `scale` holds log2(e).
    """
    TILES: tl.constexpr = SIZE // BM
    PARTS: tl.constexpr = SIZE // BN
    row = tl.load(work + tl.program_id(0) // TILES)
    tile = tl.program_id(0) % TILES
    entry = table + tl.load(owner + row) * 5
    first_row = tl.load(entry)
    q_start = tl.load(entry + 1)
    q_len = tl.load(entry + 2)
    k_start = tl.load(entry + 3)
    k_len = tl.load(entry + 4)
    before = k_len - q_len
    first_block = before // SIZE
    blocks = tl.cdiv(k_len, SIZE) - first_block
    h = (row - first_row) // blocks
    own = first_block + (row - first_row) % blocks

    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    d = tl.arange(0, BD)
    c = tl.arange(0, BV)
    t = own * SIZE + tile * BM - before  # the tile's first query, negative where the first block is cut
    ok = (t + m >= 0) & (t + m < q_len)
    b_q = tl.load(
        q + (q_start + t) * q_time + h * q_head + m[:, None] * q_time + d[None, :],
        mask=ok[:, None] & (d[None, :] < D),
        other=0.0,
    )
    k_base = k + k_start * k_time + (h // GROUP) * k_head
    v_base = v + k_start * v_time + (h // GROUP) * v_head
    k_tile = d[:, None] + n[None, :] * k_time
    v_tile = n[:, None] * v_time + c[None, :]

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    start = tl.load(starts + row)
    stop = tl.load(stops + row)
    last = tl.load(indices + stop - 1, mask=stop > start, other=-1)
    if last == own:
        stop -= 1
        for at in range(0, (tile + 1) * BM, BN):
            key = own * SIZE + at
            there = key + n < k_len
            b_k = tl.load(k_base + key * k_time + k_tile, mask=there[None, :] & (d[:, None] < D), other=0.0)
            b_v = tl.load(v_base + key * v_time + v_tile, mask=there[:, None] & (c[None, :] < V), other=0.0)
            scores = tl.dot(b_q, b_k, input_precision=PRECISION)
            scores = tl.where(at + n[None, :] <= tile * BM + m[:, None], scores, float("-inf"))
            top, total, acc = take(top, total, acc, b_v, scores, scale, PRECISION)

    for i in range((stop - start).to(tl.int32) * PARTS):
        key = tl.load(indices + start + i // PARTS).to(tl.int64) * SIZE + i % PARTS * BN
        if BD == D:
            b_k = tl.load(k_base + key * k_time + k_tile)
        else:
            b_k = tl.load(k_base + key * k_time + k_tile, mask=d[:, None] < D, other=0.0)
        if BV == V:
            b_v = tl.load(v_base + key * v_time + v_tile)
        else:
            b_v = tl.load(v_base + key * v_time + v_tile, mask=c[None, :] < V, other=0.0)
        scores = tl.dot(b_q, b_k, input_precision=PRECISION)
        top, total, acc = take(top, total, acc, b_v, scores, scale, PRECISION)

    some = total > 0  # a part of a plan may leave a row without keys
    total = tl.where(some, total, 1.0)
    acc = acc / total[:, None]
    out = tl.where(some, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    place = (q_start + t) * H + h
    tl.store(
        y + place * V + m[:, None] * (H * V) + c[None, :],
        acc.to(y.dtype.element_ty),
        mask=ok[:, None] & (c[None, :] < V),
    )
    tl.store(lse + place + m * H, out, mask=ok)
