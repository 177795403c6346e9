"""What a group's step does from step to step, as long as nothing of it changes."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from whimbrel.optim.fused import Fused
from whimbrel.optim.matrix import Key, Matrix, layout_of
from whimbrel.optim.sharding import local, local_grad

PLANNED = ("impl", "rank", "refresh_steps", "seed", "side", "stagger")
"""Group keys from which a plan follows."""


class Held(NamedTuple):
    """A low-rank parameter as a plan was made for it: what it would have to be made anew for."""

    param: Tensor
    state: dict[str, Tensor]
    entries: list[Tensor]
    """Of the state."""
    address: int
    """Of the part that this process holds."""
    layout: Any
    members: list[Matrix]

    def renew(self, states: Any) -> bool:
        """Take the gradient of this step; whether the rest is as it was."""
        param = self.param
        if states.get(param) is not self.state or param.grad is None:
            return False
        if any(now is not then for now, then in zip(self.state.values(), self.entries, strict=False)):
            return False
        weight, grad = local(param), local_grad(param)
        if weight.data_ptr() != self.address or layout_of(weight, grad) != self.layout:
            return False
        for matrix in self.members:
            expert = matrix.key[1]
            matrix.grad = grad if expert is None else grad[expert]
        return True


def hold(found: list[Matrix], states: Any) -> list[Held]:
    """The parameters of these matrices, as they are now."""
    members: dict[Tensor, list[Matrix]] = {}
    for matrix in found:
        members.setdefault(matrix.key[0], []).append(matrix)
    return [_hold(param, states[param], its) for param, its in members.items()]


def _hold(param: Tensor, state: dict[str, Tensor], members: list[Matrix]) -> Held:
    weight = local(param)
    layout = layout_of(weight, local_grad(param))
    return Held(param, state, list(state.values()), weight.data_ptr(), layout, members)


class Plan(NamedTuple):
    """What a group's step does to parameters that have all been stepped before, as long as nothing of it changes."""

    number: int
    """Of the group."""
    options: list[Any]
    """Values of PLANNED."""
    found: list[Matrix]
    held: list[Held]
    """Their parameters, of which only the gradients are new in each step."""
    due: dict[int, list[Matrix]]
    """Matrices by the number of steps after which their bases are fitted, modulo refresh_steps."""
    fused: Fused | None
    """The batches for the kernels."""
    taken: set[Key]
    """Matrices in them."""
    others: list[list[Matrix]]
    """Batches for PyTorch."""
    rest: list[Tensor]
    """Parameters that are not projected."""

    def renew(self, group: dict[str, Any], states: Any) -> bool:
        """Take the gradients of this step; whether the plan still stands."""
        return (
            [group[name] for name in PLANNED] == self.options
            and all(states.get(param) for param in self.rest)
            and all(held.renew(states) for held in self.held)
        )

    def release(self) -> None:
        """Hold no gradient until the next step."""
        for matrix in self.found:
            del matrix.grad
