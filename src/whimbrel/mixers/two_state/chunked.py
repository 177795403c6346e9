"""RLA and RDN in the chunkwise parallel form: plain PyTorch with its own backward, on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from whimbrel.mixers.two_state.rule import Rule
from whimbrel.scan import chunks
from whimbrel.scan.base import Out, State
from whimbrel.scan.common import compute_dtype
from whimbrel.scan.opaque import opaque


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    gamma: Tensor,
    *,
    rule: Rule,
    delta: bool,
    state: State | None,
    cu_seqlens: Tensor | None,
    chunk_size: int = chunks.DEFAULT_CHUNK,
) -> Out:
    """The chunkwise parallel form; with `delta` both states obey the delta rule (RDN), else they add (RLA)."""
    tensors, states = (q, k, v, log_decay, beta, gamma), state or (None, None)
    if torch.compiler.is_compiling():
        settings = [math.inf if rule.clip is None else rule.clip, rule.scale, rule.gated, rule.decayed, delta]
        y, base, residual = _opaque(*tensors, *states, cu_seqlens, settings, chunk_size)
        return Out(y, State(base, residual))
    y, base, residual = chunks.in_tiles(
        lambda layout, *tensors: _Chunked.apply(layout, rule, delta, *tensors),
        tensors,
        states,
        cu_seqlens,
        chunk_size,
    )
    return Out(y, State(base, residual))


class _Rest(NamedTuple):
    """What the backward needs besides ground, query and streams."""

    inside: Tensor | None
    """[X, C, V] bool: where the clip left the residual alone; None without a clip."""
    correction: Tensor
    """[X, C, V]: R_t q_t."""
    y: Tensor | None
    """[X, C, V]: the output; kept for gated outputs only."""


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layout: chunks.Layout,
        rule: Rule,
        delta: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        gamma: Tensor,
        base: Tensor | None,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        value_heads, dtype = v.shape[2], compute_dtype(q, log_decay, beta, gamma, base, residual)
        shape = (layout.sequences, value_heads, q.shape[3], v.shape[3])
        with torch.autocast(q.device.type, enabled=False):
            values = layout.split(v, value_heads, dtype)
            beta_c = layout.split(beta, value_heads, dtype)[..., None]
            gamma_c = layout.split(gamma, value_heads, dtype)[..., None]
            g = chunks.ground(
                layout, layout.split(k, value_heads, dtype), layout.split(log_decay, value_heads, torch.float64)
            )
            x = chunks.query(g, layout.split(q, value_heads, dtype).mul_(rule.scale))
            first = chunks.scan(g, values, beta_c, layout.enter(base, values, shape), delta=delta, want_seen=True)
            assert first.seen is not None
            left = torch.addcmul(values, g.alpha, first.seen, value=-1) if rule.decayed else values - first.seen
            inside = None
            if rule.clip is not None:
                if any(ctx.needs_input_grad):
                    inside = left.abs() <= rule.clip
                left.clamp_(-rule.clip, rule.clip)
            second = chunks.scan(g, left, gamma_c, layout.enter(residual, values, shape), delta=delta, want_seen=False)
            correction = chunks.read_after(g, x, second)
            y = chunks.read_before(x, first)
            y = y.mul_(g.alpha).addcmul_(gamma_c, correction) if rule.gated else y.add_(correction)
            ctx.layout, ctx.rule, ctx.delta, ctx.heads = layout, rule, delta, q.shape[2]
            ctx.dtypes = [None if t is None else t.dtype for t in (q, k, v, log_decay, beta, gamma, base, residual)]
            chunks.keep(ctx, g, x, first, second, _Rest(inside, correction, y if rule.gated else None))
            return (
                layout.join(y, value_heads, value_heads, v.dtype),
                layout.leave(first.final, value_heads),
                layout.leave(second.final, value_heads),
            )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore [bad-override]
        dy, dbase, dresidual = grad_outputs
        layout, rule, delta, heads = ctx.layout, ctx.rule, ctx.delta, ctx.heads
        g, x, first, second, rest = chunks.kept(ctx)
        value_heads, dtype = dy.shape[2], g.k.dtype
        state_shape = (layout.sequences, value_heads, g.k.shape[2], dy.shape[3])
        with torch.autocast(dy.device.type, enabled=False):
            dy = layout.split(dy, value_heads, dtype)
            gain = chunks.row_dot(dy, rest.correction)
            dcorrection = dy * second.rate if rule.gated else dy
            down = chunks.row_dot(dcorrection, second.write)
            dlog = (chunks.row_dot(dy, rest.y) if rule.gated else gain) - down * x.own[..., 0]

            before = dcorrection * g.alpha
            pull2 = chunks.scan_back(
                g,
                second,
                torch.baddbmm(x.own * dcorrection, x.keys.mT, before),
                None,
                torch.bmm(x.decayed.mT, before),
                layout.enter(dresidual, before, state_shape),
            )
            reads = [chunks.Read(second, pull2, before)]

            dleft = second.rate * pull2.write
            if rest.inside is not None:
                dleft.mul_(rest.inside)
            dseen = -g.alpha * dleft if rule.decayed else dleft.neg()
            before = dy * g.alpha if rule.gated else dy
            pull1 = chunks.scan_back(
                g,
                first,
                torch.bmm(x.keys.mT, before),
                dseen,
                torch.bmm(x.decayed.mT, before),
                layout.enter(dbase, before, state_shape),
            )
            reads.append(chunks.Read(first, pull1, before))
            dv = dleft.addcmul_(first.rate, pull1.write)

            # alpha acts by itself in the delta rule of both streams (v - alpha p) and in the decayed residual.
            if delta:
                dlog = dlog + pull1.level + pull2.level
            if delta and not rule.decayed:
                dlog -= chunks.row_dot(first.seen, dseen)
            if rule.decayed and not delta:
                dlog = dlog + pull1.level
            dq, dk, dlog = chunks.shared_gradients(g, x, reads, down, dlog)
            dgamma = pull2.rate + gain if rule.gated else pull2.rate

            types = iter(ctx.dtypes)
            return (
                None,
                None,
                None,
                layout.join(dq.mul_(rule.scale), heads, value_heads, next(types)),
                layout.join(dk, heads, value_heads, next(types)),
                *(layout.join(t, value_heads, value_heads, next(types)) for t in (dv, dlog, pull1.rate, dgamma)),
                *(
                    None if t is None else layout.leave(d, value_heads).to(t)
                    for d, t in zip((pull1.initial, pull2.initial), types)
                ),
            )


def _settings(numbers: Sequence[float]) -> tuple[Rule, bool]:
    """What the operator's numbers say; no clip is an infinite one there."""
    clip, scale, gated, decayed, delta = numbers
    return Rule(None if math.isinf(clip) else clip, scale, bool(gated), bool(decayed)), bool(delta)


_opaque = opaque("chunked_two_states", _Chunked, _settings)
