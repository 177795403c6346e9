"""Operators of PyTorch from plain functions, registered by hand.

The decorators of PyTorch do the same, and go through the operator's schema again for every call: together some hundreds
of microseconds for a forward and a backward, which is longer than most kernels here run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

_library = library.Library("whimbrel", "FRAGMENT")
_functions: dict[Any, Callable[..., Any]] = {}
"""What each operator was made from."""


def operator(
    name: str, function: Callable[..., Any], fake: Callable[..., Any], keys: tuple[str, ...] = ("CPU", "CUDA")
) -> Any:
    """whimbrel::NAME from a function that returns new tensors, its schema read from the annotations.

    fake: the same from tensors without data to tensors without data, which is what torch.compile sees.
    keys: the dispatcher's names of what the function runs on.
    """
    _library.define(name + library.infer_schema(function, mutates_args=()))
    for key in keys:
        _library.impl(name, function, key)
    library.register_fake(f"whimbrel::{name}", fake, lib=_library)
    op = getattr(torch.ops.whimbrel, name).default
    _functions[op] = function
    return op


def plain(*tensors: Tensor | None) -> bool:
    """Whether nobody but autograd looks at operators on these tensors, so that a call may go past the dispatcher.

    Its way through an operator of twenty arguments takes tens of microseconds, twice with gradients.
    """
    return (
        not torch.compiler.is_compiling()
        and all(x is None or type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def differentiate(
    op: Any,
    keep: Callable[[Any, tuple[Any, ...], Any], None],
    pull: Callable[..., Any],
) -> Callable[..., Any]:
    """Give `op` a gradient, once; returns the same for tensors that are `plain`.

    keep: called as keep(ctx, inputs, output) after the forward, to save what `pull` needs.
    pull: called as pull(ctx, *cotangents of the outputs); returns one of each input, None where there is none.
    """

    def recorded(compute: Callable[..., Any]) -> Callable[..., Any]:
        class Gradient(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                output = compute(*inputs)
                keep(ctx, inputs, output)
                return output

            backward = staticmethod(pull)

        def run(*inputs: Any) -> Any:
            wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
            return Gradient.apply(*inputs) if wanted else compute(*inputs)

        return run

    def below(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    _library.impl(op.name().partition("::")[2], recorded(below), "Autograd")
    return recorded(_functions[op])
