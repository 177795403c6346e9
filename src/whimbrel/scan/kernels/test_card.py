"""What the kernels promise on a GPU beyond ordinary inputs: gates at their ends, pieces, many heads, short times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from whimbrel.scan.kernels.test_launch import HALF, every
from whimbrel.testing.budget import assert_close, rms_ratio
from whimbrel.testing.gpu import need_memory
from whimbrel.testing.recurrence import (
    RECURRENCES,
    Inputs,
    Recurrence,
    Shape,
    clear_of_clip,
    make_inputs,
    outputs_and_gradients,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu
WHOLE, STRETCHES = Shape(2, 333, 2, 4, 128, 128), Shape(1, 2100, 1, 1, 128, 128)
"""A walk over each sequence, and one sequence with so few heads that it is cut into stretches."""
by_walk = pytest.mark.parametrize("shape", [WHOLE, STRETCHES], ids=["whole", "stretches"])
CLEAR = {"": 0.008, "y": 0.005, "state 0": 0.005, "state 1": 0.005, "log_decay": 0.02}
CLEAR |= {"gradient of v": 0.015, "gradient of beta": 0.01, "gradient of gamma": 0.01}
"""RMS ratios to fp64 that bf16 products may reach where the clip decides nothing."""
ENDS = ((0.0, 1.0), (0.0, 0.0), (-1e-6, 1 - 1e-6), (-30.0, 1e-6), (-100.0, 1.0))
"""Logarithms of decays, and rates: exactly 1, near it and near 0; 0, 1 and near both."""


def on_card(recurrence: Recurrence, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    inputs = make_inputs(recurrence, shape, seed=shape.time, dtype=dtype)
    return Inputs(*([x.cuda() for x in part] for part in inputs))


def check(recurrence: Recurrence, inputs: Inputs, found, budget=HALF, floor: float = 0.0) -> None:
    """Outputs and gradients `found` against the plain form in fp64, which equals the recurrence to 1e-11."""
    exact = Inputs(*([x.double() for x in part] for part in inputs))
    wanted = outputs_and_gradients(recurrence, exact, impl="chunked")
    for kind, want, got in zip(("", "gradient of "), wanted, found, strict=True):
        for name in want:
            limit = budget.get(kind + name, budget.get(name, budget[""]))
            assert_close(kind + name, want[name], got[name], limit, floor=floor)


@every
@by_walk
def test_gates_at_their_ends(recurrence: Recurrence, shape: Shape):
    inputs = on_card(recurrence, shape)
    for place, (decay, rate) in enumerate(ENDS):
        inputs.tensors[3][:, 5 + place :: 15] = decay
        for x in inputs.tensors[4:]:
            x[:, 2 + place :: 20] = rate
    found = outputs_and_gradients(recurrence, inputs, impl="triton")
    check(recurrence, inputs, found, HALF | {"log_decay": 0.03})


@every
@pytest.mark.parametrize(
    ("time", "dtype"), [(31, torch.bfloat16), (64, torch.float16), (65, torch.bfloat16)], ids=["31", "64", "65"]
)
def test_times_about_a_chunk(recurrence: Recurrence, time: int, dtype: torch.dtype):
    inputs = on_card(recurrence, Shape(3, time, 2, 2, 64, 64), dtype)
    check(recurrence, inputs, outputs_and_gradients(recurrence, inputs, impl="triton"), floor=5e-3)


@every
@by_walk
def test_precision_away_from_the_clip(recurrence: Recurrence, shape: Shape):
    """Where no residual is decided by rounding, the bounds are those of bf16 products alone."""
    inputs = make_inputs(recurrence, shape, seed=shape.time, dtype=torch.bfloat16)
    if recurrence.states == 2:
        inputs = clear_of_clip(inputs, delta=recurrence is RECURRENCES["rdn"])
    inputs = Inputs(*([x.cuda() for x in part] for part in inputs))
    check(recurrence, inputs, outputs_and_gradients(recurrence, inputs, impl="triton"), CLEAR)


@every
@by_walk
def test_pieces_equal_the_whole(recurrence: Recurrence, shape: Shape):
    """States handed from piece to piece give what one call gives, gradients into the first states included."""
    inputs = on_card(recurrence, shape)

    class InPieces:
        rates = recurrence.rates

        def __call__(self, tensors, states, **kwargs):
            outputs = []
            for a, b in pairwise([0, 1, 130, 131, shape.time]):
                y, states = recurrence([x[:, a:b] for x in tensors], states, **kwargs)
                outputs.append(y)
            return torch.cat(outputs, 1), states

    found = outputs_and_gradients(InPieces(), inputs, impl="triton")  # pyrefly: ignore [bad-argument-type]
    check(recurrence, inputs, found)


@every
@by_walk
def test_errors_are_at_most_twice_those_of_the_plain_form(recurrence: Recurrence, shape: Shape, monkeypatch):
    """The plain form with its products' operands rounded to bf16 too, sums and all else in fp32."""
    inputs = on_card(recurrence, shape)
    exact = Inputs(*([x.double() for x in part] for part in inputs))
    wanted = outputs_and_gradients(recurrence, exact, impl="chunked")
    found = outputs_and_gradients(recurrence, inputs, impl="triton")
    with monkeypatch.context() as patch:
        for owner, name in ((torch, "bmm"), (torch, "baddbmm"), (torch.Tensor, "baddbmm_")):
            patch.setattr(owner, name, rounding(getattr(owner, name)))
        plain = outputs_and_gradients(recurrence, inputs, impl="chunked")
    ratios = {
        name: (rms_ratio(want[name], got[name]), rms_ratio(want[name], other[name]))
        for want, got, other in zip(wanted, found, plain, strict=True)
        for name in want
    }
    assert not {name: pair for name, pair in ratios.items() if pair[0] > max(2 * pair[1], 1e-3)}, ratios


def rounding(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`product` of its last two tensors as bf16 holds them."""

    def rounded(*tensors: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        *rest, a, b = tensors
        return product(*rest, a.bfloat16().to(a), b.bfloat16().to(b), **kwargs)

    return rounded


@every
def test_thousands_of_heads(recurrence: Recurrence):
    """3,072 heads in one call are each what they are in a call of their own."""
    inputs = on_card(recurrence, Shape(96, 70, 16, 32, 64, 64))
    y, states = recurrence(inputs.tensors, inputs.states, impl="triton")
    for row in (0, 50, 95):
        part = Inputs(*([x[row : row + 1].double() for x in group] for group in inputs))
        want, ends = recurrence(part.tensors, part.states, impl="chunked")
        assert_close("y", want, y[row : row + 1], HALF["y"])
        for a, b in zip(ends, states, strict=True):
            assert_close("state", a, b[row : row + 1], HALF["state 0"])


@pytest.fixture
def giving_back() -> Iterator[None]:
    """Memory that a test took and torch would keep."""
    yield
    torch.cuda.empty_cache()


@every
def test_past_two_billion_elements(recurrence: Recurrence, giving_back):
    """Rows of a batch with more than 2^31 elements of q, k, v each are what they are alone, gradients to the bit too.

    Rows of 960 tokens are never cut into stretches, so that a row alone is computed in the same order.
    """
    need_memory(64 * 2**30)
    batch, time, heads, dim = 1100, 960, 16, 128
    random = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random, device="cuda", dtype=torch.bfloat16)

    q, k = (normal(batch, time, heads, dim).mul_(dim**-0.5) for _ in range(2))
    v, weight = normal(batch, time, heads, dim), normal(batch, time, heads, dim)
    assert v[:-1].numel() > 2**31
    rates = [normal(batch, time, heads).float().sigmoid() for _ in recurrence.rates]
    tensors = [q, k, v, normal(batch, time, heads).float().abs().mul_(-0.1), *rates]

    def run(rows: slice) -> dict[str, torch.Tensor]:
        leaves = [x[rows].detach().requires_grad_() for x in tensors]
        y, states = recurrence(leaves, None, impl="triton")
        gradients = torch.autograd.grad(y, leaves, weight[rows])
        names = ["y", *(f"state {n}" for n in range(len(states))), "dq", "dk", "dv", "dlog", *recurrence.rates]
        return dict(zip(names, [x.detach() for x in (y, *states, *gradients)], strict=True))

    whole = run(slice(None))
    for row in (batch // 2, batch - 1):
        rows = slice(row, row + 1)
        for name, alone in run(rows).items():
            assert alone.abs().max() > 0, name
            assert torch.equal(whole[name][rows], alone), (row, name)


@every
def test_checkpointing_gives_equal_bits(recurrence: Recurrence):
    inputs, results = on_card(recurrence, WHOLE), []
    for again in (False, True):
        leaves = [x.clone().requires_grad_() for x in (*inputs.tensors, *inputs.states)]
        count = len(inputs.tensors)

        def run(*leaves, count=count):
            return recurrence(list(leaves[:count]), list(leaves[count:]), impl="triton")[0]

        y = checkpoint(run, *leaves, use_reentrant=False) if again else run(*leaves)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every
def test_autocast_leaves_gates_and_states_alone(recurrence: Recurrence):
    """Under autocast to bf16 a call gives the bits it gives outside."""
    inputs = on_card(recurrence, WHOLE)
    wanted = outputs_and_gradients(recurrence, inputs, impl="triton")
    with torch.autocast("cuda", torch.bfloat16):
        found = outputs_and_gradients(recurrence, inputs, impl="triton")
    for want, got in zip(wanted, found, strict=True):
        for name in want:
            assert got[name].dtype == want[name].dtype, name
            assert torch.equal(got[name], want[name]), name
