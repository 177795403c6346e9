"""The global norm of a step's gradients, from norms that the step takes anyway."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Groups = tuple[ProcessGroup, ...]
"""Groups of processes over which the squared norm of a parameter's gradient is a sum of what each notes."""


class GradNorm:
    """Squared norms, added up apart for parameters that are summed over different processes."""

    def __init__(self) -> None:
        self._squares: dict[Groups, Tensor] = {}

    def square(self, groups: Groups, device: torch.device) -> Tensor:
        """Where squared norms are added up of gradients, or of slices of them, that are this process's to count."""
        if groups not in self._squares:
            self._squares[groups] = torch.zeros((), device=device)
        return self._squares[groups]

    def total(self, groups: Iterable[Groups], device: torch.device) -> Tensor:
        """The norm of all that was noted, on every process; what was noted is zero again.

        groups: of every parameter, so that all processes speak with each other in one order.
        """
        total = torch.zeros((), device=device)
        for each in dict.fromkeys(groups):
            part = self._squares.get(each, total.new_zeros(())).clone()
            for processes in each:
                dist.all_reduce(part, group=processes)
            total += part.to(total.device)
        for held in self._squares.values():
            held.zero_()
        return total.sqrt()
