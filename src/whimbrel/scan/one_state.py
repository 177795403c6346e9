"""One state read after each write, the ground of `decay_scan` and `delta_scan`.

The two differ only in the rule by which the state is written (`delta`). Derivation: README.md in this folder.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from whimbrel.scan import chunks
from whimbrel.scan.base import Out
from whimbrel.scan.common import (
    by_sequence,
    check_inputs,
    checked_scale,
    choose,
    compute_dtype,
    form_of,
    in_rows,
    needs_grad,
    one_token,
    spread_heads,
)
from whimbrel.scan.kernels import HAS_TRITON
from whimbrel.scan.opaque import opaque


def run(
    op: str,
    recur: Callable[..., tuple[Tensor, Tensor]],
    *tensors: Tensor,
    delta: bool,
    scale: float | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    impl: str,
) -> Out:
    """`decay_scan` or `delta_scan`: checks and choice of code, where no call alike went through them, and the call.

    tensors: q, k, v, log_decay, beta. recur: one sequence token by token, as `reference` takes it. delta: whether the
    state is written by the delta rule.
    """

    def find() -> Callable[..., Out]:
        q, k, v, log_decay, beta = tensors
        check_inputs(op, q, k, v, {"log_decay": log_decay, "beta": beta}, {"state": state}, cu_seqlens)
        factor = checked_scale(op, scale, q.shape[3])
        code = choose(op, impl, q, v, log_decay, beta, state, one_step=one_token(cu_seqlens, *tensors, state))
        if code == "step":
            return partial(one_step, scale=factor, delta=delta, kernel=True if impl == "triton" else None)
        if code == "reference":
            return partial(reference, recur, scale=factor)
        return in_kernels(factor, delta) if code == "triton" else partial(chunked, scale=factor, delta=delta)

    form = form_of(find, op, tensors, state, cu_seqlens, (delta, scale, impl))
    return form(*tensors, state=state, cu_seqlens=cu_seqlens)


def reference(
    recur: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Out:
    """The recurrence token by token in fp64, with checked arguments; autograd differentiates it.

    recur(q, k, v, alpha, beta, S) -> (y, S) takes q, k, v [N, T, HV, 1, ...], gates [N, T, HV, 1, 1] and states
    [N, HV, K, V].
    """
    heads, dtype = v.shape[2], compute_dtype(q, log_decay, beta, state)
    gates = (x[..., None, None] for x in (log_decay.double().exp(), beta.double()))
    if state is None:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        state = q.new_zeros(sequences, heads, q.shape[3], v.shape[3])
    tensors = (*in_rows(heads, q.double() * scale, k, v), *gates)
    y, final = by_sequence(recur, tensors, [state.double()], cu_seqlens)
    return Out(y.to(v.dtype), final.to(dtype))


def step_in_kernel(asked: bool | None, *tensors: Tensor | None) -> bool:
    """Whether one token goes through the Triton kernel: as `asked`, or where that is None and the kernel serves.

    It serves CUDA tensors without gradients and computes in fp32.
    """
    if asked is not None:
        return asked
    cuda = all(x is None or x.is_cuda for x in tensors)
    return HAS_TRITON and cuda and compute_dtype(*tensors) == torch.float32 and not needs_grad(*tensors)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float,
    delta: bool,
    state: Tensor | None,
    kernel: bool | None = None,
) -> Out:
    """One token [B, 1, ...]: the state is read once at k and q, and written once. `kernel`: see `step_in_kernel`."""
    if step_in_kernel(kernel, q, k, v, log_decay, beta, state):
        from whimbrel.scan.kernels.step import step as run

        y, state, _ = run(q, k, v, log_decay, beta, base=state, scale=scale, delta=delta)
        return Out(y, state)
    dtype, heads = compute_dtype(q, log_decay, beta, state), v.shape[2]
    q_, k_ = (spread_heads(x[:, 0].to(dtype), heads, 1) for x in (q, k))
    v_, log_alpha, beta_ = (x[:, 0].to(dtype) for x in (v, log_decay[..., None], beta[..., None]))
    with torch.autocast(q.device.type, enabled=False):
        alpha, q_ = log_alpha.exp(), q_ * scale
        state = k_.new_zeros(*k_.shape, v.shape[3]) if state is None else state.to(dtype)
        seen, read = (torch.stack((k_, q_), -2) @ state).unbind(-2)
        write = beta_ * (v_ - alpha * seen if delta else v_)
        y = alpha * read + (q_ * k_).sum(-1, keepdim=True) * write
        state = alpha[..., None] * state + k_[..., None] * write[..., None, :]
    return Out(y[:, None].to(v.dtype), state)


def one_step(*tensors: Tensor, state: Tensor | None, cu_seqlens: None, **settings: Any) -> Out:
    """`step`, called as the other forms."""
    return step(*tensors, state=state, **settings)


def in_kernels(scale: float, delta: bool) -> Callable[..., Out]:
    """The chunkwise parallel form in Triton kernels, for calls alike; with `delta` by the delta rule, else it adds."""
    from whimbrel.scan.kernels.launch import Recurrence

    run = Recurrence(delta=delta, two=False, scale=scale)

    def form(*tensors: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Out:
        q, k, v, log_decay, beta = tensors
        states = None if state is None else (state,)
        return Out(*run(q, k, v, log_decay, None, beta, states=states, cu_seqlens=cu_seqlens))

    return form


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float,
    delta: bool,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int = chunks.DEFAULT_CHUNK,
) -> Out:
    """The chunkwise parallel form; with `delta` the state obeys the delta rule, else it adds."""
    tensors = (q, k, v, log_decay, beta)
    if torch.compiler.is_compiling():
        y, state, _ = _opaque(*tensors, None, state, None, cu_seqlens, [scale, delta], chunk_size)
        return Out(y, state)
    y, state = chunks.in_tiles(
        lambda layout, *tensors: _Chunked.apply(layout, scale, delta, *tensors),
        tensors,
        (state,),
        cu_seqlens,
        chunk_size,
    )
    return Out(y, state)


class _Rest(NamedTuple):
    """What the backward needs besides ground, query and stream."""

    y: Tensor
    """[X, C, V]: the output."""


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layout: chunks.Layout,
        scale: float,
        delta: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        heads, dtype = v.shape[2], compute_dtype(q, log_decay, beta, state)
        with torch.autocast(q.device.type, enabled=False):
            g = chunks.ground(layout, layout.split(k, heads, dtype), layout.split(log_decay, heads, torch.float64))
            x = chunks.query(g, layout.split(q, heads, dtype).mul_(scale))
            values, rate = layout.split(v, heads, dtype), layout.split(beta, heads, dtype)[..., None]
            start = layout.enter(state, values, (layout.sequences, heads, q.shape[3], v.shape[3]))
            stream = chunks.scan(g, values, rate, start, delta=delta, want_seen=False)
            y = chunks.read_after(g, x, stream)
            ctx.layout, ctx.scale, ctx.delta, ctx.heads = layout, scale, delta, q.shape[2]
            ctx.dtypes = [None if t is None else t.dtype for t in (q, k, v, log_decay, beta, state)]
            chunks.keep(ctx, g, x, stream, _Rest(y))
            return layout.join(y, heads, heads, v.dtype), layout.leave(stream.final, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore [bad-override]
        dy, dstate = grad_outputs
        layout, heads, value_heads = ctx.layout, ctx.heads, dy.shape[2]
        g, x, stream, rest = chunks.kept(ctx)
        with torch.autocast(dy.device.type, enabled=False):
            dy = layout.split(dy, value_heads, g.k.dtype)
            down = chunks.row_dot(dy, stream.write)
            before = dy * g.alpha
            pull = chunks.scan_back(
                g,
                stream,
                torch.baddbmm(x.own * dy, x.keys.mT, before),
                None,
                torch.bmm(x.decayed.mT, before),
                layout.enter(dstate, before, dstate.shape),
            )
            # alpha acts by itself in the read (decay, then the token's own write) and in the delta rule.
            dlog = chunks.row_dot(dy, rest.y) - down * x.own[..., 0]
            if ctx.delta:
                dlog += pull.level
            reads = [chunks.Read(stream, pull, before)]
            dq, dk, dlog = chunks.shared_gradients(g, x, reads, down, dlog)
            *types, state_type = ctx.dtypes
            results = (dq.mul_(ctx.scale), dk, stream.rate * pull.write, dlog, pull.rate)
            counts = (heads, heads, value_heads, value_heads, value_heads)
            return (
                None,
                None,
                None,
                *(layout.join(d, n, value_heads, t) for d, n, t in zip(results, counts, types)),
                None if state_type is None else layout.leave(pull.initial, value_heads).to(state_type),
            )


_opaque = opaque("chunked_one_state", _Chunked, lambda x: (x[0], bool(x[1])))
