"""How checkpoints of one run lie to one another: inner products of a sample, and drift apart from noise.

An average removes what is independent between its checkpoints and lags behind what all of them move along. Both show
in squared distances: over a lag of k intervals a steady drift of length d each adds d² k², and noise of variance s²
whose correlation falls as ρ^k (AR(1)) adds 2 s² (1 - ρ^k).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from whimbrel.checkpoint.tensorfile import ITEM_BYTES, Entry, TensorFolder, read_exactly, read_folder
from whimbrel.config import require
from whimbrel.errors import CheckpointError
from whimbrel.merge.pma import Weights

LEAST = 4
"""Checkpoints that are needed to tell drift from noise."""

_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_BLOCK = 4096
# From here on 1 - ρ^k is nearly a straight line over a window of checkpoints, as it is for a random walk.
_WALK = 0.95
_CORRELATIONS = np.arange(0, 0.991, 0.01)


class Gram(NamedTuple):
    """Inner products of checkpoints, less the newest of them."""

    products: NDArray[np.float64]
    """Σ (M_i - M_n)(M_j - M_n) over the sampled elements, [n, n]."""
    elements: int
    """Floating-point elements that were sampled."""
    total: int
    """Those that there are."""
    newest: float
    """Σ M_n² over the sampled elements."""

    def distances(self) -> NDArray[np.float64]:
        """||M_i - M_j||² over the sampled elements, [n, n]."""
        own = np.diag(self.products)
        return np.maximum(own[:, None] + own[None, :] - 2 * self.products, 0.0)


class Drift(NamedTuple):
    """What the distances between checkpoints at equal intervals say, per element as a share of the weights' size."""

    step: float
    """Length of the drift over one interval, relative to the length of the weights."""
    noise: float
    """Standard deviation of the noise, likewise."""
    correlation: float
    """ρ, correlation of the noise from one checkpoint to the next."""

    @property
    def is_walk(self) -> bool:
        """Whether the noise did not settle within the checkpoints looked at: then it cannot be told from drift."""
        return self.correlation > _WALK

    def noise_left(self, weights: Weights) -> float:
        """Variance of the noise in an average of these weights, as a share of that in one checkpoint."""
        w = np.array(weights.floats())
        lags = np.abs(np.subtract.outer(np.arange(len(w)), np.arange(len(w))))
        return float(w @ (self.correlation**lags) @ w)

    def error(self, weights: Weights) -> float:
        """Squared distance of an average to the newest point of the drift, as a share of one checkpoint's noise.

        1 is what the newest checkpoint has; all directions count alike, which the loss does not do.
        """
        lag = len(weights.values) - weights.mean_index
        if not self.noise:
            return 1.0 if not lag else math.inf
        return self.noise_left(weights) + (self.step / self.noise) ** 2 * lag**2


def gram(sources: Sequence[str | Path], *, share: float = 0.01) -> Gram:
    """Inner products of checkpoints (step folders or safetensors), oldest first, over `share` of their elements.

    Elements are read in blocks of 4096 at equal distances in each floating-point tensor, at least one block of each.
    Raises CheckpointError where names, shapes or types differ.
    """
    require(len(sources) > 0, "number of checkpoints", 0, "at least one")
    require(0 < share <= 1, "share", share, "a share above 0, at most 1")
    folders = [read_folder(source) for source in sources]
    products = np.zeros((len(folders), len(folders)))
    elements = total = 0
    newest = 0.0
    for name in folders[-1].places:
        entry = folders[-1].entry(name)
        if entry.dtype not in _FLOATS:
            continue
        _check_same(name, entry, folders)
        size = (entry.stop - entry.start) // ITEM_BYTES[entry.dtype]
        total += size
        for start in range(0, size, max(_BLOCK, round(_BLOCK / share))):
            length = min(_BLOCK, size - start)
            values = np.stack([_read(folder, name, start, length) for folder in folders])
            newest += float(values[-1] @ values[-1])
            values -= values[-1].copy()
            products += values @ values.T
            elements += length
    return Gram(products, elements, total, newest)


def _check_same(name: str, entry: Entry, folders: Sequence[TensorFolder]) -> None:
    for folder in folders:
        if name not in folder.places:
            raise CheckpointError(f"tensor '{name}' is in {folders[-1].path} but not in {folder.path}")
        other = folder.entry(name)
        if (other.dtype, other.shape) != (entry.dtype, entry.shape):
            raise CheckpointError(
                f"tensor '{name}' is {other.dtype} {list(other.shape)} in {folder.path}, but {entry.dtype} "
                f"{list(entry.shape)} in {folders[-1].path}"
            )


def _read(folder: TensorFolder, name: str, start: int, length: int) -> NDArray[np.float64]:
    entry, path = folder.entry(name), folder.file(name).path
    width = ITEM_BYTES[entry.dtype]
    data = bytearray(length * width)
    handle = os.open(path, os.O_RDONLY)
    try:
        read_exactly(handle, memoryview(data), entry.start + start * width, path)
    finally:
        os.close(handle)
    values = np.frombuffer(data, _FLOATS[entry.dtype])
    if entry.dtype == "BF16":
        values = (values.astype("<u4") << 16).view("<f4")
    return values.astype(np.float64)


def fit_drift(found: Gram) -> Drift:
    """Drift, noise and correlation from checkpoints at equal intervals, by least squares over their lags.

    The squared distance of each lag is taken relative to itself and weighted by its number of pairs, over a grid of
    correlations from 0 to 0.99. Raises ConfigError for fewer than LEAST checkpoints.
    """
    distances = found.distances()
    count = len(distances)
    require(count >= LEAST, "number of checkpoints", count, f"at least {LEAST}, to tell drift from noise")
    lags = np.arange(1, count)
    measured = np.array([np.diagonal(distances, k).mean() for k in lags])
    if not measured.all() or not found.newest:
        return Drift(0.0, 0.0, 0.0)
    scale = np.sqrt(count - lags) / measured
    best: tuple[float, Drift] | None = None
    for correlation in _CORRELATIONS:
        columns = np.stack([lags.astype(float) ** 2, 2 * (1 - correlation**lags)], axis=1)
        (drift, noise), error = _fit_positive(columns * scale[:, None], measured * scale)
        if best is None or error < best[0] - 1e-12:
            size = found.newest
            best = error, Drift(math.sqrt(drift / size), math.sqrt(noise / size), float(correlation))
    assert best is not None
    return best[1]


def _fit_positive(columns: NDArray[np.float64], wanted: NDArray[np.float64]) -> tuple[tuple[float, float], float]:
    """Two coefficients of at least 0 that fit best, and the squared error."""
    both = np.linalg.lstsq(columns, wanted, rcond=None)[0]
    options = [both] if (both >= 0).all() else []
    for i in range(2):
        alone = np.zeros(2)
        alone[i] = max(0.0, columns[:, i] @ wanted / (columns[:, i] @ columns[:, i]))
        options.append(alone)
    errors = [float(((columns @ option - wanted) ** 2).sum()) for option in options]
    chosen = int(np.argmin(errors))
    return (float(options[chosen][0]), float(options[chosen][1])), errors[chosen]
