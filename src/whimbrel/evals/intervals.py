"""Intervals: percentile bootstrap of ratios over blocks, and Wilson's interval of accuracies."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from whimbrel.data.draws import Draws

DRAWS = 2000
LEVEL = 0.95

_CHUNK = 2**22


class Interval(NamedTuple):
    """An estimate and the ends of its interval."""

    value: float
    low: float
    high: float


def ratio_interval(
    numerators: np.ndarray,
    denominators: np.ndarray,
    *,
    seed: int = 0,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> Interval:
    """sum(numerators) / sum(denominators) with a percentile bootstrap over blocks (Efron, Tibshirani 1993).

    numerators, denominators: one number per block, [blocks]; blocks are drawn with replacement, `draws`
    times, so a ratio is weighted by block size in every draw. Blocks are taken as independent; with
    neighbouring blocks of one document they are not quite, and the interval is then somewhat too short. The
    ends are nan for fewer than two blocks, which say nothing about spread.
    """
    value = float(np.sum(numerators) / np.sum(denominators))
    if len(numerators) < 2:
        return Interval(value, math.nan, math.nan)
    return Interval(value, *_percentiles(numerators, denominators, seed, draws, level))


def paired_difference(
    numerators_a: np.ndarray,
    numerators_b: np.ndarray,
    denominators: np.ndarray,
    *,
    seed: int = 0,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> Interval:
    """The ratio of a minus the ratio of b over the same blocks, drawn together, as in `ratio_interval`.

    Two models' losses on one block vary together, so this interval is far shorter than the two separate ones
    suggest.
    """
    return ratio_interval(
        np.asarray(numerators_a) - np.asarray(numerators_b), denominators, seed=seed, draws=draws, level=level
    )


def _percentiles(
    numerators: np.ndarray, denominators: np.ndarray, seed: int, draws: int, level: float
) -> tuple[float, float]:
    blocks = len(numerators)
    stream = Draws(seed)
    ratios = []
    rows = max(1, _CHUNK // blocks)
    for first in range(0, draws, rows):
        chosen = stream.below(blocks, min(rows, draws - first), blocks)
        ratios.append(numerators[chosen].sum(1) / denominators[chosen].sum(1))
    low, high = np.quantile(np.concatenate(ratios), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson(hits: float, trials: float, *, level: float = LEVEL) -> Interval:
    """The share hits / trials with Wilson's score interval (Wilson 1927, doi 10.2307/2276774)."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = hits / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # Exact arithmetic keeps the share inside; rounding may not, at 0 and 1.
    return Interval(share, max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share)))


def accuracy_interval(hits: np.ndarray, trials: np.ndarray, *, level: float = LEVEL) -> Interval:
    """The share of right answers with Wilson's interval, widened where answers of one sequence go together.

    hits, trials: right answers and questions of each sequence, [sequences]. The number of questions is
    divided by the design effect (Kish 1965, section 8.2): the variance of the share between sequences over
    that of independent questions, at least 1. Where all or none are right it cannot be estimated, and each
    sequence counts as one question.
    """
    hits, trials = np.asarray(hits, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    total, share, count = float(trials.sum()), float(hits.sum() / trials.sum()), len(hits)
    if share in (0.0, 1.0) or count < 2:
        effective = float(count)
    else:
        between = float(count / (count - 1) * np.square(hits - share * trials).sum() / total**2)
        effective = total / max(1.0, between / (share * (1 - share) / total))
    return wilson(share * effective, effective, level=level)._replace(value=share)
