"""Options of Gated DeltaNet. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from whimbrel.mixers.linear_config import LinearMixerConfig

if TYPE_CHECKING:
    from whimbrel.mixers.gdn.layer import GDN


@dataclass(frozen=True, kw_only=True)
class GDNConfig(LinearMixerConfig):
    """Gated DeltaNet (arXiv 2412.06464): one state under a gated delta rule."""

    NUM_GATES: ClassVar[int] = 2
    NUM_STATES: ClassVar[int] = 1

    def build(self, hidden_size: int, norm_eps: float) -> GDN:
        """The layer."""
        from whimbrel.mixers.gdn.layer import GDN

        return GDN(hidden_size, norm_eps=norm_eps, **self.layer_options())
