"""The arithmetic of an average: blocks in float64, each result rounded once to the nearest, ties to even.

With integer weights of sum W the weighted sum of values with p-bit significands is exact while one element's
values span at most 53 - p - log2(W) binades, and the one division then rounds correctly; derived in this
folder's README.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whimbrel.merge.pma import Weights

_Array = NDArray[Any]

# Elements whose accumulator, scratch and sources stay in a core's second-level cache.
BLOCK = 32_768

# Stored types that are averaged; bfloat16 has no numpy type and is handled as the upper half of a float32.
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# Magnitudes from which a value rounds to infinity: half a step above the largest finite one.
_TOO_LARGE = {
    "F64": np.inf,
    "F32": (2 - 2.0**-24) * 2.0**127,
    "F16": (2 - 2.0**-11) * 2.0**15,
    "BF16": (2 - 2.0**-8) * 2.0**127,
}


class BadValue(Exception):
    """An element that cannot be averaged; `source` is its source's number, None where the result overflows."""

    def __init__(self, element: int, source: int | None, value: float) -> None:
        super().__init__(element, source, value)
        self.element, self.source, self.value = element, source, value


class Averager:
    """Weighted sums of float tensors; one instance per thread, since it owns its scratch memory."""

    def __init__(self, weights: Weights) -> None:
        integers = weights.integers()
        if integers is None:
            self._factors, self._divisor = weights.floats(), 1.0
        else:
            self._factors, self._divisor = tuple(float(n) for n in integers[0]), float(integers[1])
        self._is_average = abs(float(weights.total) - 1) < 1e-9
        self._sum = np.empty(BLOCK)
        self._term = np.empty(BLOCK)
        self._half = np.empty(BLOCK, dtype="<u4")

    def average(self, sources: Sequence[memoryview], dtype: str, out: memoryview, out_dtype: str) -> None:
        """Put Σ w_i source_i into `out`; all hold equally many elements of their dtype.

        Raises BadValue for NaN and infinities in a source and for results too large for `out_dtype`.
        """
        inputs = [np.frombuffer(source, FLOATS[dtype]) for source in sources]
        result = np.frombuffer(out, FLOATS[out_dtype])
        with np.errstate(all="ignore"):
            for start in range(0, len(result), BLOCK):
                stop = min(start + BLOCK, len(result))
                block = [values[start:stop] for values in inputs]
                total = self._weighted_sum(block, dtype)
                if not max(total.max(), -total.min()) < _TOO_LARGE[out_dtype]:
                    raise self._bad_value(block, dtype, total, start)
                self._round(total, result[start:stop], out_dtype)

    def _weighted_sum(self, block: list[_Array], dtype: str) -> _Array:
        size = len(block[0])
        total, term = self._sum[:size], self._term[:size]
        if dtype == "F64" and self._is_average:
            return self._around_newest(block, total, term)
        np.multiply(self._widen(block[0], dtype), self._factors[0], out=total, dtype=np.float64)
        for values, factor in zip(block[1:], self._factors[1:], strict=True):
            wide = self._widen(values, dtype)
            if factor != 1:
                wide = np.multiply(wide, factor, out=term, dtype=np.float64)
            np.add(total, wide, out=total)
        if self._divisor != 1:
            np.divide(total, self._divisor, out=total)
        return total

    def _around_newest(self, block: list[_Array], total: _Array, term: _Array) -> _Array:
        """x_N + Σ w_i (x_i - x_N): no type is wider than float64, but differences of close values are exact."""
        newest = block[-1]
        total[:] = 0
        for values, factor in zip(block[:-1], self._factors[:-1], strict=True):
            np.subtract(values, newest, out=term)
            np.multiply(term, factor, out=term)
            np.add(total, term, out=total)
        np.divide(total, self._divisor, out=total)
        changed = total != 0
        np.add(total, newest, out=total, where=changed)
        # Adding zero would turn -0.0 into 0.0.
        np.copyto(total, newest, where=~changed)
        return total

    def _widen(self, values: _Array, dtype: str) -> _Array:
        if dtype != "BF16":
            return values
        bits = self._half[: len(values)]
        np.copyto(bits, values)
        np.left_shift(bits, 16, out=bits)
        return bits.view("<f4")

    def _round(self, total: _Array, out: _Array, dtype: str) -> None:
        if dtype != "BF16":
            np.copyto(out, total, casting="same_kind")
            return
        single = total.astype("<f4")
        bits = single.view("<u4")
        # Where the first rounding has landed half-way between two bfloat16 numbers, step back to the exact side.
        half_way = np.flatnonzero((bits & 0xFFFF) == 0x8000)
        if len(half_way):
            exact, rounded = np.abs(total[half_way]), np.abs(single[half_way].astype(np.float64))
            bits[half_way] += (exact > rounded).astype("<u4")
            bits[half_way] -= (exact < rounded).astype("<u4")
        odd = (bits >> 16) & 1
        bits += odd
        bits += 0x7FFF
        np.right_shift(bits, 16, out=bits)
        np.copyto(out, bits, casting="unsafe")

    def _bad_value(self, block: list[_Array], dtype: str, total: _Array, start: int) -> BadValue:
        for number, values in enumerate(block):
            wide = self._widen(values, dtype)
            wrong = np.flatnonzero(~np.isfinite(wide))
            if len(wrong):
                return BadValue(start + int(wrong[0]), number, float(wide[wrong[0]]))
        worst = int(np.argmax(np.where(np.isfinite(total), np.abs(total), np.inf)))
        return BadValue(start + worst, None, float(total[worst]))
