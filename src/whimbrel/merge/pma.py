"""Weights of checkpoints in an average: arXiv 2505.12082, equations 1 to 5, and decay curves (2507.17634).

Checkpoints are numbered from the oldest. Weights stay exact fractions wherever the formula is rational.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

from whimbrel.config import require
from whimbrel.errors import ConfigError

# A 13-bit significand times integers up to this total is exact in float64, so bfloat16 and float16 sums are.
_LARGEST_TOTAL = 2**40


Number = float | Fraction | str
"""A number as written: 0.1, Fraction(1, 3), "1/3"."""


class Weights(NamedTuple):
    """The weights of N checkpoints, oldest first: all fractions, or all floats for an irrational formula."""

    values: tuple[Fraction, ...] | tuple[float, ...]

    @property
    def total(self) -> Fraction | float:
        """Sum of the weights; 1 for every average."""
        return sum(self.values, Fraction(0)) if self.is_rational else math.fsum(self.values)

    @property
    def is_rational(self) -> bool:
        """Whether the weights are fractions."""
        return all(isinstance(value, Fraction) for value in self.values)

    @property
    def effective_count(self) -> float:
        """N_eff = (Σ w)² / Σ w²: how many equally weighted checkpoints would average noise as well."""
        floats = self.floats()
        return math.fsum(floats) ** 2 / math.fsum(w * w for w in floats)

    @property
    def mean_index(self) -> float:
        """Σ i w_i with i from 1: how recent the average is."""
        return math.fsum(i * w for i, w in enumerate(self.floats(), start=1))

    @property
    def decay(self) -> tuple[float, ...]:
        """Tail sums Σ_(j>=i) w_j: the learning-rate decay that the average imitates (2507.17634)."""
        return tuple(float(tail) for tail in accumulate(reversed(self.values)))[::-1]

    def floats(self) -> tuple[float, ...]:
        """The weights as floats."""
        return tuple(float(value) for value in self.values)

    def integers(self) -> tuple[tuple[int, ...], int] | None:
        """Numerators and their common denominator; None where weights are irrational or it is too large.

        With integer weights the weighted sum is exact, and one division at the end rounds once.
        """
        fractions = [value for value in self.values if isinstance(value, Fraction)]
        if len(fractions) != len(self.values):
            return None
        denominator = math.lcm(*(value.denominator for value in fractions))
        numerators = tuple(int(value * denominator) for value in fractions)
        if max(denominator, sum(map(abs, numerators))) > _LARGEST_TOTAL:
            return None
        return numerators, denominator

    def texts(self) -> list[str]:
        """The weights for a manifest: exact fractions as "1/10", other values in full precision."""
        return [str(value) if isinstance(value, Fraction) else repr(value) for value in self.values]


def sma(n: int) -> Weights:
    """Equal weights 1/n (equation 3)."""
    _check_count(n)
    return Weights(tuple(Fraction(1, n) for _ in range(n)))


def wma(n: int) -> Weights:
    """Weights that grow with the index, 2i / (n(n+1)) (equation 5)."""
    _check_count(n)
    return Weights(tuple(Fraction(2 * i, n * (n + 1)) for i in range(1, n + 1)))


def ema(n: int, alpha: float | Fraction) -> Weights:
    """The recursion avg_i = alpha M_i + (1 - alpha) avg_(i-1) that starts at avg_1 = M_1 (equation 4).

    In closed form w_1 = (1 - alpha)^(n-1) and w_i = alpha (1 - alpha)^(n-i) after it.
    """
    _check_count(n)
    a = _alpha(alpha)
    return Weights(((1 - a) ** (n - 1), *(a * (1 - a) ** (n - i) for i in range(2, n + 1))))


def ema_corrected(n: int, alpha: float | Fraction) -> Weights:
    """Weights alpha (1 - alpha)^(n-i) divided by their sum: the recursion from zero, corrected."""
    _check_count(n)
    a = _alpha(alpha)
    return Weights(tuple(a * (1 - a) ** (n - i) / (1 - (1 - a) ** n) for i in range(1, n + 1)))


def from_decay(curve: Sequence[Number]) -> Weights:
    """Weights c_j = w_j - w_(j+1), w_(n+1) = 0, that imitate the rates w_1 = 1 >= w_2 >= ... >= w_n >= 0.

    One value of `curve` per checkpoint, oldest first, as a share of the full rate. Raises ConfigError for a
    curve that starts elsewhere than at 1, rises, or goes below 0.
    """
    _check_count(len(curve))
    values = [_exact(value) for value in curve]
    require(values[0] == 1, "merge.values[0]", curve[0], "1, the full rate, as the start of a decay curve")
    for i, value in enumerate(values[1:], start=1):
        allowed = f"at most {curve[i - 1]}, the value before it, and at least 0"
        require(0 <= value <= values[i - 1], f"merge.values[{i}]", curve[i], allowed)
    return Weights(tuple(here - after for here, after in zip(values, [*values[1:], Fraction(0)])))


def cosine_decay(n: int) -> Weights:
    """Decay w_i = (1 + cos(π (i-1)/n)) / 2."""
    _check_count(n)
    # cos(a) - cos(b) as a product keeps full precision for the small weights at both ends.
    half = math.pi / (2 * n)
    return Weights(tuple(math.sin((2 * i + 1) * half) * math.sin(half) for i in range(n)))


def minus_sqrt_decay(n: int) -> Weights:
    """Decay w_i = 1 - sqrt((i-1)/n), called 1-sqrt or minus-sqrt; the oldest checkpoint weighs most."""
    _check_count(n)
    return Weights(tuple(1 / (math.sqrt(n) * (math.sqrt(i + 1) + math.sqrt(i))) for i in range(n)))


def explicit(values: Sequence[Number], *, any_sum: bool = False) -> Weights:
    """The given weights, taken as the decimal numbers they are written as.

    Raises ConfigError for a sum other than 1, unless `any_sum`, and for values that are not finite.
    """
    _check_count(len(values))
    weights = Weights(tuple(_exact(value) for value in values))
    if weights.total == 1 or any_sum:
        return weights
    # Decimal fractions such as 0.3333 cannot always add up to 1; what is left over is not spread silently.
    raise ConfigError(
        f"merge.values sum to {float(weights.total):.9g}, not 1; scale them, write fractions such as '1/3',"
        " or allow any sum (any_sum=True)"
    )


def _exact(value: Number) -> Fraction:
    """The fraction that a number is written as: 0.1 is 1/10."""
    try:
        return value if isinstance(value, Fraction) else Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"merge.values has {value!r}, which is not a number; write 0.25 or '1/4'") from None


def _alpha(alpha: float | Fraction) -> Fraction:
    require(math.isfinite(alpha) and 0 < alpha <= 1, "merge.alpha", alpha, "a number above 0 and at most 1")
    return _exact(alpha)


def _check_count(n: int) -> None:
    require(n >= 1, "number of checkpoints", n, "at least one")
