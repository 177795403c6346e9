"""Benchmark cases of `rdn`."""

from __future__ import annotations

from whimbrel.bench.case import Case
from whimbrel.mixers.rdn.op import rdn
from whimbrel.scan.bench import recurrence_cases


def cases(*, device: str, quick: bool = False) -> list[Case]:
    """The recurrence against its chunked form."""
    return recurrence_cases("rdn", rdn, rates=2, device=device, quick=quick)
