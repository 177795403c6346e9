"""Weights against the tables and closed forms of arXiv 2505.12082 and 2507.17634."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.errors import ConfigError
from whimbrel.merge import KINDS, merge_weights, pma
from whimbrel.merge.config import DecayConfig, EMAConfig, ExplicitConfig

# Ten checkpoints: first and last weight, mean index, effective count, implied decay.
TABLE = {
    "sma": (pma.sma(10), 0.1, 0.1, 5.50, 10.00, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
    "wma": (
        pma.wma(10), 0.0182, 0.1818, 7.00, 7.86,
        [1, 0.982, 0.945, 0.891, 0.818, 0.727, 0.618, 0.491, 0.345, 0.182],
    ),
    "ema 0.1": (
        pma.ema(10, 0.1), 0.3874, 0.1, 4.49, 5.13,
        [1, 0.613, 0.570, 0.522, 0.469, 0.410, 0.344, 0.271, 0.190, 0.100],
    ),
    "ema 0.2": (
        pma.ema(10, 0.2), 0.1342, 0.2, 6.54, 7.87,
        [1, 0.866, 0.832, 0.790, 0.738, 0.672, 0.590, 0.488, 0.360, 0.200],
    ),
    "ema-corrected 0.1": (
        pma.ema_corrected(10, 0.1), 0.0595, 0.1535, 6.35, 9.18,
        [1, 0.941, 0.874, 0.801, 0.719, 0.629, 0.528, 0.416, 0.292, 0.154],
    ),
    "ema-corrected 0.2": (
        pma.ema_corrected(10, 0.2), 0.0301, 0.2241, 7.20, 7.25,
        [1, 0.970, 0.932, 0.885, 0.827, 0.753, 0.661, 0.547, 0.403, 0.224],
    ),
    "minus-sqrt": (
        pma.minus_sqrt_decay(10), 0.3162, 0.0513, 3.89, 6.36,
        [1, 0.684, 0.553, 0.452, 0.368, 0.293, 0.225, 0.163, 0.106, 0.051],
    ),
    "cosine": (
        pma.cosine_decay(10), 0.0245, 0.0245, 5.50, 8.17,
        [1, 0.976, 0.905, 0.794, 0.655, 0.500, 0.345, 0.206, 0.095, 0.024],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_ten_checkpoints_as_published(name: str) -> None:
    weights, first, last, mean, count, decay = TABLE[name]
    assert weights.floats()[0] == pytest.approx(first, abs=5e-5)
    assert weights.floats()[-1] == pytest.approx(last, abs=5e-5)
    assert weights.mean_index == pytest.approx(mean, abs=5e-3)
    assert weights.effective_count == pytest.approx(count, abs=5e-3)
    assert weights.decay == pytest.approx(decay, abs=6e-4)
    assert float(weights.total) == pytest.approx(1, abs=1e-15)


def test_curves_weight_by_weight() -> None:
    sqrt = [0.3162, 0.1310, 0.1005, 0.0847, 0.0747, 0.0675, 0.0621, 0.0578, 0.0543, 0.0513]
    cosine = [0.0245, 0.0710, 0.1106, 0.1394, 0.1545, 0.1545, 0.1394, 0.1106, 0.0710, 0.0245]
    assert pma.minus_sqrt_decay(10).values == pytest.approx(sqrt, abs=5e-5)
    assert pma.cosine_decay(10).values == pytest.approx(cosine, abs=5e-5)


@given(n=st.integers(1, 60))
def test_closed_forms(n: int) -> None:
    assert pma.sma(n).floats() == pytest.approx([1 / n] * n, abs=1e-12)
    assert pma.wma(n).floats() == pytest.approx([2 * i / (n * (n + 1)) for i in range(1, n + 1)], abs=1e-12)
    sqrt = [math.sqrt((i + 1) / n) - math.sqrt(i / n) for i in range(n)]
    assert pma.minus_sqrt_decay(n).values == pytest.approx(sqrt, abs=1e-12)
    tails = [(1 + math.cos(math.pi * i / n)) / 2 for i in range(n)] + [0.0]
    assert pma.cosine_decay(n).values == pytest.approx([a - b for a, b in pairwise(tails)], abs=1e-12)


@given(n=st.integers(1, 40), alpha=st.fractions(Fraction(1, 1000), 1, max_denominator=1000))
def test_ema_is_the_recursion_from_the_oldest_checkpoint(n: int, alpha: Fraction) -> None:
    average = [Fraction(int(i == 0)) for i in range(n)]
    for newest in range(1, n):
        average = [(1 - alpha) * w for w in average]
        average[newest] += alpha
    assert pma.ema(n, alpha).values == tuple(average)
    assert pma.ema(n, alpha).total == 1


@given(n=st.integers(1, 40), alpha=st.fractions(Fraction(1, 1000), 1, max_denominator=1000))
def test_corrected_ema_is_the_recursion_from_zero_rescaled(n: int, alpha: Fraction) -> None:
    average = [Fraction(0)] * n
    for newest in range(n):
        average = [(1 - alpha) * w for w in average]
        average[newest] += alpha
    assert pma.ema_corrected(n, alpha).values == tuple(w / sum(average) for w in average)


@given(st.lists(st.fractions(0, 1, max_denominator=97), max_size=30))
def test_decay_curve_and_weights_are_inverse(values: list[Fraction]) -> None:
    curve = [Fraction(1), *sorted(values, reverse=True)]
    assert pma.from_decay(curve).decay == pytest.approx([float(value) for value in curve], abs=1e-15)
    assert pma.from_decay(curve).total == 1


def test_linear_curve_is_sma() -> None:
    assert merge_weights(7, method=DecayConfig(curve="linear")) == pma.sma(7)
    assert pma.from_decay([Fraction(7 - i, 7) for i in range(7)]) == pma.sma(7)


def test_one_checkpoint_weighs_one() -> None:
    for kind in KINDS:
        weights = merge_weights(1, method=kind, weights=[1] if kind == "explicit" else None)
        assert weights.floats() == (1.0,)


def test_integers() -> None:
    assert pma.sma(10).integers() == ((1,) * 10, 10)
    assert pma.wma(4).integers() == ((1, 2, 3, 4), 10)
    assert pma.ema(3, 0.2).integers() == ((16, 4, 5), 25)
    assert pma.explicit([0.5, -0.25, 0.75]).integers() == ((2, -1, 3), 4)
    assert pma.minus_sqrt_decay(10).integers() is None
    assert pma.ema(50, 0.1).integers() is None


def test_weights_are_taken_as_written() -> None:
    assert pma.explicit([0.1] * 10).values == (Fraction(1, 10),) * 10
    assert pma.explicit(["1/3", "1/3", "1/3"]).texts() == ["1/3"] * 3
    assert pma.minus_sqrt_decay(1).texts() == ["1.0"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pma.sma(0), "number of checkpoints = 0 is not allowed; use at least one"),
        (
            lambda: EMAConfig(alpha=0.0),
            "merge.alpha = 0.0 is not allowed; use a number above 0 and at most 1",
        ),
        (lambda: pma.ema(3, 1.5), "merge.alpha = 1.5 is not allowed"),
        (lambda: pma.ema(3, math.nan), "merge.alpha = nan is not allowed"),
        (lambda: ExplicitConfig(values=("0.5", "0.6")), "merge.values sum to 1.1, not 1; scale them"),
        (lambda: pma.explicit(["x"]), "merge.values has 'x', which is not a number; write 0.25 or '1/4'"),
        (lambda: pma.explicit([math.inf]), "merge.values has inf, which is not a number"),
        (lambda: pma.from_decay([0.9, 0.5]), r"merge.values\[0\] = 0.9 is not allowed; use 1, the full rate"),
        (lambda: pma.from_decay([1, 0.5, 0.6]), r"merge.values\[2\] = 0.6 is not allowed; use at most 0.5"),
        (lambda: pma.from_decay([1, -0.5]), r"merge.values\[1\] = -0.5 is not allowed"),
        (
            lambda: merge_weights(3, method="explicit", weights=[0.5, 0.5]),
            "number of merge.values = 2 is not allowed; use one for each of the 3 checkpoints",
        ),
        (lambda: merge_weights(3, method="smma"), "merge.method = 'smma' is not known; did you mean 'sma'"),
        (lambda: merge_weights(3, method="sma", alpha=0.1), "merge.alpha is not used by method SMAConfig"),
        (
            lambda: merge_weights(3, method="ema", weights=[1]),
            "merge.weights is not used by method EMAConfig",
        ),
        (lambda: merge_weights(3, method="explicit"), "merge.method = 'explicit' needs merge.weights"),
    ],
)
def test_bad_settings_are_named(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # pyrefly: ignore


def test_any_sum_on_request() -> None:
    assert merge_weights(2, method=ExplicitConfig(values=("1", "-0.5"), any_sum=True)).total == Fraction(1, 2)
