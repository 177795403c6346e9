"""Where each parameter of an optimizer stands: its group, the number of its first matrix, and its processes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from whimbrel.optim.groups import resolve_side
from whimbrel.optim.matrix import Matrix, count_matrices, matrices, place_of
from whimbrel.optim.sharding import Spread, split_over


class Places:
    """The parameters of `groups`: the matrices of all are numbered, and after them the other parameters."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        low_rank = [param for group in groups if group["low_rank"] for param in group["params"]]
        others = [param for group in groups if not group["low_rank"] for param in group["params"]]
        counts = [count_matrices(param) for param in low_rank]
        starts = itertools.accumulate([0, *counts, *[1] * len(others)])
        self.num_matrices = sum(counts)
        self.offsets: dict[Tensor, int] = dict(zip([*low_rank, *others], starts, strict=False))
        """Number of a parameter, or of its first matrix."""
        self.home: dict[Tensor, int] = {
            param: number for number, group in enumerate(groups) for param in group["params"]
        }
        """Number of a parameter's group."""
        self._groups = groups
        self._spreads: dict[Tensor, tuple[Spread, tuple[int, int]]] = {}
        self._summands: dict[Tensor, tuple[ProcessGroup, ...]] = {}

    def group(self, param: Tensor) -> dict[str, Any]:
        """The group of a parameter."""
        return self._groups[self.home[param]]

    def matrices(self, params: Sequence[Tensor], states: Any) -> list[Matrix]:
        """The matrices of low-rank parameters that have gradients, with their states."""
        found: list[Matrix] = []
        for param in params:
            found += matrices(param, states[param], self.offsets[param], *self._place(param))
        return found

    def summands(self, param: Tensor) -> tuple[ProcessGroup, ...]:
        """Groups of processes over which the squared norm of a parameter's gradient is a sum of what each has."""
        if param not in self._summands:
            low_rank = self.group(param)["low_rank"]
            found = self._place(param)[0].summands if low_rank else split_over(param, range(param.ndim))
            self._summands[param] = found
        return self._summands[param]

    def _place(self, param: Tensor) -> tuple[Spread, tuple[int, int]]:
        if param not in self._spreads:
            side = self.group(param)["side"]
            self._spreads[param] = place_of(param, resolve_side(side, param.shape) == "left")
        return self._spreads[param]
