"""The matrices of a step: parameters [m, n], and the experts of parameters [E, m, n], each a matrix of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whimbrel.optim.sharding import Spread, local, local_grad, part_of, spread_of

BATCH_ELEMENTS = 1 << 18
"""Largest stack of gradients, in elements, about what a core's cache holds; larger matrices go one by one."""
DEVICE_BATCH_ELEMENTS = 1 << 24
"""The same where a call costs more than what it does: on a GPU, and where processes speak with each other."""

Key = tuple[Tensor, int | None]
"""A parameter, and which of the experts held here, or None."""


@dataclass(eq=False, slots=True)
class Matrix:
    """One matrix in a step.

    weight, grad: the part that this process holds, plain tensors; shape: (m, n) of the whole; state: its tensors, as
    far as they are held here; offset: number of the matrix among all; first: row and column of the whole where the
    part begins; layout: `layout_of` the two.
    """

    key: Key
    weight: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    shape: tuple[int, int]
    offset: int
    spread: Spread
    first: tuple[int, int]
    layout: Any

    def full_grad(self, left: bool) -> Tensor:
        """The whole gradient on every process, which all must ask for."""
        return self.spread.join(self.grad, left)


def matrices(
    param: Tensor, state: dict[str, Tensor], offset: int, spread: Spread, first: tuple[int, int]
) -> Iterator[Matrix]:
    """The matrices of a parameter that has a gradient, or those of them that this process holds.

    offset: number of its first matrix.
    """
    m, n = param.shape[-2:]
    weight, grad = local(param), local_grad(param)
    # the very state of a plain parameter, so that it may be known again
    held = state if weight is param else {key: local(value) for key, value in state.items()}
    layout = layout_of(weight, grad)
    if param.ndim == 2:
        yield Matrix((param, None), weight, grad, held, (m, n), offset, spread, first, layout)
        return
    experts = part_of(param, 0)
    for i in range(weight.shape[0]):
        number = offset + (experts.start + i if experts.at is None else experts.at[i])
        views = {key: value[i] for key, value in held.items()}
        yield Matrix((param, i), weight[i], grad[i], views, (m, n), number, spread, first, layout)


def layout_of(weight: Tensor, grad: Tensor) -> Any:
    """How a parameter and its gradient lie, but for their addresses."""
    return weight.dtype, weight.stride(), weight.device, grad.dtype, grad.stride(), grad.device


def count_matrices(param: Tensor) -> int:
    """1, or the number of experts on all processes."""
    return param.shape[0] if param.ndim == 3 else 1


def place_of(param: Tensor, left: bool) -> tuple[Spread, tuple[int, int]]:
    """How a parameter's matrices lie, and the row and column of each at which the part held here begins."""
    return spread_of(param, left), (part_of(param, -2).start, part_of(param, -1).start)


def batches(found: Sequence[Matrix]) -> list[list[Matrix]]:
    """Lists of matrices of one shape that lie alike, none above the limit unless it is a single matrix.

    The same on every process, as matrices are told apart by the whole.
    """
    equal: dict[object, list[Matrix]] = {}
    for matrix in found:
        kind = (matrix.shape, matrix.weight.dtype, matrix.weight.device, matrix.spread)
        equal.setdefault(kind, []).append(matrix)
    lists = []
    for members in equal.values():
        (m, n), one = members[0].shape, members[0]
        alone = one.weight.device.type == "cpu" and not one.spread.split
        size = max(1, (BATCH_ELEMENTS if alone else DEVICE_BATCH_ELEMENTS) // (m * n))
        lists += [members[i : i + size] for i in range(0, len(members), size)]
    return lists


def stack_grads(batch: Sequence[Matrix]) -> Tensor:
    """A copy of the gradients [B, ...]."""
    return torch.stack([matrix.grad for matrix in batch])
