"""What a method says of itself, and the projected gradients that it is given in a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from whimbrel.optim import lowrank
from whimbrel.optim.sharding import WHOLE, Spread


class Projected(NamedTuple):
    """B gradients of one shape on their way through a step.

    grad [B, m, n], float32, zero where not active; slice_norm [B, n] or
    [B, m], the norm of each slice; active [B], false where the gradient is zero or not finite; basis [B, d, r]. Under a
    spread they are the parts that this process holds, slice_norm that of the slices which it owns.
    """

    grad: Tensor
    slice_norm: Tensor
    active: Tensor
    basis: Tensor
    side: str
    spread: Spread = WHOLE

    def down(self) -> Tensor:
        """The gradients in the coordinates of the bases, for the slices that this process owns."""
        low = lowrank.down(self.grad, self.basis, self.side)
        return self.spread.own(low, -1 if self.side == "left" else -2)


class Method:
    """The part of a low-rank optimizer that differs between methods; each is a class that states these."""

    rule: ClassVar[Callable[..., Any]]
    """(Projected, *state, **options) -> (update [B, m, n], *state after); the weights become W - update."""
    factors: ClassVar[Callable[..., lowrank.Factors]]
    """The numbers by which its coefficients follow from norms, from the options."""
    random: ClassVar[bool] = False
    """Whether bases may be drawn, refresh="random"."""
    scalars: ClassVar[tuple[str, ...]] = ()
    """Names of the method's own scalars in the state, after step, exp_avg and exp_avg_sq."""
    options: ClassVar[tuple[str, ...]] = ()
    """Group keys that `rule` takes besides lr, betas and eps."""
