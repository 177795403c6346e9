"""How matrices lie over processes: FSDP2, tensor and expert parallel dimensions, by the placements of DTensors.

A matrix of s slices of d elements may have its slices split over processes, each slice split, or both. Everything
that a step does to a slice is done where the slice is; what crosses processes is a few numbers for each matrix
(`total`), and, only where slices themselves are split, the projected gradient and what the basis is multiplied with
(`own`, `whole`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

# torch 2.13 renamed them
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds; in-place changes reach the DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_grad(param: Tensor) -> Tensor:
    """The gradient of the part of `param` that this process holds."""
    grad = param.grad
    assert grad is not None
    if isinstance(param, DTensor) and isinstance(grad, DTensor) and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return local(grad)


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every process; every process of the mesh must call it, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(whole: Tensor, like: Tensor) -> Tensor:
    """Cut the part of `like` that this process holds out of `whole`, which is equal on every process."""
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=like.placements).to_local()


@dataclass(frozen=True)
class Part:
    """Which of the indices of a dimension this process holds: `start` and `size`, or `at` where they do not adjoin."""

    start: int
    size: int
    at: tuple[int, ...] | None = None

    def of(self, x: Tensor, dim: int) -> Tensor:
        """That part of `x`, a view where the indices adjoin."""
        if self.at is None:
            return x.narrow(dim, self.start, self.size)
        return x.index_select(dim, torch.tensor(self.at, device=x.device))

    def spread(self, x: Tensor, dim: int, whole: int) -> Tensor:
        """`x` at its place along `dim` of a tensor that is zero elsewhere and `whole` long there."""
        shape = list(x.shape)
        shape[dim] = whole
        found = x.new_zeros(shape)
        if self.at is None:
            found.narrow(dim, self.start, self.size).copy_(x)
        else:
            found.index_copy_(dim, torch.tensor(self.at, device=x.device), x)
        return found


@dataclass(frozen=True)
class Split:
    """How one dimension of `count` indices is split: over which groups, and the part that is here. None: not at all."""

    groups: tuple[ProcessGroup, ...] = ()
    part: Part | None = None
    count: int = 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum of what processes found from their parts; x may be overwritten."""
        if self.groups:
            x = x.contiguous()
            for group in self.groups:
                dist.all_reduce(x, group=group)
        return x

    def rows(self, x: Tensor) -> int:
        """Rows of the whole of which x [..., rows, k] holds those that are here."""
        return x.shape[-2] if self.part is None else self.count

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """The part of `x` that is here."""
        return x if self.part is None else self.part.of(x, dim)

    def join(self, x: Tensor, dim: int) -> Tensor:
        """`x` from the parts of it that processes hold; exact, as the others' add zero."""
        return x if self.part is None else self.sum(self.part.spread(x, dim, self.count))


class Message(NamedTuple):
    """What processes that hold the slices of a matrix tell each other: float32 numbers, contiguous.

    how: "sum", [n], added up; "scatter", [processes, n], added up, of which each gets its row; "gather", [n], of which
    all get [processes, n]. The last two go over one group.
    """

    how: Literal["sum", "scatter", "gather"]
    content: Tensor

    def room(self, groups: tuple[ProcessGroup, ...]) -> Tensor:
        """Where the answer lies after `exchange`: that of a sum in its place."""
        if self.how == "sum":
            return self.content
        if self.how == "scatter":
            return torch.empty_like(self.content[0])
        return self.content.new_empty(dist.get_world_size(groups[0]), *self.content.shape)

    def exchange(self, groups: tuple[ProcessGroup, ...], answer: Tensor) -> None:
        """Say it to all processes of these groups, which say theirs, and leave what comes of it in `answer`."""
        if self.how == "sum":
            for group in groups:
                dist.all_reduce(answer, group=group)
        elif self.how == "scatter":
            _reduce_scatter(answer, self.content.view(-1), group=groups[0])
        else:
            _all_gather(answer.view(-1), self.content, group=groups[0])


@dataclass(frozen=True)
class Spread:
    """How the slices of one matrix, and the elements of each slice (`depth`), lie over processes.

    Moments lie where their slices are. Where each slice is split over one group and the slices are not, every process
    of the group takes an equal share of the slices, `owned`, as its own. `apart`: groups whose processes hold other
    matrices of the same parameter [E, m, n].
    """

    slices: Split = Split()
    depth: Split = Split()
    owned: Part | None = None
    apart: tuple[ProcessGroup, ...] = ()

    @property
    def holders(self) -> tuple[ProcessGroup, ...]:
        """Groups over whose processes the slices are spread, each stepped by one."""
        return self.depth.groups if self.shares_slices else self.slices.groups

    @property
    def share(self) -> int:
        """The most slices that a process steps."""
        return -(-self.slices.count // math.prod(dist.get_world_size(group) for group in self.holders))

    @property
    def summands(self) -> tuple[ProcessGroup, ...]:
        """Groups over which sums over the slices owned here add up to those over the whole parameter."""
        return (*self.holders, *self.apart)

    @property
    def split(self) -> bool:
        """Whether the matrix lies on more than one process."""
        return bool(self.slices.groups or self.depth.groups)

    @property
    def shares_slices(self) -> bool:
        """Whether slices, each split over processes, are shared out among these."""
        return len(self.depth.groups) == 1 and not self.slices.groups

    def join(self, x: Tensor, left: bool) -> Tensor:
        """The whole of x [..., m, n] from the parts that processes hold; `left` says that columns are the slices."""
        of_slices, of_depth = (-1, -2) if left else (-2, -1)
        return self.slices.join(self.depth.join(x, of_depth), of_slices)

    def everywhere(self, x: Tensor) -> Tensor:
        """The sum of what processes found from all that they hold of the matrix."""
        return self.slices.sum(self.depth.sum(x))

    def total(self, x: Tensor) -> Tensor:
        """Sums [B] over all slices of x [B, slices owned here]."""
        return (self.depth if self.shares_slices else self.slices).sum(x.sum(-1))

    def own(self, x: Tensor, dim: int) -> Tensor:
        """The sum of what processes found from their parts of slices, here for the slices owned, along `dim`."""
        if self.owned is None or not self.shares_slices:
            return self.depth.sum(x)
        (group,) = self.depth.groups
        count, share = self.slices.count, _share(self.slices.count, group)
        parts = x.new_zeros(share * dist.get_world_size(group), *_without(x.shape, dim))
        parts[:count].copy_(x.movedim(dim, 0))
        mine = parts.new_empty(share, *parts.shape[1:])
        _reduce_scatter(mine, parts, group=group)
        return mine[: self.owned.size].movedim(0, dim)

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """All local slices along `dim`, from those owned here and elsewhere."""
        if not self.shares_slices:
            return x
        (group,) = self.depth.groups
        share = _share(self.slices.count, group)
        mine = x.new_zeros(share, *_without(x.shape, dim))
        mine[: x.shape[dim]].copy_(x.movedim(dim, 0))
        parts = mine.new_empty(share * dist.get_world_size(group), *mine.shape[1:])
        _all_gather(parts, mine, group=group)
        return parts[: self.slices.count].movedim(0, dim)


WHOLE = Spread()


def spread_of(param: Tensor, left: bool) -> Spread:
    """How the matrices of a parameter [..., m, n] lie; `left` says that columns are the slices."""
    if not isinstance(param, DTensor):
        return WHOLE
    apart = split_over(param, range(param.ndim - 2))
    if not _splitting(param, (-2, -1)):
        return Spread(apart=apart)
    of_slices, of_depth = (-1, -2) if left else (-2, -1)
    slices, depth = _split(param, of_slices), _split(param, of_depth)
    if len(depth.groups) != 1 or slices.groups:
        return Spread(slices, depth, slices.part or Part(0, slices.count), apart)
    (group,) = depth.groups
    share = _share(slices.count, group)
    start = min(slices.count, share * dist.get_rank(group))
    return Spread(slices, depth, Part(start, min(share, slices.count - start)), apart)


def _split(param: DTensor, dim: int) -> Split:
    groups = tuple(param.device_mesh.get_group(i) for i in _splitting(param, (dim,)))
    return Split(groups, part_of(param, dim) if groups else None, param.shape[dim])


def part_of(param: Tensor, dim: int) -> Part:
    """The indices of one dimension of `param` that this process holds."""
    size = param.shape[dim]
    if not isinstance(param, DTensor):
        return Part(0, size)
    mesh = param.device_mesh
    placements = [_moved(p, 0) if _dim(p, param.ndim) == dim % param.ndim else Replicate() for p in param.placements]
    if all(isinstance(p, Shard | Replicate) for p in placements):
        start = 0
        for i, p in enumerate(placements):
            if isinstance(p, Shard):
                share = -(-size // mesh.size(i))
                first = min(size, share * mesh.get_local_rank(i))
                start, size = start + first, min(share, size - first)
        return Part(start, size)
    index = torch.arange(size, device=param.device)
    held = DTensor.from_local(index, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return Part(0, 0, tuple(held.redistribute(placements=placements).to_local().tolist()))


def matrix_placements(param: DTensor, key: str, left: bool) -> list[Placement]:
    """Placements of one tensor of the state of a parameter [m, n] or [E, m, n].

    Moments, [..., s, r], lie where their slices are, all else is the same on every process that holds the matrix.
    """
    experts = param.ndim == 3
    sliced = (param.ndim - 1) if left else (param.ndim - 2)
    shares = len(_splitting(param, (-2,) if left else (-1,))) == 1 and not _splitting(param, (-1,) if left else (-2,))
    found: list[Placement] = []
    for p in param.placements:
        dim = _dim(p, param.ndim)
        if experts and dim == 0:
            found.append(_moved(p, 0))
        elif key.startswith("exp_avg") and dim is not None and (dim == sliced or shares):
            found.append(_moved(p, 1 if experts else 0) if dim == sliced else Shard(1 if experts else 0))
        else:
            found.append(Replicate())
    return found


def zeros(shape: Sequence[int], dtype: torch.dtype, like: DTensor, placements: Sequence[Placement]) -> Tensor:
    """A DTensor of zeros on the mesh of `like`; a plain tensor where every process holds the whole."""
    if all(isinstance(p, Replicate) for p in placements):
        return torch.zeros(tuple(shape), dtype=dtype, device=like.device)
    return place(torch.zeros(tuple(shape), dtype=dtype, device=like.device), like, placements)


def place(whole: Tensor, like: DTensor, placements: Sequence[Placement]) -> Tensor:
    """A tensor that is equal on every process as a DTensor on the mesh of `like`; nothing is sent."""
    mesh = like.device_mesh
    held = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    found = held.redistribute(placements=placements)
    # a copy, since a part is a view that would keep the whole alive
    return DTensor.from_local(
        found.to_local().clone(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _dim(placement: Placement, ndim: int) -> int | None:
    dim = getattr(placement, "dim", None)
    return None if dim is None else dim % ndim


def _moved(placement: Placement, dim: int) -> Placement:
    """The same way of splitting, along another dimension."""
    factor = getattr(placement, "split_factor", None)
    return Shard(dim) if factor is None else type(placement)(dim, split_factor=factor)  # pyrefly: ignore


def split_over(param: Tensor, dims: Iterable[int]) -> tuple[ProcessGroup, ...]:
    """Groups of processes, of more than one, over which these dimensions of a parameter are split."""
    if not isinstance(param, DTensor):
        return ()
    return tuple(param.device_mesh.get_group(i) for i in _splitting(param, tuple(dims)))


def _splitting(param: DTensor, dims: tuple[int, ...]) -> list[int]:
    """Dimensions of the mesh, of more than one process, that split one of these dimensions of the parameter."""
    wanted = {dim % param.ndim for dim in dims}
    return [
        i for i, p in enumerate(param.placements) if _dim(p, param.ndim) in wanted and param.device_mesh.size(i) > 1
    ]


def _share(count: int, group: ProcessGroup) -> int:
    return -(-count // dist.get_world_size(group))


def _without(shape: Sequence[int], dim: int) -> list[int]:
    return [size for i, size in enumerate(shape) if i != dim % len(shape)]
