"""Kernels over B matrices of one shape that lie anywhere: tables of addresses [B] stand for stacks, which would copy.

A matrix is s slices of d elements, whichever of its dimensions these are; low-rank tensors are [B, s, r], contiguous.
`project` and `write` are the two that read gradients; `adam` and `blend` work on low-rank tensors between them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _words(key, index):
    """As `counter.words`: uint32, where products wrap by themselves."""
    return _mix(_mix(index ^ key) + key)


@triton.jit
def draw(bases, keys, count, size, BLOCK: tl.constexpr):
    """Gaussian numbers [B, count] of standard deviation `size`, as `counter.normal` draws them."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    matrix = tl.program_id(1).to(tl.int64)
    key = tl.load(keys + matrix).to(tl.uint32)
    first = _words(key, index.to(tl.uint32)).to(tl.float32)
    second = _words(key, (index + count).to(tl.uint32)).to(tl.float32)
    radius = tl.sqrt(-2 * tl.log((first + 1) * 2.3283064365386963e-10))
    value = radius * tl.cos(second * 1.4629180792671596e-09) * size
    tl.store(bases + matrix * count + index, value, mask=index < count)


@triton.jit
def unpack(bases, codes, scales, d, r, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Bases [B, d, r] of packed codes, as `storage.decode_basis`."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    matrix = tl.program_id(1).to(tl.int64)
    held = index < d * r
    row, column = index // r, index % r
    pair = tl.load(tl.load(codes + matrix).to(tl.pointer_type(tl.uint8)) + row // 2 * r + column, mask=held, other=0)
    scale = tl.load(tl.load(scales + matrix).to(tl.pointer_type(tl.float32)) + row // GROUP * r + column, mask=held)
    code = tl.where(row % 2 == 1, pair >> 4, pair & 15).to(tl.float32) - 8
    tl.store(bases + matrix * d * r + index, code * scale, mask=held)


@triton.jit
def narrow(bases, stored, count, BLOCK: tl.constexpr):
    """Bases [B, count] of float32 ones, rounded to the dtype of `bases`."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    matrix = tl.program_id(1).to(tl.int64)
    value = tl.load(tl.load(stored + matrix).to(tl.pointer_type(tl.float32)) + index, mask=index < count)
    tl.store(bases + matrix * count + index, value, mask=index < count)


@triton.jit
def _bits(row, start, column):
    """As `counter.lattice`, 16 bits from words of rows [M], the word of column 0, and columns [N]."""
    x = row[:, None] ^ ((start + column.to(tl.uint32)) * 0x9E3779B9)[None, :]
    return (x * 0x85EBCA6B) >> 16


@triton.jit
def project(
    grads,
    bases,
    low,
    sums,
    s,
    d,
    r,
    grad_s,
    grad_d,
    GRAD: tl.constexpr,
    BASIS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """low = grad basis, and sums [B, s] of squares of each slice of the gradient."""
    at = tl.program_id(0) * BS + tl.arange(0, BS)
    column = tl.program_id(1) * BR + tl.arange(0, BR)
    matrix = tl.program_id(2).to(tl.int64)
    grad = tl.multiple_of(tl.load(grads + matrix).to(tl.pointer_type(GRAD)), ALIGN)
    basis = tl.multiple_of(tl.load(bases + matrix).to(tl.pointer_type(BASIS)), ALIGN)
    acc = tl.zeros([BS, BR], tl.float32)
    squares = tl.zeros([BS, BD], tl.float32)
    for first in range(0, d, BD):
        inside = first + tl.arange(0, BD)
        g = tl.load(
            grad + at[:, None] * grad_s + inside[None, :] * grad_d,
            mask=(at[:, None] < s) & (inside[None, :] < d),
            other=0.0,
        )
        p = tl.load(
            basis + inside[:, None] * r + column[None, :],
            mask=(inside[:, None] < d) & (column[None, :] < r),
            other=0.0,
        )
        wide = g.to(tl.float32)
        squares += wide * wide
        acc = tl.dot(g.to(DOT), p.to(DOT), acc, input_precision=PRECISION)
    low += matrix * s * r
    tl.store(low + at[:, None] * r + column[None, :], acc, mask=(at[:, None] < s) & (column[None, :] < r))
    tl.store(sums + matrix * s + at, tl.sum(squares, 1), mask=(at < s) & (tl.program_id(1) == 0))


@triton.jit
def _one_less_power(count, log_beta):
    """1 - beta^count, in float32 without cancellation."""
    x = count * log_beta
    series = 1 + x / 6 * (1 + x / 7 * (1 + x / 8))
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * series)))
    return tl.where(x > -0.5, -x * series, 1 - tl.exp(x))


@triton.jit
def settle(
    sums,
    totals,
    slice_norms,
    actives,
    steps,
    base_words,
    keys,
    corrections,
    row_words,
    column_words,
    grad_scale,
    found_inf,
    s,
    m,
    first_row,
    columns_at,
    log_beta1,
    log_beta2,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    HAS_WORDS: tl.constexpr,
    BS: tl.constexpr,
):
    """What a matrix's step follows from: norms of its slices, whether it counts, its count, Adam's correction, its key.

    One program a matrix. The step in the state is counted here. As `counter.key` and `lowrank.bias_correction`.
    HAS_WORDS: also the words of the rows [B, m] and of the columns [B] by which `counter.lattice` rounds the weights.
    """
    matrix = tl.program_id(0).to(tl.int64)
    inverse = 1.0
    if HAS_SCALE:
        inverse = 1.0 / tl.load(grad_scale)
    total = 0.0
    for first in range(0, s, BS):
        at = first + tl.arange(0, BS)
        norm = tl.sqrt(tl.load(sums + matrix * s + at, mask=at < s, other=0.0)) * inverse
        total += tl.sum(norm * norm, 0)
    if HAS_TOTAL:  # of all processes' slices
        total = tl.load(totals + matrix) * inverse * inverse
    size = tl.sqrt(total)
    active = (size > 0) & (size < float("inf"))
    if HAS_FOUND:
        active = active & (tl.load(found_inf) == 0)
    for first in range(0, s, BS):
        at = first + tl.arange(0, BS)
        norm = tl.sqrt(tl.load(sums + matrix * s + at, mask=at < s, other=0.0)) * inverse
        tl.store(slice_norms + matrix * s + at, tl.where(active, norm, 0.0), mask=at < s)
    place = tl.load(steps + matrix).to(tl.pointer_type(tl.float32))
    step = tl.load(place) + active.to(tl.float32)
    tl.store(place, step)
    tl.store(actives + matrix, active)
    key = _mix(tl.load(base_words + matrix).to(tl.uint32) + step.to(tl.int64).to(tl.uint32) * 0x9E3779B9)
    tl.store(keys + matrix, key.to(tl.int64))
    count = tl.maximum(step, 1.0)
    correction = tl.sqrt(_one_less_power(count, log_beta2)) / _one_less_power(count, log_beta1)
    tl.store(corrections + matrix, correction)
    if HAS_WORDS:
        word = key.to(tl.uint32)
        tl.store(column_words + matrix, _words(word, columns_at.to(tl.uint32)).to(tl.int32, bitcast=True))
        for first in range(0, m, BS):
            at = first + tl.arange(0, BS)
            row = _words(word, (at.to(tl.int64) + first_row).to(tl.uint32)).to(tl.int32, bitcast=True)
            tl.store(row_words + matrix * m + at, row, mask=at < m)


@triton.jit
def _read(
    table,
    scales,
    matrix,
    place,
    at,
    s,
    r,
    mask,
    DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile [BS, BR] of a moment, float32; place counts elements, at the slices."""
    stored = tl.multiple_of(tl.load(table + matrix).to(tl.pointer_type(DTYPE)), ALIGN)
    value = tl.load(stored + place, mask=mask, other=0).to(tl.float32)
    if tl.uint8 == DTYPE:
        BS: tl.constexpr = place.shape[0]
        BLOCKS: tl.constexpr = place.shape[1] // BLOCK
        number = (r + BLOCK - 1) // BLOCK
        block = tl.arange(0, BLOCKS)
        scale = tl.load(
            tl.load(scales + matrix).to(tl.pointer_type(tl.float32)) + at[:, None] * number + block[None, :],
            mask=(at[:, None] < s) & (block[None, :] < number),
            other=0.0,
        )
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], [BS, BLOCKS, BLOCK]), [BS, BLOCKS * BLOCK])
        if SQUARED:
            value = value / 255
            value = value * value
            value = value * value * scale
        else:
            value = (value - 128) / 127
            value = value * tl.abs(value) * scale
    return value


@triton.jit
def _write(
    value,
    bits,
    table,
    scales,
    matrix,
    place,
    at,
    s,
    r,
    mask,
    DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store a tile, rounded by bits below float32, as `storage.write_moment` does."""
    stored = tl.multiple_of(tl.load(table + matrix).to(tl.pointer_type(DTYPE)), ALIGN)
    if tl.uint8 == DTYPE:
        BS: tl.constexpr = place.shape[0]
        BLOCKS: tl.constexpr = place.shape[1] // BLOCK
        number = (r + BLOCK - 1) // BLOCK
        block = tl.arange(0, BLOCKS)
        size = tl.abs(tl.where(mask, value, 0.0))
        largest = tl.max(tl.reshape(size, [BS, BLOCKS, BLOCK]), 2)
        tl.store(
            tl.load(scales + matrix).to(tl.pointer_type(tl.float32)) + at[:, None] * number + block[None, :],
            largest,
            mask=(at[:, None] < s) & (block[None, :] < number) & (tl.max(mask.to(tl.int32), 1)[:, None] > 0),
        )
        whole = tl.reshape(tl.broadcast_to(largest[:, :, None], [BS, BLOCKS, BLOCK]), [BS, BLOCKS * BLOCK])
        share = tl.sqrt(size / tl.maximum(whole, 1.1754943508222875e-38))
        chance = bits.to(tl.float32) * (1.0 / 65536)
        if SQUARED:
            code = tl.minimum(tl.floor(255 * tl.sqrt(share) + chance), 255.0)
        else:
            code = tl.minimum(tl.floor(127 * share + chance), 127.0)
            code = tl.where(value < 0, -code, code) + 128
        tl.store(stored + place, code.to(tl.uint8), mask=mask)
    elif tl.bfloat16 == DTYPE:
        tl.store(stored + place, _round(value, bits), mask=mask)
    else:
        tl.store(stored + place, value, mask=mask)


@triton.jit
def _round(value, bits):
    """float32 to bfloat16, up with a chance equal to the part that is cut off; not finite values stay so.

    Infinity's low bits are zero, so 16 more do not reach its high ones; NaN's may be ones.
    """
    raised = (value.to(tl.uint32, bitcast=True) + bits) >> 16
    raised = tl.where(value == value, raised, 0x7FC0)
    return raised.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def adam(
    low,
    grad_scale,
    direction,
    low_sums,
    direction_sums,
    means,
    mean_scales,
    squares,
    square_scales,
    actives,
    keys,
    s,
    r,
    beta1,
    beta2,
    eps,
    first_mean,
    first_square,
    columns_at,
    HAS_SCALE: tl.constexpr,
    MOMENT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    BS: tl.constexpr,
    BR: tl.constexpr,
):
    """Adam's moments in place and its direction, with norms [B, s] of the slices of low and of the direction.

    low is divided by the gradient scaler's scale in place. Matrices that are not active keep their moments.
    """
    at = tl.program_id(0) * BS + tl.arange(0, BS)
    column = tl.arange(0, BR)
    matrix = tl.program_id(1).to(tl.int64)
    active = tl.load(actives + matrix) != 0
    held = (at[:, None] < s) & (column[None, :] < r)
    place = at[:, None] * r + column[None, :]
    low += matrix * s * r
    direction += matrix * s * r
    value = tl.load(low + place, mask=held & active, other=0.0).to(tl.float32)
    if HAS_SCALE:
        value = value / tl.load(grad_scale)
        tl.store(low + place, value, mask=held)
    mean = _read(means, mean_scales, matrix, place, at, s, r, held, MOMENT, ALIGN, False, BLOCK)
    square = _read(squares, square_scales, matrix, place, at, s, r, held, MOMENT, ALIGN, True, BLOCK)
    mean += (value - mean) * (1 - beta1)
    square = square * beta2 + value * value * (1 - beta2)
    found = tl.where(held, mean / (tl.sqrt(square) + eps), 0.0)
    tl.store(direction + place, found, mask=held)
    tl.store(low_sums + matrix * s + at, tl.sqrt(tl.sum(value * value, 1)), mask=at < s)
    tl.store(direction_sums + matrix * s + at, tl.where(active, tl.sqrt(tl.sum(found * found, 1)), 0.0), mask=at < s)
    key = tl.load(keys + matrix).to(tl.uint32)
    start = _words(key, columns_at.to(tl.uint32))
    mask = held & active
    bits = _bits(_words(key, (at + first_mean).to(tl.uint32)), start, column)
    _write(mean, bits, means, mean_scales, matrix, place, at, s, r, mask, MOMENT, ALIGN, False, BLOCK)
    bits = _bits(_words(key, (at + first_square).to(tl.uint32)), start, column)
    _write(square, bits, squares, square_scales, matrix, place, at, s, r, mask, MOMENT, ALIGN, True, BLOCK)


@triton.jit
def _measures(grad_norms, low_norms, direction_norms, start, s, kept, MATRIX: tl.constexpr, BS: tl.constexpr):
    """Squared norms of low and of the direction over the slices from `start` on, and of the residual under their ratio.

    MATRIX: the residual as it is, which one ratio for all slices multiplies later.
    """
    low_sum, direction_sum, total = 0.0, 0.0, 0.0
    for first in range(0, s, BS):
        at = start + first + tl.arange(0, BS)
        mask = first + tl.arange(0, BS) < s
        grad = tl.load(grad_norms + at, mask=mask, other=0.0)
        low = tl.load(low_norms + at, mask=mask, other=0.0)
        direction = tl.load(direction_norms + at, mask=mask, other=0.0)
        rest = grad * grad - (2 * kept - kept * kept) * low * low
        if not MATRIX:
            factor = direction / (low + 1e-8)
            rest *= factor * factor
        low_sum += tl.sum(low * low, 0)
        direction_sum += tl.sum(direction * direction, 0)
        total += tl.sum(rest, 0)
    return low_sum, direction_sum, total


@triton.jit
def measure(grad_norms, low_norms, direction_norms, measured, s, kept, MATRIX: tl.constexpr, BS: tl.constexpr):
    """`_measures` of the slices here, [B, 3], which processes add up; one program a matrix."""
    matrix = tl.program_id(0).to(tl.int64)
    low, direction, total = _measures(grad_norms, low_norms, direction_norms, matrix * s, s, kept, MATRIX, BS)
    tl.store(measured + matrix * 3, low)
    tl.store(measured + matrix * 3 + 1, direction)
    tl.store(measured + matrix * 3 + 2, total)


@triton.jit
def coefficients(
    grad_norms,
    low_norms,
    direction_norms,
    measured,
    corrections,
    actives,
    limiter_norms,
    on_direction,
    on_low,
    on_grad,
    shares,
    rate,
    grad_scale,
    s,
    lr,
    weight_decay,
    inside,
    outside,
    kept,
    gamma,
    RATE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_MEASURES: tl.constexpr,
    HAS_INSIDE: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    EARLY: tl.constexpr,
    MATRIX: tl.constexpr,
    BS: tl.constexpr,
):
    """Factors of the update and shares of decay, as a method's function in PyTorch has them; one program a matrix.

    on_direction, shares [B]; on_low, on_grad [B, s]. limiter_norms: addresses of the state's, written here. The numbers
    are those of `lowrank.Factors`. RATE: whether the learning rate is read from `rate`; HAS_MEASURES: whether sums over
    all slices are read from `measured`, as some of the slices are elsewhere.
    """
    matrix = tl.program_id(0).to(tl.int64)
    active = tl.load(actives + matrix) != 0
    correction = tl.load(corrections + matrix)
    if RATE:
        lr = tl.load(rate).to(tl.float32)
    size = tl.where(active, lr * correction, 0.0)
    tl.store(shares + matrix, tl.where(active, lr * weight_decay, 0.0))
    if HAS_INSIDE:
        tl.store(on_direction + matrix, size * inside)
    if HAS_GRAD:
        if HAS_MEASURES:
            low_sum = tl.load(measured + matrix * 3)
            direction_sum = tl.load(measured + matrix * 3 + 1)
            total = tl.load(measured + matrix * 3 + 2)
        else:
            low_sum, direction_sum, total = _measures(
                grad_norms, low_norms, direction_norms, matrix * s, s, kept, MATRIX, BS
            )
        ratio = 1.0
        if MATRIX:
            ratio = tl.sqrt(direction_sum) / (tl.sqrt(low_sum) + 1e-8)
        norm = ratio * tl.sqrt(tl.maximum(total, 0.0))
        if EARLY:
            norm *= correction
        scale = 1.0
        if gamma != 0:
            place = tl.load(limiter_norms + matrix).to(tl.pointer_type(tl.float32))
            previous = tl.load(place)
            ceiling = gamma * (previous + 1e-8)
            scale = tl.where((previous > 0) & (norm > ceiling), ceiling / norm, 1.0)
            after = norm * scale
            tl.store(place, after, mask=active & (after > 0) & (after < float("inf")))
        size *= scale * outside
        unscaled = 1.0
        if HAS_SCALE:
            unscaled = tl.load(grad_scale)
        for first in range(0, s, BS):
            at = matrix * s + first + tl.arange(0, BS)
            mask = first + tl.arange(0, BS) < s
            factor = ratio
            if not MATRIX:
                low = tl.load(low_norms + at, mask=mask, other=0.0)
                factor = tl.load(direction_norms + at, mask=mask, other=0.0) / (low + 1e-8)
            value = tl.broadcast_to(factor * size, [BS])
            if HAS_INSIDE:
                tl.store(on_low + at, value * kept, mask=mask)
            tl.store(on_grad + at, value / unscaled, mask=mask)


@triton.jit
def blend(
    direction, low, on_direction, on_low, actives, s, r, HAS_LOW: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr
):
    """direction becomes on_direction direction - on_low low, what the basis is multiplied with."""
    at = tl.program_id(0) * BS + tl.arange(0, BS)
    column = tl.arange(0, BR)
    matrix = tl.program_id(1).to(tl.int64)
    held = (at[:, None] < s) & (column[None, :] < r)
    place = at[:, None] * r + column[None, :]
    low += matrix * s * r
    direction += matrix * s * r
    value = tl.load(direction + place, mask=held, other=0.0).to(tl.float32) * tl.load(on_direction + matrix)
    if HAS_LOW:
        factor = tl.load(on_low + matrix * s + at, mask=at < s, other=0.0)
        value -= tl.load(low + place, mask=held, other=0.0).to(tl.float32) * factor[:, None]
    active = tl.load(actives + matrix) != 0
    tl.store(direction + place, tl.where(active, value, 0.0), mask=held)


@triton.jit
def write(
    weights,
    grads,
    bases,
    inside,
    on_grad,
    shares,
    actives,
    keys,
    m,
    n,
    r,
    weight_m,
    weight_n,
    grad_m,
    grad_n,
    first_row,
    first_column,
    columns_at,
    LEFT: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    BASIS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_INSIDE: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """W - inside basis^T - on_grad grad (on the left: basis inside^T), then less its share of decay.

    Tiles are those of the weights, [m, n], whichever side is projected. Weights and gradients are asked for before the
    product, so that they arrive during it.
    """
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    matrix = tl.program_id(2).to(tl.int64)
    mask = (rows[:, None] < m) & (columns[None, :] < n)
    weight = tl.multiple_of(tl.load(weights + matrix).to(tl.pointer_type(WEIGHT)), ALIGN)
    weight += rows[:, None] * weight_m + columns[None, :] * weight_n
    old = tl.load(weight, mask=mask, other=0.0)
    g = old
    if HAS_GRAD:
        grad = tl.multiple_of(tl.load(grads + matrix).to(tl.pointer_type(GRAD)), ALIGN)
        g = tl.load(grad + rows[:, None] * grad_m + columns[None, :] * grad_n, mask=mask, other=0.0)
    acc = tl.zeros([BM, BN], tl.float32)
    if HAS_INSIDE:
        basis = tl.multiple_of(tl.load(bases + matrix).to(tl.pointer_type(BASIS)), ALIGN)
        if LEFT:
            first_factor, second_factor = basis, inside + matrix * n * r
        else:
            first_factor, second_factor = inside + matrix * m * r, basis
        for first in range(0, r, BR):
            column = first + tl.arange(0, BR)
            a = tl.load(
                first_factor + rows[:, None] * r + column[None, :],
                mask=(rows[:, None] < m) & (column[None, :] < r),
                other=0.0,
            )
            b = tl.load(
                second_factor + columns[None, :] * r + column[:, None],
                mask=(columns[None, :] < n) & (column[:, None] < r),
                other=0.0,
            )
            acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=PRECISION)
    if HAS_GRAD:
        if LEFT:
            factor = tl.load(on_grad + matrix * n + columns, mask=columns < n, other=0.0)[None, :]
        else:
            factor = tl.load(on_grad + matrix * m + rows, mask=rows < m, other=0.0)[:, None]
        acc += g.to(tl.float32) * factor
    # a gradient that is not finite may be multiplied by zero above
    acc = tl.where(tl.load(actives + matrix) != 0, acc, 0.0)
    value = old.to(tl.float32) - acc
    value -= tl.load(shares + matrix) * value
    if STOCHASTIC:
        key = tl.load(keys + matrix).to(tl.uint32)
        row = _words(key, (rows.to(tl.int64) + first_row).to(tl.uint32))
        bits = _bits(row, _words(key, columns_at.to(tl.uint32)), columns + first_column)
        tl.store(weight, _round(value, bits), mask=mask)
    else:
        tl.store(weight, value.to(WEIGHT), mask=mask)
