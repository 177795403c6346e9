"""Words from which the random bits of a step are drawn (`counter`), held on the device where steps read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from whimbrel.optim import counter, storage
from whimbrel.optim.device import to_device
from whimbrel.optim.matrix import Matrix


class Words:
    """Words of matrices and other parameters, by their numbers and the seed of their group."""

    def __init__(self) -> None:
        self._bases: dict[tuple[int, tuple[int, ...], torch.device], Tensor] = {}

    def of(self, group: dict[str, Any], offsets: Sequence[int], device: torch.device) -> Tensor:
        """Words [B], int64, of the parameters or matrices with these numbers."""
        known = tuple(offsets)
        bases = self._bases.get((group["seed"], known, device))
        if bases is None:
            words = torch.tensor([counter.base(group["seed"], index) for index in known])
            bases = self._bases[group["seed"], known, device] = to_device(words, device)
        return bases

    def of_batch(self, group: dict[str, Any], batch: Sequence[Matrix]) -> Tensor:
        """Words [B], int64, of B matrices on one device."""
        return self.of(group, [matrix.offset for matrix in batch], batch[0].weight.device)

    def keys(self, group: dict[str, Any], batch: Sequence[Matrix]) -> Tensor:
        """Words [B] for stochastic rounding in the step that has just been counted."""
        steps = storage.stack([matrix.state["step"] for matrix in batch])
        return counter.key(self.of_batch(group, batch), steps)
