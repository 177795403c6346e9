"""A step's launches as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Replay:
    """The launches of a step, replayed as a CUDA graph where steps before were the same.

    Where what a step reads has moved, tables say. Its scratch stays allocated. The n-th recording, which takes as long
    as some steps, waits for 2^(n - 1) equal steps.
    """

    def __init__(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self._known: object = None
        self._equal = 0
        self._patience = 1

    def run(self, known: object, device: torch.device, step: Callable[[], None]) -> None:
        """Take a step, of which `known` says all that its launches depend on."""
        if known != self._known:
            self._known, self._equal, self.graph = known, 0, None
        if self.graph is None and self._equal < self._patience:
            self._equal += 1
            step()
            return
        if self.graph is None:
            self._patience *= 2
            self.graph = _record(device, step)
        self.graph.replay()


def _record(device: torch.device, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            step()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph
