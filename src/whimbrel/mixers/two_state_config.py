"""The options that RLA and RDN share. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

from whimbrel.config import require
from whimbrel.mixers.linear_config import LinearMixerConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TwoStateConfig(LinearMixerConfig):
    """A mixer whose second state is fitted to the residual of the first (arXiv 2509.25223)."""

    NUM_GATES: ClassVar[int] = 3
    NUM_STATES: ClassVar[int] = 2

    clip: float = 1.0
    """Bound of the residual's elements; 0 turns clipping off."""
    combine: Literal["gated", "sum"] = "gated"
    """Weight the two reads by decay and gamma, or sum them."""
    residual: Literal["undecayed", "decayed"] = "undecayed"
    """Take the residual against the first state before or after the token's decay."""
    recompute: int = 0
    """Parts that run again in the backward and so keep nothing for it but their inputs; 0 keeps what it needs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.clip >= 0, "mixer.clip", self.clip, "0 (off) or a positive bound")
        require(self.recompute >= 0, "mixer.recompute", self.recompute, "0 (off) or a number of parts")

    def make(self, layer: Callable[..., T], hidden_size: int, norm_eps: float) -> T:
        """`layer` with these options."""
        return layer(
            hidden_size,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            num_value_heads=self.value_heads,
            value_head_dim=self.value_dim,
            conv_size=self.conv_size,
            clip=self.clip or None,
            combine=self.combine,
            residual=self.residual,
            recompute=self.recompute,
            norm_eps=norm_eps,
            impl=self.impl,
        )
