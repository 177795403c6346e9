"""Options of Residual Linear Attention. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from whimbrel.mixers.two_state.config import TwoStateConfig

if TYPE_CHECKING:
    from whimbrel.mixers.rla.layer import RLA


@dataclass(frozen=True, kw_only=True)
class RLAConfig(TwoStateConfig):
    """Residual Linear Attention (arXiv 2509.25223): a second state is fitted to what the first leaves over."""

    def build(self, hidden_size: int, norm_eps: float) -> RLA:
        """The layer."""
        from whimbrel.mixers.rla.layer import RLA

        return RLA(hidden_size, norm_eps=norm_eps, **self.layer_options())
