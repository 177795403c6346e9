"""Work of several processes that must succeed or fail as one; with a single process, plain calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from whimbrel.errors import CheckpointError, WhimbrelError

T = TypeVar("T")


def world_size() -> int:
    """Processes in the default group; 1 without one."""
    return dist.get_world_size() if is_joined() else 1


def rank() -> int:
    """Number of this process in the default group; 0 without one."""
    return dist.get_rank() if is_joined() else 0


def is_joined() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def on_all(work: Callable[[], T]) -> list[T]:
    """Results of `work` of all processes, by rank; an error in one process is raised in every process.

    `work` must not leave another process waiting in a collective operation when it fails.
    """
    if world_size() == 1:
        return [work()]
    outcome: tuple[Any, Exception | None]
    own: Exception | None = None
    try:
        outcome = work(), None
    except Exception as error:
        own = error
        outcome = None, _portable(error)
    outcomes: list[Any] = [None] * world_size()
    dist.all_gather_object(outcomes, outcome)
    if own is not None:
        raise own
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]


def on_first(work: Callable[[], T]) -> T:
    """The result of `work` run by the first process; its error is raised in every process."""
    results = on_all(lambda: work() if rank() == 0 else None)
    return results[0]  # pyrefly: ignore[bad-return]


def _portable(error: Exception) -> Exception:
    """The error in a form that can be sent to another process."""
    if isinstance(error, (WhimbrelError, OSError)):
        return error
    return CheckpointError(f"process {rank()} failed: {type(error).__name__}: {error}")
