"""The arithmetic of an average, in one place for merges of files and for averages kept during training.

`weighted_sum` adds source by source, `divide_and_round` turns it into a result that is rounded once, to
the nearest, ties to even. With integer weights of sum W the weighted sum of values with p-bit significands is
exact in float64 while one element's values span at most 53 - p - log2(W) binades, and the one division then rounds
correctly; derived in this folder's README. Both run compiled where numba is installed, with the same bits.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from whimbrel.merge.pma import Weights

_Array = NDArray[Any]

# Elements whose accumulator, scratch and sources stay in a core's second-level cache.
BLOCK = 16_384

# Stored types that are averaged; bfloat16 has no numpy type and is handled by its bits.
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
SUMS = {"float64": np.dtype("<f8"), "float32": np.dtype("<f4")}
# Magnitudes from which a value rounds to infinity: half a step above the largest finite one.
_TOO_LARGE = {
    "F64": np.inf,
    "F32": (2 - 2.0**-24) * 2.0**127,
    "F16": (2 - 2.0**-11) * 2.0**15,
    "BF16": (2 - 2.0**-8) * 2.0**127,
}


class _Format(NamedTuple):
    """A 16-bit type as seen from the bits of a float64."""

    shift: np.uint64
    """Bits of the significand that it lacks."""
    rebias: np.uint64
    """What to take from a float64's bits for its exponent's bias."""
    least: float
    """Its smallest normal number."""
    unit: float
    """A float64 whose last place is worth its smallest subnormal number, so that adding it rounds to those."""


_SIXTEEN = {
    "BF16": _Format(np.uint64(45), np.uint64((1023 - 127) << 52), 2.0**-126, 2.0 ** (52 - 133)),
    "F16": _Format(np.uint64(42), np.uint64((1023 - 15) << 52), 2.0**-14, 2.0 ** (52 - 24)),
}


class BadValue(Exception):
    """An element that cannot be averaged; `source` is its source's number, None where the result overflows."""

    def __init__(self, element: int, source: int | None, value: float) -> None:
        super().__init__(element, source, value)
        self.element, self.source, self.value = element, source, value


@functools.cache
def compiled() -> ModuleType | None:
    """The compiled loops, or None where numba is missing or cannot run here."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        from whimbrel.merge import compiled as module
    except ImportError as error:
        warnings.warn(f"numba is installed but cannot be used ({error}); merging goes on with numpy", stacklevel=2)
        return None
    return module


def weighted_sum(
    total: _Array, sources: _Array, dtype: str, rows: Sequence[int], factors: Sequence[float], start: int = 0
) -> None:
    """total = Σ factors[k] · sources[rows[k], start : start + n].

    total: [n] float64 or float32. sources: [any number, at least start + n] as stored, of numpy type FLOATS[dtype],
    rows one after the other in memory: bfloat16 as its bits in uint16. Each element is widened, multiplied and added in
    float64, in the order of `rows`, and rounded once to the type of `total`, so the result depends on nothing else: not
    on blocks, threads, or whether numba is there.
    """
    # Adding to -0.0 changes no number, while 0.0 would turn -0.0 around.
    total.fill(-0.0)
    fast = compiled()
    if fast is not None:
        values = sources.view("<i2") if dtype == "F16" else sources
        fast.add(total, values, np.asarray(rows), np.asarray(factors, np.float64), start)
        return
    for at in range(0, len(total), BLOCK):
        part = total[at : at + BLOCK]
        for row, factor in zip(rows, factors, strict=True):
            values = sources[row, start + at : start + at + len(part)]
            term = np.multiply(widen(values, dtype), factor, dtype=np.float64)
            part[:] = np.add(part, term, out=term, dtype=np.float64)


def divide_and_round(total: _Array, divisor: float, out: _Array, dtype: str) -> bool:
    """out = total / divisor, divided in float64 and rounded once to the nearest number of the type, ties to even.

    total: [n] float64 or float32. out: [n] of numpy type FLOATS[dtype]. Returns whether every quotient is finite
    and within the type; where one is not, `out` is not to be used.
    """
    limit, sixteen, fast = _TOO_LARGE[dtype], _SIXTEEN.get(dtype), compiled()
    if fast is not None:
        if sixteen is None:
            return bool(fast.round_float(total, float(divisor), out, limit))
        return bool(fast.round_16(total, float(divisor), out.view("<u2"), limit, *sixteen))
    fine = True
    for start in range(0, len(total), BLOCK):
        value = np.divide(total[start : start + BLOCK], divisor, dtype=np.float64)
        size = np.abs(value)
        fine = fine and bool(size.max() < limit)
        part = out[start : start + BLOCK]
        if sixteen is None:
            np.copyto(part, value, casting="same_kind")
        else:
            part.view("<u2")[:] = _bits_16(value, size, sixteen)
    return fine


def _bits_16(value: _Array, size: _Array, to: _Format) -> _Array:
    bits = size.view("<u8") - to.rebias
    normal = (
        bits + ((np.uint64(1) << (to.shift - np.uint64(1))) - np.uint64(1)) + ((bits >> to.shift) & 1)
    ) >> to.shift
    small = (size + to.unit).view("<u8") - np.float64(to.unit).view("<u8")
    sign = (value.view("<u8") >> np.uint64(48)) & np.uint64(0x8000)
    return np.where(size < to.least, small, normal) | sign


def widen(values: _Array, dtype: str) -> _Array:
    """The values as numpy floats: those of bfloat16 from their bits, others as they are."""
    return (values.astype("<u4") << 16).view("<f4") if dtype == "BF16" else values


class Averager:
    """Weighted averages of float tensors; one instance per thread, since it owns its scratch memory."""

    def __init__(self, weights: Weights, sums: str = "float64") -> None:
        self.factors, self.divisor = factors(weights)
        self._is_average = abs(float(weights.total) - 1) < 1e-9
        self._sum = np.empty(BLOCK, SUMS[sums])

    def average(self, sources: _Array, rows: Sequence[int], dtype: str, out: memoryview, out_dtype: str) -> None:
        """Put Σ w_i · sources[rows[i]] into `out`.

        sources: [any number, bytes] uint8, rows one after the other in memory, each a multiple of 8 bytes long and
        beginning with as many elements of `dtype` as `out` has of `out_dtype`.

        Raises BadValue for NaN and infinities in a source and for results too large for `out_dtype`.
        """
        values, result = sources.view(FLOATS[dtype]), np.frombuffer(out, FLOATS[out_dtype])
        with np.errstate(all="ignore"):
            for start in range(0, len(result), BLOCK):
                part = result[start : start + BLOCK]
                if not self._block(values, rows, dtype, start, part, out_dtype):
                    raise self._bad_value(self._inputs(values, rows, start, len(part)), dtype, start)

    @staticmethod
    def _inputs(values: _Array, rows: Sequence[int], start: int, size: int) -> list[_Array]:
        return [values[row, start : start + size] for row in rows]

    def _block(self, values: _Array, rows: Sequence[int], dtype: str, start: int, out: _Array, out_dtype: str) -> bool:
        if dtype == "F64" and self._is_average:
            around = self._around_newest(self._inputs(values, rows, start, len(out)))
            return divide_and_round(around, 1.0, out, out_dtype)
        total = self._sum[: len(out)]
        weighted_sum(total, values, dtype, rows, self.factors, start)
        return divide_and_round(total, self.divisor, out, out_dtype)

    def _around_newest(self, block: list[_Array]) -> _Array:
        """x_N + Σ w_i (x_i - x_N): no type is wider than float64, but differences of close values are exact."""
        newest = block[-1]
        total = np.zeros(len(newest))
        for values, factor in zip(block[:-1], self.factors[:-1], strict=True):
            total += np.subtract(values, newest) * factor
        total /= self.divisor
        # Adding zero would turn -0.0 into 0.0.
        return np.where(total != 0, total + newest, newest)

    def _bad_value(self, block: list[_Array], dtype: str, start: int) -> BadValue:
        wide = [widen(values, dtype).astype(np.float64) for values in block]
        for number, values in enumerate(wide):
            wrong = np.flatnonzero(~np.isfinite(values))
            if len(wrong):
                return BadValue(start + int(wrong[0]), number, float(values[wrong[0]]))
        total = np.sum([values * factor for values, factor in zip(wide, self.factors, strict=True)], 0) / self.divisor
        worst = int(np.argmax(np.abs(total)))
        return BadValue(start + worst, None, float(total[worst]))


def factors(weights: Weights) -> tuple[tuple[float, ...], float]:
    """What to multiply each source with, and what to divide the sum by: integers wherever the weights allow."""
    integers = weights.integers()
    if integers is None:
        return weights.floats(), 1.0
    return tuple(float(n) for n in integers[0]), float(integers[1])
