"""The arithmetic: compiled and plain numpy agree bit for bit, and both with exact fractions."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from whimbrel.merge import blocks
from whimbrel.merge.blocks import FLOATS, SUMS, divide_and_round, weighted_sum
from whimbrel.testing.merge import nearest_of

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def values_of(dtype: str, seed: int, size: int = 5000) -> np.ndarray:
    """Random bits, so that every exponent and both signs occur; zero where they are not finite. Then ordinary ones."""
    item = np.dtype(FLOATS[dtype]).itemsize
    bits = np.random.default_rng(seed).integers(0, 256, size * item, dtype=np.uint8)
    tensor = torch.from_numpy(bits).view(TORCH[dtype]).nan_to_num(0.0, 0.0, 0.0)
    tensor[:3] = torch.tensor([0.0, -0.0, 1.0])
    tensor[size - size // 4 :] = torch.randn(size // 4, generator=torch.Generator().manual_seed(seed))
    return tensor.view(torch.uint8).numpy().view(FLOATS[dtype])


def averaged(dtype: str, out_dtype: str, sums: str, factors: tuple[float, ...], divisor: float) -> np.ndarray:
    # A row that is not asked for, and elements before the first and behind the last.
    rows, size, start = [*range(1, len(factors)), 0], 5000, 3
    sources = np.stack([values_of(dtype, seed, size + 8) for seed in range(len(factors) + 1)])
    total, out = np.full(size, 7, SUMS[sums]), np.empty(size, FLOATS[out_dtype])
    with np.errstate(all="ignore"):
        weighted_sum(total, sources, dtype, rows, factors, start)
        divide_and_round(total, divisor, out, out_dtype)
    return out


@pytest.mark.parametrize("sums", SUMS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("out_dtype", FLOATS)
def test_compiled_loops_give_the_same_bits(
    dtype: str, out_dtype: str, sums: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert blocks.compiled() is not None, "numba belongs to the development requirements"
    for factors, divisor in (((1.0,) * 9, 9.0), ((1.0, 2.0, 3.0), 6.0), ((0.3, -0.1, 0.6, 0.1, 0.1), 1.0)):
        fast = averaged(dtype, out_dtype, sums, factors, divisor)
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "compiled", lambda: None)
            plain = averaged(dtype, out_dtype, sums, factors, divisor)
        finite = np.isfinite(torch.from_numpy(fast.view(np.uint8)).view(TORCH[out_dtype]).double().numpy())
        assert finite.sum() > 100
        assert np.array_equal(
            fast.view(np.uint8).reshape(len(fast), -1)[finite], plain.view(np.uint8).reshape(len(fast), -1)[finite]
        )


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_division_and_rounding_of_every_exponent(dtype: str, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirds of exact sums, from the smallest subnormal up, against fractions."""
    if plain:
        monkeypatch.setattr(blocks, "compiled", lambda: None)
    generator = np.random.default_rng(0)
    low, high = (-140, 120) if dtype == "BF16" else (-30, 14)
    totals = np.ldexp(generator.integers(-(2**20), 2**20, 400).astype(float), generator.integers(low, high, 400) - 20)
    out = np.empty(len(totals), FLOATS[dtype])
    assert divide_and_round(totals, 3.0, out, dtype)
    got = torch.from_numpy(out.view("<i2")).view(TORCH[dtype]).double().tolist()
    assert got == [nearest_of(Fraction(total) / 3, TORCH[dtype]) for total in totals.tolist()]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38, 1e300])
def test_quotients_that_do_not_fit_are_told(value: float) -> None:
    out = np.empty(3, FLOATS["BF16"])
    assert not divide_and_round(np.array([1.0, value, 2.0]), 1.0, out, "BF16")
    assert divide_and_round(np.array([1.0, 3.38e38, 2.0]), 1.0, out, "BF16")


@pytest.mark.parametrize("plain", [False, True])
def test_float32_sums_round_each_addition_once(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setattr(blocks, "compiled", lambda: None)
    total, sources = np.empty(1, "<f4"), np.array([[1.0], [2.0**-24], [2.0**-24], [2.0**-23]])
    weighted_sum(total, sources, "F64", range(3), [1.0] * 3)
    assert total[0] == 1.0
    weighted_sum(total, sources, "F64", range(4), [1.0] * 4)
    assert total[0] == np.float32(1 + 2.0**-23)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sum_of_negative_zeros_is_one(dtype: str, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setattr(blocks, "compiled", lambda: None)
    zeros = torch.full((5, 2), -0.0, dtype=TORCH[dtype]).view(torch.uint8).numpy().view(FLOATS[dtype])
    total = np.empty(2)
    weighted_sum(total, zeros, dtype, range(5), [1.0] * 5)
    assert np.signbit(total).all()


def test_numpy_takes_over_where_numba_is_missing() -> None:
    script = (
        "import sys; sys.modules['numba'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'numba' else find(name, *rest)\n"
        "import numpy as np; from whimbrel.merge import blocks\n"
        "total = np.empty(2); blocks.weighted_sum(total, np.array([[1.0, 2.0]]), 'F64', [0], [2.0])\n"
        "print(blocks.compiled(), total.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "None [2.0, 4.0]\n"
