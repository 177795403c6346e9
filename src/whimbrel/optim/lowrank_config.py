"""The options that the low-rank optimizers share. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from whimbrel.config import OptimConfig
from whimbrel.optim.groups import assign_groups
from whimbrel.optim.layout import Entry, matrix_layout, other_layout
from whimbrel.optim.options import (
    AnyRefresh,
    BasisDtype,
    Impl,
    OnRefresh,
    Side,
    StateDtype,
    check_options,
    check_rank,
)

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(OptimConfig):
    """An optimizer whose matrices keep state of a low rank; AdamW for the other parameters."""

    SCALARS: ClassVar[tuple[str, ...]] = ()
    """Numbers that a low-rank matrix keeps beside its step, basis and moments."""

    RANDOM: ClassVar[bool] = False
    """Whether the method takes bases that are drawn, not fitted."""

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
    refresh: AnyRefresh = "power"
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
    """Seed of the first fit under `refresh = "power"`, and of stochastic rounding."""
    lazy_overlap: float = 0.0
    """Share of a subspace kept by a refresh from which on the matrix waits twice as long for the next; 0 is never."""
    state_dtype: StateDtype = "float32"
    """Moments of low-rank matrices: `float32`, `bfloat16`, or `int8` in blocks."""
    basis_dtype: BasisDtype = "float32"
    """The basis: `float32`, `bfloat16`, or `int4`, packed."""
    other_dtype: StateDtype = "float32"
    """Moments of the other parameters; `int8` leaves those below 4096 elements in float32."""
    stochastic_rounding: bool = True
    """Round weights in bfloat16 up or down by chance, so that small updates are not lost."""
    impl: Impl = "auto"
    """How low-rank matrices are stepped: `triton` (CUDA), `eager`, or `auto`, which takes the kernels
    where they are proven."""

    def __post_init__(self) -> None:
        check_options(dataclasses.asdict(self), prefix="optim.", random=self.RANDOM)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups `low_rank`, `decay` and `no_decay` of the model's parameters."""
        from whimbrel.optim.groups import param_groups

        return param_groups(model, low_rank=self.low_rank, exclude=self.exclude, min_dim=self.min_dim)

    def options(self) -> dict[str, Any]:
        """The arguments of the optimizer: all settings but those that sort parameters into groups."""
        sorting = ("low_rank", "exclude", "min_dim")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in sorting}

    def state_bytes(self, shapes: Mapping[str, Sequence[int]], *, bytes_per_element: int = 4) -> int:
        """Bytes of state, whatever `bytes_per_element` of the weights; `whimbrel.optim.layout` lists the tensors.

        In float32, for a matrix with its basis on the side of d and another side s: 4 (d r + 2 s r + 1 + scalars);
        for any other parameter of N elements: 4 (2 N + 1).
        """
        return sum(self.bytes_by_group(shapes).values())

    def bytes_by_group(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Bytes of state of each group that `groups` would make, from names and shapes alone."""
        groups = assign_groups(shapes, low_rank=self.low_rank, exclude=self.exclude, min_dim=self.min_dim)
        found = dict.fromkeys(groups.values(), 0)
        for name, shape in shapes.items():
            found[groups[name]] += sum(entry.num_bytes for entry in self._layout(name, shape, groups[name]).values())
        return found

    def _layout(self, name: str, shape: Sequence[int], group: str) -> dict[str, Entry]:
        if group != "low_rank":
            return other_layout(shape, other_dtype=self.other_dtype)
        check_rank(self.rank, tuple(shape), name)
        return matrix_layout(
            shape,
            rank=self.rank,
            side=self.side,
            scalars=(*self.SCALARS, *(("refresh_gap",) if self.lazy_overlap else ())),
            state_dtype=self.state_dtype,
            basis_dtype=None if self.refresh == "random" else self.basis_dtype,
        )
