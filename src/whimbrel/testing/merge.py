"""Contract of an averaging method: a config class with `weights(n)`, merged through the one streaming engine.

Each check takes `make`, which gives the method's config for n checkpoints, and an empty folder to work in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from whimbrel.config import MergeConfig
from whimbrel.errors import CheckpointError
from whimbrel.merge import merge_checkpoints

Make = Callable[[int], MergeConfig]
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def write_sources(folder: Path, sources: Sequence[Mapping[str, Tensor]]) -> list[Path]:
    """Write each of `sources` to a folder of its own with one model.safetensors; returns the folders."""
    paths = [folder / f"source-{i}" for i in range(len(sources))]
    for path, tensors in zip(paths, sources, strict=True):
        path.mkdir(parents=True)
        save_file(dict(tensors), path / "model.safetensors")
    return paths


def merged(paths: Sequence[Path], out: Path, method: str | MergeConfig) -> dict[str, Tensor]:
    """The tensors of the merge of `paths`."""
    merge_checkpoints(paths, out, method=method)
    return load_file(out / "model.safetensors")


def trajectory(count: int, dtype: torch.dtype, *, size: int = 1009, seed: int = 0) -> list[Tensor]:
    """Checkpoints of a random walk around normal values, with zeros, signs and magnitudes mixed."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(size, generator=generator, dtype=torch.float64)
    value *= 10.0 ** torch.randint(-3, 3, (size,), generator=generator)
    value[:3] = torch.tensor([0.0, -0.0, 1.0])
    steps = []
    for _ in range(count):
        value = value * (1 + 0.02 * torch.randn(size, generator=generator, dtype=torch.float64))
        steps.append(value.to(dtype))
    return steps


def nearest_of(value: Fraction, dtype: torch.dtype) -> float:
    """The number of a 16- or 32-bit float type nearest to `value`, ties to even, found without rounding twice."""
    lower = torch.tensor(float(value), dtype=torch.float64).to(dtype)
    around = [lower]
    bits = lower.view(torch.int32 if dtype == torch.float32 else torch.int16)
    around += [(bits + offset).view(dtype) for offset in (-1, 1)]
    even = {float(c): int(c.view(bits.dtype)) % 2 == 0 for c in around if torch.isfinite(c)}
    best = min(abs(Fraction(c) - value) for c in even)
    nearest = [c for c in even if abs(Fraction(c) - value) == best]
    return nearest[0] if len(nearest) == 1 else next(c for c in nearest if even[c])


def check_weights(make: Make) -> None:
    """n weights that sum to 1, for each n; one checkpoint weighs 1."""
    for n in range(1, 13):
        weights = make(n).weights(n)
        assert len(weights.values) == n
        assert abs(float(weights.total) - 1) < 1e-12
    assert make(1).weights(1).floats() == (1.0,)


def check_equal_inputs(make: Make, folder: Path) -> None:
    """Equal checkpoints give themselves back bit for bit, signed zeros, smallest and largest values included."""
    for count in (1, 2, 7, 10):
        tensors = {}
        for dtype in FLOATS:
            info = torch.finfo(dtype)
            edge = torch.tensor([0.0, -0.0, info.smallest_normal, -info.tiny / 2, info.max, info.min], dtype=dtype)
            tensors[str(dtype)] = torch.cat([edge, trajectory(1, dtype)[0]])
        result = merged(write_sources(folder / str(count), [tensors] * count), folder / f"out-{count}", make(count))
        for name, tensor in tensors.items():
            assert _same_bits(result[name], tensor), f"{count} equal checkpoints of {name} gave something else"


def check_exact_mean(make: Make, folder: Path) -> None:
    """Every result is the correctly rounded weighted mean; float64 results lie within 4 of its steps.

    Irrational weights have errors of their own, so there a result half-way between two numbers may go to either.
    """
    count = 6
    method = make(count).weights(count)
    weights = [Fraction(value) for value in method.values]
    slack = Fraction(0) if method.integers() else Fraction(1, 10**9)
    sources = [trajectory(count, dtype) for dtype in FLOATS]
    tensors = [{str(dtype): steps[i] for dtype, steps in zip(FLOATS, sources, strict=True)} for i in range(count)]
    result = merged(write_sources(folder, tensors), folder / "out", make(count))
    for dtype, steps in zip(FLOATS, sources, strict=True):
        values = [step.double().tolist() for step in steps]
        for element, got in enumerate(result[str(dtype)].double().tolist()):
            exact = sum((w * Fraction(v[element]) for w, v in zip(weights, values, strict=True)), Fraction(0))
            if dtype == torch.float64:
                largest = max(abs(v[element]) for v in values)
                assert abs(Fraction(got) - exact) <= 4 * Fraction(float(np.spacing(largest))), f"{dtype} {element}"
            else:
                nearest = nearest_of(exact, dtype)
                tied = slack and abs(Fraction(got) - exact) <= abs(Fraction(nearest) - exact) * (1 + slack)
                assert got == nearest or tied, f"{dtype} element {element}: {got}, exact {float(exact)}"


def check_order(make: Make, folder: Path) -> None:
    """The i-th weight goes to the i-th source: a checkpoint of ones among zeros gives back its weight."""
    count = 5
    weights = make(count).weights(count).floats()
    for one in range(count):
        tensors = [{"w": torch.full((3,), float(i == one), dtype=torch.float64)} for i in range(count)]
        result = merged(write_sources(folder / str(one), tensors), folder / f"out-{one}", make(count))
        assert abs(float(result["w"][0]) - weights[one]) < 1e-15, f"source {one} has another weight"


def check_missing_tensor(make: Make, folder: Path) -> None:
    """A tensor that one source lacks is named, with both sources, and nothing is written."""
    tensors = {"a": torch.ones(3), "b": torch.ones(2)}
    paths = write_sources(folder, [tensors, {"a": tensors["a"]}, tensors])
    message = _refusal(paths, folder / "out", make(3))
    assert message == f"tensor 'b' is in {paths[2]} but not in {paths[1]}", message
    assert not (folder / "out").exists()


def check_integers(make: Make, folder: Path) -> None:
    """Integers and booleans are kept where equal and refused by name where not; they are never weighted."""
    exact = {"count": torch.tensor([7, 2**53 + 1]), "mask": torch.tensor([True, False])}
    paths = write_sources(folder / "equal", [{**exact, "w": torch.ones(2)}] * 3)
    result = merged(paths, folder / "out", make(3))
    assert all(_same_bits(result[name], tensor) for name, tensor in exact.items())
    other = {**exact, "count": torch.tensor([7, 2**53 + 2]), "w": torch.ones(2)}
    paths = write_sources(folder / "other", [{**exact, "w": torch.ones(2)}, other, other])
    message = _refusal(paths, folder / "refused", make(3))
    assert message.startswith(f"tensor 'count' (I64) differs between {paths[0]} and {paths[2]}"), message


def _refusal(paths: Sequence[Path], out: Path, method: MergeConfig) -> str:
    """The message with which the merge is refused."""
    try:
        merge_checkpoints(paths, out, method=method)
    except CheckpointError as error:
        return str(error)
    raise AssertionError("sources that do not fit were merged")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
