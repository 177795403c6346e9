"""APOLLO: the gradient scaled slice by slice as Adam scales a random projection of it. Written from the paper."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whimbrel.optim import lowrank
from whimbrel.optim.base import LowRankOptimizer, Projected, given
from whimbrel.optim.limiter import factors, limit
from whimbrel.optim.options import AnyRefresh, BasisDtype, Impl, OnRefresh, Scaling, Side, StateDtype


class ApolloOut(NamedTuple):
    """update [B, m, n], to be subtracted from the weights, and the state after the step."""

    update: Tensor
    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    limiter_norm: Tensor


def apollo_step(
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
    scaling: Scaling,
) -> ApolloOut:
    """The APOLLO update of B matrices (arXiv 2412.05270, algorithm 1), without weight decay.

    step, limiter_norm [B]; exp_avg, exp_avg_sq: [B, r, n] (left) or [B, m, r] (right); all float32. `lr` is per
    step, `eps` is in units of the gradient.
    """
    grad, slice_norm, active, basis, side, spread = projected
    low = projected.down()
    direction, correction, moments = lowrank.adam(
        low, lowrank.Moments(step, exp_avg, exp_avg_sq), active, betas=betas, eps=eps
    )
    slices = lowrank.slices(slice_norm, low, direction, side, spread)
    coefficients, norm = apollo_coefficients(
        slices, correction, active, limiter_norm, lr=lr, alpha=alpha, gamma=gamma, scaling=scaling
    )
    return ApolloOut(lowrank.combine(grad, basis, side, low, direction, coefficients, spread), *moments, norm)


def apollo_coefficients(
    slices: lowrank.Slices,
    correction: Tensor,
    active: Tensor,
    limiter_norm: Tensor,
    *,
    lr: float | Tensor,
    alpha: float,
    gamma: float,
    scaling: Scaling,
) -> tuple[lowrank.Coefficients, Tensor]:
    """A factor for each slice of the gradient, nothing inside of the basis; and the limiter's norm after the step.

    correction, active, limiter_norm: [B].
    """
    factor = factors(slices, scaling)
    limited = limit(slices.total((factor * slices.grad).square()).sqrt(), limiter_norm, gamma=gamma)
    size = lr * math.sqrt(alpha) * correction * active
    on_grad = factor * (limited.scale * size)[:, None]
    return lowrank.Coefficients(None, None, on_grad), torch.where(active, limited.norm, limiter_norm)


def apollo_factors(*, alpha: float, gamma: float, scaling: Scaling) -> lowrank.Factors:
    """The numbers in `apollo_coefficients`."""
    return lowrank.Factors(None, math.sqrt(alpha), gamma=gamma, matrix=scaling == "matrix")


class Apollo(LowRankOptimizer):
    """APOLLO (arXiv 2412.05270) for groups marked low-rank, AdamW for the others; see `LowRankOptimizer` for the
    rules.

    groups: from `param_groups`, or dictionaries whose keys win over the arguments; "update_proj_gap",
        "proj_type" and "scale" are read as `refresh_steps`, `side` and `alpha`.
    lr: learning rate of every group, per step. rank: columns of the basis.
    alpha: factor on the scaled gradient, whose root is taken.
    gamma: growth of the scaled gradient's norm allowed per step; 0 switches the limiter off.
    refresh_steps: steps between two bases. refresh: "random" (Gaussian of variance 1 / rank, drawn from the seed in
        each step and stored nowhere), "power" or "exact". stagger: spread new bases over `refresh_steps`.
    scaling: "column", one factor for each slice, or "matrix", one for all; with rank=1 and alpha=128 APOLLO-Mini.
    side: projected side, "std" (the shorter), "reverse_std", "left" or "right".
    on_refresh: moments at a new basis, "keep", "rotate" or "reset"; "rotate" needs bases that are fitted.
    betas, eps, weight_decay: as in AdamW; `eps` is added to the uncorrected root, the decay follows the update.
    seed: of the bases, and of stochastic rounding.
    lazy_overlap, state_dtype, basis_dtype, other_dtype, stochastic_rounding, impl: as in `Fira`.

    Raises ConfigError for a value that is not allowed, a group without a mark, or a rank above a matrix's smaller
    side.
    """

    rule = staticmethod(apollo_step)
    factors = staticmethod(apollo_factors)
    scalars = ("limiter_norm",)
    random = True
    options = ("alpha", "gamma", "scaling")

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float | Tensor = 1e-2,
        *,
        rank: int = 256,
        alpha: float = 1.0,
        gamma: float = 1.01,
        refresh_steps: int = 200,
        scaling: Scaling = "column",
        side: Side = "std",
        refresh: AnyRefresh = "random",
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
