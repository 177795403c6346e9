"""Benchmark cases of `rla`."""

from __future__ import annotations

from whimbrel.bench.case import Case
from whimbrel.mixers.rla.op import rla
from whimbrel.scan.bench import recurrence_cases


def cases(*, device: str, quick: bool = False) -> list[Case]:
    """The recurrence against its chunked form."""
    return recurrence_cases("rla", rla, rates=2, device=device, quick=quick)
