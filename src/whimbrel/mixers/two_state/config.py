"""The options that RLA and RDN share. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from whimbrel.config import require
from whimbrel.mixers.linear_config import LinearMixerConfig


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

    def layer_options(self) -> dict[str, Any]:
        """Keyword arguments of the layer, but for `norm_eps`."""
        own = {"clip": self.clip or None, "combine": self.combine, "residual": self.residual}
        return super().layer_options() | own | {"recompute": self.recompute}
