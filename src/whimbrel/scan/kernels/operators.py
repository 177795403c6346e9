"""Operators of PyTorch from plain functions, registered by hand.

The decorators of PyTorch do the same, and go through the operator's schema again for every call: together some hundreds
of microseconds for a forward and a backward, which is longer than most kernels here run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library
from torch.autograd.function import once_differentiable

_library = library.Library("whimbrel", "FRAGMENT")


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
    return getattr(torch.ops.whimbrel, name).default


_ORDINARY = {Tensor, torch.nn.Parameter, type(None)}


def plain(*tensors: Tensor | None) -> bool:
    """Whether nobody but autograd looks at operators on these tensors, so that a call may go past the dispatcher.

    Its way through an operator of twenty arguments takes tens of microseconds, twice with gradients.
    """
    return (
        not torch.compiler.is_compiling()
        and _ORDINARY.issuperset(map(type, tensors))
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def differentiate(
    op: Any,
    keep: Callable[..., None],
    pull: Callable[..., Any],
) -> Callable[..., Any]:
    """Give `op` a gradient, once; returns record(made, *inputs), which notes for autograd what was made of what.

    keep: called as keep(ctx, inputs, *made) after the forward, to save what `pull` needs. made: the output, first.
    pull: called as pull(ctx, *cotangents of the outputs); returns a tuple of those of the inputs, None for no tensor.
    record returns the output, made before of `plain` inputs: the device is at work while autograd takes its notes.
    """

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, made: tuple[Any, ...], *inputs: Any) -> Any:
            keep(ctx, inputs, *made)
            return made[0]

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *cotangents: Any) -> Any:  # pyrefly: ignore [bad-override]
            return None, *pull(ctx, *cotangents)

    def run(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*inputs)
        wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        # In a tuple, or autograd would take it for an input.
        return Gradient.apply((output,), *inputs) if wanted else output

    _library.impl(op.name().partition("::")[2], run, "Autograd")
    # What its `apply` comes to where functorch is not at work.
    return super(torch.autograd.Function, Gradient).apply  # pyrefly: ignore [missing-attribute]
