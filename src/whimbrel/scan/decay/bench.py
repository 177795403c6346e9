"""Benchmark cases of `decay_scan`."""

from __future__ import annotations

from whimbrel.bench.case import Case
from whimbrel.scan.bench import recurrence_cases
from whimbrel.scan.decay.op import decay_scan


def cases(*, device: str, quick: bool = False) -> list[Case]:
    """The recurrence against its chunked form."""
    return recurrence_cases("decay", decay_scan, rates=1, device=device, quick=quick)
