"""The GDN layer."""

from __future__ import annotations

from functools import partial
from typing import Literal

from whimbrel.mixers.linear import LinearMixer, one_state
from whimbrel.scan.delta.op import delta_scan


class GDN(LinearMixer):
    """Gated DeltaNet: y, state = layer(x, state) for x [B, T, hidden_size].

    Arguments as in GDNConfig, where they are described; None for `num_value_heads` and `value_head_dim` takes
    `num_heads` and `head_dim`. Source: arXiv 2412.06464.
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
            partial(one_state, delta_scan, impl=impl),
            num_gates=2,
            num_heads=num_heads,
            head_dim=head_dim,
            num_value_heads=num_value_heads,
            value_head_dim=value_head_dim,
            conv_size=conv_size,
            norm_eps=norm_eps,
        )
