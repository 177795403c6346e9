"""GaLore: Adam in the coordinates of a low-rank basis."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from whimbrel.optim import lowrank
from whimbrel.optim.base import LowRankOptimizer, Projected, given
from whimbrel.optim.options import BasisDtype, Impl, OnRefresh, Refresh, Side, StateDtype


class GaLoreOut(NamedTuple):
    """update [B, m, n], to be subtracted from the weights, and the state after the step."""

    update: Tensor
    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def galore_step(
    projected: Projected,
    step: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    alpha: float,
) -> GaLoreOut:
    """The GaLore update of B matrices (arXiv 2403.03507, algorithm 2), without weight decay.

    step [B]; exp_avg, exp_avg_sq: [B, r, n] (left) or [B, m, r] (right); all float32. `lr` is per step, `eps`
    is in units of the gradient.
    """
    low = projected.down()
    adam = lowrank.adam(low, lowrank.Moments(step, exp_avg, exp_avg_sq), projected.active, betas=betas, eps=eps)
    slices = lowrank.Slices(projected.slice_norm, projected.slice_norm, projected.slice_norm)  # no norm is asked for
    (coefficients,) = galore_coefficients(slices, adam.correction, projected.active, lr=lr, alpha=alpha)
    grad, _, _, basis, side, spread = projected
    update = lowrank.combine(grad, basis, side, low, adam.direction, coefficients, spread)
    return GaLoreOut(update, *adam.moments)


def galore_coefficients(
    slices: lowrank.Slices, correction: Tensor, active: Tensor, *, lr: float | Tensor, alpha: float
) -> tuple[lowrank.Coefficients]:
    """The factors of the update: nothing outside the basis. correction, active: [B]."""
    return (lowrank.Coefficients(lr * alpha * correction * active, None, None),)


def galore_factors(*, alpha: float) -> lowrank.Factors:
    """The numbers in `galore_coefficients`."""
    return lowrank.Factors(alpha, None)


class GaLore(LowRankOptimizer):
    """GaLore (arXiv 2403.03507) for groups marked low-rank, AdamW for the others; see `LowRankOptimizer` for
    the rules.

    groups: from `param_groups`, or dictionaries whose keys win over the arguments; "update_proj_gap" and
        "proj_type" are read as `refresh_steps` and `side`.
    lr: learning rate of every group, per step. rank: columns of the basis.
    alpha: factor on the update of low-rank matrices.
    refresh_steps: steps between two fits of a basis. refresh: "power" (warm-started block power iteration) or
        "exact" (thin SVD). stagger: spread the fits over `refresh_steps`, each later one for the steps
        after its own, else all fall on steps 0, refresh_steps, ..., for these steps too.
    side: projected side, "std" (the shorter), "reverse_std", "left" or "right".
    on_refresh: moments at a new basis, "keep", "rotate" or "reset".
    betas, eps, weight_decay: as in AdamW; `eps` is added to the uncorrected root, the decay follows the
        update.
    seed: of the first fit under refresh="power", and of stochastic rounding.
    lazy_overlap: share of a subspace kept by a refresh from which on the matrix waits twice as long for the next,
        up to 8 times; 0 is never.
    state_dtype, other_dtype: moments of low-rank matrices and of the other parameters, "float32", "bfloat16" or
        "int8". basis_dtype: "float32", "bfloat16" or "int4".
    stochastic_rounding: of weights in bfloat16. impl: "auto", "eager" or "triton" for low-rank matrices.

    Raises ConfigError for a value that is not allowed, a group without a mark, or a rank above a matrix's
    smaller side.
    """

    rule = staticmethod(galore_step)
    factors = staticmethod(galore_factors)
    options = ("alpha",)

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float | Tensor = 1e-2,
        *,
        rank: int = 256,
        alpha: float = 0.25,
        refresh_steps: int = 200,
        side: Side = "std",
        refresh: Refresh = "power",
        on_refresh: OnRefresh = "keep",
        stagger: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        seed: int = 0,
        lazy_overlap: float = 0.0,
        state_dtype: StateDtype = "float32",
        basis_dtype: BasisDtype = "float32",
        other_dtype: StateDtype = "float32",
        stochastic_rounding: bool = True,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(groups, given(locals()))
