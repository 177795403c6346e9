"""Benchmark cases of `delta_scan`."""

from __future__ import annotations

from whimbrel.bench.case import Case
from whimbrel.scan.bench import recurrence_cases
from whimbrel.scan.delta.op import delta_scan


def cases(*, device: str, quick: bool = False) -> list[Case]:
    """The recurrence against its chunked form."""
    return recurrence_cases("delta", delta_scan, rates=1, device=device, quick=quick)
