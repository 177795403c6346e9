"""Small values between host and device without making either wait."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor in host memory on `device`."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


class HostCopy:
    """A scalar tensor's value now, for the host to read later."""

    def __init__(self, value: Tensor) -> None:
        self._event = torch.cuda.Event() if value.is_cuda else None
        self._value = torch.empty((), dtype=value.dtype, pin_memory=value.is_cuda)
        self._value.copy_(value, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> float:
        """The value; waits only where the copy is not done."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._value.numpy())
