"""The loops of `blocks`, compiled with numba: the same operations in the same order, so the same bits.

Imported where numba is installed; the first call in a process takes a second to compile, later processes read
the compiled code from numba's cache. No fast-math: products and sums are rounded one by one, as numpy does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}


def _wide(value):
    """The float64 of a stored element: uint16 holds the bits of bfloat16, int16 those of float16."""
    raise NotImplementedError  # what numba compiles is chosen below, by type


@overload(_wide)
def _wide_by_type(value):
    if value == types.uint16:
        return lambda value: np.float64(np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32))
    if value == types.int16:
        return _from_f16
    return lambda value: np.float64(value)


def _from_f16(value):
    bits = np.uint16(value)
    low = np.uint32(np.uint32(bits & np.uint16(0x7FFF)) << np.uint32(13))
    size = np.float64(low.view(np.float32)) * 2.0**112
    if bits & np.uint16(0x7FFF) >= np.uint16(0x7C00):
        size = np.float64(np.uint32(low | np.uint32(0x7F800000)).view(np.float32))
    return -size if bits & np.uint16(0x8000) else size


@njit(**_OPTIONS)
def add(total, sources, rows, factors, start):
    """total += factors[k] * sources[rows[k]] from `start` on, for one k after the other, each rounded to its type.

    Four at a time: `total` is read and written once for them, and their loads wait side by side.
    """
    rounded, stop = total.dtype.type, start + total.shape[0]
    k = 0
    while k + 4 <= len(rows):
        a, b = sources[rows[k], start:stop], sources[rows[k + 1], start:stop]
        c, d = sources[rows[k + 2], start:stop], sources[rows[k + 3], start:stop]
        p, q, r, s = factors[k], factors[k + 1], factors[k + 2], factors[k + 3]
        for i in range(total.shape[0]):
            value = rounded(np.float64(total[i]) + _wide(a[i]) * p)
            value = rounded(np.float64(value) + _wide(b[i]) * q)
            value = rounded(np.float64(value) + _wide(c[i]) * r)
            total[i] = np.float64(value) + _wide(d[i]) * s
        k += 4
    while k < len(rows):
        a, p = sources[rows[k], start:stop], factors[k]
        for i in range(total.shape[0]):
            total[i] = np.float64(total[i]) + _wide(a[i]) * p
        k += 1


@njit(**_OPTIONS)
def round_16(total, divisor, out, limit, shift, rebias, least, unit):
    """out = bits of total / divisor in a 16-bit type; whether every quotient is below `limit`, which no NaN is."""
    fine = True
    one, sign = np.uint64(1), np.uint64(0x8000)
    below_half = (one << (shift - one)) - one
    base = np.float64(unit).view(np.uint64)
    for i in range(total.shape[0]):
        value = np.float64(total[i]) / divisor
        size = abs(value)
        fine &= size < limit
        bits = np.float64(size).view(np.uint64) - rebias
        normal = (bits + below_half + ((bits >> shift) & one)) >> shift
        small = np.float64(size + unit).view(np.uint64) - base
        result = small if size < least else normal
        out[i] = np.uint16(result | ((np.float64(value).view(np.uint64) >> np.uint64(48)) & sign))
    return fine


@njit(**_OPTIONS)
def round_float(total, divisor, out, limit):
    """out = total / divisor in the type of `out`; whether every quotient is below `limit`, which no NaN is."""
    fine = True
    for i in range(total.shape[0]):
        value = np.float64(total[i]) / divisor
        fine &= abs(value) < limit
        out[i] = value
    return fine
