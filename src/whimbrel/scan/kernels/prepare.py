"""What the states do not enter: gates summed over a chunk, and the triangular solves inside it. Token-parallel.

For one stream with rate b, unit lower triangular X = (I + strict(K K^T) diag(b))^-1 and G the sums of the log decay,
the stored tile is

    L_ij = exp(G_(i-1) - G_j) X_ij   for j < i, else 0

so that with D = V - exp(G) K S0 the delta rule's error is E = D + alpha (L D), and the prediction at the key before
the token's own decay is exp(G_(i-1)) K S0 - L D. Neither divides by the decay or subtracts nearly equal numbers.
A stream that adds its values needs exp(G_(i-1) - G_j) (K K^T)_ij instead: its prediction is exp(G_(i-1)) K S0 + L U.
"""

from __future__ import annotations

import triton
import triton.language as tl

COUNTS = ["tokens", "chunks", "stretches", "parts", "H", "HV"]
"""Arguments whose value must not lead to another compilation."""
LOG2E = tl.constexpr(1.4426950408889634)
# exp(-40) = 4e-18 is nothing beside 1; a lower floor would only cost digits in differences of the sums.
LOG_LEAST = tl.constexpr(-40.0)


@triton.jit
def unit_lower_inverse(m, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + m)^-1 for m [C, C] strictly lower triangular in fp32, C = 16, 32 or 64.

    Substitution within blocks of 8, which no set of keys can make inaccurate; then blocks are joined in pairs.
    """
    NB: tl.constexpr = C // 8
    within = tl.arange(0, 8)
    block = tl.arange(0, NB)
    same = block[:, None, None, None] == block[None, None, :, None]
    diagonal = tl.sum(tl.where(same, tl.reshape(m, [NB, 8, NB, 8]), 0.0), axis=2)
    x = tl.where(within[None, :, None] == within[None, None, :], 1.0, 0.0 * diagonal)
    # Column by column: both factors of each update lie as x does, so nothing moves between warps.
    for i in range(7):
        column = tl.sum(tl.where(within[None, None, :] == i, diagonal, 0.0), axis=2)
        row = tl.sum(tl.where(within[None, :, None] == i, x, 0.0), axis=1)
        x -= column[:, :, None] * row[:, None, :]
    x = tl.reshape(tl.where(same, tl.broadcast_to(x[:, :, None, :], [NB, 8, NB, 8]), 0.0), [C, C])
    place = tl.arange(0, C)
    x = _join_blocks(x, m, place, 8, PRECISION)
    if C >= 32:
        x = _join_blocks(x, m, place, 16, PRECISION)
    if C >= 64:
        x = _join_blocks(x, m, place, 32, PRECISION)
    return x


@triton.jit
def _join_blocks(x, m, place, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """Inverses of diagonal blocks of SIZE -> of blocks of 2 SIZE: [[A, 0], [B, D]]^-1 has -D^-1 B A^-1 below."""
    i, j = place[:, None], place[None, :]
    below = (i // SIZE == j // SIZE + 1) & (i // (2 * SIZE) == j // (2 * SIZE))
    between = tl.where(below, m, 0.0)
    if PRECISION == "half":
        # Both factors are of order 1 for keys of unit length, and the result is rounded to fewer digits than these.
        half = x.to(tl.float16)
        change = tl.dot(tl.dot(half, between.to(tl.float16)).to(tl.float16), half)
    else:
        change = tl.dot(tl.dot(x, between, input_precision=PRECISION), x, input_precision=PRECISION)
    return x - change


@triton.jit(do_not_specialize=COUNTS)
def prepare(
    k,
    log_decay,
    first_rate,
    second_rate,
    gates,
    tiles,
    chunk_start,
    chunk_end,
    tokens,
    chunks,
    H,
    HV,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    DELTA: tl.constexpr,
    TWO: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE: tl.constexpr,
):
    """One chunk of one value head, and of one stream where there are two inverses; grid (chunks * HV * inverses,).

    Fills gates [3, HV, tokens], the sums of the log decay and the two rates, and tiles [2, HV, chunks, C, C].
    """
    INVERSES: tl.constexpr = 2 if TWO and DELTA else 1
    pid = tl.program_id(0)
    stream, c, hv = pid % INVERSES, pid // INVERSES // HV, pid // INVERSES % HV
    start = tl.load(chunk_start + c).to(tl.int64)
    end = tl.load(chunk_end + c).to(tl.int64)
    if end <= start:
        return
    place = tl.arange(0, C)
    t = start + place
    ok = t < end
    log = tl.load(log_decay + t * HV + hv, mask=ok, other=0.0).to(tl.float32)
    log = tl.where(log < LOG_LEAST, LOG_LEAST, log) * LOG2E
    until = tl.cumsum(log, axis=0)
    before = until - log
    row = gates + hv.to(tl.int64) * tokens + t
    plane = HV * tokens.to(tl.int64)
    rate = tl.load(second_rate + t * HV + hv, mask=ok, other=0.0).to(tl.float32)
    if TWO:
        first = tl.load(first_rate + t * HV + hv, mask=ok, other=0.0).to(tl.float32)
        tl.store(row + plane, first, mask=ok & (stream == 0))
    tl.store(row + 2 * plane, rate, mask=ok & (stream == INVERSES - 1))
    tl.store(row, until, mask=ok & (stream == 0))
    if DELTA or TWO:
        col = tl.arange(0, BK)
        keys = k + (t[:, None] * H + hv // (HV // H)) * K + col[None, :]
        b_k = tl.load(keys, mask=ok[:, None] & (col[None, :] < K), other=0.0)
        tile = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
        lower = place[:, None] > place[None, :]
        tile = tl.where(lower, tile, 0.0)
        which = stream
        if DELTA:
            if TWO:
                rate = tl.where(stream == 0, first, rate)
            else:
                which = 1
            tile = unit_lower_inverse(tile * rate[None, :], C, SOLVE)
        decay = tl.where(lower, tl.exp2(tl.minimum(before[:, None] - until[None, :], 0.0)), 0.0)
        at = (((which * HV + hv).to(tl.int64) * chunks + c) * C + place[:, None]) * C + place[None, :]
        tl.store(tiles + at, (tile * decay).to(tiles.dtype.element_ty))
