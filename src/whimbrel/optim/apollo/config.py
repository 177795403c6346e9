"""Options of APOLLO. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from whimbrel.optim.lowrank_config import LowRankConfig
from whimbrel.optim.options import AnyRefresh, Scaling

if TYPE_CHECKING:
    from torch import optim


@dataclass(frozen=True, kw_only=True)
class ApolloConfig(LowRankConfig):
    """APOLLO (arXiv 2412.05270): scaled gradients from random projections; AdamW for the other parameters."""

    SCALARS: ClassVar[tuple[str, ...]] = ("limiter_norm",)
    RANDOM: ClassVar[bool] = True

    alpha: float = 1.0
    """Factor on the scaled gradient, whose root is taken (arXiv 2412.05270, section 4: 1; 128 at rank 1)."""
    refresh: AnyRefresh = "random"
    """`random` draws bases from the seed and stores none; `power` and `exact` fit them to the gradient."""
    gamma: float = 1.01
    """Growth of the scaled gradient's norm allowed per step; 0 for no limit."""
    scaling: Scaling = "column"
    """One factor for each slice of the gradient (`column`), or one for the whole (`matrix`, APOLLO-Mini at rank 1)."""

    def build(self, groups: list[dict[str, Any]]) -> optim.Optimizer:
        """APOLLO over `groups`."""
        from whimbrel.optim.apollo.optimizer import Apollo

        return Apollo(groups, **self.options())
