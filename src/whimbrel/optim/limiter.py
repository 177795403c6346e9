"""What Fira and APOLLO share: factors from the norms of slices, and the limiter of the growth of a norm."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from whimbrel.optim.lowrank import Slices
from whimbrel.optim.options import Scaling

DELTA = 1e-8
"""Added to the norms that are divided by, as in the authors' code."""


class Limited(NamedTuple):
    """scale [B] for the residual, and the norm [B] that the next step is measured against."""

    scale: Tensor
    norm: Tensor


def factors(slices: Slices, scaling: Scaling) -> Tensor:
    """How much larger Adam makes each slice of the projected gradient: [B, s], or [B, 1] under "matrix"."""
    low, direction = slices.low, slices.direction
    if scaling == "matrix":
        low, direction = (slices.norm(x)[:, None] for x in (low, direction))
    return direction / (low + DELTA)


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
