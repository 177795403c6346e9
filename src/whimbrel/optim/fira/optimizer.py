"""Fira: GaLore, plus the part of the gradient outside the basis, scaled as Adam scales the part inside."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whimbrel.optim import lowrank
from whimbrel.optim.base import LowRankOptimizer, Projected
from whimbrel.optim.options import OnRefresh, Refresh, ResidualMode, Scaling, Side

DELTA = 1e-8
"""Added to the norms that are divided by, as in the authors' code."""


class FiraOut(NamedTuple):
    """update [B, m, n], to be subtracted from the weights, and the state after the step."""

    update: Tensor
    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    limiter_norm: Tensor


class Limited(NamedTuple):
    """scale [B] for the residual, and the norm [B] that the next step is measured against."""

    scale: Tensor
    norm: Tensor


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
    grad, slice_norm, active, basis, side = projected
    dim = lowrank.slice_dim(side)
    low = lowrank.down(grad, basis, side)
    direction, correction, moments = lowrank.adam(
        low, lowrank.Moments(step, exp_avg, exp_avg_sq), active, betas=betas, eps=eps
    )
    # official: alpha acts inside the residual, and the correction on the whole update after the limiter;
    # paper: alpha acts on the whole update, and the correction before the limiter
    official = residual_mode == "official"
    kept = alpha if official else 1.0
    before, after = (torch.ones_like(correction), correction) if official else (correction, torch.ones_like(correction))
    low_norm = torch.linalg.vector_norm(low, dim=dim)
    direction_norm = torch.linalg.vector_norm(direction, dim=dim)
    if scaling == "matrix":
        low_size, direction_size = (
            torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (low_norm, direction_norm)
        )
    else:
        low_size, direction_size = low_norm, direction_norm
    factor = before[:, None] * direction_size / (low_size + DELTA)
    residual_sq = slice_norm.square() - (2 * kept - kept * kept) * low_norm.square()
    residual_norm = (factor.square() * residual_sq).sum(-1).clamp_min(0.0).sqrt()
    limited = limit(residual_norm, limiter_norm, gamma=gamma)

    size = (lr * after * active)[:, None]
    on_grad = (factor * limited.scale[:, None] * size * (1.0 if official else alpha)).unsqueeze(dim)
    on_direction = (before[:, None] * size * alpha).unsqueeze(dim)
    inside = torch.addcmul(direction * on_direction, low, on_grad, value=-kept)
    update = lowrank.up(inside, basis, side, add=grad * on_grad)
    return FiraOut(update, *moments, torch.where(active, limited.norm, limiter_norm))


def limit(norm: Tensor, previous: Tensor, *, gamma: float) -> Limited:
    """The norm-growth limiter: the residual's norm may grow by the factor `gamma` per step; 0 is no limit.

    norm, previous [B]; a previous norm of 0 stands for none, which limits nothing. A norm that is zero or not
    finite is not remembered, so that the limiter neither starts from zero nor keeps a NaN. (arXiv 2410.01623,
    algorithm 1)
    """
    if gamma == 0:
        return Limited(torch.ones_like(norm), previous)
    ceiling = gamma * (previous + DELTA)
    scale = torch.where((previous > 0) & (norm > ceiling), ceiling / norm, 1.0)
    after = norm * scale
    return Limited(scale, torch.where(after.isfinite() & (after > 0), after, previous))


class Fira(LowRankOptimizer):
    """Fira (arXiv 2410.01623) for groups marked low-rank, AdamW for the others; see `LowRankOptimizer` for
    the rules.

    groups: from `param_groups`, or dictionaries whose keys win over the arguments; "update_proj_gap" and
        "proj_type" are read as `refresh_steps` and `side`.
    lr: learning rate of every group, per step. rank: columns of the basis.
    alpha: factor on the update inside the basis ("official"), or on the whole update ("paper").
    gamma: growth of the residual's norm allowed per step; 0 switches the limiter off.
    refresh_steps: steps between two fits of a basis. refresh: "power" (warm-started block power iteration) or
        "exact" (thin SVD). stagger: spread the fits over `refresh_steps`, else all fall on steps 0,
        refresh_steps, ...
    residual_mode: "official", as the authors' code computes, or "paper", as algorithm 1 states; the learning
        rate must be tuned anew between them unless alpha = 1.
    scaling: "column", one factor for each slice of the residual, or "matrix", one for all.
    side: projected side, "std" (the shorter), "reverse_std", "left" or "right".
    on_refresh: moments at a new basis, "keep", "rotate" or "reset".
    betas, eps, weight_decay: as in AdamW; `eps` is added to the uncorrected root, the decay follows the
        update.
    seed: of the first fit under refresh="power".

    Raises ConfigError for a value that is not allowed, a group without a mark, or a rank above a matrix's
    smaller side.
    """

    rule = staticmethod(fira_step)
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
    ) -> None:
        defaults = {
            "lr": lr,
            "rank": rank,
            "alpha": alpha,
            "gamma": gamma,
            "refresh_steps": refresh_steps,
            "residual_mode": residual_mode,
            "scaling": scaling,
            "side": side,
            "refresh": refresh,
            "on_refresh": on_refresh,
            "stagger": stagger,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "seed": seed,
        }
        super().__init__(groups, defaults)
