"""The layer of RLA and RDN."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal

from whimbrel.mixers.base import Out
from whimbrel.mixers.linear import LinearMixer
from whimbrel.mixers.two_state.rule import check_options
from whimbrel.scan.common import IMPLS, check_choice


class TwoStateMixer(LinearMixer):
    """y, state = layer(x, state) for x [B, T, hidden_size], with the recurrence `_op` of the subclass.

    Arguments as in TwoStateConfig, where they are described; None for `num_value_heads` and `value_head_dim` takes
    `num_heads` and `head_dim`, None for `clip` turns clipping off.
    """

    _op: ClassVar[Callable[..., Out]]
    """`rla` or `rdn`."""

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int,
        num_value_heads: int | None = None,
        value_head_dim: int | None = None,
        conv_size: int = 4,
        clip: float | None = 1.0,
        combine: Literal["gated", "sum"] = "gated",
        residual: Literal["undecayed", "decayed"] = "undecayed",
        recompute: int = 0,
        norm_eps: float = 1e-5,
        impl: Literal["auto", "reference", "chunked", "triton"] = "auto",
    ) -> None:
        name = type(self).__name__
        check_choice(name, "impl", impl, IMPLS)
        check_options(name, clip=clip, combine=combine, residual=residual, recompute=recompute)
        super().__init__(
            hidden_size,
            partial(type(self)._op, clip=clip, combine=combine, residual=residual, recompute=recompute, impl=impl),
            num_gates=3,
            num_heads=num_heads,
            head_dim=head_dim,
            num_value_heads=num_value_heads,
            value_head_dim=value_head_dim,
            conv_size=conv_size,
            norm_eps=norm_eps,
        )
