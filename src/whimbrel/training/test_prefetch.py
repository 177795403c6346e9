"""Batches made ahead are those of their steps, whatever is asked for."""

from __future__ import annotations

import threading

import pytest

from whimbrel.training.prefetch import Prefetcher


def test_every_step_gets_its_own_and_the_next_is_made_while_nobody_asks() -> None:
    made: list[int] = []
    done = threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if step == 1:
            done.set()
        return 10 * step

    batches = Prefetcher(make)
    assert batches(0) == 0
    assert done.wait(10)  # step 1 was asked for by nobody yet
    assert [batches(step) for step in (1, 2, 2, 7, 8, 3)] == [10, 20, 20, 70, 80, 30]
    assert made[:3] == [0, 1, 2]
    assert made.count(1) == 1
    assert made.count(8) == 1


def test_an_error_is_raised_where_its_step_is_asked_for() -> None:
    def make(step: int) -> int:
        if step == 1:
            raise ValueError("step 1")
        return step

    batches = Prefetcher(make)
    assert batches(0) == 0
    with pytest.raises(ValueError, match="step 1"):
        batches(1)
    assert batches(2) == 2
