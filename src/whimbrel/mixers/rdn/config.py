"""Options of Residual Delta Net. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from whimbrel.mixers.two_state.config import TwoStateConfig

if TYPE_CHECKING:
    from whimbrel.mixers.rdn.layer import RDN


@dataclass(frozen=True, kw_only=True)
class RDNConfig(TwoStateConfig):
    """Residual Delta Net (arXiv 2509.25223): a gated delta rule whose second state is fitted to the rest."""

    def build(self, hidden_size: int, norm_eps: float) -> RDN:
        """The layer."""
        from whimbrel.mixers.rdn.layer import RDN

        return RDN(hidden_size, norm_eps=norm_eps, **self.layer_options())
