"""The loops of `blocks`, compiled with numba: the same operations in the same order, so the same bits.

Imported where numba is installed; the first call in a process takes a second to compile, later processes read
the compiled code from numba's cache. No fast-math: products and sums are rounded one by one, as numpy does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}


@njit(inline="always")
def _from_bf16(bits):
    return np.float64(np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32))


@njit(inline="always")
def _from_f16(bits):
    low = np.uint32(np.uint32(bits & np.uint16(0x7FFF)) << np.uint32(13))
    value = np.float64(low.view(np.float32)) * 2.0**112
    if bits & np.uint16(0x7FFF) >= np.uint16(0x7C00):
        value = np.float64(np.uint32(low | np.uint32(0x7F800000)).view(np.float32))
    return -value if bits & np.uint16(0x8000) else value


@njit(**_OPTIONS)
def add_bf16(total, values, factor, first):
    """total = total + values * factor, or values * factor where it is the first."""
    if first:
        for i in range(total.shape[0]):
            total[i] = _from_bf16(values[i]) * factor
    else:
        for i in range(total.shape[0]):
            total[i] = np.float64(total[i]) + _from_bf16(values[i]) * factor


@njit(**_OPTIONS)
def add_f16(total, values, factor, first):
    """As `add_bf16`, for the bits of float16."""
    if first:
        for i in range(total.shape[0]):
            total[i] = _from_f16(values[i]) * factor
    else:
        for i in range(total.shape[0]):
            total[i] = np.float64(total[i]) + _from_f16(values[i]) * factor


@njit(**_OPTIONS)
def add_float(total, values, factor, first):
    """As `add_bf16`, for float32 and float64."""
    if first:
        for i in range(total.shape[0]):
            total[i] = np.float64(values[i]) * factor
    else:
        for i in range(total.shape[0]):
            total[i] = np.float64(total[i]) + np.float64(values[i]) * factor


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
