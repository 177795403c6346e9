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
    """low = grad basis, float32, and sums [B, s] of squares of each slice of the gradient."""
    at = tl.program_id(0) * BS + tl.arange(0, BS)
    column = tl.program_id(1) * BR + tl.arange(0, BR)
    matrix = tl.program_id(2).to(tl.int64)
    grad = tl.multiple_of(tl.load(grads + matrix).to(tl.pointer_type(GRAD)), ALIGN)
    basis = tl.multiple_of(tl.load(bases + matrix).to(tl.pointer_type(BASIS)), ALIGN)
    acc = tl.zeros([BS, BR], tl.float32)
    squares = tl.zeros([BS], tl.float32)
    for first in range(0, d, BD):
        inside = first + tl.arange(0, BD)
        g = tl.load(
            grad + at[:, None].to(tl.int64) * grad_s + inside[None, :].to(tl.int64) * grad_d,
            mask=(at[:, None] < s) & (inside[None, :] < d),
            other=0.0,
        )
        p = tl.load(
            basis + inside[:, None].to(tl.int64) * r + column[None, :],
            mask=(inside[:, None] < d) & (column[None, :] < r),
            other=0.0,
        )
        wide = g.to(tl.float32)
        squares += tl.sum(wide * wide, 1)
        acc = tl.dot(g.to(DOT), p.to(DOT), acc, input_precision=PRECISION)
    place = (matrix * s + at[:, None]) * r + column[None, :]
    tl.store(low + place, acc, mask=(at[:, None] < s) & (column[None, :] < r))
    tl.store(sums + matrix * s + at, squares, mask=(at < s) & (tl.program_id(1) == 0))


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
    words,
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
    """Store a tile, rounded by words below float32, as `storage.write_moment` does."""
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
        chance = (words >> 8).to(tl.float32) * (1.0 / 16777216)
        if SQUARED:
            code = tl.minimum(tl.floor(255 * tl.sqrt(share) + chance), 255.0)
        else:
            code = tl.minimum(tl.floor(127 * share + chance), 127.0)
            code = tl.where(value < 0, -code, code) + 128
        tl.store(stored + place, code.to(tl.uint8), mask=mask)
    elif tl.bfloat16 == DTYPE:
        tl.store(stored + place, _round(value, words), mask=mask)
    else:
        tl.store(stored + place, value, mask=mask)


@triton.jit
def _round(value, words):
    """float32 to bfloat16, up with a chance equal to the part that is cut off; not finite values stay so."""
    raised = (value.to(tl.uint32, bitcast=True) + (words & 0xFFFF)) & 0xFFFF0000
    finite = tl.abs(value) < float("inf")
    return tl.where(finite, raised.to(tl.float32, bitcast=True), value).to(tl.bfloat16)


@triton.jit
def adam(
    low,
    inverse_scale,
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
    MOMENT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    BS: tl.constexpr,
    BR: tl.constexpr,
):
    """Adam's moments in place and its direction, with sums [B, s] of squares of low and of the direction.

    low is divided by the gradient scaler's scale in place. Matrices that are not active keep their moments.
    """
    at = tl.program_id(0) * BS + tl.arange(0, BS)
    column = tl.arange(0, BR)
    matrix = tl.program_id(1).to(tl.int64)
    active = tl.load(actives + matrix) != 0
    held = (at[:, None] < s) & (column[None, :] < r)
    place = at[:, None].to(tl.int64) * r + column[None, :]
    scratch = matrix * s * r + place
    value = tl.load(low + scratch, mask=held & active, other=0.0) * tl.load(inverse_scale)
    mean = _read(means, mean_scales, matrix, place, at, s, r, held, MOMENT, ALIGN, False, BLOCK)
    square = _read(squares, square_scales, matrix, place, at, s, r, held, MOMENT, ALIGN, True, BLOCK)
    mean += (value - mean) * (1 - beta1)
    square = square * beta2 + value * value * (1 - beta2)
    found = tl.where(held, mean / (tl.sqrt(square) + eps), 0.0)
    key = tl.load(keys + matrix).to(tl.uint32)
    mask = held & active
    words = _words(key, place.to(tl.uint32))
    _write(mean, words, means, mean_scales, matrix, place, at, s, r, mask, MOMENT, ALIGN, False, BLOCK)
    words = _words(key, (place + s * r).to(tl.uint32))
    _write(square, words, squares, square_scales, matrix, place, at, s, r, mask, MOMENT, ALIGN, True, BLOCK)
    tl.store(low + scratch, value, mask=held)
    tl.store(direction + scratch, found, mask=held)
    tl.store(low_sums + matrix * s + at, tl.sum(value * value, 1), mask=at < s)
    tl.store(direction_sums + matrix * s + at, tl.sum(found * found, 1), mask=at < s)


@triton.jit
def blend(
    direction, low, on_direction, on_low, actives, s, r, HAS_LOW: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr
):
    """direction becomes on_direction direction - on_low low, what the basis is multiplied with."""
    at = tl.program_id(0) * BS + tl.arange(0, BS)
    column = tl.arange(0, BR)
    matrix = tl.program_id(1).to(tl.int64)
    held = (at[:, None] < s) & (column[None, :] < r)
    place = (matrix * s + at[:, None]) * r + column[None, :]
    value = tl.load(direction + place, mask=held, other=0.0).to(tl.float32) * tl.load(on_direction + matrix)
    if HAS_LOW:
        factor = tl.load(on_low + matrix * s + at, mask=at < s, other=0.0)
        value -= tl.load(low + place, mask=held, other=0.0) * factor[:, None]
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
    s,
    d,
    r,
    weight_s,
    weight_d,
    grad_s,
    grad_d,
    index_s,
    index_d,
    first_word,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    BASIS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_INSIDE: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """W - inside basis^T - on_grad grad, then less its share of decay; index strides count elements row by row."""
    at = tl.program_id(0) * BS + tl.arange(0, BS)
    across = tl.program_id(1) * BD + tl.arange(0, BD)
    matrix = tl.program_id(2).to(tl.int64)
    basis = tl.multiple_of(tl.load(bases + matrix).to(tl.pointer_type(BASIS)), ALIGN)
    acc = tl.zeros([BS, BD], tl.float32)
    if HAS_INSIDE:
        for first in range(0, r, BR):
            column = first + tl.arange(0, BR)
            z = tl.load(
                inside + (matrix * s + at[:, None]) * r + column[None, :],
                mask=(at[:, None] < s) & (column[None, :] < r),
                other=0.0,
            )
            p = tl.load(
                basis + across[None, :].to(tl.int64) * r + column[:, None],
                mask=(across[None, :] < d) & (column[:, None] < r),
                other=0.0,
            )
            acc = tl.dot(z.to(DOT), p.to(DOT), acc, input_precision=PRECISION)
    rows, columns = at[:, None].to(tl.int64), across[None, :].to(tl.int64)
    mask = (rows < s) & (columns < d)
    if HAS_GRAD:
        grad = tl.multiple_of(tl.load(grads + matrix).to(tl.pointer_type(GRAD)), ALIGN)
        g = tl.load(grad + rows * grad_s + columns * grad_d, mask=mask, other=0.0).to(tl.float32)
        acc += g * tl.load(on_grad + matrix * s + at, mask=at < s, other=0.0)[:, None]
    # a gradient that is not finite may be multiplied by zero above
    acc = tl.where(tl.load(actives + matrix) != 0, acc, 0.0)
    weight = tl.multiple_of(tl.load(weights + matrix).to(tl.pointer_type(WEIGHT)), ALIGN)
    weight += rows * weight_s + columns * weight_d
    value = tl.load(weight, mask=mask, other=0.0).to(tl.float32) - acc
    value -= tl.load(shares + matrix) * value
    if STOCHASTIC:
        index = (rows * index_s + columns * index_d + first_word).to(tl.uint32)
        tl.store(weight, _round(value, _words(tl.load(keys + matrix).to(tl.uint32), index)), mask=mask)
    else:
        tl.store(weight, value.to(WEIGHT), mask=mask)
