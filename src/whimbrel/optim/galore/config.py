"""Options of GaLore. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from whimbrel.optim.lowrank_config import LowRankConfig

if TYPE_CHECKING:
    from torch import optim


@dataclass(frozen=True, kw_only=True)
class GaLoreConfig(LowRankConfig):
    """GaLore (arXiv 2403.03507): Adam on projected gradients; AdamW for the other parameters."""

    def build(self, groups: list[dict[str, Any]]) -> optim.Optimizer:
        """GaLore over `groups`."""
        from whimbrel.optim.galore.optimizer import GaLore

        return GaLore(groups, **self.options())
