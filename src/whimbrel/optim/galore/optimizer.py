"""GaLore: Adam in the coordinates of a low-rank basis."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from whimbrel.optim import lowrank
from whimbrel.optim.base import LowRankOptimizer, Projected
from whimbrel.optim.options import OnRefresh, Refresh, Side


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
    low = lowrank.down(projected.grad, projected.basis, projected.side)
    adam = lowrank.adam(low, lowrank.Moments(step, exp_avg, exp_avg_sq), projected.active, betas=betas, eps=eps)
    size = lr * alpha * adam.correction * projected.active
    update = lowrank.up(adam.direction * size[:, None, None], projected.basis, projected.side)
    return GaLoreOut(update, *adam.moments)


class GaLore(LowRankOptimizer):
    """GaLore (arXiv 2403.03507) for groups marked low-rank, AdamW for the others; see `LowRankOptimizer` for
    the rules.

    groups: from `param_groups`, or dictionaries whose keys win over the arguments; "update_proj_gap" and
        "proj_type" are read as `refresh_steps` and `side`.
    lr: learning rate of every group, per step. rank: columns of the basis.
    alpha: factor on the update of low-rank matrices.
    refresh_steps: steps between two fits of a basis. refresh: "power" (warm-started block power iteration) or
        "exact" (thin SVD). stagger: spread the fits over `refresh_steps`, else all fall on steps 0,
        refresh_steps, ...
    side: projected side, "std" (the shorter), "reverse_std", "left" or "right".
    on_refresh: moments at a new basis, "keep", "rotate" or "reset".
    betas, eps, weight_decay: as in AdamW; `eps` is added to the uncorrected root, the decay follows the
        update.
    seed: of the first fit under refresh="power".

    Raises ConfigError for a value that is not allowed, a group without a mark, or a rank above a matrix's
    smaller side.
    """

    rule = staticmethod(galore_step)
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
    ) -> None:
        defaults = {
            "lr": lr,
            "rank": rank,
            "alpha": alpha,
            "refresh_steps": refresh_steps,
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
