"""torch.compile around the chunked forms: whole graphs, one node for a scan, the results of eager calls."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import library
from torch._dynamo.backends.common import aot_autograd

from whimbrel._lazy import load_object
from whimbrel.scan.base import State
from whimbrel.testing.budget import assert_close
from whimbrel.testing.recurrence import RECURRENCES, Inputs, Recurrence, Shape, make_inputs, outputs_and_gradients

every = pytest.mark.parametrize("recurrence", RECURRENCES.values(), ids=list(RECURRENCES))


class Compiled:
    """A recurrence that torch.compile has seen."""

    def __init__(self, recurrence: Recurrence, *, seen: list[int], **kwargs) -> None:
        def count(graph, example):
            seen.append(len(graph.graph.nodes))
            return make_boxed_func(graph)

        function, two = load_object(recurrence.target), recurrence.states == 2

        def run(tensors, states):
            state = None if states is None else State(*states) if two else states[0]
            y, state = function(*tensors, state=state, impl="chunked", **kwargs)
            return y, [*state] if two else [state]

        self.rates = recurrence.rates
        self.run = torch.compile(run, fullgraph=True, backend=aot_autograd(fw_compiler=count, bw_compiler=count))

    def __call__(self, tensors, states):
        return self.run(tensors, states)


@every
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_equals_eager_in_one_small_graph_at_any_length(recurrence: Recurrence, packed: bool):
    torch._dynamo.reset()
    seen: list[int] = []
    for time in (70, 300, 301):
        edges = torch.tensor([0, 33, 33, time]) if packed else None
        options = {"clip": 0.7, "combine": "sum", "residual": "decayed"} if recurrence.states == 2 and packed else {}
        if time == 70:
            compiled = Compiled(recurrence, seen=seen, cu_seqlens=edges, **options)
        elif packed:
            continue  # the edges are a constant of the function
        inputs = make_inputs(recurrence, Shape(1 if packed else 2, time, 2, 4, 8, 6), sequences=3 if packed else None)
        wanted = outputs_and_gradients(recurrence, inputs, impl="chunked", cu_seqlens=edges, **options)
        found = outputs_and_gradients(compiled, inputs)  # pyrefly: ignore [bad-argument-type]
        for want, got in zip(wanted, found, strict=True):
            for name in want:
                assert_close(name, want[name], got[name], 1e-11, floor=1e-12)
    assert 0 < max(seen) < 60, "a scan is traced chunk by chunk"
    assert packed or len(seen) == 4, "every length is compiled again"


@every
def test_compiled_without_states_and_in_low_precision(recurrence: Recurrence):
    torch._dynamo.reset()
    inputs = make_inputs(recurrence, Shape(2, 40, 1, 2, 8, 6), dtype=torch.bfloat16)
    y, states = Compiled(recurrence, seen=[])(inputs.tensors, None)
    want, ends = recurrence(inputs.tensors, None, impl="chunked")
    assert y.dtype == torch.bfloat16
    assert torch.equal(want, y)
    assert all(torch.equal(a, b) for a, b in zip(ends, states, strict=True))
    leaves = Inputs([x.requires_grad_() for x in inputs.tensors], inputs.states)
    y, _ = Compiled(recurrence, seen=[])(leaves.tensors, None)
    y.float().square().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == x.dtype for x in leaves.tensors)


@every
def test_operators_agree_with_what_the_compiler_is_told(recurrence: Recurrence):
    """PyTorch's own checks of an operator: schema, shapes without data, gradients, compilation."""
    inputs = make_inputs(recurrence, Shape(2, 40, 1, 2, 8, 6))
    load_object(recurrence.target)
    two = recurrence.states == 2
    tensors = [*inputs.tensors, *([] if two else [None])]
    states = [*inputs.states, *([] if two else [None])]
    settings = [0.7, 0.3, 1.0, 0.0, 1.0] if two else [0.3, 1.0]
    name = "chunked_two_states" if two else "chunked_one_state"
    arguments = [None if x is None else x.clone().requires_grad_() for x in (*tensors, *states)]
    library.opcheck(getattr(torch.ops.whimbrel, name).default, (*arguments, None, settings, 32))
