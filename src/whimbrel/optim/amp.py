"""What torch.amp.GradScaler leaves on an optimizer for its step."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class GradScale(NamedTuple):
    """The scale of the gradients and whether a scaler found one that is not finite, one-element tensors on the device.

    Both are None without a scaler.
    """

    grad_scale: Tensor | None
    found_inf: Tensor | None

    @classmethod
    def of(cls, optimizer: Any) -> GradScale:
        """As it stands now: a scaler writes before each step, and takes back after it."""
        return cls(getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None))

    def usable(self) -> Tensor | None:
        """Whether this step counts, as a scalar on the device, where a gradient scaler has left its verdict."""
        return None if self.found_inf is None else self.found_inf.reshape(()) == 0

    def unscaled(self, grad: Tensor) -> Tensor:
        """A gradient, or a norm of one, in float32 and without the scale."""
        return grad.float() if self.grad_scale is None else grad.float() / self.grad_scale.reshape(())

    def active(self, total: Tensor) -> Tensor:
        """Which matrices [B] are stepped, by the squares of their norms."""
        active, usable = (total > 0) & (total < float("inf")), self.usable()
        return active if usable is None else active & usable
