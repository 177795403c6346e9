"""What the benchmarks of RLA and RDN share: one token of both states."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from whimbrel.mixers.two_state.rule import Rule
from whimbrel.mixers.two_state.step import step as one_token
from whimbrel.scan.base import Out, State


def step(*tensors: Tensor, states: Sequence[Tensor], kernel: bool, delta: bool) -> Out:
    """One token with the options of the paper, the states updated in place."""
    state = State(*states)
    q, k, v, log_decay, beta, gamma = tensors
    rule = Rule(clip=1.0, scale=q.shape[-1] ** -0.5, gated=True, decayed=False)
    return one_token(q, k, v, log_decay, beta, gamma, rule=rule, delta=delta, state=state, out=state, kernel=kernel)
