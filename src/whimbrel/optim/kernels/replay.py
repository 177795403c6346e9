"""A step's launches as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

Step = Callable[[], Iterator[Callable[[], object]]]
"""Launches of a step, which pauses for each thing to be called that no graph may hold: words between processes."""


class Replay:
    """The launches of a step, replayed as CUDA graphs where steps before were the same: one between two pauses.

    Where what a step reads has moved, tables say. Its scratch stays allocated. The n-th recording, which takes as long
    as some steps, waits for 2^(n - 1) equal steps. What is said in the pauses is not recorded, as processes need not
    record in the same step.
    """

    def __init__(self) -> None:
        self._graphs: list[tuple[torch.cuda.CUDAGraph, Callable[[], object] | None]] = []
        self._known: object = None
        self._equal = 0
        self._patience = 1

    @property
    def ready(self) -> bool:
        """Whether the next step is replayed if it is the same."""
        return bool(self._graphs)

    def run(self, known: object, device: torch.device, step: Step) -> None:
        """Take a step, of which `known` says all that its launches depend on."""
        if known != self._known:
            self._known, self._equal, self._graphs = known, 0, []
        if self._graphs:
            for graph, pause in self._graphs:
                graph.replay()
                if pause is not None:
                    pause()
        elif self._equal < self._patience:
            self._equal += 1
            for pause in step():
                pause()
        else:
            self._patience *= 2
            self._graphs = _recorded(device, step())


def _recorded(
    device: torch.device, step: Iterator[Callable[[], object]]
) -> list[tuple[torch.cuda.CUDAGraph, Callable[[], object] | None]]:
    """Take a step by recording and replaying it, from pause to pause; returns the graphs, with the pause after each."""
    graphs: list[tuple[torch.cuda.CUDAGraph, Callable[[], object] | None]] = []
    pool = torch.cuda.graph_pool_handle()
    while not graphs or graphs[-1][1] is not None:
        graph, pause = _record(device, pool, step)
        graph.replay()
        if pause is not None:
            pause()
        graphs.append((graph, pause))
    return graphs


def _record(
    device: torch.device, pool: Any, step: Iterator[Callable[[], object]]
) -> tuple[torch.cuda.CUDAGraph, Callable[[], object] | None]:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            pause = next(step, None)
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph, pause
