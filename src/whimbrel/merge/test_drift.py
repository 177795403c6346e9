"""Inner products from files, and the split of made-up trajectories whose drift and noise are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from whimbrel.errors import CheckpointError, ConfigError
from whimbrel.merge.drift import Drift, Gram, fit_drift, gram
from whimbrel.merge.pma import sma, wma
from whimbrel.testing.merge import write_sources


def walk(count: int, *, step: float, noise: float, correlation: float, size: int = 40_000) -> list[Tensor]:
    """Weights of length 1 that drift and carry AR(1) noise of these lengths."""
    generator = torch.Generator().manual_seed(0)

    def unit() -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64) / math.sqrt(size)

    start, direction, error = unit(), unit(), unit()
    points = []
    for i in range(count):
        points.append(start + step * i * direction + noise * error)
        error = correlation * error + math.sqrt(1 - correlation**2) * unit()
    return points


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gram_reads_every_type(dtype: torch.dtype, tmp_path: Path) -> None:
    points = [{"w": point.to(dtype), "n": torch.tensor([3])} for point in walk(4, step=0.5, noise=0.5, correlation=0)]
    found = gram(write_sources(tmp_path, points), share=1)
    exact = torch.stack([point["w"].double() for point in points])
    exact -= exact[-1].clone()
    np.testing.assert_allclose(found.products, (exact @ exact.T).numpy(), rtol=1e-10, atol=1e-14)
    assert found.elements == found.total == 40_000
    np.testing.assert_allclose(found.distances()[0, 1], float((exact[0] - exact[1]).square().sum()))


def test_a_sample_is_enough(tmp_path: Path) -> None:
    points = [{"w": point.float()} for point in walk(6, step=0.02, noise=0.1, correlation=0.4, size=400_000)]
    paths = write_sources(tmp_path, points)
    whole, part = gram(paths, share=1), gram(paths, share=0.05)
    assert part.elements < 0.06 * part.total
    for a, b in zip(fit_drift(whole), fit_drift(part), strict=True):
        assert a == pytest.approx(b, rel=0.2, abs=0.05)


@pytest.mark.parametrize(
    ("step", "noise", "correlation"), [(0.01, 0.1, 0.0), (0.02, 0.1, 0.5), (0.0, 0.1, 0.8), (0.01, 0.0, 0.0)]
)
def test_drift_and_noise_are_told_apart(step: float, noise: float, correlation: float, tmp_path: Path) -> None:
    points = walk(16, step=step, noise=noise, correlation=correlation)
    found = fit_drift(gram(write_sources(tmp_path, [{"w": point} for point in points]), share=1))
    assert found.step == pytest.approx(step, abs=0.003)
    assert found.noise == pytest.approx(noise, abs=0.015)
    if noise:
        assert found.correlation == pytest.approx(correlation, abs=0.08)


def test_a_random_walk_is_called_one(tmp_path: Path) -> None:
    points = walk(12, step=0.0, noise=0.0, correlation=0.0)
    generator = torch.Generator().manual_seed(1)
    for i in range(1, 12):
        points[i] = points[i - 1] + 0.0005 * torch.randn(40_000, generator=generator, dtype=torch.float64)
    assert fit_drift(gram(write_sources(tmp_path, [{"w": point} for point in points]), share=1)).is_walk
    assert not Drift(0.01, 0.1, 0.5).is_walk


@pytest.mark.parametrize(("correlation", "left"), [(0.0, 0.1), (0.5, 0.26), (0.8, 0.54), (0.9, 0.73)])
def test_noise_left_in_an_average_of_ten(correlation: float, left: float) -> None:
    assert Drift(0.0, 1.0, correlation).noise_left(sma(10)) == pytest.approx(left, abs=0.005)


def test_error_weighs_lag_against_noise() -> None:
    moving, still = Drift(1.0, 1.0, 0.0), Drift(0.01, 1.0, 0.0)
    assert still.error(sma(10)) < still.error(sma(3)) < still.error(sma(1)) == 1
    assert moving.error(sma(10)) > 1
    assert moving.error(wma(6)) < moving.error(sma(6))


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    a, b = write_sources(tmp_path, [{"w": torch.ones(3)}, {"w": torch.ones(4)}])
    with pytest.raises(CheckpointError, match=r"tensor 'w' is F32 \[3\] in .* but F32 \[4\]"):
        gram([a, b])
    with pytest.raises(ConfigError, match="at least 4, to tell drift from noise"):
        fit_drift(Gram(np.zeros((3, 3)), 1, 1, 1.0))
