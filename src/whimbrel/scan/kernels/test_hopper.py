"""The logic of the kernels for Hopper against the fp64 reference, on the CPU, in fp32."""

from __future__ import annotations

import pytest
import torch

from whimbrel.scan.kernels.test_launch import OPTIONS, check, every, two_states
from whimbrel.testing.gluon import emulated
from whimbrel.testing.recurrence import Recurrence, Shape

pytest.importorskip("triton.experimental.gluon")
KERNELS = [
    f"whimbrel.scan.kernels.{name}"
    for name in (
        "hopper",
        "hopper_prepare",
        "hopper_ends",
        "hopper_forward",
        "hopper_backward",
        "hopper_adding",
        "hopper_sums",
    )
]
EDGES = torch.tensor([0, 5, 5, 70, 140], dtype=torch.int32)
SHAPES = [
    Shape(2, 70, 1, 2, 64, 64),
    Shape(1, 64, 1, 1, 128, 64),
    Shape(1, 200, 1, 1, 64, 128),
    Shape(1, 1, 1, 1, 64, 64),
]


@pytest.fixture
def hopper(monkeypatch):
    """All calls go to the kernels for Hopper, in one stretch for each sequence unless a test asks for more."""
    from whimbrel.scan.kernels import hopper_launch, launch

    monkeypatch.setattr(hopper_launch, "fits", lambda q, v: q.shape[0] * q.shape[1] > 0)
    monkeypatch.setattr(hopper_launch, "count_stretches", lambda *_: 1)
    monkeypatch.setattr(launch, "_precision", lambda dtype: "ieee")
    with emulated(*KERNELS):
        yield hopper_launch


@every
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(hopper, recurrence: Recurrence, shape: Shape):
    check(recurrence, shape, torch.float32, 1e-5, floor=1e-5)


@two_states
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(hopper, recurrence: Recurrence, options):
    check(recurrence, Shape(1, 70, 1, 1, 64, 64), torch.float32, 1e-5, floor=1e-5, **options)


@every
@pytest.mark.parametrize("stretches", [1, 2])
def test_packed_sequences(hopper, recurrence: Recurrence, stretches: int, monkeypatch):
    monkeypatch.setattr(hopper, "count_stretches", lambda *_: stretches)
    check(recurrence, Shape(1, 140, 1, 2, 64, 64), torch.float32, 1e-5, floor=1e-5, cu_seqlens=EDGES)


@every
@pytest.mark.parametrize("strongest_decay", [0.01, 30.0])
def test_stretches(hopper, recurrence: Recurrence, strongest_decay: float, monkeypatch):
    monkeypatch.setattr(hopper, "count_stretches", lambda *_: 3)
    shape = Shape(1, 170, 1, 1, 64, 64)
    check(recurrence, shape, torch.float32, 2e-5, floor=2e-5, strongest_decay=strongest_decay)


@every
def test_what_follows_a_sequence_cannot_be_seen_in_it(hopper, recurrence: Recurrence, monkeypatch):
    """Tiles that reach over an end hold the next sequence, which may be broken."""
    from whimbrel.testing.recurrence import make_inputs, outputs_and_gradients

    inputs = make_inputs(recurrence, Shape(1, 100, 1, 1, 64, 64), dtype=torch.float32, sequences=2)
    for x in inputs.tensors:
        x[:, 70:] = torch.nan
    edges = torch.tensor([0, 70, 100], dtype=torch.int32)
    for part in outputs_and_gradients(recurrence, inputs, impl="triton", cu_seqlens=edges):
        for name, x in part.items():
            mine = x[0] if "state" in name else x[:, :70]
            assert mine.isfinite().all(), name


@pytest.mark.parametrize("signs", [(1.0,), (1.0, -1.0)], ids=["equal", "opposite"])
def test_solves_of_keys_in_one_direction(hopper, signs: tuple[float, ...]):
    """No triangle is worse for a solve: with equal keys and rates of 1 it is full of ones."""
    from whimbrel.mixers.rdn import rdn
    from whimbrel.testing.budget import assert_close

    random = torch.Generator().manual_seed(0)
    shape = (1, 90, 1, 64)
    q, v, one = (torch.randn(shape, generator=random) for _ in range(3))
    k = torch.nn.functional.normalize(one[:, :1], dim=-1) * torch.tensor(signs * 90)[:90, None, None]
    tensors = (q, k, v, torch.zeros(shape[:3]), torch.ones(shape[:3]), torch.rand(shape[:3], generator=random))
    wanted = rdn(*tensors, impl="reference").y
    assert_close("y", wanted, rdn(*tensors, impl="triton").y, 1e-5)
