"""Values between host and device, and results that a device finds beside others, without making the host wait."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

TOGETHER = 4
"""Most calls that run beside each other."""


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


def beside(compute: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """compute(x), on a GPU beside what it is given next; the call that is returned gives the result.

    For what leaves most of the device idle. Call it in the same stream, after which x may change.
    """
    if not x.is_cuda or torch.cuda.is_current_stream_capturing():
        found = compute(x)
        return lambda: found
    stream = next(_streams(x.device))
    # what was freed there since is read by what this stream was given, so it waits before the memory is used again
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        there, done = compute(x), stream.record_event()

    def result() -> Tensor:
        torch.cuda.current_stream(x.device).wait_event(done)
        return there

    return result


@functools.cache
def _streams(device: torch.device) -> Iterator[torch.cuda.Stream]:
    return itertools.cycle([torch.cuda.Stream(device) for _ in range(TOGETHER)])
