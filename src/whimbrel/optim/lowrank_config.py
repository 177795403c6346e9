"""The options that the low-rank optimizers share. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from whimbrel.config import OptimConfig
from whimbrel.optim.groups import low_rank_state_bytes
from whimbrel.optim.options import OnRefresh, Refresh, Side, check_options

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(OptimConfig):
    """An optimizer whose matrices keep state of a low rank; AdamW for the other parameters."""

    SCALARS: ClassVar[int]
    """Single numbers that a low-rank matrix keeps beside its basis and moments."""

    lr: float = 1e-2
    """Full learning rate, per step, of every group; the schedule scales it."""
    rank: int = 128
    """Columns of the basis; at most the smaller side of every low-rank matrix."""
    alpha: float = 0.25
    """Factor on the update of low-rank matrices (arXiv 2403.03507, section 5: 0.25); for Fira see `residual_mode`."""
    refresh_steps: int = 200
    """Steps between two fits of a matrix's basis."""
    side: Side = "std"
    """Side that is projected: `std` the shorter, `reverse_std` the longer, `left` rows, `right` columns."""
    refresh: Refresh = "power"
    """How a basis is fitted: `power` (warm-started block power iteration) or `exact` (thin SVD)."""
    on_refresh: OnRefresh = "keep"
    """Moments at a new basis: `keep` as they are, `rotate` into it, or `reset`."""
    stagger: bool = True
    """Spread the fits of the matrices over `refresh_steps`, so that no step does them all."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments, per step."""
    eps: float = 1e-6
    """Added to the root of the uncorrected second moment, in units of the gradient."""
    weight_decay: float = 0.0
    """Decay of matrices and embeddings, per step and unit of learning rate; vectors are never decayed."""
    low_rank: tuple[str, ...] = ("blocks.*",)
    """Patterns over parameter names; the matrices that match get low-rank state."""
    exclude: tuple[str, ...] = ()
    """Patterns over parameter names that stay with AdamW although they match `low_rank`."""
    min_dim: int = 32
    """Smaller side below which a matrix stays with AdamW, in elements."""
    seed: int = 0
    """Seed of the first fit under `refresh = "power"`."""

    def __post_init__(self) -> None:
        check_options(dataclasses.asdict(self), prefix="optim.")

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups `low_rank`, `decay` and `no_decay` of the model's parameters."""
        from whimbrel.optim.groups import param_groups

        return param_groups(model, low_rank=self.low_rank, exclude=self.exclude, min_dim=self.min_dim)

    def options(self) -> dict[str, Any]:
        """The arguments of the optimizer: all settings but those that sort parameters into groups."""
        sorting = ("low_rank", "exclude", "min_dim")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in sorting}

    def state_bytes(self, shapes: Mapping[str, Sequence[int]], *, bytes_per_element: int = 4) -> int:
        """Bytes of float32 state, whatever `bytes_per_element` of the weights.

        For a matrix with its basis on the side of d and another side s: 4 (d r + 2 s r + SCALARS); for any other
        parameter of N elements: 4 (2 N + 1).
        """
        return low_rank_state_bytes(
            shapes,
            rank=self.rank,
            side=self.side,
            scalars=self.SCALARS,
            low_rank=self.low_rank,
            exclude=self.exclude,
            min_dim=self.min_dim,
        )
