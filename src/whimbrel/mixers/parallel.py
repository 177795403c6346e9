"""RLA and RDN over sequences that several processes share, and what a layer needs besides.

Two states pass from stretch to stretch, in two rounds or along a chain: `whimbrel.scan.parallel` has the schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from whimbrel.mixers.rdn.op import rdn as rdn_whole
from whimbrel.mixers.rla.op import rla as rla_whole
from whimbrel.mixers.two_state import checked_rule
from whimbrel.scan.base import Out, State
from whimbrel.scan.parallel import Group, Rule, line_of, over_stretches


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
    impl: str = "auto",
) -> Out:
    """`whimbrel.mixers.rla.rla` over this process's stretch of every sequence; the rest as `rdn` here."""
    options = {"clip": clip, "scale": scale, "combine": combine, "residual": residual}
    tensors = (q, k, v, log_decay, beta, gamma)
    return _two_states("rla", rla_whole, tensors, group, schedule, state, cu_seqlens, impl, options)


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
    impl: str = "auto",
) -> Out:
    """`whimbrel.mixers.rdn.rdn` over this process's stretch of every sequence.

    Tensors and options are those of `whimbrel.mixers.rdn.rdn`; all processes of the group call it together, with
    equal shapes but for T, which may be 0, and take part in the backward together.

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
    return _two_states("rdn", rdn_whole, tensors, group, schedule, state, cu_seqlens, impl, options)


def _two_states(
    op: str,
    whole: Callable[..., Out],
    tensors: Sequence[Tensor],
    group: Group,
    schedule: str,
    state: State | None,
    cu_seqlens: Tensor | None,
    impl: str,
    options: dict[str, Any],
) -> Out:
    line = line_of(op, group)
    if line.world == 1:
        return whole(*tensors, state=state, cu_seqlens=cu_seqlens, impl=impl, **options)
    line.check(op, state, cu_seqlens)
    checked_rule(op, *tensors, state=state, cu_seqlens=None, **options)

    def on_stretch(tensors: Sequence[Tensor], starts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        y, ends = whole(*tensors, state=State(*starts), impl=impl, **options)
        return y, *ends

    rule = Rule(on_stretch, delta=op == "rdn", impl=impl)
    starts = None if state is None or state.residual is None else (state.base, state.residual)
    y, *ends = over_stretches(op, rule, line, schedule, tensors, starts)
    return Out(y, State(*ends))
