"""Intervals: they cover, they weigh by size, they know about pairs and clusters."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.evals.intervals import accuracy_interval, paired_difference, ratio_interval, wilson


def test_the_estimate_is_the_ratio_of_sums_not_the_mean_of_ratios():
    found = ratio_interval(np.array([2.0, 90.0]), np.array([1, 99]))
    assert found.value == 92 / 100


def test_the_bootstrap_covers_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        sizes = rng.integers(50, 150, 80)
        sums = sizes * 3.0 + rng.gamma(2.0, 20.0, 80) - 40.0
        found = ratio_interval(sums, sizes, seed=trial, draws=400)
        hits += found.low <= 3.0 <= found.high
    assert 0.90 <= hits / 200 <= 0.985


def test_the_bootstrap_agrees_with_the_normal_interval_of_a_mean():
    values = np.random.default_rng(1).normal(5, 1, 400)
    found = ratio_interval(values, np.ones(400))
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.008)
    assert found.high == pytest.approx(values.mean() + half, abs=0.008)


def test_equal_seeds_give_equal_intervals_and_chunks_do_not_matter(monkeypatch):
    values, sizes = np.random.default_rng(2).normal(5, 1, 50), np.full(50, 2)
    whole = ratio_interval(values, sizes, seed=3)
    assert ratio_interval(values, sizes, seed=3) == whole
    assert ratio_interval(values, sizes, seed=4) != whole
    monkeypatch.setattr("whimbrel.evals.intervals._CHUNK", 170)
    assert ratio_interval(values, sizes, seed=3) == whole


def test_one_block_gives_no_interval():
    found = ratio_interval(np.array([3.0]), np.array([2]))
    assert found.value == 1.5
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_a_paired_difference_sees_what_separate_intervals_hide():
    rng = np.random.default_rng(5)
    base = rng.normal(300, 60, 100)
    better = base - rng.normal(1.0, 0.5, 100)
    sizes = np.full(100, 100)
    a, b = ratio_interval(better, sizes), ratio_interval(base, sizes)
    assert a.low < b.value < a.high
    found = paired_difference(better, base, sizes)
    assert found.low < found.value < found.high < 0
    assert found.value == pytest.approx(a.value - b.value)
    assert paired_difference(base, base, sizes) == (0.0, 0.0, 0.0)


def test_wilson_gives_known_values():
    """Worked by hand from the formula with z = 1.959964."""
    z = 1.959964
    for hits, trials in [(8, 10), (0, 20), (20, 20), (1, 64)]:
        p, n = hits / trials, trials
        middle, half = (p + z * z / 2 / n) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
        found = wilson(hits, trials)
        assert found.value == p
        assert found.low == pytest.approx(middle - half / (1 + z * z / n), abs=1e-6)
        assert found.high == pytest.approx(middle + half / (1 + z * z / n), abs=1e-6)
    assert wilson(8, 10).low == pytest.approx(0.4902, abs=1e-4)
    assert wilson(8, 10).high == pytest.approx(0.9433, abs=1e-4)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_stays_in_range_and_holds_the_share(case):
    found = wilson(*case)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert wilson(*case, level=0.5).low >= found.low


def test_answers_that_go_together_widen_the_interval():
    trials = np.full(64, 8)
    rng = np.random.default_rng(6)
    together = 8 * rng.integers(0, 2, 64)
    apart = rng.binomial(8, 0.5, 64)
    width = {}
    for name, hits in (("together", together), ("apart", apart)):
        found = accuracy_interval(hits, trials)
        assert found.value == hits.sum() / trials.sum()
        width[name] = found.high - found.low
    one_by_one = wilson(together.sum() / 8, 64)
    assert width["together"] == pytest.approx(one_by_one.high - one_by_one.low, rel=0.05)
    assert width["apart"] < 0.5 * width["together"]


def test_one_question_a_sequence_is_plain_wilson():
    hits = np.array([1] * 20 + [0] * 44)
    assert accuracy_interval(hits, np.ones(64)) == pytest.approx(wilson(20, 64), rel=0.02)


def test_all_right_counts_sequences_not_questions():
    assert accuracy_interval(np.full(64, 32), np.full(64, 32)) == wilson(64, 64)
    assert accuracy_interval(np.zeros(64), np.full(64, 32)) == wilson(0, 64)
    assert all(isinstance(value, float) for value in accuracy_interval(np.full(4, 2), np.full(4, 3)))


def test_the_accuracy_interval_covers_with_clusters():
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(300):
        rates = rng.beta(2, 2, 60)
        found = accuracy_interval(rng.binomial(10, rates), np.full(60, 10))
        covered += found.low <= 0.5 <= found.high
    assert covered / 300 >= 0.91
