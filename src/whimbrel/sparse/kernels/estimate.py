"""Attention masses of key blocks for sampled queries, in three steps that never hold a logit in memory.

A tile is P sampled queries of one query block, for all the GROUP heads that share a key head. No result depends on
what lies behind its own query block, not even in rounding: every sum runs over fixed runs of blocks from the first on.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_lse(
    q,
    k,
    at,
    lse,
    q_batch,
    q_time,
    q_head,
    k_batch,
    k_time,
    k_head,
    before,
    k_len,
    tiles,
    blocks,
    first,
    scale,
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
    """lse fp32 [B, HKV, tiles, blocks, GROUP, P], natural units times log2(e), up to each tile's own block.

    at int32 [tiles, P]: absolute positions, -1 for none; S tiles belong to a query block, the first to block `first`.
    A program takes Q tiles, since reading the keys costs more than multiplying them, and RUN blocks of keys.
    """
    run, pair = tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, hkv = pair // HKV, pair % HKV
    r = tl.arange(0, M)
    g, slot = r // P % GROUP, r % P
    tile = tl.program_id(0) * Q + r // (P * GROUP)
    used = (r < P * GROUP * Q) & (tile < tiles)
    tile = tl.minimum(tile, tiles - 1)
    own = first + tile // S
    start = run * RUN
    if start <= tl.max(own):
        d = tl.arange(0, BD)
        pos = tl.load(at + tile * P + slot)
        query = q + b * q_batch + (pos - before).to(tl.int64) * q_time + (hkv * GROUP + g) * q_head
        b_q = tl.load(query[:, None] + d[None, :], mask=(used & (pos >= 0))[:, None] & (d[None, :] < D), other=0.0)
        k_base = k + b * k_batch + hkv * k_head
        wide = tl.full([], SIZE, tl.int64)
        out = lse + ((pair * tiles + tile) * blocks) * (GROUP * P) + g * P + slot
        n = tl.arange(0, SIZE)
        # One path for all blocks: a second one without masks could round otherwise, and which blocks would take it
        # depends on the tiles that a program happens to hold.
        for j in range(start, tl.minimum(tl.max(own) + 1, start + RUN)):
            key = j * wide + n
            b_k = tl.load(
                k_base + key[None, :] * k_time + d[:, None],
                mask=(key[None, :] < k_len) & (d[:, None] < D),
                other=0.0,
            )
            scores = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
            # The first key stays, so that nothing is NaN where a query sees none; what sees none is not stored.
            scores = tl.where((key[None, :] <= pos[:, None]) | (n[None, :] == 0), scores, float("-inf"))
            top = tl.max(scores, 1)
            sums = top + tl.log2(tl.sum(tl.exp2(scores - top[:, None]), 1))
            tl.store(out + j * (GROUP * P), sums, mask=used & (j <= own))


@triton.jit
def whole_lse(lse, whole, tiles, blocks, first, S: tl.constexpr, MP: tl.constexpr, M: tl.constexpr,
              RUN: tl.constexpr):  # fmt: skip
    """whole fp32 [B, HKV, tiles, GROUP, P]: `lse` of all blocks of a tile together; MP = GROUP * P."""
    tile, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    r = tl.arange(0, M)
    c = tl.arange(0, RUN)
    own = first + tile // S
    base = lse + ((pair * tiles + tile) * blocks) * MP
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for j in range(0, own + 1, RUN):
        some = (j + c[:, None] <= own) & (r[None, :] < MP)
        x = tl.load(base + (j + c[:, None]) * MP + r[None, :], mask=some, other=float("-inf"))
        new = tl.maximum(tl.maximum(top, tl.max(x, 0)), -3.0e38)
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(x - new[None, :]), 0)
        top = new
    tl.store(whole + (pair * tiles + tile) * MP + r, top + tl.log2(total), mask=r < MP)


@triton.jit
def masses(at, lse, whole, mass, tiles, rows, blocks, first, GROUP: tl.constexpr, G: tl.constexpr,
           P: tl.constexpr, S: tl.constexpr, RUN: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """mass int32 [B, H, rows, blocks] in units of 1 / UNIT, rounded down: means over the S tiles of each row.

    `lse` becomes the mass for each sampled query, int32 in the same units in the same place. Whole numbers have sums
    that no order of summation changes. Blocks behind a row's own get 0 in `mass` and are not touched in `lse`. G is
    GROUP or the next power of two.
    """
    row, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    r = tl.arange(0, G * P)
    g = tl.arange(0, G)
    c = tl.arange(0, RUN)
    first_tile = pair * tiles + row * S
    own = first + row
    count = tl.full([], 0, tl.int32)
    for s in range(S):
        count += tl.sum((tl.load(at + (row * S + s) * P + tl.arange(0, P)) >= 0).to(tl.int32))
    for j in range(0, blocks, RUN):
        found = tl.zeros([RUN, G], tl.float32)
        if j <= own:
            for s in range(S):
                ok = (tl.load(at + (row * S + s) * P + r % P) >= 0) & (r < GROUP * P)
                whole_s = tl.load(whole + (first_tile + s) * (GROUP * P) + r, mask=ok, other=0.0)
                some = (j + c[:, None] <= own) & ok[None, :]
                where = ((first_tile + s) * blocks + j + c[:, None]) * (GROUP * P) + r[None, :]
                x = tl.load(lse + where, mask=some, other=float("-inf"))
                alone = tl.exp2(x - whole_s[None, :])
                found += tl.sum(tl.reshape(alone, [RUN, G, P]), 2)
                tl.store(lse + where, (alone * UNIT).to(tl.int32).to(tl.float32, bitcast=True), mask=some)
        share = found / count.to(tl.float32) * UNIT
        out = ((pair * GROUP + g[None, :]) * rows + row) * blocks + j + c[:, None]
        tl.store(mass + out, share.to(tl.int32), mask=(j + c[:, None] < blocks) & (g[None, :] < GROUP))
