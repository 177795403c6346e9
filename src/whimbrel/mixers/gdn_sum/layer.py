"""The layer of two summed GDNs."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from whimbrel.mixers.base import Out, State
from whimbrel.mixers.linear import OneStateMixer, one_state
from whimbrel.scan.delta.op import delta_scan


def summed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *gates: Tensor,
    state: State | None,
    cu_seqlens: Tensor | None,
    impl: Literal["auto", "reference", "chunked", "triton"],
) -> Out:
    """Scans of v [B, T, HV, V] under gates [B, T, 2 HV], summed to y [B, T, HV, V]; states [N, 2 HV, K, V].

    A value head's two states stand side by side, as value heads of one scan.
    """
    twice = v.repeat_interleave(2, dim=2)
    y, state = one_state(delta_scan, q, k, twice, *gates, state=state, cu_seqlens=cu_seqlens, impl=impl)
    return Out(y.unflatten(2, (-1, 2)).sum(3), state)


class GDNSum(OneStateMixer):
    """Two Gated DeltaNets over the same q, k and v, summed: y, state = layer(x, state) for x [B, T, hidden_size].

    Arguments as in GDNSumConfig, where they are described; None for `num_value_heads` and `value_head_dim` takes
    `num_heads` and `head_dim`. The baseline that the reviews of arXiv 2509.25223 asked for: as many states as RDN, each
    fitted to the values, none to what another left.
    """

    _op = staticmethod(summed)
    gate_sets = 2
