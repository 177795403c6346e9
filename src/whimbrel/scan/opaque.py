"""A chunked form as one operator of PyTorch, for torch.compile.

Traced, the form is a graph of all its chunks: minutes of compilation, and again for every other length. As an operator
it is one node, packed sequences included. Its gradient runs the forward again, so only arguments are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from whimbrel.scan import chunks
from whimbrel.scan.common import compute_dtype
from whimbrel.scan.kernels.operators import differentiate, operator


class _Context:
    """Stands in for what autograd hands to a function, where the gradient is asked for by hand."""

    def __init__(self, wanted: bool, arguments: int) -> None:
        self.needs_input_grad = (wanted,) * arguments
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


def opaque(
    name: str, function: type[torch.autograd.Function], decode: Callable[[Sequence[float]], tuple[Any, ...]]
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """whimbrel::NAME from `function`, called as function(layout, *decode(settings), *tensors, *states).

    The operator takes q, k, v, log_decay, beta, gamma, base, residual (the last three None where there is no such
    thing), cu_seqlens, settings, chunk size; it gives y and the states, an empty tensor for a second one that is not.
    """

    def arguments(x: Sequence[Any]) -> tuple[list[Tensor], list[Tensor | None], Tensor | None, tuple[Any, ...], int]:
        *tensors, gamma, base, residual, cu_seqlens, settings, chunk = x
        if gamma is None:
            return tensors, [base], cu_seqlens, decode(settings), chunk
        return [*tensors, gamma], [base, residual], cu_seqlens, decode(settings), chunk

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        gamma: Tensor | None,
        base: Tensor | None,
        residual: Tensor | None,
        cu_seqlens: Tensor | None,
        settings: Sequence[float],
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors, states, edges, given, chunk = arguments(
            (q, k, v, log_decay, beta, gamma, base, residual, cu_seqlens, settings, chunk)
        )

        def run(layout: chunks.Layout, *x: Tensor) -> tuple[Tensor, ...]:
            return function.forward(_Context(False, 1 + len(given) + len(x)), layout, *given, *x)

        y, *ends = chunks.in_tiles(run, tensors, states, edges, chunk)
        return y.contiguous(), ends[0], ends[1] if len(ends) == 2 else y.new_empty(0)

    def fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        tensors, states, edges, _, _ = arguments(inputs)
        q, _, v, *gates = tensors
        sequences = v.shape[0] if edges is None else edges.shape[0] - 1
        shape, dtype = (sequences, v.shape[2], q.shape[3], v.shape[3]), compute_dtype(q, *gates, *states)
        second = q.new_empty(shape, dtype=dtype) if len(states) == 2 else v.new_empty(0)
        return v.new_empty(v.shape), q.new_empty(shape, dtype=dtype), second

    def pull(
        dy: Tensor,
        dbase: Tensor,
        dresidual: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        gamma: Tensor | None,
        base: Tensor | None,
        residual: Tensor | None,
        cu_seqlens: Tensor | None,
        settings: Sequence[float],
        chunk: int,
    ) -> list[Tensor]:
        tensors, states, edges, given, chunk = arguments(
            (q, k, v, log_decay, beta, gamma, base, residual, cu_seqlens, settings, chunk)
        )
        batch, time = v.shape[:2]
        layout = chunks.Layout.dense(batch, time, chunk) if edges is None else chunks.Layout.packed(edges, chunk)
        context = _Context(True, 1 + len(given) + len(tensors) + len(states))
        function.forward(context, layout, *given, *tensors, *states)
        found = function.backward(context, dy, dbase, *([dresidual] if len(states) == 2 else []))
        return [x.contiguous() for x in found if x is not None]

    def fake_pull(*inputs: Any) -> list[Tensor]:
        tensors, states, *_ = arguments(inputs[3:])
        return [x.new_empty(x.shape) for x in (*tensors, *states) if x is not None]

    everywhere = ("CompositeExplicitAutograd",)
    op = operator(name, forward, fake, everywhere)
    pull_op = operator(f"{name}_backward", pull, fake_pull, everywhere)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:9])
        ctx.rest = inputs[9:]

    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        found = iter(pull_op(*(x.contiguous() for x in cotangents), *inputs, *ctx.rest))
        return (*(None if x is None else next(found) for x in inputs[:8]), None, None, None)

    differentiate(op, keep, backward)
    return op
