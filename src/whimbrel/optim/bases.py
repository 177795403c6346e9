"""The bases of an optimizer's matrices: when each is fitted or drawn anew, by which process, and what follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from whimbrel.optim import counter, lowrank, storage
from whimbrel.optim.amp import GradScale
from whimbrel.optim.device import HostCopy, to_device
from whimbrel.optim.groups import resolve_side
from whimbrel.optim.layout import sides
from whimbrel.optim.matrix import Key, Matrix
from whimbrel.optim.method import Projected
from whimbrel.optim.moments import read_moments, store_moments
from whimbrel.optim.sharding import WHOLE, Spread
from whimbrel.optim.words import Words

LARGEST_GAP = 8
"""Most candidates from one lazy refresh of a matrix to the next."""


class Fitted(NamedTuple):
    """New bases of B matrices, [B, d, r], and the matrices whose fits are to be used, [B]."""

    chosen: Sequence[Matrix]
    new: Tensor
    active: Tensor


class Bases:
    """Bases by the options of their groups.

    sharers: processes that fit bases for each other (`LowRankOptimizer.share_refreshes`), or None.
    """

    def __init__(self, words: Words, sharers: ProcessGroup | None) -> None:
        self.num_matrices = 0
        """Of all groups, over which refreshes are staggered."""
        self.sharers = sharers
        self._words = words
        self._gaps: dict[Key, HostCopy] = {}
        self._drawn: dict[tuple[int, int, int], tuple[tuple[int, ...], Tensor]] = {}

    def read(self, group: dict[str, Any], batch: Sequence[Matrix], *, opened: bool = True) -> Tensor:
        """The bases [B, d, r], whole on every process: in float32, or as they are held where they need no decoding."""
        _, d = sides(batch[0].shape, group["side"])
        if group["refresh"] != "random":
            return storage.read_basis([matrix.state for matrix in batch], d, opened=opened)
        return lowrank.drawn(self.drawn_keys(group, batch), d, group["rank"])

    def drawn_keys(self, group: dict[str, Any], batch: Sequence[Matrix]) -> Tensor:
        """Words [B] from which the bases of this step are drawn."""
        every = group["refresh_steps"]
        found = tuple(
            counter.drawn_basis_key(
                counter.base(group["seed"], matrix.offset), self._phase(group, matrix.offset) // every
            )
            for matrix in batch
        )
        role = group["seed"], batch[0].offset, len(batch)
        held = self._drawn.get(role)
        if held is None or held[0] != found:
            words = to_device(torch.tensor(found), batch[0].weight.device)
            # in their place, where replayed launches read them
            self._drawn[role] = held = found, words if held is None else held[1].copy_(words)
        return held[1]

    def residues(self, group: dict[str, Any], found: Sequence[Matrix]) -> dict[int, list[Matrix]]:
        """Matrices by the number of steps after which their bases may be fitted, modulo refresh_steps."""
        due: dict[int, list[Matrix]] = {}
        for matrix in found if group["refresh"] != "random" else ():
            due.setdefault(-self._shift(group, matrix.offset) % group["refresh_steps"], []).append(matrix)
        return due

    def due(self, group: dict[str, Any], residues: dict[int, list[Matrix]], fresh: set[Key]) -> set[Key]:
        """Matrices whose bases are fitted in this step, but for those that get their first ones."""
        every = group["refresh_steps"]
        return {
            matrix.key
            for matrix in residues.get((group["step"] - 1) % every, ())
            if matrix.key not in fresh and self._phase(group, matrix.offset) // every % self._gap(group, matrix) == 0
        }

    def _phase(self, group: dict[str, Any], offset: int) -> int:
        """Steps before this one, shifted so that refreshes fall on multiples of `refresh_steps`."""
        return group["step"] - 1 + self._shift(group, offset)

    def _shift(self, group: dict[str, Any], offset: int) -> int:
        return offset * group["refresh_steps"] // self.num_matrices if group["stagger"] else 0

    def _gap(self, group: dict[str, Any], matrix: Matrix) -> int:
        """Candidates from one refresh of the matrix to the next: 1, or more where refreshes are lazy."""
        if not group["lazy_overlap"]:
            return 1
        if matrix.key not in self._gaps:
            # after loading; later refreshes write to host memory without making anything wait
            self._gaps[matrix.key] = HostCopy(matrix.state["refresh_gap"])
        return max(1, int(self._gaps[matrix.key].read()))

    def fit_apart(self, group: dict[str, Any], refreshed: Sequence[Matrix], fresh: set[Key]) -> dict[Key, Tensor]:
        """Bases [d, r] that processes fit for each other: each whole fit is done by one of them, and sent to the rest.

        Exact fits of matrices that lie on one dimension of a mesh; and all fits, after `share_refreshes`.
        """
        sharers: dict[ProcessGroup, list[Matrix]] = {}
        for matrix in refreshed:
            groups = matrix.spread.slices.groups + matrix.spread.depth.groups
            if self.sharers is not None and not groups:
                sharers.setdefault(self.sharers, []).append(matrix)
            elif len(groups) == 1 and group["refresh"] == "exact":
                sharers.setdefault(groups[0], []).append(matrix)
        found = {}
        for processes, members in sharers.items():
            world, rank = dist.get_world_size(processes), dist.get_rank(processes)
            # equal work side by side: whoever waits, waits for the heaviest of a round
            members.sort(key=lambda matrix: (-math.prod(matrix.shape) * min(matrix.shape), matrix.offset))
            for round in (members[i : i + world] for i in range(0, len(members), world)):
                left = [resolve_side(group["side"], matrix.shape) == "left" for matrix in round]
                grads = [matrix.full_grad(is_left) for matrix, is_left in zip(round, left, strict=True)]
                for i, (matrix, grad, is_left) in enumerate(zip(round, grads, left, strict=True)):
                    side = "left" if is_left else "right"
                    if i == rank:
                        found[matrix.key] = self.fit(group, [matrix], grad[None].float(), side, fresh)[0].contiguous()
                    else:
                        shape = lowrank.basis_shape(matrix.shape, group["rank"], side)
                        found[matrix.key] = torch.empty(shape, device=grad.device)
                for i, matrix in enumerate(round):
                    dist.broadcast(found[matrix.key], group=processes, group_src=i)
        return found

    def fit(
        self,
        group: dict[str, Any],
        chosen: Sequence[Matrix],
        grad: Tensor | list[Tensor],
        side: str,
        fresh: set[Key],
        old: Tensor | None = None,
        spread: Spread = WHOLE,
        total: Tensor | None = None,
    ) -> Tensor:
        """Bases [B, d, r] of B gradients, or their parts under a spread; all first ones, or all later ones.

        total: squares [B] of the norms of the whole gradients, where they are known.
        """
        rank = group["rank"]
        if group["refresh"] == "exact" or chosen[0].key in fresh:
            stack = grad if isinstance(grad, Tensor) else storage.stack(grad)
            if group["refresh"] == "exact":
                return lowrank.fit_exact(spread.join(stack, side == "left").float(), side, rank)
            noise = spread.depth.cut(self._noise(group, chosen, stack.device, side), -2)
            return spread.depth.join(lowrank.fit_first(stack.float(), noise, side, rank, spread=spread), -2)
        old = self.read(group, chosen) if old is None else old
        products = torch.bfloat16 if chosen[0].grad.dtype == torch.bfloat16 else torch.float32
        start = spread.depth.cut(old, -2)
        new = lowrank.fit_warm(grad, start, side, products=products, total=total, spread=spread)
        return spread.depth.join(new, -2)

    def _noise(self, group: dict[str, Any], chosen: Sequence[Matrix], device: torch.device, side: str) -> Tensor:
        rank, shape = group["rank"], chosen[0].shape
        rows, _ = lowrank.basis_shape(shape, rank, side)
        columns = lowrank.noise_columns(shape, rank, side)
        drawn = [lowrank.noise(rows, columns, seed=group["seed"], index=matrix.offset) for matrix in chosen]
        return torch.stack(drawn).to(device, non_blocking=True)

    def refresh_projected(
        self,
        group: dict[str, Any],
        batch: list[Matrix],
        projected: Projected,
        keys: set[Key],
        fresh: set[Key],
        apart: dict[Key, Tensor],
    ) -> None:
        """Fit bases anew of the matrices with these keys, in the states and in `projected`.

        fresh: matrices that get their first bases. apart: what `fit_apart` has found.
        """
        indices = [i for i, matrix in enumerate(batch) if matrix.key in keys]
        if not indices:
            return
        grad, active = projected.grad, projected.active
        if len(indices) < len(batch):
            grad, active = (torch.stack([t[i] for i in indices]) for t in (grad, active))
        chosen = [batch[i] for i in indices]
        self.put(group, self._refit(group, chosen, grad, active, fresh, apart))
        stored = projected.spread.depth.cut(self.read(group, chosen), -2)
        for i, basis in zip(indices, stored.unbind(), strict=True):
            projected.basis[i].copy_(basis)

    def refit(
        self, group: dict[str, Any], batch: list[Matrix], amp: GradScale, fresh: set[Key], apart: dict[Key, Tensor]
    ) -> Fitted:
        """New bases where the kernels do the step: from gradients in their own dtype and at their own scale.

        fresh: matrices that get their first bases, all of the batch or none. apart: what `fit_apart` has found.
        """
        grads = [matrix.grad for matrix in batch]
        total = batch[0].spread.everywhere(lowrank.norms(grads, torch.float32).square())
        return self._refit(group, batch, grads, amp.active(total), fresh, apart, total)

    def _refit(
        self,
        group: dict[str, Any],
        chosen: Sequence[Matrix],
        grad: Tensor | list[Tensor],
        active: Tensor,
        fresh: set[Key],
        apart: dict[Key, Tensor],
        total: Tensor | None = None,
    ) -> Fitted:
        """New bases of B matrices, of which those that are active [B] count; total: squares [B] of whole norms."""
        spread, side = chosen[0].spread, resolve_side(group["side"], chosen[0].shape)
        if all(matrix.key in apart for matrix in chosen):
            new = storage.stack([apart[matrix.key] for matrix in chosen])
        else:
            old = self.read(group, chosen, opened=False)
            new = self.fit(group, chosen, grad, side, fresh, old, spread, total)
        # a fit that fails leaves NaN, at the latest in the last column, and the old basis then stays
        return Fitted(chosen, new, active & new[..., -1].sum(-1).isfinite())

    def put(self, group: dict[str, Any], fitted: Fitted) -> None:
        """Let the bases of matrices be those found for them, and do with moments what the group asks for."""
        chosen, new, active = fitted
        old, side = self.read(group, chosen, opened=False), resolve_side(group["side"], chosen[0].shape)
        new = torch.where(active[:, None, None], new, old)
        if group["on_refresh"] != "keep":
            self._carry(group, chosen, old.float(), new, side, active)
        if group["lazy_overlap"]:
            self._widen(group, chosen, old.float(), new)
        storage.write_basis([matrix.state for matrix in chosen], new)

    def follow(self, group: dict[str, Any]) -> bool:
        """Whether later fits serve from the next step on, so that the one whose gradients they see need not wait.

        Without `stagger` they serve in that step, as in the published code; and moments that change with a basis are
        those of the step before.
        """
        return group["stagger"] and group["on_refresh"] == "keep"

    def _carry(
        self, group: dict[str, Any], chosen: Sequence[Matrix], old: Tensor, new: Tensor, side: str, active: Tensor
    ) -> None:
        """Carry the moments of active matrices [B] from the old bases [B, d, r] to the new ones."""
        moments = read_moments(chosen, side)
        carried = lowrank.carry(moments, old, new, side, group["on_refresh"])
        kept = lowrank.Moments(
            *(
                torch.where(active.view(-1, *[1] * (before.ndim - 1)), after, before)
                for before, after in zip(moments, carried, strict=True)
            )
        )
        # other bits than those of the step that follows
        store_moments(chosen, kept, side, counter.mix(self._words.keys(group, chosen)), active)

    def _widen(self, group: dict[str, Any], chosen: Sequence[Matrix], old: Tensor, new: Tensor) -> None:
        """Double the gaps to the next refreshes of matrices whose subspaces have stayed; let the others' be 1."""
        states = [matrix.state for matrix in chosen]
        gaps = storage.stack([state["refresh_gap"] for state in states])
        stays = lowrank.overlap(old, new) >= group["lazy_overlap"]
        gaps = torch.where(stays & (gaps > 0), (2 * gaps).clamp_max(LARGEST_GAP), 1.0)
        storage.store(states, "refresh_gap", gaps)
        self._gaps |= {matrix.key: HostCopy(gap) for matrix, gap in zip(chosen, gaps.unbind(), strict=True)}
