"""Every recurrence of the library under the contract of `whimbrel.testing.recurrence`."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from whimbrel.testing import recurrence as contract
from whimbrel.testing.recurrence import RECURRENCES, Recurrence, Shape

TWO_STATES = [name for name, recurrence in RECURRENCES.items() if recurrence.states == 2]
OPTIONS = [
    {"combine": combine, "residual": residual, "clip": clip}
    for combine in ("gated", "sum")
    for residual in ("undecayed", "decayed")
    for clip in (1.0, None)
]
VARIANTS = {name: recurrence for name, recurrence in RECURRENCES.items() if recurrence.states == 1} | {
    "-".join((name, *map(str, options.values()))): dataclasses.replace(RECURRENCES[name], options=options)
    for name in TWO_STATES
    for options in OPTIONS
}

every = pytest.mark.parametrize("recurrence", RECURRENCES.values(), ids=list(RECURRENCES))
every_variant = pytest.mark.parametrize("recurrence", VARIANTS.values(), ids=list(VARIANTS))


@every_variant
def test_equals_reference(recurrence: Recurrence):
    contract.check_equals_reference(recurrence, Shape())


@every
@pytest.mark.parametrize("time", [1, 2, 31, 32, 33, 64, 97])
def test_equals_reference_at_length(recurrence: Recurrence, time: int):
    contract.check_equals_reference(recurrence, Shape(time=time, batch=1), seed=time)


@every
@pytest.mark.parametrize("shape", [Shape(value_heads=6), Shape(3, 40, 1, 1, 1, 1), Shape(1, 40, 3, 3, 5, 16)], ids=str)
def test_equals_reference_at_shape(recurrence: Recurrence, shape: Shape):
    contract.check_equals_reference(recurrence, shape, seed=1)


@every_variant
def test_finite_differences(recurrence: Recurrence):
    contract.check_finite_differences(recurrence)


@every_variant
def test_steps(recurrence: Recurrence):
    contract.check_steps(recurrence)


@every_variant
def test_gate_limits(recurrence: Recurrence):
    contract.check_gate_limits(recurrence)


@every
@pytest.mark.parametrize("cut", [1, 32, 41])
def test_segments(recurrence: Recurrence, cut: int):
    contract.check_segments(recurrence, cut=cut)


@every
@pytest.mark.parametrize("lengths", [(33, 1, 0, 70, 64, 5), (7, 7), (20,), (0, 0, 3), (64, 64, 64)], ids=str)
def test_packed(recurrence: Recurrence, lengths: tuple[int, ...]):
    contract.check_packed(recurrence, lengths)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(recurrence: Recurrence, dtype: torch.dtype):
    contract.check_low_precision(recurrence, dtype)


@every
@pytest.mark.parametrize(
    "check",
    [
        contract.check_value_heads,
        contract.check_forgets,
        contract.check_causal,
        contract.check_deterministic,
        contract.check_inputs_kept,
        contract.check_empty,
        contract.check_default_state,
    ],
    ids=lambda check: check.__name__,
)
def test_contract(recurrence: Recurrence, check):
    check(recurrence)


# Three times the largest ratio found over four seeds at every decay; rounding alone gives 1e-7.
@every
@pytest.mark.parametrize(
    ("strongest_decay", "budget"),
    [
        (0.02, {"": 8e-7, "gradient of log_decay": 1e-6}),
        (0.3, {"": 6e-7, "gradient of log_decay": 3e-6}),
        (4.0, {"": 7e-7, "gradient of log_decay": 1.2e-5}),
        (20.0, {"": 7e-7, "gradient of log_decay": 8e-5}),
    ],
)
def test_fp32(recurrence: Recurrence, strongest_decay: float, budget: dict[str, float]):
    contract.check_fp32(recurrence, budget, strongest_decay=strongest_decay)
