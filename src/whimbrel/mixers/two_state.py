"""Two coupled states, the ground of RLA and RDN: the second is fitted to what the first leaves over.

The two differ only in the rule by which a state is written (`delta`), so what they share is here once: checks,
chunkwise form with its backward, single step. Derivation: README.md beside `whimbrel.scan.chunks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from whimbrel.errors import ConfigError
from whimbrel.scan import chunks
from whimbrel.scan.base import Out, State
from whimbrel.scan.common import check_choice, check_inputs, checked_scale, compute_dtype, needs_grad, spread_heads
from whimbrel.scan.one_state import step_in_kernel
from whimbrel.scan.opaque import opaque

COMBINE = ("gated", "sum")
RESIDUAL = ("undecayed", "decayed")
GRAIN = 64
"""Parts of a sequence are multiples of as many tokens, so that they cut no chunk in two."""


class Rule(NamedTuple):
    """The options that fix the mathematics of one call."""

    clip: float | None
    """Bound of the residual's elements; None for no bound."""
    scale: float
    """Factor on q."""
    gated: bool
    """The two reads are weighted by alpha and gamma, else summed."""
    decayed: bool
    """The residual is taken against alpha_t S_(t-1), else against S_(t-1)."""


def checked_rule(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    gamma: Tensor,
    *,
    clip: float | None,
    scale: float | None,
    combine: str,
    residual: str,
    state: State | None,
    cu_seqlens: Tensor | None,
    recompute: int = 0,
    out: State | None = None,
) -> Rule:
    """The options as a `Rule`; raises ConfigError unless all arguments of `rla` or `rdn` fit together.

    `out` as for `step`.
    """
    check_choice(op, "combine", combine, COMBINE)
    check_choice(op, "residual", residual, RESIDUAL)
    if clip is not None and not clip > 0:
        raise ConfigError(f"{op}: clip = {clip} is not allowed; give a number above 0, or None for no clipping")
    if not isinstance(recompute, int) or recompute < 0:
        raise ConfigError(f"{op}: recompute = {recompute!r} is not allowed; give 0 (off) or a number of parts")
    gates = {"log_decay": log_decay, "beta": beta, "gamma": gamma}
    before, after = _parts(op, "state", state), _parts(op, "out", out)
    check_inputs(op, q, k, v, gates, {**before, **after}, cu_seqlens)
    if after:
        _check_out(op, after, q, k, v, *gates.values(), *before.values())
    return Rule(clip, checked_scale(op, scale, q.shape[3]), combine == "gated", residual == "decayed")


def _parts(op: str, name: str, state: State | None) -> dict[str, Tensor]:
    """The two tensors of `state` by name, none where it is None."""
    if state is None:
        return {}
    if not isinstance(state, tuple) or len(state) != 2 or any(s is None for s in state):
        raise ConfigError(f"{op}: {name} lacks one of its two parts; give State(base, residual) of two tensors")
    return {f"{name}.{part}": x for part, x in zip(State._fields, state) if x is not None}


def _check_out(op: str, out: dict[str, Tensor], *inputs: Tensor) -> None:
    """Raise ConfigError unless a step on `inputs` can write its states to `out`."""
    dtype = compute_dtype(*inputs)
    for name, x in out.items():
        if x.dtype != dtype or not x.is_contiguous():
            raise ConfigError(
                f"{op}: {name} has dtype {x.dtype} and strides {list(x.stride())}; give a contiguous tensor of {dtype}"
            )
    if needs_grad(*inputs, *out.values()):
        raise ConfigError(f"{op}: out is written to, which autograd cannot record; call under torch.no_grad()")


def both_states(
    state: State | None, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Base and residual [N, HV, K, V] in `dtype`, zeros where `state` is None."""
    if state is None:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        zero = q.new_zeros(sequences, v.shape[2], q.shape[3], v.shape[3], dtype=dtype)
        return zero, zero
    assert state.residual is not None
    return state.base.to(dtype), state.residual.to(dtype)


def step(
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
    out: State | None = None,
    kernel: bool | None = None,
) -> Out:
    """One token [B, 1, ...]: both states are read once at k and q, and written once.

    out: where to write the states, which is then also the state returned; it may be `state` itself. None: new tensors.
    kernel: as `asked` in `step_in_kernel`.
    """
    if step_in_kernel(kernel, q, k, v, log_decay, beta, gamma, *(state or ())):
        from whimbrel.scan.kernels.step import step as run

        base, residual = state or (None, None)
        y, base, residual = run(
            q, k, v, log_decay, beta, gamma, base=base, residual=residual, delta=delta, out=out, **rule._asdict()
        )
        return Out(y, State(base, residual))
    dtype = compute_dtype(q, log_decay, beta, gamma, *(state or ()))
    heads = v.shape[2]
    q_, k_ = (spread_heads(x[:, 0].to(dtype), heads, 1) for x in (q, k))
    v_, log_alpha, beta_, gamma_ = (
        x[:, 0].to(dtype) for x in (v, log_decay[..., None], beta[..., None], gamma[..., None])
    )
    with torch.autocast(q.device.type, enabled=False):
        alpha, q_ = log_alpha.exp(), q_ * rule.scale
        base, residual = both_states(state, q, v, None, dtype)
        probes = torch.stack((k_, q_), -2)
        p, base_read = (probes @ base).unbind(-2)
        p_residual, residual_read = (probes @ residual).unbind(-2)
        u = beta_ * (v_ - alpha * p if delta else v_)
        r = v_ - (alpha * p if rule.decayed else p)
        if rule.clip is not None:
            r = r.clamp(-rule.clip, rule.clip)
        w = gamma_ * (r - alpha * p_residual if delta else r)
        correction = alpha * residual_read + (q_ * k_).sum(-1, keepdim=True) * w
        y = alpha * base_read + gamma_ * correction if rule.gated else base_read + correction
        base, residual = (s * alpha[..., None] + k_[..., None] * x[..., None, :] for s, x in ((base, u), (residual, w)))
    if out is not None:
        assert out.residual is not None
        base, residual = out.base.copy_(base), out.residual.copy_(residual)
    return Out(y[:, None].to(v.dtype), State(base, residual))


def in_parts(
    run: Callable[..., Out],
    *tensors: Tensor,
    state: State | None,
    cu_seqlens: Tensor | None,
    parts: int,
) -> Out:
    """run(*tensors, state=, cu_seqlens=), part after part, each of which runs again when its gradients are wanted.

    A part keeps no more than it was given. A batch is cut between its rows, one row between tokens, where the part
    before hands its states on. Without `parts`, or gradients, it is one call that keeps what it likes.
    """
    batch, time = tensors[0].shape[:2]
    if not parts or not batch or not time or not needs_grad(*tensors, *(state or ())):
        return run(*tensors, state=state, cu_seqlens=cu_seqlens)

    def part(*tensors: Tensor, **kwargs: Any) -> Out:
        return checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False, **kwargs)

    if batch > 1:
        rows = -(-batch // parts)
        cuts = zip(*(x.split(rows) for x in tensors))
        starts = (
            [None] * batch
            if state is None
            else [State(*s) for s in zip(*(x.split(rows) for x in state if x is not None))]
        )
        outs = [part(*cut, state=start, cu_seqlens=None) for cut, start in zip(cuts, starts)]
        ends = zip(*(out.state for out in outs))
        return Out(torch.cat([out.y for out in outs]), State(*map(torch.cat, ends)))
    length = -(-time // (parts * GRAIN)) * GRAIN
    ys = []
    for n, cut in enumerate(zip(*(x.split(length, 1) for x in tensors))):
        # A sequence that lies elsewhere is empty here: its state goes through.
        edges = None if cu_seqlens is None else (cu_seqlens - n * length).clamp(0, cut[0].shape[1])
        y, state = part(*cut, state=state, cu_seqlens=edges)
        ys.append(y)
    return Out(torch.cat(ys, 1), state)


def in_kernels(
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
) -> Out:
    """The chunkwise parallel form in Triton kernels; with `delta` RDN, else RLA."""
    from whimbrel.scan.kernels.launch import recurrence

    y, base, residual = recurrence(
        q,
        k,
        v,
        log_decay,
        beta,
        gamma,
        states=None if state is None else both_states(state, q, v, cu_seqlens, torch.float32),
        cu_seqlens=cu_seqlens,
        delta=delta,
        gated=rule.gated,
        decayed=rule.decayed,
        clip=rule.clip,
        scale=rule.scale,
    )
    return Out(y, State(base, residual))


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
    chunk_size: int,
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
