"""The fewest blocks that hold a coverage, row by row: a threshold is searched bit by bit, nothing is sorted."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def enough(mass, count, wanted, least, most, BUDGET: tl.constexpr):
    """Whether blocks of this mass and count will do."""
    done = mass >= wanted
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
def choose(mass, bits, counts, rows, blocks, first_row, all_rows, words, first_block, wanted, least, most,
           N: tl.constexpr, UNIT_BITS: tl.constexpr, BUDGET: tl.constexpr):  # fmt: skip
    """bits int32 [B * H, all_rows, words] and counts int64 [B * H, all_rows] of rows from first_row on.

    mass int32 [B * H, rows, blocks]. The first block, a row's own and the one before it are kept; then the largest,
    equal ones in their order, until their mass is at least `wanted` and, if BUDGET, their number `least`, or that is
    `most`.
    """
    row, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    own = first_block + first_row + row
    n = tl.arange(0, N)
    allowed = n <= own
    forced = allowed & ((n == 0) | (n >= own - 1))
    free = allowed & (n > 0) & (n < own - 1)
    x = tl.load(mass + (pair * rows + row) * blocks + n, mask=allowed & (n < blocks), other=0)
    kept_mass = tl.sum(tl.where(forced, x, 0))
    kept = tl.sum(forced.to(tl.int32))
    # The largest threshold whose entries are enough; 0, if none is.
    threshold = 0
    for i in range(UNIT_BITS + 1):
        higher = threshold | (1 << (UNIT_BITS - i))
        over = free & (x >= higher)
        over_mass = kept_mass + tl.sum(tl.where(over, x, 0))
        got = enough(over_mass, kept + number(over, BUDGET), wanted, least, most, BUDGET)
        threshold = tl.where(got, higher, threshold)
    over = free & (x > threshold)
    level = free & (x == threshold)
    mass_over = kept_mass + tl.sum(tl.where(over, x, 0))
    count_over = kept + tl.sum(over.to(tl.int32))
    earlier = tl.cumsum(level.to(tl.int32), 0) - level.to(tl.int32)
    # Products of a threshold and a count can exceed 32 bits.
    before = mass_over.to(tl.int64) + earlier.to(tl.int64) * threshold
    level = level & (enough(before, count_over + earlier, wanted, least, most, BUDGET) == 0)
    keep = (forced | over | level).to(tl.int32)
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
