"""Options of GaLore. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from whimbrel.config import OptimConfig
from whimbrel.optim.groups import low_rank_state_bytes
from whimbrel.optim.options import OnRefresh, Refresh, Side, check_options

if TYPE_CHECKING:
    from torch import nn, optim


@dataclass(frozen=True, kw_only=True)
class GaLoreConfig(OptimConfig):
    """GaLore (arXiv 2403.03507): Adam on projected gradients; AdamW for the other parameters."""

    lr: float = 1e-2
    """Full learning rate, per step, of every group; the schedule scales it."""
    rank: int = 128
    """Columns of the basis; at most the smaller side of every low-rank matrix."""
    alpha: float = 0.25
    """Factor on the update of low-rank matrices (arXiv 2403.03507, section 5: 0.25)."""
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

    def build(self, groups: list[dict[str, Any]]) -> optim.Optimizer:
        """GaLore over `groups`."""
        from whimbrel.optim.galore.optimizer import GaLore

        return GaLore(
            groups,
            lr=self.lr,
            rank=self.rank,
            alpha=self.alpha,
            refresh_steps=self.refresh_steps,
            side=self.side,
            refresh=self.refresh,
            on_refresh=self.on_refresh,
            stagger=self.stagger,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            seed=self.seed,
        )

    def state_bytes(self, shapes: Mapping[str, Sequence[int]], *, bytes_per_element: int = 4) -> int:
        """Bytes of float32 state, whatever `bytes_per_element` of the weights: for an m x n matrix with basis
        on the
        side of d and other side s, 4 (d r + 2 s r + 1); for any other parameter of N elements, 4 (2 N + 1).
        """
        return low_rank_state_bytes(
            shapes,
            rank=self.rank,
            side=self.side,
            scalars=1,
            low_rank=self.low_rank,
            exclude=self.exclude,
            min_dim=self.min_dim,
        )
