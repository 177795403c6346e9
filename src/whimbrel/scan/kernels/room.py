"""One allocation for all that a call keeps: one address, and one tensor to save, hand on and give back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BOUNDARY = 256
"""Bytes at whose multiples each part begins."""


class Room:
    """Where tensors of given shapes and dtypes lie in an allocation of bytes."""

    def __init__(self, device: torch.device, **parts: tuple[Sequence[int], torch.dtype]) -> None:
        self.bytes = 0
        self.places = []
        for shape, dtype in parts.values():
            size = math.prod(shape) * dtype.itemsize
            self.places.append((self.bytes, self.bytes + size, shape, dtype))
            self.bytes += (size + BOUNDARY - 1) // BOUNDARY * BOUNDARY
        self.like = torch.empty((), dtype=torch.uint8, device=device).expand(self.bytes)

    def new(self) -> Tensor:
        """New memory, uint8 [bytes]."""
        return torch.empty_like(self.like, memory_format=torch.contiguous_format)

    def parts_of(self, memory: Tensor) -> list[Tensor]:
        """The tensors that lie in it."""
        return [memory[begin:end].view(dtype).view(shape) for begin, end, shape, dtype in self.places]
