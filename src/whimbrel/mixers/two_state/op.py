"""Choice of code for RLA and RDN, whole or in parts that run again in the backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from whimbrel.mixers.two_state.chunked import chunked
from whimbrel.mixers.two_state.rule import Rule, both_states, checked_rule
from whimbrel.mixers.two_state.step import step
from whimbrel.scan.base import Out, State
from whimbrel.scan.common import by_sequence, choose, compute_dtype, form_of, in_rows, needs_grad, one_token

GRAIN = 64
"""Parts of a sequence are multiples of as many tokens, so that they cut no chunk in two."""


def run(
    op: str,
    recur: Callable[..., tuple[Tensor, Tensor, Tensor]],
    *tensors: Tensor,
    delta: bool,
    state: State | None,
    cu_seqlens: Tensor | None,
    recompute: int,
    impl: str,
    **options: Any,
) -> Out:
    """`rla` or `rdn`: checks and choice of code, where no call alike went through them, and the call.

    tensors: q, k, v, log_decay, beta, gamma. recur: one sequence token by token, as `reference` takes it. delta:
    whether states are written by the delta rule. options: those of `checked_rule`.
    """

    def find() -> Callable[..., Out]:
        rule = checked_rule(op, *tensors, state=state, cu_seqlens=cu_seqlens, recompute=recompute, **options)
        q, _, *others = tensors
        code = choose(op, impl, q, *others, *(state or ()), one_step=one_token(cu_seqlens, *tensors, *(state or ())))
        if code == "step":
            return partial(one_step, rule=rule, delta=delta, kernel=True if impl == "triton" else None)
        if code == "reference":
            form = partial(reference, recur, rule=rule)
        elif code == "triton":
            if not recompute:
                return in_kernels(rule, delta)
            form = partial(part_in_kernels, rule, delta)
        else:
            form = partial(chunked, rule=rule, delta=delta)
        return partial(in_parts, form, parts=recompute)

    form = form_of(find, op, tensors, state, cu_seqlens, (delta, recompute, impl, *options.values()))
    return form(*tensors, state=state, cu_seqlens=cu_seqlens)


def run_step(op: str, *tensors: Tensor, delta: bool, state: State | None, out: State | None, **options: Any) -> Out:
    """`rla_step` or `rdn_step` on tensors without a time axis; the rest as for `run`."""
    tensors = tuple(x.unsqueeze(1) for x in tensors)
    rule = checked_rule(op, *tensors, state=state, cu_seqlens=None, out=out, **options)
    y, state = step(*tensors, rule=rule, delta=delta, state=state, out=out)
    return Out(y[:, 0], state)


def reference(
    recur: Callable[..., tuple[Tensor, Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    gamma: Tensor,
    *,
    rule: Rule,
    state: State | None,
    cu_seqlens: Tensor | None,
) -> Out:
    """The recurrence token by token in fp64, with checked arguments; autograd differentiates it.

    recur(rule, q, k, v, alpha, beta, gamma, S, R) -> (y, S, R) takes q, k, v [N, T, HV, 1, ...], gates
    [N, T, HV, 1, 1] and states [N, HV, K, V].
    """
    heads, dtype = v.shape[2], compute_dtype(q, log_decay, beta, gamma, *(state or ()))
    gates = (x[..., None, None] for x in (log_decay.double().exp(), beta.double(), gamma.double()))
    y, base, residual = by_sequence(
        partial(recur, rule),
        (*in_rows(heads, q.double() * rule.scale, k, v), *gates),
        both_states(state, q, v, cu_seqlens, torch.float64),
        cu_seqlens,
    )
    return Out(y.to(v.dtype), State(base.to(dtype), residual.to(dtype)))


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


def one_step(*tensors: Tensor, state: State | None, cu_seqlens: None, **settings: Any) -> Out:
    """`step`, called as the other forms."""
    return step(*tensors, state=state, **settings)


def part_in_kernels(rule: Rule, delta: bool, *tensors: Tensor, **given: Any) -> Out:
    """`in_kernels` for one call: parts of a call are not alike."""
    return in_kernels(rule, delta)(*tensors, **given)


def in_kernels(rule: Rule, delta: bool) -> Callable[..., Out]:
    """The chunkwise parallel form in Triton kernels, for calls alike; with `delta` RDN, else RLA."""
    from whimbrel.scan.kernels.launch import Recurrence

    run = Recurrence(delta=delta, two=True, gated=rule.gated, decayed=rule.decayed, clip=rule.clip, scale=rule.scale)

    def form(*tensors: Tensor, state: State | None, cu_seqlens: Tensor | None) -> Out:
        states = None if state is None else both_states(state, tensors[0], tensors[2], cu_seqlens, torch.float32)
        y, base, residual = run(*tensors, states=states, cu_seqlens=cu_seqlens)
        return Out(y, State(base, residual))

    return form
