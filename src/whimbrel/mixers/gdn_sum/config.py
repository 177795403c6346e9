"""Options of two summed Gated DeltaNets. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from whimbrel.mixers.linear_config import LinearMixerConfig

if TYPE_CHECKING:
    from whimbrel.mixers.gdn_sum.layer import GDNSum


@dataclass(frozen=True, kw_only=True)
class GDNSumConfig(LinearMixerConfig):
    """Two gated delta rules with gates of their own over one q, k and v, their outputs summed."""

    NUM_GATES: ClassVar[int] = 2
    NUM_STATES: ClassVar[int] = 2
    GATE_SETS: ClassVar[int] = 2

    def build(self, hidden_size: int, norm_eps: float) -> GDNSum:
        """The layer."""
        from whimbrel.mixers.gdn_sum.layer import GDNSum

        return GDNSum(hidden_size, norm_eps=norm_eps, **self.layer_options())
