"""Options of AdamW. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from whimbrel.config import OptimConfig
from whimbrel.optim.groups import assign_groups
from whimbrel.optim.options import check_options

if TYPE_CHECKING:
    from torch import nn, optim


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(OptimConfig):
    """AdamW (arXiv 1711.05101), as torch ships it."""

    lr: float = 1e-3
    """Full learning rate, per step; the schedule scales it."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments, per step."""
    eps: float = 1e-8
    """Added to the root of the corrected second moment, in units of the gradient."""
    weight_decay: float = 0.0
    """Decay of matrices and embeddings, per step and unit of learning rate; vectors are never decayed."""

    def __post_init__(self) -> None:
        check_options(dataclasses.asdict(self), prefix="optim.")

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Two groups: `decay` and `no_decay`."""
        from whimbrel.optim.groups import param_groups

        return param_groups(model, low_rank=())

    def build(self, groups: list[dict[str, Any]]) -> optim.Optimizer:
        """torch.optim.AdamW over `groups`."""
        from whimbrel.optim.adamw.optimizer import AdamW

        return AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)

    def bytes_by_group(self, shapes: Mapping[str, Sequence[int]], *, bytes_per_element: int = 4) -> dict[str, int]:
        """Bytes of state of each group that `groups` would make."""
        names = assign_groups(shapes, low_rank=())
        found = dict.fromkeys(names.values(), 0)
        for name, shape in shapes.items():
            found[names[name]] += self.state_bytes({name: shape}, bytes_per_element=bytes_per_element)
        return found

    def state_bytes(self, shapes: Mapping[str, Sequence[int]], *, bytes_per_element: int = 4) -> int:
        """Two moments of `bytes_per_element` and a float32 step for each parameter."""
        return sum(2 * math.prod(shape) * bytes_per_element + 4 for shape in shapes.values())
