"""Which matrices the kernels step, and a step of theirs, launched or replayed."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from whimbrel.errors import UnsupportedError
from whimbrel.optim.amp import GradScale
from whimbrel.optim.kernels import PROVEN_ON
from whimbrel.optim.matrix import Matrix
from whimbrel.optim.method import Method
from whimbrel.optim.sharding import Message, Spread
from whimbrel.optim.words import Words

if TYPE_CHECKING:
    from whimbrel.optim.kernels.tables import Batch

T = TypeVar("T")


def fuses(impl: str, matrix: Matrix) -> bool:
    """Whether the kernels step this matrix; raises UnsupportedError where impl = "triton" cannot."""
    small = matrix.weight.numel() < 1 << 31  # the kernels count elements in 32 bits
    if impl == "auto":
        # matrices in parts have been stepped by the kernels on processors alone
        known = matrix.weight.is_cuda and small and not matrix.spread.split
        return known and _proven(matrix.weight.device)
    if impl == "triton" and not (matrix.weight.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise UnsupportedError(
            f"impl = 'triton' needs parameters on a CUDA device, these are on {matrix.weight.device.type}; "
            "use impl = 'auto' or 'eager'"
        )
    if impl == "triton" and not small:
        raise UnsupportedError(
            f"impl = 'triton' takes no matrix of 2^31 elements or more, as {list(matrix.shape)}; use impl = 'auto'"
        )
    if impl == "triton" and not _shared(matrix.spread):
        raise UnsupportedError(
            "impl = 'triton' takes no matrices whose slices are split over several dimensions of a mesh, or not in "
            "order; use impl = 'auto'"
        )
    return impl == "triton"


def _shared(spread: Spread) -> bool:
    """Whether slices are whole here, or shared out among processes that hold adjoining elements of each."""
    depth = spread.depth
    return not depth.groups or (spread.shares_slices and depth.part is not None and depth.part.at is None)


@functools.cache
def _proven(device: torch.device) -> bool:
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) in PROVEN_ON


def _replays(matrices: Sequence[Matrix]) -> bool:
    """Whether steps may be replayed: all on one GPU."""
    devices = {matrix.weight.device for matrix in matrices}
    return len(devices) == 1 and next(iter(devices)).type == "cuda"


def _side_by_side(
    steps: Sequence[Generator[Message, Any]], groups: tuple[ProcessGroup, ...]
) -> Iterator[Callable[[], object]]:
    """Steps of batches that lie alike; yields what processes have to say to each other before they go on.

    Whatever the steps say at once goes as one message.
    """
    answers: Sequence[Tensor | None] = [None] * len(steps)
    while said := [message for message in map(_next, steps, answers) if message is not None]:
        message = Message(said[0].how, torch.cat([each.content for each in said], -1))
        answer = message.room(groups)
        yield functools.partial(message.exchange, groups, answer)
        answers = answer.split([each.content.shape[-1] for each in said], -1)


def _next(step: Generator[Message, Any], answer: Tensor | None) -> Message | None:
    try:
        return step.send(answer)
    except StopIteration:
        return None


class Fused:
    """Batches of a group's matrices for the kernels, and what stays of their steps.

    together: whether all are stepped at once, as updates in backward are not.
    """

    def __init__(self, group: dict[str, Any], matrices: Sequence[Matrix], words: Words, *, together: bool) -> None:
        from whimbrel.optim.kernels import replay, tables

        self.batches: list[Batch] = tables.batches(matrices, group["rank"], group["side"])
        self.replay = replay.Replay() if together and _replays(matrices) else None
        self._waves = tables.waves(self.batches, group["rank"])
        self._words = [words.of_batch(group, batch.matrices) for batch in self.batches]
        self._rate: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None

    def beside(self, step: Callable[[], None], work: Callable[[], T]) -> T:
        """Do `work` of which a step of these matrices needs nothing, and the step; where it is replayed, side by side.

        Not where either speaks with other processes, which must hear both in one order. The step has a stream of its
        own then: its kernels need no workspace of cuBLAS, which each stream keeps.
        """
        ready = self.replay is not None and self.replay.ready and not torch.cuda.is_current_stream_capturing()
        if not ready or any(batch.matrices[0].spread.split for batch in self.batches):
            found = work()
            step()
            return found
        device = self.batches[0].matrices[0].weight.device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        self._stream.wait_stream(current)
        found = work()
        with torch.cuda.stream(self._stream):
            step()
        current.wait_stream(self._stream)
        return found

    def step(
        self,
        method: Method,
        group: dict[str, Any],
        amp: GradScale,
        *,
        drawn: Sequence[Tensor | None],
        squares: Sequence[Tensor | None],
    ) -> None:
        """Step the matrices of every batch.

        drawn: words [B] from which each batch's bases are drawn, where they are. squares: where each batch adds the
        squared norms of its gradients, where they are asked for.
        """
        from whimbrel.optim.kernels.launch import Rule, Settings, fused_step

        options = {name: group[name] for name in method.options}
        factors = method.factors(**options)
        settings = Settings(group["betas"], group["eps"], group["weight_decay"], group["stochastic_rounding"])

        rule = Rule(factors, method.scalars)

        def launches(lr: float | Tensor) -> Iterator[Callable[[], object]]:
            steps = [
                fused_step(batch, rule, settings, amp, lr=lr, bases=words, drawn=keys, square=square)
                for batch, words, keys, square in zip(self.batches, self._words, drawn, squares, strict=True)
            ]
            for wave in self._waves:
                yield from _side_by_side([steps[i] for i in wave], self.batches[wave[0]].matrices[0].spread.holders)

        lr = group["lr"]
        if self.replay is None or torch.cuda.is_current_stream_capturing():
            for speak in launches(lr):
                speak()
            return
        device = self.batches[0].matrices[0].weight.device
        if not isinstance(lr, Tensor) or not lr.is_cuda:
            # where a graph reads it
            if self._rate is None:
                self._rate = torch.zeros((), device=device)
            lr = self._rate.fill_(float(lr))
        held = [lr, amp.found_inf, amp.grad_scale, *drawn, *squares]
        known = (
            [batch.moves() for batch in self.batches],
            [None if x is None else (x.data_ptr(), x.dtype) for x in held],
            (factors, method.scalars, settings),
        )
        self.replay.run(known, device, lambda: launches(lr))
