"""The arithmetic: compiled and plain numpy agree bit for bit, and both with exact fractions."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from whimbrel.merge import blocks
from whimbrel.merge.blocks import FLOATS, SUMS, add, divide_and_round
from whimbrel.testing.merge import nearest_of

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def values_of(dtype: str, seed: int, size: int = 5000) -> np.ndarray:
    """Random bits, so that every exponent and both signs occur; what is not finite is put to zero."""
    item = np.dtype(FLOATS[dtype]).itemsize
    bits = np.random.default_rng(seed).integers(0, 256, size * item, dtype=np.uint8)
    tensor = torch.from_numpy(bits).view(TORCH[dtype]).nan_to_num(0.0, 0.0, 0.0)
    tensor[:3] = torch.tensor([0.0, -0.0, 1.0])
    return tensor.view(torch.uint8).numpy().view(FLOATS[dtype])


def averaged(dtype: str, out_dtype: str, sums: str, factors: tuple[float, ...], divisor: float) -> np.ndarray:
    sources = [values_of(dtype, seed) for seed in range(len(factors))]
    total, out = np.empty(len(sources[0]), SUMS[sums]), np.empty(len(sources[0]), FLOATS[out_dtype])
    with np.errstate(all="ignore"):
        for number, (source, factor) in enumerate(zip(sources, factors, strict=True)):
            add(total, source, dtype, factor, first=number == 0)
        divide_and_round(total, divisor, out, out_dtype)
    return out


@pytest.mark.parametrize("sums", SUMS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("out_dtype", FLOATS)
def test_compiled_loops_give_the_same_bits(
    dtype: str, out_dtype: str, sums: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert blocks.compiled() is not None, "numba belongs to the development requirements"
    for factors, divisor in (((1.0,) * 4, 4.0), ((1.0, 2.0, 3.0), 6.0), ((0.3, -0.1, 0.8), 1.0)):
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


def test_float32_sums_round_each_addition_once() -> None:
    total = np.empty(1, "<f4")
    for number, value in enumerate([1.0, 2.0**-24, 2.0**-24]):
        add(total, np.array([value]), "F64", 1.0, first=number == 0)
    assert total[0] == 1.0
    add(total, np.array([1.0]), "F64", 2.0**-23, first=False)
    assert total[0] == np.float32(1 + 2.0**-23)


def test_numpy_takes_over_where_numba_is_missing() -> None:
    script = (
        "import sys; sys.modules['numba'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'numba' else find(name, *rest)\n"
        "import numpy as np; from whimbrel.merge import blocks\n"
        "total = np.empty(2); blocks.add(total, np.array([1.0, 2.0]), 'F64', 2.0, first=True)\n"
        "print(blocks.compiled(), total.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "None [2.0, 4.0]\n"
