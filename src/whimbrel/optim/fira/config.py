"""Options of Fira. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from whimbrel.optim.lowrank_config import LowRankConfig
from whimbrel.optim.options import ResidualMode, Scaling

if TYPE_CHECKING:
    from torch import optim


@dataclass(frozen=True, kw_only=True)
class FiraConfig(LowRankConfig):
    """Fira (arXiv 2410.01623): full-rank updates with low-rank state; AdamW for the other parameters."""

    SCALARS: ClassVar[tuple[str, ...]] = ("limiter_norm",)

    gamma: float = 1.01
    """Growth of the residual's norm allowed per step (arXiv 2410.01623, algorithm 1); 0 for no limit."""
    residual_mode: ResidualMode = "official"
    """`official` computes as the authors' code does: `alpha` scales the update inside the basis only. `paper` follows
    algorithm 1: `alpha` scales the whole update."""
    scaling: Scaling = "column"
    """One factor for each slice of the residual (`column`), or one for the whole (`matrix`)."""

    def build(self, groups: list[dict[str, Any]]) -> optim.Optimizer:
        """Fira over `groups`."""
        from whimbrel.optim.fira.optimizer import Fira

        return Fira(groups, **self.options())
