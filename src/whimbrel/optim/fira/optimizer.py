"""Fira: GaLore, plus the part of the gradient outside the basis, scaled as Adam scales the part inside."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whimbrel.optim import lowrank
from whimbrel.optim.base import LowRankOptimizer, Projected, given
from whimbrel.optim.limiter import factors, limit
from whimbrel.optim.options import (
    BasisDtype,
    Impl,
    OnRefresh,
    Refresh,
    ResidualMode,
    Scaling,
    Side,
    StateDtype,
)


class FiraOut(NamedTuple):
    """update [B, m, n], to be subtracted from the weights, and the state after the step."""

    update: Tensor
    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    limiter_norm: Tensor


def fira_step(
    projected: Projected,
    step: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    limiter_norm: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    alpha: float,
    gamma: float,
    residual_mode: ResidualMode,
    scaling: Scaling,
) -> FiraOut:
    """The Fira update of B matrices (arXiv 2410.01623, algorithm 1), without weight decay.

    step, limiter_norm [B]; exp_avg, exp_avg_sq: [B, r, n] (left) or [B, m, r] (right); all float32. `lr` is
    per step, `eps` is in units of the gradient.

    The residual is never formed: its norm follows from the slice norms of the gradient and of its projection,
    and the update is basis Z + grad diag(f). Derived in this folder's README.
    """
    grad, slice_norm, active, basis, side, spread = projected
    low = projected.down()
    direction, correction, moments = lowrank.adam(
        low, lowrank.Moments(step, exp_avg, exp_avg_sq), active, betas=betas, eps=eps
    )
    slices = lowrank.slices(slice_norm, low, direction, side, spread)
    coefficients, norm = fira_coefficients(
        slices,
        correction,
        active,
        limiter_norm,
        lr=lr,
        alpha=alpha,
        gamma=gamma,
        residual_mode=residual_mode,
        scaling=scaling,
    )
    return FiraOut(lowrank.combine(grad, basis, side, low, direction, coefficients, spread), *moments, norm)


def fira_coefficients(
    slices: lowrank.Slices,
    correction: Tensor,
    active: Tensor,
    limiter_norm: Tensor,
    *,
    lr: float | Tensor,
    alpha: float,
    gamma: float,
    residual_mode: ResidualMode,
    scaling: Scaling,
) -> tuple[lowrank.Coefficients, Tensor]:
    """The factors of the update, and the limiter's norm after the step; all that Fira needs of G is its norms.

    correction (of Adam's bias), active (whether a matrix is stepped), limiter_norm: [B].
    """
    # official: alpha acts inside the residual, and the correction on the whole update after the limiter;
    # paper: alpha acts on the whole update, and the correction before the limiter
    official = residual_mode == "official"
    kept = alpha if official else 1.0
    before, after = (torch.ones_like(correction), correction) if official else (correction, torch.ones_like(correction))
    factor = before[:, None] * factors(slices, scaling)
    residual_sq = slices.grad.square() - (2 * kept - kept * kept) * slices.low.square()
    residual_norm = slices.total(factor.square() * residual_sq).clamp_min(0.0).sqrt()
    limited = limit(residual_norm, limiter_norm, gamma=gamma)

    size = lr * after * active
    on_grad = factor * (limited.scale * size * (1.0 if official else alpha))[:, None]
    coefficients = lowrank.Coefficients(before * size * alpha, kept * on_grad, on_grad)
    return coefficients, torch.where(active, limited.norm, limiter_norm)


def fira_factors(*, alpha: float, gamma: float, residual_mode: ResidualMode, scaling: Scaling) -> lowrank.Factors:
    """The numbers in `fira_coefficients`."""
    official = residual_mode == "official"
    outside, kept = (1.0, alpha) if official else (alpha, 1.0)
    return lowrank.Factors(alpha, outside, kept, not official, gamma, scaling == "matrix")


class Fira(LowRankOptimizer):
    """Fira (arXiv 2410.01623) for groups marked low-rank, AdamW for the others; see `LowRankOptimizer` for
    the rules.

    groups: from `param_groups`, or dictionaries whose keys win over the arguments; "update_proj_gap" and
        "proj_type" are read as `refresh_steps` and `side`.
    lr: learning rate of every group, per step. rank: columns of the basis.
    alpha: factor on the update inside the basis ("official"), or on the whole update ("paper").
    gamma: growth of the residual's norm allowed per step; 0 switches the limiter off.
    refresh_steps: steps between two fits of a basis. refresh: "power" (warm-started block power iteration) or
        "exact" (thin SVD). stagger: spread the fits over `refresh_steps`, each later one for the steps
        after its own, else all fall on steps 0, refresh_steps, ..., for these steps too.
    residual_mode: "official", as the authors' code computes, or "paper", as algorithm 1 states; the learning
        rate must be tuned anew between them unless alpha = 1.
    scaling: "column", one factor for each slice of the residual, or "matrix", one for all.
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

    rule = staticmethod(fira_step)
    factors = staticmethod(fira_factors)
    scalars = ("limiter_norm",)
    options = ("alpha", "gamma", "residual_mode", "scaling")

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float | Tensor = 1e-2,
        *,
        rank: int = 256,
        alpha: float = 0.25,
        gamma: float = 1.01,
        refresh_steps: int = 200,
        residual_mode: ResidualMode = "official",
        scaling: Scaling = "column",
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
