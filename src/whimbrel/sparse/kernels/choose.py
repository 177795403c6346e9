"""The fewest blocks that hold a coverage, row by row: a threshold is searched bit by bit, nothing is sorted."""

from __future__ import annotations

import triton
import triton.language as tl

PER_MILLION: tl.constexpr = tl.constexpr(1_000_000)
EXACT: tl.constexpr = tl.constexpr(2.0**17)
"""Whole numbers in the largest sum of a query, and again in each of these."""
LONE: tl.constexpr = tl.constexpr(1 << 44)
"""An entry, in a number that holds how many there are and what they sum up to."""


@triton.jit
def enough(covered, needed, count, least, most, BUDGET: tl.constexpr):
    """Whether so many covered queries and so many blocks will do."""
    done = covered >= needed
    if BUDGET:
        done = (done & (count >= least)) | (count >= most)
    return done


@triton.jit
def number(chosen, BUDGET: tl.constexpr):
    """How many are chosen, where anybody asks."""
    if BUDGET:
        return tl.sum(chosen.to(tl.int32))
    return 0


@triton.jit
def load_tile(data, at, n, p, wanted, step):
    """[N, P]: what `data` holds for the sampled queries of a tile, at int32 [P], in the wanted blocks; 0 elsewhere."""
    # Read whole, in one piece for each block; what nobody wrote for queries that are not there is left out afterwards.
    found = tl.load(data + n[:, None] * step + p[None, :], mask=wanted[:, None], other=0)
    return tl.where((tl.load(at + p) >= 0)[None, :], found, 0)


@triton.jit
def shares_of(sums, UNIT: tl.constexpr):
    """int32 [N, P] in units of 1 / UNIT, rounded down: each column of `sums` as shares of its total.

    The total is taken in whole numbers, whose sums no order of summation changes; up to 16,383 blocks they fit.
    """
    top = tl.max(sums, 0)
    part = sums * (1.0 / tl.where(top > 0, top, 1.0))[None, :]
    whole = (part * EXACT).to(tl.int32)
    rest = ((part * EXACT - whole.to(tl.float32)) * EXACT).to(tl.int32)
    total = (tl.sum(whole, 0).to(tl.float32) + tl.sum(rest, 0).to(tl.float32) / EXACT) / EXACT
    return (part * (UNIT / tl.maximum(total, 1.0))[None, :]).to(tl.int32)


COUNTS = ["rows", "room", "begin", "blocks", "words", "first_block", "wanted", "row_share", "least", "most", "slack"]
"""Numbers that differ from strip to strip and from call to call: one kernel serves them all."""


@triton.jit(do_not_specialize=COUNTS)
def choose(at, sums, shares, bits, counts, units, filled, wanting, rows, room, begin, blocks, words, first_block,
           wanted, row_share, least, most, slack, LISTED: tl.constexpr, PILOT: tl.constexpr, HKV: tl.constexpr,
           GROUP: tl.constexpr, P: tl.constexpr, S: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr,
           UNIT_BITS: tl.constexpr, SHIFT: tl.constexpr, BUDGET: tl.constexpr):  # fmt: skip
    """bits int32 [B * H, rows, words] and counts int32 [B * H, rows] of rows from `begin` on.

    sums fp32 [B * HKV, room * S, blocks, GROUP, P], at, units and filled as for `estimate.scores`; shares is the same
    memory as int32, and holds shares afterwards where S > 1. The first block, a row's own and the one before it are
    kept; then those of the largest mean share, equal ones in their order, until of the row's sampled queries
    `row_share` in a million hold at least `wanted` each and, if BUDGET, the blocks are `least`, or they are `most`.
    SHIFT is log2(P * S).

    If PILOT, wanting int32 [B * HKV, rows] gets bit g, and the row an entry of `units`, where the choice for head g
    deserves a second look: queries are missing, or one would hold less by more than `slack`, on average, had the others
    chosen without it. If LISTED, only heads with such a bit are chosen for.
    """
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // (HKV * GROUP), pair % (HKV * GROUP)
    group, head = b * HKV + h // GROUP, h % GROUP
    place = begin + tl.program_id(0)
    row = place
    asked = 1
    if LISTED:
        some = place < tl.load(filled + group)
        row = tl.load(units + group * rows + place, mask=some, other=0)
        asked = tl.load(wanting + group * rows + row, mask=some, other=0) >> head & 1
    if asked > 0:
        own = first_block + row
        n = tl.arange(0, N)
        p = tl.arange(0, P)
        allowed = n <= own
        forced = allowed & ((n == 0) | (n >= own - 1))
        free = allowed & (n > 0) & (n < own - 1)
        step = GROUP * P
        next_tile = tl.full([], step, tl.int64) * blocks
        tile = (group * room + tl.program_id(0)) * S * next_tile + head * P
        at += row * S * P
        samples = tl.full([], 0, tl.int32)
        for s in range(S):
            samples += tl.sum((tl.load(at + s * P + p) >= 0).to(tl.int32))
        needed = tl.maximum((samples * row_share + (PER_MILLION - 1)) // PER_MILLION, 1)
        kept = tl.sum(forced.to(tl.int32))
        shares += tile
        first = shares_of(load_tile(sums + tile, at, n, p, allowed, step), UNIT)
        x = tl.sum(first >> SHIFT, 1)
        if S > 1:
            for s in range(S):
                part = shares_of(load_tile(sums + tile + s * next_tile, at + s * P, n, p, allowed, step), UNIT)
                if s > 0:
                    x += tl.sum(part >> SHIFT, 1)
                tl.store(shares + s * next_tile + n[:, None] * step + p[None, :], part, mask=allowed[:, None])
            tl.debug_barrier()
        # The largest threshold whose entries are enough; 0, if none is. Its highest bit is searched by halves, as few
        # bits have entries at all; then bit by bit, until one mass is left that it can be.
        threshold = 0
        low, high = -1, UNIT_BITS + 1  # bits that are known to be enough, and not
        bit = UNIT_BITS  # no block but the forced ones
        alone = -1  # from where on it pays to look whether one mass is left
        open = 1
        while open > 0:
            higher = threshold | (1 << bit)
            over = free & (x >= higher)
            inside = forced | over
            covered = tl.sum((tl.sum(tl.where(inside[:, None], first, 0), 0) >= wanted).to(tl.int32))
            for s in range(1, S):
                more = load_tile(shares + s * next_tile, at + s * P, n, p, inside, step)
                covered += tl.sum((tl.sum(more, 0) >= wanted).to(tl.int32))
            got = enough(covered, needed, kept + number(over, BUDGET), least, most, BUDGET)
            if threshold == 0:
                low = tl.where(got, bit, low)
                high = tl.where(got, high, bit)
                found = high - low == 1
                threshold = tl.where(found & (low >= 0), 1 << tl.maximum(low, 0), 0)
                bit = tl.where(found, low - 1, (low + high) // 2)
                open = ((bit >= 0) & (low < UNIT_BITS)).to(tl.int32)
                alone = low - 4
            else:
                threshold = tl.where(got, higher, threshold)
                bit -= 1
                open = (bit >= 0).to(tl.int32)
            if (threshold > 0) & (bit < alone):
                between = free & (x >= threshold) & (x - threshold < (1 << (bit + 1)))
                left = tl.sum(tl.where(between, (x - threshold).to(tl.int64) + LONE, 0))
                if left // LONE == 1:
                    threshold += (left % LONE).to(tl.int32)
                    open = 0
        over = free & (x > threshold)
        level = (free & (x == threshold)).to(tl.int32)
        inside = forced | over
        chosen = kept + tl.sum(over.to(tl.int32))
        keep = inside.to(tl.int32)
        equals = tl.sum(level)
        if equals == 1:
            # It was needed, as nothing above the threshold is enough.
            keep += level
        if equals > 1:
            # What the queries hold before each entry at the threshold: such entries are taken in order.
            covered = tl.zeros([N], tl.int32)
            for s in range(S):
                part = (
                    load_tile(shares + s * next_tile, at + s * P, n, p, inside | (level > 0), step) if S > 1 else first
                )
                tied = tl.where(level[:, None] > 0, part, 0)
                held = tl.sum(tl.where(inside[:, None], part, 0), 0)[None, :] + tl.cumsum(tied, 0) - tied
                covered += tl.sum((held >= wanted).to(tl.int32), 1)
            earlier = chosen + tl.cumsum(level, 0) - level
            keep += ((level > 0) & (enough(covered, needed, earlier, least, most, BUDGET) == 0)).to(tl.int32)
        chosen = tl.sum(keep)
        tl.store(counts + pair * rows + row, chosen)
        packed = tl.sum(tl.reshape(keep, [N // 32, 32]) << tl.arange(0, 32)[None, :], 1)
        w = tl.arange(0, N // 32)
        tl.store(bits + (pair * rows + row) * words + w, packed, mask=w < words)
        if PILOT:
            others = free[:, None] & (x[:, None] - (first >> SHIFT) >= threshold - (threshold >> SHIFT))
            mine = tl.sum(tl.where(keep[:, None] > 0, first, 0), 0) >> SHIFT
            theirs = tl.sum(tl.where(forced[:, None] | others, first, 0), 0) >> SHIFT
            unsure = (tl.sum(mine - theirs) > slack) & (chosen * 16 < (own + 1) * 15)
            if unsure | (samples < P):
                before = tl.atomic_or(wanting + group * rows + row, 1 << head)
                if before == 0:
                    tl.store(units + group * rows + tl.atomic_add(filled + group, 1), row)


@triton.jit(do_not_specialize=["rows"])
def place(counts, offsets, rows, N: tl.constexpr):
    """offsets int64 [rows + 1]: sums of the counts, int32 [rows], of all rows before. One program does it."""
    n = tl.arange(0, N)
    before = tl.full([], 0, tl.int64)
    tl.store(offsets, before)
    for first in range(0, rows, N):
        found = tl.load(counts + first + n, mask=first + n < rows, other=0).to(tl.int64)
        tl.store(offsets + 1 + first + n, before + tl.cumsum(found, 0), mask=first + n < rows)
        before += tl.sum(found, 0)


@triton.jit(do_not_specialize=["width"])
def compact(chosen, offsets, indices, width, N: tl.constexpr, PACKED: tl.constexpr):
    """indices int32: the chosen blocks of each row, from offsets[row] on.

    chosen [rows, width]: int32 words of 32 blocks each if PACKED, else int8 flags.
    """
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, N)
    if PACKED:
        word = tl.load(chosen + row * width + n // 32, mask=n < width * 32, other=0)
        keep = (word >> (n % 32)) & 1
    else:
        keep = tl.load(chosen + row * width + n, mask=n < width, other=0).to(tl.int32)
    place = tl.load(offsets + row) + tl.cumsum(keep, 0) - 1
    tl.store(indices + place, n, mask=keep == 1)
