"""Options of scalar-gated linear attention. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from whimbrel.mixers.linear_config import LinearMixerConfig

if TYPE_CHECKING:
    from whimbrel.mixers.sgla.layer import SGLA


@dataclass(frozen=True, kw_only=True)
class SGLAConfig(LinearMixerConfig):
    """Linear attention with one scalar decay a head (arXiv 2405.21060, section 6; the base of RLA)."""

    NUM_GATES: ClassVar[int] = 2
    NUM_STATES: ClassVar[int] = 1

    def build(self, hidden_size: int, norm_eps: float) -> SGLA:
        """The layer."""
        from whimbrel.mixers.sgla.layer import SGLA

        return SGLA(hidden_size, norm_eps=norm_eps, **self.layer_options())
