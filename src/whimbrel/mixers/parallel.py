"""Context parallelism of RLA and RDN, over sequences that several processes share, and what a layer needs besides.

Two states pass from stretch to stretch, in two rounds or along a chain: `whimbrel.scan.parallel` has the schedules.
In a layer only the short convolution also looks back, by `conv_start`; everything else acts on single tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from whimbrel.mixers.rdn.op import rdn as rdn_whole
from whimbrel.mixers.rla.op import rla as rla_whole
from whimbrel.mixers.two_state.rule import checked_rule
from whimbrel.scan.base import Out, State
from whimbrel.scan.common import choose
from whimbrel.scan.parallel import Group, Line, Rule, line_of, over_stretches, walk_of


def rla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    gamma: Tensor,
    *,
    group: Group = None,
    schedule: str = "auto",
    clip: float | None = 1.0,
    scale: float | None = None,
    combine: str = "gated",
    residual: str = "undecayed",
    state: State | None = None,
    cu_seqlens: Tensor | None = None,
    recompute: int = 0,
    impl: str = "auto",
) -> Out:
    """`whimbrel.mixers.rla.rla` over this process's stretch of every sequence; the rest as `rdn` here."""
    options = {"clip": clip, "scale": scale, "combine": combine, "residual": residual}
    tensors = (q, k, v, log_decay, beta, gamma)
    return _two_states("rla", rla_whole, tensors, group, schedule, state, cu_seqlens, recompute, impl, options)


def rdn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    gamma: Tensor,
    *,
    group: Group = None,
    schedule: str = "auto",
    clip: float | None = 1.0,
    scale: float | None = None,
    combine: str = "gated",
    residual: str = "undecayed",
    state: State | None = None,
    cu_seqlens: Tensor | None = None,
    recompute: int = 0,
    impl: str = "auto",
) -> Out:
    """`whimbrel.mixers.rdn.rdn` over this process's stretch of every sequence.

    Tensors and options, `recompute` among them, are those of `whimbrel.mixers.rdn.rdn`; all processes of the group call
    it together, with equal shapes but for T, which may be 0, and take part in the backward together.

    group: the processes that share the sequences, in their order: a process group, one dim of a device mesh, or None
        for all processes (one, where `torch.distributed` was not initialised).
    schedule: "rounds" or "chain", as `whimbrel.scan.parallel` describes; "auto" for the cheaper one at this number of
        processes.
    state: State(base, residual), each [B, HV, K, V], at the start of the sequences, in the first process only; None
        for zero.
    cu_seqlens: None; packed sequences cannot be shared by processes yet.

    Returns Out(y of this stretch, State at its end). The last process has the final state. Gradients are those of one
    process with the whole sequences, through the state of every process as well.

    Raises ConfigError where the arguments do not fit together, UnsupportedError for cu_seqlens.
    """
    options = {"clip": clip, "scale": scale, "combine": combine, "residual": residual}
    tensors = (q, k, v, log_decay, beta, gamma)
    return _two_states("rdn", rdn_whole, tensors, group, schedule, state, cu_seqlens, recompute, impl, options)


def _two_states(
    op: str,
    whole: Callable[..., Out],
    tensors: Sequence[Tensor],
    group: Group,
    schedule: str,
    state: State | None,
    cu_seqlens: Tensor | None,
    recompute: int,
    impl: str,
    options: dict[str, Any],
) -> Out:
    line, whole = line_of(op, group), partial(whole, recompute=recompute)
    if line.world == 1:
        return whole(*tensors, state=state, cu_seqlens=cu_seqlens, impl=impl, **options)
    line.check(op, state, cu_seqlens)
    fixed = checked_rule(op, *tensors, state=state, cu_seqlens=None, **options)

    def on_stretch(tensors: Sequence[Tensor], starts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        y, ends = whole(*tensors, state=State(*starts), impl=impl, **options)
        return y, *ends

    q, _, v, *others = tensors
    walk = None
    if op == "rdn" and not recompute and choose(op, impl, q, v, *others, *(state or ())) == "triton":
        walk = walk_of(q, v, two=True, **fixed._asdict())
    rule = Rule(on_stretch, delta=op == "rdn", impl=impl, walk=walk)
    starts = None if state is None or state.residual is None else (state.base, state.residual)
    y, *ends = over_stretches(op, rule, line, schedule, tensors, starts)
    return Out(y, State(*ends))


def conv_start(streams: Sequence[Tensor], past: int, state: Tensor | None = None, *, group: Group = None) -> Tensor:
    """The state of a short convolution at the start of this process's stretch.

    streams: the convolution's inputs over the stretch, [B, T, channels] each; T may be 0, and less than `past`.
    past: tokens that the convolution looks back, its size - 1.
    state: [B, channels of all streams, past] at the start of the sequences, in the first process only; None for zero.
    group: as for `rdn`.

    Returns [B, channels of all streams, past] in the streams' dtype, what `LinearMixer` takes as `LayerState.conv`.
    Differentiable once; the last `past` tokens of every stretch are exchanged in one all-gather, and their gradients
    in one all-reduce.
    """
    line = line_of("conv_start", group)
    line.check("conv_start", state, None)
    x = torch.cat([x[:, max(0, x.shape[1] - past) :] for x in streams], -1)
    start = x.new_zeros(x.shape[0], past, x.shape[2]) if state is None else state.transpose(1, 2).to(x.dtype)
    if line.world == 1:
        return start.transpose(1, 2)
    # The first always has `past` tokens to tell, so that stretches shorter than that need no other case.
    tail = torch.cat((start, x), 1)[:, x.shape[1] :] if line.first else x
    start, tails, counts = _Tails.apply(line, start, tail)
    if not line.first:
        start = tails[0]
        slots = torch.arange(past, device=x.device)
        for tail, count in zip(tails[1 : line.rank], counts[1 : line.rank]):
            start = torch.cat((start, tail), 1).index_select(1, slots + count)
    return start.transpose(1, 2)


class _Tails(torch.autograd.Function):
    """The tails [B, n <= past, C] of all stretches as [world, B, past, C], zeros behind n tokens, and every n.

    `start` goes through, so that the first process, which needs no tail, takes part in the backward too.
    """

    @staticmethod
    def forward(ctx: Any, line: Line, start: Tensor, tail: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.line, ctx.count = line, tail.shape[1]
        padded = F.pad(tail, (0, 0, 0, start.shape[1] - ctx.count))
        tails, counts = zip(*line.gather(padded, tail.new_full((1,), ctx.count)))
        counts = torch.cat(counts).long()
        ctx.mark_non_differentiable(counts)
        return start.view_as(start), torch.stack(tails), counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore [bad-override]
        dstart, dtails, _ = grad_outputs
        dtails = dtails.contiguous()
        dist.all_reduce(dtails, group=ctx.line.group)
        return None, dstart, dtails[ctx.line.rank, :, : ctx.count]
