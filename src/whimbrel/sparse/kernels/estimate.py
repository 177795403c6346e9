"""What sampled queries see of each key block, in one step that holds no logit in memory.

A tile is P sampled queries of one query block, for all the GROUP heads that share a key head. No result depends on
what lies behind its own query block, nor on which other tiles are at hand, not even in rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

MOST: tl.constexpr = tl.constexpr(2.0**107)
"""Most that a block counts for a query, so that a sum over blocks stays finite."""


COUNTS = ["before", "k_len", "rows", "room", "begin", "blocks", "first"]
"""Numbers that differ from strip to strip: one kernel serves them all."""


@triton.jit(do_not_specialize=COUNTS)
def scores(
    q,
    k,
    at,
    units,
    filled,
    out,
    q_batch,
    q_time,
    q_head,
    k_batch,
    k_time,
    k_head,
    before,
    k_len,
    rows,
    room,
    begin,
    blocks,
    first,
    scale,
    LISTED: tl.constexpr,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    Q: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    SIZE: tl.constexpr,
    RUN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out fp32 [B, HKV, room, blocks, GROUP, P]: sums of exp2(logit - reference) over the keys of each block that a
    sampled query sees, up to its own block. `scale` holds log2(e).

    The reference of a query is its larger logit with itself and with the first key, which lies below the logarithm of
    the whole sum and, for any attention that rises from them by less than 2^100, close enough to need no maximum.

    at int32 [rows, S * P]: absolute positions, -1 for none, of row i in block `first` + i. Tiles `begin` to `begin` +
    room are taken, S of a row. If LISTED, rows are those that units int32 [B * HKV, rows] names, filled int32
    [B * HKV] of them. A program takes Q tiles, since reading the keys costs more than multiplying them, and RUN
    blocks of keys.
    """
    run, pair = tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, hkv = pair // HKV, pair % HKV
    r = tl.arange(0, M)
    g, slot = r // P % GROUP, r % P
    tile = begin + tl.program_id(0) * Q + r // (P * GROUP)
    count = begin + room
    if LISTED:
        count = tl.minimum(count, tl.load(filled + pair) * S)
    used = (r < P * GROUP * Q) & (tile < count)
    row = tl.where(used, tile // S, 0)
    if LISTED:
        row = tl.load(units + pair * rows + row, mask=used, other=0)
    pos = tl.load(at + (row * S + tile % S) * P + slot, mask=used, other=-1)
    own = tl.where(used, first + row, -1)
    start = run * RUN
    if start <= tl.max(own):
        d = tl.arange(0, BD)
        query = q + b * q_batch + (pos - before).to(tl.int64) * q_time + (hkv * GROUP + g) * q_head
        there = (pos >= 0)[:, None] & (d[None, :] < D)
        b_q = tl.load(query[:, None] + d[None, :], mask=there, other=0.0)
        k_base = k + b * k_batch + hkv * k_head
        own_key = tl.load(k_base + pos.to(tl.int64)[:, None] * k_time + d[None, :], mask=there, other=0.0)
        first_key = tl.load(k_base + d, mask=d < D, other=0.0).to(tl.float32)
        wide = b_q.to(tl.float32)
        own_key = own_key.to(tl.float32)
        ref = tl.maximum(tl.sum(wide * own_key, 1), tl.sum(wide * first_key[None, :], 1)) * scale
        wide_size = tl.full([], SIZE, tl.int64)
        place = out + ((pair * room + tile - begin) * blocks) * (GROUP * P) + g * P + slot
        n = tl.arange(0, SIZE)
        # One path for all blocks: a second one without masks could round otherwise, and which blocks would take it
        # depends on the tiles that a program happens to hold.
        for j in range(start, tl.minimum(tl.max(own) + 1, start + RUN)):
            key = j * wide_size + n
            b_k = tl.load(
                k_base + key[None, :] * k_time + d[:, None],
                mask=(key[None, :] < k_len) & (d[:, None] < D),
                other=0.0,
            )
            logits = tl.dot(b_q, b_k, input_precision=PRECISION) * scale - ref[:, None]
            sums = tl.sum(tl.where(key[None, :] <= pos[:, None], tl.exp2(logits), 0.0), 1)
            tl.store(place + j * (GROUP * P), tl.minimum(sums, MOST), mask=(pos >= 0) & (j <= own))
