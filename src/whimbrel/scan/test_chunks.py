"""The chunkwise form where it is special: layouts, tiles, chunk sizes, extreme decays."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from whimbrel.mixers.two_state import op as two_state_op
from whimbrel.scan import chunks, one_state
from whimbrel.scan.chunks import Layout
from whimbrel.testing.budget import assert_close
from whimbrel.testing.recurrence import (
    FP64,
    RECURRENCES,
    Inputs,
    Recurrence,
    Shape,
    check_equals_reference,
    make_inputs,
    outputs_and_gradients,
)

every = pytest.mark.parametrize("recurrence", RECURRENCES.values(), ids=list(RECURRENCES))


def layouts() -> list[tuple[Layout, int]]:
    """Layouts with their number of tokens in all."""
    return [
        (Layout.dense(3, 10, 4), 30),
        (Layout.dense(2, 8, 4), 16),
        (Layout.packed(torch.tensor([0, 3, 3, 14, 15, 23]), 4), 23),
    ]


@pytest.mark.parametrize(("layout", "tokens"), layouts())
@pytest.mark.parametrize("tail", [(), (5,)])
def test_join_is_the_transpose_of_split(layout, tokens, tail):
    x = torch.randn(layout.batch, layout.time, 2, *tail, dtype=torch.float64)
    y = layout.split(x, 6, torch.float64)
    assert y.shape == (sum(layout.counts) * 6, layout.chunk, *tail)
    assert torch.equal(layout.join(y, 2, 6, torch.float64), 3 * x)
    z = torch.randn_like(y)
    assert torch.allclose((y * z).sum(), (x * layout.join(z, 2, 6, torch.float64)).sum())
    assert int((layout.split(torch.ones(layout.batch, layout.time, 1), 1, torch.float32) != 0).sum()) == tokens


@pytest.mark.parametrize(("layout", "tokens"), layouts())
def test_states_enter_and_leave_in_the_order_of_the_caller(layout, tokens):
    states = torch.randn(layout.sequences, 2, 3, 4)
    assert torch.equal(layout.leave(layout.enter(states, states, states.shape), 2), states)


def test_packed_layout_wastes_less_than_one_chunk_a_sequence():
    lengths = torch.tensor([4000, *[3] * 50])
    layout = Layout.packed(torch.cat((torch.zeros(1).long(), lengths.cumsum(0))), 32)
    assert sum(layout.counts) == 125 + 50


@every
@pytest.mark.parametrize("tile", [1, 200, 1000, 2000])
def test_tiles_give_the_results_of_a_single_run(recurrence: Recurrence, tile: int, monkeypatch):
    inputs = make_inputs(recurrence, Shape(batch=3, time=75))
    want = outputs_and_gradients(recurrence, inputs, impl="chunked")
    calls = []
    dense = Layout.dense
    monkeypatch.setattr(Layout, "dense", lambda *args: calls.append(args) or dense(*args))
    monkeypatch.setattr(chunks, "TILE", tile)
    got = outputs_and_gradients(recurrence, inputs, impl="chunked")
    assert len(calls) > 1
    for a, b in zip(want, got):
        for name in a:
            assert_close(name, a[name], b[name], FP64)


@every
@pytest.mark.parametrize("size", [1, 2, 5, 16, 64, 128])
def test_every_chunk_size_gives_the_same(recurrence: Recurrence, size: int, monkeypatch):
    module = one_state if recurrence.states == 1 else two_state_op
    monkeypatch.setattr(module, "chunked", partial(module.chunked, chunk_size=size))
    check_equals_reference(recurrence, Shape(time=70, batch=1))


def test_strong_decay_leaves_no_subnormal_factor():
    layout = Layout.dense(1, 64, 64)
    log_decay = torch.linspace(-30, 0, 64).double()[None]
    g = chunks.ground(layout, torch.ones(1, 64, 1), log_decay)
    for x in (g.before, g.after, g.whole, g.between):
        assert ((x == 0) | (x >= 1e-27)).all()
    exact = (log_decay.cumsum(1) - log_decay)[0, :, None] - log_decay.cumsum(1)[0]
    inside = (exact > -50) & torch.ones(64, 64, dtype=torch.bool).tril(-1)
    assert_close("between", exact[inside].exp(), g.between[0][inside], 2e-7)


@every
def test_final_states_hold_no_more_memory_than_they_need(recurrence: Recurrence):
    inputs = make_inputs(recurrence, Shape(time=200))
    _, states = recurrence(inputs.tensors, inputs.states, impl="chunked")
    for state in states:
        assert state.untyped_storage().nbytes() == state.numel() * 8


@every
def test_backward_can_run_twice_and_not_be_differentiated(recurrence: Recurrence):
    inputs = make_inputs(recurrence, Shape(time=40))
    leaves = [x.requires_grad_() for x in inputs.tensors]
    y, _ = recurrence(leaves, inputs.states, impl="chunked")
    first = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second[0].sum().backward()


@every
def test_checkpointing_and_autocast_change_nothing(recurrence: Recurrence):
    inputs = make_inputs(recurrence, Shape(time=40), dtype=torch.float32)
    want = outputs_and_gradients(recurrence, inputs, impl="chunked")

    def checkpointed(tensors, states, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(lambda *x: recurrence(list(x), states, **kwargs), *tensors, use_reentrant=False)

    checkpointed.rates = recurrence.rates
    got = outputs_and_gradients(checkpointed, Inputs(*inputs), impl="chunked")  # pyrefly: ignore
    for a, b in zip(want, got):
        assert all(torch.equal(a[name], b[name]) for name in a)


@every
def test_autocast_leaves_the_single_step_in_fp32(recurrence: Recurrence):
    inputs = make_inputs(recurrence, Shape(time=1), dtype=torch.float32)
    want, _ = recurrence(inputs.tensors, inputs.states, impl="auto")
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = recurrence(inputs.tensors, inputs.states, impl="auto")
    assert torch.equal(want, got)
