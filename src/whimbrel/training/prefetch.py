"""The next batch is made while the device computes with this one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """`make(step)`, with step + 1 made in a thread after each call, for the call that comes next.

    A call for any other step makes its own. All calls of `make` are made by one thread, one after another; what one
    raises is raised where its step is asked for.
    """

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._step = -1
        self._next: Future[T] | None = None

    def __call__(self, step: int) -> T:
        """make(step)."""
        if self._next is None or self._step != step:
            self._next = self._pool.submit(self._make, step)
        batch = self._next.result()
        self._step, self._next = step + 1, self._pool.submit(self._make, step + 1)
        return batch
