"""The fewest blocks that hold a coverage, row by row: a threshold is searched bit by bit, nothing is sorted."""

from __future__ import annotations

import triton
import triton.language as tl

PER_MILLION: tl.constexpr = tl.constexpr(1_000_000)


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
def load_shares(shares, at, tile, n, p, step, wanted):
    """int32 [N, P]: masses of the sampled queries of a tile, at int32 [P], in the wanted blocks; 0 elsewhere."""
    found = tl.load(at + p) >= 0
    return tl.load(shares + tile + n[:, None] * step + p[None, :], mask=wanted[:, None] & found[None, :], other=0)


@triton.jit
def choose(at, mass, shares, bits, counts, tiles, rows, blocks, first_row, all_rows, words, first_block, wanted,
           row_share, least, most, HKV: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
           N: tl.constexpr, UNIT_BITS: tl.constexpr, BUDGET: tl.constexpr):  # fmt: skip
    """bits int32 [B * H, all_rows, words] and counts int64 [B * H, all_rows] of rows from first_row on.

    mass int32 [B * H, rows, blocks]; shares int32 [B * HKV, tiles, blocks, GROUP, P] and at int32 [tiles, P] as for
    `masses`. The first block, a row's own and the one before it are kept; then those of the largest mass, equal ones in
    their order, until of the row's sampled queries `row_share` in a million hold at least `wanted` each and, if BUDGET,
    the blocks are `least`, or they are `most`.
    """
    row, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = pair // (HKV * GROUP), pair % (HKV * GROUP)
    own = first_block + first_row + row
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    allowed = n <= own
    forced = allowed & ((n == 0) | (n >= own - 1))
    free = allowed & (n > 0) & (n < own - 1)
    x = tl.load(mass + (pair * rows + row) * blocks + n, mask=allowed & (n < blocks), other=0)
    step = GROUP * P
    tile = ((b * HKV + h // GROUP) * tiles + row * S) * blocks * step + h % GROUP * P
    next_tile = tl.full([], step, tl.int64) * blocks
    at += row * S * P
    samples = tl.full([], 0, tl.int32)
    for s in range(S):
        samples += tl.sum((tl.load(at + s * P + p) >= 0).to(tl.int32))
    needed = tl.maximum((samples * row_share + (PER_MILLION - 1)) // PER_MILLION, 1)
    kept = tl.sum(forced.to(tl.int32))
    first = load_shares(shares, at, tile, n, p, step, allowed)
    # The largest threshold whose entries are enough; 0, if none is. Its highest bit is searched by halves, as few bits
    # have entries at all; then bit by bit, until one mass is left that it can be.
    threshold = 0
    low, high = -1, UNIT_BITS + 1  # bits that are known to be enough, and not
    bit = (low + high) // 2
    open = 1
    while open > 0:
        higher = threshold | (1 << bit)
        over = free & (x >= higher)
        inside = forced | over
        covered = tl.sum((tl.sum(tl.where(inside[:, None], first, 0), 0) >= wanted).to(tl.int32))
        for s in range(1, S):
            more = load_shares(shares, at + s * P, tile + s * next_tile, n, p, step, inside)
            covered += tl.sum((tl.sum(more, 0) >= wanted).to(tl.int32))
        got = enough(covered, needed, kept + number(over, BUDGET), least, most, BUDGET)
        if threshold == 0:
            low = tl.where(got, bit, low)
            high = tl.where(got, high, bit)
            found = high - low == 1
            threshold = tl.where(found & (low >= 0), 1 << tl.maximum(low, 0), 0)
            bit = tl.where(found, low - 1, (low + high) // 2)
            open = (bit >= 0).to(tl.int32)
        else:
            threshold = tl.where(got, higher, threshold)
            bit -= 1
            open = (bit >= 0).to(tl.int32)
        if threshold > 0:
            between = free & (x >= threshold) & (x - threshold < (1 << (bit + 1)))
            least_left = tl.min(tl.where(between, x, 2147483647))
            most_left = tl.max(tl.where(between, x, 0))
            if least_left == most_left:
                threshold = most_left
                open = 0
    over = free & (x > threshold)
    level = (free & (x == threshold)).to(tl.int32)
    inside = forced | over
    # What the queries hold before each entry that lies at the threshold: such entries are taken in order.
    covered = tl.zeros([N], tl.int32)
    for s in range(S):
        part = load_shares(shares, at + s * P, tile + s * next_tile, n, p, step, inside | (level > 0))
        tied = tl.where(level[:, None] > 0, part, 0)
        held = tl.sum(tl.where(inside[:, None], part, 0), 0)[None, :] + tl.cumsum(tied, 0) - tied
        covered += tl.sum((held >= wanted).to(tl.int32), 1)
    earlier = kept + tl.sum(over.to(tl.int32)) + tl.cumsum(level, 0) - level
    level = (level > 0) & (enough(covered, needed, earlier, least, most, BUDGET) == 0)
    keep = (inside | level).to(tl.int32)
    tl.store(counts + pair * all_rows + first_row + row, tl.sum(keep).to(tl.int64))
    packed = tl.sum(tl.reshape(keep, [N // 32, 32]) << tl.arange(0, 32)[None, :], 1)
    w = tl.arange(0, N // 32)
    tl.store(bits + (pair * all_rows + first_row + row) * words + w, packed, mask=w < words)


@triton.jit
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
