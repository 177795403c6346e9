"""What every recurrence must fulfil, whoever wrote it: run these on your own function.

A recurrence is a function of q, k, v, log_decay and rates with the keywords `state`, `cu_seqlens` and `impl`, whose
`impl="reference"` is the token-by-token form in fp64. Each check raises AssertionError where it is not fulfilled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from whimbrel._lazy import load_object
from whimbrel.scan.base import Out, State
from whimbrel.testing.budget import assert_close

FP64 = 1e-11
"""RMS ratio within which two fp64 results count as equal; rounding leaves about 1e-15."""


Result = tuple[Tensor, list[Tensor]]
"""y and the states after it."""


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """A function to be checked."""

    target: str
    """"module:function"."""
    rates: tuple[str, ...]
    """Names of the arguments after `log_decay`."""
    states: int = 1
    """1: `state` is a tensor; 2: it is State(base, residual)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keywords for every call."""

    def __call__(self, tensors: list[Tensor], states: list[Tensor] | None, **kwargs: Any) -> Result:
        """(y, states after), states in a list whatever their number."""
        state = None if states is None else State(*states) if self.states == 2 else states[0]
        function: Callable[..., Out] = load_object(self.target)
        out = function(*tensors, state=state, **{**self.options, **kwargs})
        return out.y, list(out.state) if self.states == 2 else [out.state]


RECURRENCES: dict[str, Recurrence] = {
    "decay": Recurrence(target="whimbrel.scan.decay:decay_scan", rates=("beta",)),
    "delta": Recurrence(target="whimbrel.scan.delta:delta_scan", rates=("beta",)),
    "rla": Recurrence(target="whimbrel.mixers.rla:rla", rates=("beta", "gamma"), states=2),
    "rdn": Recurrence(target="whimbrel.mixers.rdn:rdn", rates=("beta", "gamma"), states=2),
}
"""The recurrences of this library."""


class Shape(NamedTuple):
    """Sizes of one call."""

    batch: int = 2
    time: int = 75
    heads: int = 2
    value_heads: int = 2
    key_dim: int = 8
    value_dim: int = 6


class Inputs(NamedTuple):
    """Arguments of one call."""

    tensors: list[Tensor]
    """q, k, v, log_decay and the rates."""
    states: list[Tensor]


def make_inputs(
    recurrence: Recurrence,
    shape: Shape,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    strongest_decay: float = 0.3,
    sequences: int | None = None,
) -> Inputs:
    """Unit q and k, values of standard deviation 1.5 (which a clip at 1 cuts), rates over [0, 1], states of 0.5.

    log_decay is uniform in [-strongest_decay, 0]. Gates and states are fp32 for a `dtype` below it.
    """
    b, t, h, hv, k, v = shape
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=random, dtype=torch.float64)

    q, keys = (F.normalize(normal(b, t, h, k), dim=-1) for _ in range(2))
    values = 1.5 * normal(b, t, hv, v)
    gates = [-strongest_decay * uniform(b, t, hv), *(uniform(b, t, hv) for _ in recurrence.rates)]
    states = [0.5 * normal(b if sequences is None else sequences, hv, k, v) for _ in range(recurrence.states)]
    wide = torch.promote_types(dtype, torch.float32)
    return Inputs([x.to(dtype) for x in (q, keys, values)] + [x.to(wide) for x in gates], [x.to(wide) for x in states])


def clear_of_clip(inputs: Inputs, *, delta: bool, clip: float = 1.0, margin: float = 0.05) -> Inputs:
    """Inputs of `rla`, or with `delta` of `rdn`, with values moved so that no residual is within `margin` of the bound.

    There rounding decides whether a residual has a gradient. One that is decided otherwise changes that of v by its
    whole size, which among n elements is an RMS ratio of 1 / sqrt(n) and says nothing about precision. The margin is
    some three times what bf16 products may put a prediction off by. Needs tensors on a CPU.
    """
    _, k, v, log_decay, beta, _ = (x.double() for x in inputs.tensors)
    k, base = k.repeat_interleave(v.shape[2] // k.shape[2], 2)[..., None], inputs.states[0].double()
    values = inputs.tensors[2].clone()
    for t in range(v.shape[1]):
        key, alpha, rate = k[:, t], log_decay[:, t, :, None, None].exp(), beta[:, t, :, None, None]
        seen = key.mT @ base
        left = v[:, t, :, None] - seen
        moved = (seen + (clip + 2 * margin) * left.sign())[:, :, 0].to(values)
        values[:, t] = moved.where((left.abs() - clip).abs()[:, :, 0] < margin, values[:, t])
        write = values[:, t, :, None].double() - (alpha * seen if delta else 0)
        base = alpha * base + rate * key @ write
    return inputs._replace(tensors=[*inputs.tensors[:2], values, *inputs.tensors[3:]])


def outputs_and_gradients(
    recurrence: Recurrence, inputs: Inputs, **kwargs: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs by name, and gradients of a fixed random functional of y and of all final states by argument."""
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs.tensors, *inputs.states)]
    count = len(inputs.tensors)
    y, states = recurrence(leaves[:count], leaves[count:], **kwargs)
    random = torch.Generator().manual_seed(1)
    outputs = {"y": y, **{f"state {n}": s for n, s in enumerate(states)}}
    weights = [torch.randn(x.shape, generator=random, dtype=torch.float64) for x in outputs.values()]
    loss = torch.stack([(x.double() * w.to(x.device)).sum() for x, w in zip(outputs.values(), weights)]).sum()
    names = ["q", "k", "v", "log_decay", *recurrence.rates, *(f"initial state {n}" for n in range(len(inputs.states)))]
    gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return {n: x.detach() for n, x in outputs.items()}, dict(zip(names, gradients))


def compare(
    recurrence: Recurrence,
    wanted: Inputs,
    given: Inputs,
    budget: Mapping[str, float] | float,
    *,
    floor: float = 0.0,
    impl: str = "chunked",
    **kwargs: Any,
) -> None:
    """The form `impl` on `given` against the reference on `wanted`: outputs and every gradient within the budget.

    `budget` is one RMS ratio, or one by name with "" for the rest; `floor` as in `assert_close`.
    """
    limits = budget if isinstance(budget, Mapping) else {"": budget}
    reference = outputs_and_gradients(recurrence, wanted, impl="reference", **kwargs)
    found = outputs_and_gradients(recurrence, given, impl=impl, **kwargs)
    for kind, want, got in zip(("", "gradient of "), reference, found):
        for name in want:
            limit = limits.get(kind + name, limits.get(name, limits[""]))
            assert_close(kind + name, want[name], got[name], limit, floor=floor)


def check_equals_reference(recurrence: Recurrence, shape: Shape, *, seed: int = 0, **kwargs: Any) -> None:
    """In fp64, outputs and gradients equal those of the reference under autograd, final states included."""
    inputs = make_inputs(recurrence, shape, seed=seed)
    compare(recurrence, inputs, inputs, FP64, floor=1e-13, **kwargs)


def check_finite_differences(recurrence: Recurrence, **kwargs: Any) -> None:
    """In fp64, gradients equal finite differences, which know nothing of the reference."""
    inputs = make_inputs(recurrence, Shape(1, 7, 1, 2, 3, 2), seed=3)
    leaves = [x.requires_grad_() for x in (*inputs.tensors, *inputs.states)]
    count = len(inputs.tensors)
    leaves[3].data -= 0.01  # a decay of exactly 1 is the edge of what is allowed

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        y, states = recurrence(list(leaves[:count]), list(leaves[count:]), impl="chunked", **kwargs)
        return (y, *states)

    assert torch.autograd.gradcheck(run, leaves, eps=1e-6, atol=1e-7, rtol=1e-6)


def check_segments(recurrence: Recurrence, *, cut: int = 41, **kwargs: Any) -> None:
    """Two segments with the states handed on equal one, gradients included."""
    inputs = make_inputs(recurrence, Shape(), seed=4)

    def in_two(tensors: list[Tensor], states: list[Tensor] | None, **kwargs: Any) -> Result:
        first, middle = recurrence([x[:, :cut] for x in tensors], states, **kwargs)
        second, states = recurrence([x[:, cut:] for x in tensors], middle, **kwargs)
        return torch.cat((first, second), 1), states

    _same(recurrence, in_two, inputs, kwargs)


def check_packed(recurrence: Recurrence, lengths: tuple[int, ...] = (33, 1, 0, 70, 64, 5), **kwargs: Any) -> None:
    """Packed sequences equal the same sequences one by one, gradients included."""
    edges = torch.tensor((0, *lengths)).cumsum(0)
    inputs = make_inputs(recurrence, Shape(batch=1, time=sum(lengths)), seed=5, sequences=len(lengths))

    def packed(tensors: list[Tensor], states: list[Tensor] | None, **kwargs: Any) -> Result:
        return recurrence(tensors, states, cu_seqlens=edges.int(), **kwargs)

    def one_by_one(tensors: list[Tensor], states: list[Tensor] | None, **kwargs: Any) -> Result:
        assert states is not None
        parts = [
            recurrence([x[:, a:b] for x in tensors], [s[n : n + 1] for s in states], **kwargs)
            for n, (a, b) in enumerate(zip(edges.tolist(), edges[1:].tolist()))
        ]
        return torch.cat([y for y, _ in parts], 1), [torch.cat(s) for s in zip(*(s for _, s in parts))]

    _same(_Wrapped(recurrence, one_by_one), packed, inputs, kwargs)
    reference, _ = packed(inputs.tensors, inputs.states, impl="reference", **kwargs)
    chunked, _ = packed(inputs.tensors, inputs.states, impl="chunked", **kwargs)
    assert_close("packed reference", reference, chunked, FP64)


class _Wrapped(NamedTuple):
    """A recurrence that is called in another way."""

    recurrence: Recurrence
    call: Callable[..., Result]

    @property
    def rates(self) -> tuple[str, ...]:
        return self.recurrence.rates

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        return self.call(*args, **kwargs)


def _same(recurrence: Any, other: Callable[..., Result], inputs: Inputs, kwargs: dict) -> None:
    wanted = outputs_and_gradients(recurrence, inputs, impl="chunked", **kwargs)
    got = outputs_and_gradients(_Wrapped(recurrence, other), inputs, impl="chunked", **kwargs)  # type: ignore[arg-type]
    for kind, a, b in zip(("", "gradient of "), wanted, got):
        for name in a:
            assert_close(kind + name, a[name], b[name], FP64, floor=1e-13)


def check_steps(recurrence: Recurrence, **kwargs: Any) -> None:
    """Token by token with the states handed on, as in decoding, equals the whole sequence at once."""
    inputs = make_inputs(recurrence, Shape(time=37, value_heads=4), seed=6)
    want, final = recurrence(inputs.tensors, inputs.states, impl="chunked", **kwargs)
    states: list[Tensor] = inputs.states
    outputs = []
    with torch.no_grad():
        for t in range(37):
            y, states = recurrence([x[:, t : t + 1] for x in inputs.tensors], states, impl="auto", **kwargs)
            outputs.append(y)
    assert_close("y", want, torch.cat(outputs, 1), FP64)
    for n, (a, b) in enumerate(zip(final, states)):
        assert_close(f"state {n}", a, b, FP64)


def check_value_heads(recurrence: Recurrence, **kwargs: Any) -> None:
    """Value head h reads q/k head h // (HV / H): equals a call with q and k repeated, gradients of groups summed."""
    inputs = make_inputs(recurrence, Shape(heads=2, value_heads=6), seed=7)

    def repeated(tensors: list[Tensor], states: list[Tensor] | None, **kwargs: Any) -> Result:
        q, k, *others = tensors
        return recurrence([q.repeat_interleave(3, 2), k.repeat_interleave(3, 2), *others], states, **kwargs)

    _same(recurrence, repeated, inputs, kwargs)


def check_gate_limits(recurrence: Recurrence, **kwargs: Any) -> None:
    """Gates at the ends of their ranges: decay 1, 0 and near 0, rates 0 and 1, mixed within a sequence."""
    for case, (decay, rate) in enumerate(((0.0, 1.0), (0.0, 0.0), (-30.0, 1.0), (-float("inf"), 0.5), (-100.0, 0.0))):
        inputs = make_inputs(recurrence, Shape(), seed=8 + case)
        _, _, _, log_decay, *rates = inputs.tensors
        log_decay[:, 5::3] = decay
        for x in rates:
            x[:, 2::4] = rate
        compare(recurrence, inputs, inputs, FP64, floor=1e-12, **kwargs)


def check_forgets(recurrence: Recurrence, **kwargs: Any) -> None:
    """A decay of 0 forgets everything before it."""
    inputs = make_inputs(recurrence, Shape(), seed=9)
    inputs.tensors[3][:, 40] = -float("inf")
    want, final = recurrence([x[:, 41:] for x in inputs.tensors], None, impl="chunked", **kwargs)
    for x in inputs.tensors[4:]:
        x[:, 40] = 0  # nothing is written by the token that forgets
    y, states = recurrence(inputs.tensors, inputs.states, impl="chunked", **kwargs)
    assert_close("y", want, y[:, 41:], FP64)
    for a, b in zip(final, states):
        assert_close("state", a, b, FP64)


def check_causal(recurrence: Recurrence, *, at: int = 50, **kwargs: Any) -> None:
    """Outputs up to a token do not change by one bit when what follows it changes; outputs after it do."""
    inputs = make_inputs(recurrence, Shape(), seed=10)
    other = make_inputs(recurrence, Shape(), seed=11)
    mixed = [torch.cat((a[:, :at], b[:, at:]), 1) for a, b in zip(inputs.tensors, other.tensors)]
    want, _ = recurrence(inputs.tensors, inputs.states, impl="chunked", **kwargs)
    got, _ = recurrence(mixed, inputs.states, impl="chunked", **kwargs)
    assert torch.equal(want[:, :at], got[:, :at])
    assert not torch.isclose(want[:, at], got[:, at]).any()


def check_fp32(
    recurrence: Recurrence, budget: Mapping[str, float], *, strongest_decay: float = 0.3, **kwargs: Any
) -> None:
    """fp32 results lie within the budget of fp64 ones; the shape has several chunks and grouped heads."""
    shape = Shape(2, 150, 2, 4, 32, 24)
    narrow = make_inputs(recurrence, shape, dtype=torch.float32, seed=12, strongest_decay=strongest_decay)
    wide = Inputs([x.double() for x in narrow.tensors], [x.double() for x in narrow.states])
    compare(recurrence, wide, narrow, budget, **kwargs)


def check_low_precision(recurrence: Recurrence, dtype: torch.dtype, **kwargs: Any) -> None:
    """bf16 or fp16 q, k, v: y keeps the dtype, states are fp32, and y is the fp64 result rounded once."""
    narrow = make_inputs(recurrence, Shape(), dtype=dtype, seed=13)
    wide = Inputs([x.double() for x in narrow.tensors], [x.double() for x in narrow.states])
    for impl in ("chunked", "reference"):
        y, states = recurrence(narrow.tensors, narrow.states, impl=impl, **kwargs)
        want, final = recurrence(wide.tensors, wide.states, impl="reference", **kwargs)
        assert y.dtype == dtype
        assert all(s.dtype == torch.float32 for s in states)
        assert_close("y", want, y, torch.finfo(dtype).eps / 2)
        for a, b in zip(final, states):
            assert_close("state", a, b, 1e-6)
    _, gradients = outputs_and_gradients(recurrence, narrow, impl="chunked", **kwargs)
    for name, x in gradients.items():
        assert torch.isfinite(x).all(), name
    assert [x.dtype for x in gradients.values()] == [x.dtype for x in (*narrow.tensors, *narrow.states)]


def check_deterministic(recurrence: Recurrence, **kwargs: Any) -> None:
    """Two runs give the same bits, outputs and gradients."""
    inputs = make_inputs(recurrence, Shape(), dtype=torch.float32, seed=14)
    for a, b in zip(*(outputs_and_gradients(recurrence, inputs, impl="chunked", **kwargs) for _ in range(2))):
        assert all(torch.equal(a[name], b[name]) for name in a)


def check_inputs_kept(recurrence: Recurrence, **kwargs: Any) -> None:
    """A call changes none of its arguments, and what it returns shares no memory with them."""
    for time, impl in ((75, "chunked"), (75, "reference"), (1, "auto"), (0, "chunked")):
        inputs = make_inputs(recurrence, Shape(time=time), seed=15)
        copies = [x.clone() for x in (*inputs.tensors, *inputs.states)]
        y, states = recurrence(inputs.tensors, inputs.states, impl=impl, **kwargs)
        for x in (y, *states):
            x.add_(1)
        for a, b in zip(copies, (*inputs.tensors, *inputs.states)):
            assert torch.equal(a, b), (time, impl)


def check_empty(recurrence: Recurrence, **kwargs: Any) -> None:
    """No tokens: y is empty and the states come back; no batch: everything is empty. Gradients flow in both."""
    for impl in ("chunked", "reference", "auto"):
        for shape in (Shape(time=0), Shape(batch=0), Shape(batch=0, time=1)):
            inputs = make_inputs(recurrence, shape, seed=16)
            outputs, gradients = outputs_and_gradients(recurrence, inputs, impl=impl, **kwargs)
            assert outputs["y"].shape == (*inputs.tensors[2].shape,)
            for n, state in enumerate(inputs.states):
                assert torch.equal(outputs[f"state {n}"], state)
                assert gradients[f"initial state {n}"].shape == state.shape


def check_default_state(recurrence: Recurrence, **kwargs: Any) -> None:
    """No state is a state of zeros."""
    inputs = make_inputs(recurrence, Shape(time=37), seed=17)
    zeros = [torch.zeros_like(s) for s in inputs.states]
    for impl in ("chunked", "reference"):
        want, final = recurrence(inputs.tensors, zeros, impl=impl, **kwargs)
        got, states = recurrence(inputs.tensors, None, impl=impl, **kwargs)
        assert torch.equal(want, got)
        assert all(torch.equal(a, b) for a, b in zip(final, states))
