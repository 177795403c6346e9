"""The layer of two summed GDNs."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import Tensor

from whimbrel.mixers.base import Out, State
from whimbrel.mixers.linear import LinearMixer, one_state
from whimbrel.scan.delta.op import delta_scan


class GDNSum(LinearMixer):
    """Two Gated DeltaNets over the same q, k and v, summed: y, state = layer(x, state) for x [B, T, hidden_size].

    Arguments as in GDNSumConfig, where they are described; None for `num_value_heads` and `value_head_dim` takes
    `num_heads` and `head_dim`. The baseline that the reviews of arXiv 2509.25223 asked for: as many states as RDN, each
    fitted to the values, none to what another left.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int,
        num_value_heads: int | None = None,
        value_head_dim: int | None = None,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        impl: Literal["auto", "reference", "chunked", "triton"] = "auto",
    ) -> None:
        super().__init__(
            hidden_size,
            partial(summed, impl=impl),
            num_gates=2,
            gate_sets=2,
            num_heads=num_heads,
            head_dim=head_dim,
            num_value_heads=num_value_heads,
            value_head_dim=value_head_dim,
            conv_size=conv_size,
            norm_eps=norm_eps,
        )


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
