"""What the benchmarks of all recurrences share: shapes, inputs, the check, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from whimbrel.bench.case import Case
from whimbrel.testing.budget import assert_close

BATCH, HEADS, KEY_DIM, VALUE_DIM = 1, 4, 64, 64


def recurrence_cases(
    name: str, op: Callable[..., Any], *, rates: int, device: str, quick: bool, lengths: Sequence[int] = (1024, 4096)
) -> list[Case]:
    """The token-by-token reference (fp64 inside) against the chunked form, in fp32, forward and with backward.

    op: called as op(q, k, v, log_decay, *rates, impl=...), and returns (y, state).
    rates: tensors like beta and gamma that it takes.
    """
    found = []
    for length in (100,) if quick else lengths:
        tensors = partial(make_inputs, length, rates=rates, device=device)
        params = {"B": BATCH, "T": length, "H": HEADS, "K": KEY_DIM, "V": VALUE_DIM, "dtype": "float32"}
        check = partial(_check, name, op, tensors)
        impls = ("reference", "chunked")
        forward = {impl: partial(_forward, op, tensors, impl) for impl in impls}
        both = {impl: partial(_forward_backward, op, tensors, impl) for impl in impls}
        found.append(Case(name=name, params=params, impls=forward, check=check))
        found.append(Case(name=name, params=params, impls=both, check=check, metric="forward+backward"))
    return found


def make_inputs(length: int, *, rates: int, device: str) -> list[Tensor]:
    """q, k, v, log_decay and `rates` rates: unit keys, decays of about 0.95, rates between 0 and 1."""
    generator = torch.Generator().manual_seed(length)
    q, k = (torch.randn(BATCH, length, HEADS, KEY_DIM, generator=generator) for _ in range(2))
    v = torch.randn(BATCH, length, HEADS, VALUE_DIM, generator=generator)
    log_decay = -0.1 * torch.rand(BATCH, length, HEADS, generator=generator)
    gates = [torch.rand(BATCH, length, HEADS, generator=generator) for _ in range(rates)]
    unit = torch.nn.functional.normalize(k, dim=-1)
    return [x.to(device) for x in (q, unit, v, log_decay, *gates)]


def _forward(op: Callable[..., Any], tensors: Callable[[], list[Tensor]], impl: str) -> Callable[[], object]:
    inputs = tensors()

    def call() -> object:
        with torch.no_grad():
            return op(*inputs, impl=impl)

    return call


def _forward_backward(op: Callable[..., Any], tensors: Callable[[], list[Tensor]], impl: str) -> Callable[[], object]:
    inputs = [x.requires_grad_() for x in tensors()]
    weight = torch.ones_like(inputs[2])

    def call() -> object:
        y, _ = op(*inputs, impl=impl)
        return torch.autograd.grad(y, inputs, weight)

    return call


def _check(name: str, op: Callable[..., Any], tensors: Callable[[], list[Tensor]]) -> None:
    """Outputs and all gradients, the chunked form in fp32 against the recurrence in fp64."""
    results = []
    for impl in ("reference", "chunked"):
        inputs = [x.requires_grad_() for x in tensors()]
        y, _ = op(*inputs, impl=impl)
        results.append([y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y))])
    for part, reference, got in zip(("y", "q", "k", "v", "log_decay", "beta", "gamma"), *results, strict=False):
        assert_close(f"{name} {part}", reference, got, 1e-4)
