"""Matrices that kernels step together, and tables of where their tensors lie, read by kernels in place of stacks."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from whimbrel.launches import Address, Blocks
from whimbrel.optim.device import to_device
from whimbrel.optim.groups import resolve_side
from whimbrel.optim.matrix import Matrix

SCRATCH = 1 << 28
"""Most bytes that a batch holds during its step beside the state."""
SCRATCH_SHARE = 23
"""A batch holds at most this part of the bytes of the state, so that with a refresh a step needs less than a tenth."""
FEW = 1 << 24
"""A batch may always hold so many bytes, since small batches leave a GPU idle between them."""
WAVE = 1 << 26
"""Batches in parts may together hold so many bytes: who steps them side by side has less to say to other processes."""
ALLOCATED = 1 << 9
"""Bytes of which addresses of tensors are multiples, but for views."""
LAST = (1 << 31) - 2
"""Units that a table may count: 1 TiB where they are multiples of ALLOCATED, so that tensors may move."""

_HAS_GLUON = find_spec("triton.experimental.gluon") is not None


class Table(NamedTuple):
    """Where B tensors of one shape begin; it holds none of them.

    places [B], int64, on the device: addresses, each a multiple of `alignment` bytes, 16 or 1. units [B], int32, on the
    device: the same in units of `unit` bytes from `lowest` on, the last of which may be `last`.
    """

    places: Tensor
    alignment: int
    units: Tensor
    unit: int
    lowest: Address
    last: int

    def blocks(self, rows: int, columns: int, fold: int, block: tuple[int, int]) -> Blocks:
        """All tensors [rows, columns], `fold` rows side by side, as one of which kernels copy blocks."""
        shape, step = (self.last + 1, rows // fold, columns * fold), self.unit // self.lowest.dtype.itemsize
        return Blocks(self.lowest, shape, (step, columns * fold, 1), (1, *block))

    def refill(self, found: list[int]) -> bool:
        """Write other addresses in place of these, for kernels that were launched with this table; whether they fit."""
        apart = [divmod(place - self.lowest.place, self.unit) for place in found]
        if self.alignment < 16 or any(rest or not 0 <= units <= self.last for units, rest in apart):
            return False
        both = torch.tensor([*found, *(units for units, _ in apart)], dtype=torch.int64)
        for there, value in zip((self.places, self.units), to_device(both, self.places.device).chunk(2), strict=True):
            there.copy_(value)
        return True


class Batch:
    """Matrices of one shape, dtype and layout that are stepped together, and their addresses, sent where one moves."""

    def __init__(self, matrices: Sequence[Matrix], side: str) -> None:
        self.matrices = matrices
        self.left = side == "left"
        weight, grad = matrices[0].weight, matrices[0].grad
        m, n = weight.shape
        self.fold = 8 // math.gcd(n, 8)
        """Rows that lie side by side to be a multiple of 16 bytes apart from the next ones."""
        self.hopper = (
            _is_hopper(weight.device)
            and weight.dtype == grad.dtype == torch.bfloat16
            and weight.stride() == grad.stride() == (n, 1)
            and m % self.fold == 0
            and 0 < weight.numel() < 1 << 31
        )
        """Whether the kernels for Hopper may read the weights and gradients."""
        self._tables: dict[str, tuple[list[int], Table]] = {}
        self._moves = 0
        self._numbers = torch.arange(len(matrices), device=weight.device)
        self._units = self._numbers.int()

    def adjoining(self, stack: Tensor, *, places: bool, first: int = 0) -> Table:
        """The table of a stack [B, rows, ...], each from its `first` row on, of which the host need not send places."""
        size, before = stack[0].nbytes, first * stack.stride(1) * stack.element_size()
        address = Address(stack.data_ptr() + before, stack.dtype, stack.device)
        found = self._numbers * size + address.place if places else self._numbers
        alignment = 16 if size % 16 == before % 16 == 0 else 1
        return Table(found, alignment, self._units, size, address, len(stack) - 1)

    def table(self, role: str, tensors: Sequence[Tensor]) -> Table:
        """The table of tensors on one device; role says which."""
        found = [tensor.data_ptr() for tensor in tensors]
        held = self._tables.get(role)
        if held is None or held[0] != found:
            if held is not None and held[1].refill(found):
                table = held[1]
            else:
                table = _tabulate(found, tensors)
                self._moves += 1
            held = self._tables[role] = found, table
        return held[1]

    def memory(self, role: str) -> tuple[Tensor, int, int]:
        """For kernels that read or write elements of gradients ("grad") or weights ("weight") by their units.

        A tensor, elements from where it begins to where the table does, and elements of a unit.
        """
        first = min((getattr(matrix, role) for matrix in self.matrices), key=Tensor.data_ptr)
        table = self._tables[role][1]
        size = first.element_size()
        return first, (table.lowest.place - first.data_ptr()) // size, table.unit // size

    def moves(self) -> int:
        """How often these matrices or their states have been found where their tables do not reach."""
        self.table("grad", [matrix.grad for matrix in self.matrices])
        self.table("weight", [matrix.weight for matrix in self.matrices])
        for name in self.matrices[0].state:
            self.state(name)
        return self._moves

    def state(self, name: str) -> Table:
        """The table of one entry of the states; of bases that are no codes, the rows that belong to what is here."""
        entries = [matrix.state[name] for matrix in self.matrices]
        if name == "basis" and "basis_scale" not in self.matrices[0].state:
            entries = [self.matrices[0].spread.depth.cut(entry, 0) for entry in entries]
        return self.table(name, entries)


def _scratch(matrix: Matrix, rank: int) -> int:
    """Bytes that the step of a matrix needs beside its state: low-rank tensors, and its basis if it is formed."""
    size = 2 if matrix.grad.dtype == torch.bfloat16 else 4
    basis, spread = matrix.state.get("basis"), matrix.spread
    formed = basis is None or basis.element_size() != size
    slices = 2 * _share(matrix)
    if spread.shares_slices:
        # those of all processes, from which shares are sent and to which they come back
        slices += 3 * spread.slices.count
    return max(1, size * (slices * rank + (min(matrix.shape) * rank if formed else 0)))


def _share(matrix: Matrix) -> int:
    """The most slices that a process steps: the same number on all of them."""
    return matrix.spread.share if matrix.spread.split else matrix.state["exp_avg"].shape[0]


def _held(matrix: Matrix, rank: int) -> int:
    """Bytes of its state, but for the scales of moments; where processes hold parts of it, of the largest part."""
    moments, others = ("exp_avg", "exp_avg_sq"), ("exp_avg_scale", "exp_avg_sq_scale")
    low = _share(matrix) * rank * sum(matrix.state[name].element_size() for name in moments)
    return low + sum(x.nbytes for name, x in matrix.state.items() if name not in (*moments, *others))


def batches(matrices: Sequence[Matrix], rank: int, side: str) -> list[Batch]:
    """What one `fused_step` each takes, none above the limits unless it is a single matrix.

    Of matrices in parts the same on every process.
    """
    equal: dict[object, list[Matrix]] = {}
    for matrix in matrices:
        weight, grad = matrix.weight, matrix.grad
        kind = (matrix.shape, weight.dtype, weight.device, weight.stride(), grad.dtype, grad.stride(), matrix.spread)
        equal.setdefault(kind, []).append(matrix)
    found = []
    most = min(SCRATCH, max(FEW, sum(_held(matrix, rank) for matrix in matrices) // SCRATCH_SHARE))
    for members in equal.values():
        count = -(-len(members) // max(1, most // _scratch(members[0], rank)))
        # of equal size, as a small one does not fill a GPU
        size = -(-len(members) // count)
        chosen = resolve_side(side, members[0].shape)
        found += [Batch(members[i : i + size], chosen) for i in range(0, len(members), size)]
    return found


def waves(found: Sequence[Batch], rank: int) -> list[list[int]]:
    """Numbers of batches that are stepped side by side, as they ask the same processes the same; others one by one."""
    chosen: list[list[int]] = []
    filling: dict[object, tuple[list[int], int]] = {}
    for number, batch in enumerate(found):
        one = batch.matrices[0]
        kind, size = (one.spread.holders, one.spread.shares_slices), len(batch.matrices) * _scratch(one, rank)
        wave, taken = filling.get(kind, ([], WAVE))
        if not one.spread.split or taken + size > WAVE:
            wave, taken = [], 0
            chosen.append(wave)
        wave.append(number)
        filling[kind] = wave, taken + size
    return chosen


def _tabulate(found: list[int], tensors: Sequence[Tensor]) -> Table:
    lowest = min(found)
    apart = [place - lowest for place in found]
    bits = functools.reduce(int.__or__, apart, ALLOCATED)
    unit = bits & -bits
    units = [x // unit for x in apart]
    fits = unit >= 16 and max(units) <= LAST
    both = torch.tensor([*found, *(units if fits else apart)], dtype=torch.int64)
    places, where = to_device(both, tensors[0].device).chunk(2)
    # what is not aligned is read element by element
    alignment = 16 if fits and lowest % 16 == 0 else 1
    return Table(places, alignment, where.int(), unit, Address(lowest, tensors[0].dtype, tensors[0].device), LAST)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return _HAS_GLUON and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
