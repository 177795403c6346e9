"""Benchmark cases of `delta_scan`."""

from __future__ import annotations

from functools import partial

from whimbrel.bench.case import Case
from whimbrel.scan.bench import FLA_GDN, FLA_STEP, FLASH_QLA, kernel_cases, recurrence_cases, single_step, step_cases
from whimbrel.scan.delta.op import delta_scan

OTHERS = {"fla-gdn": FLA_GDN, "flash-qla": FLASH_QLA}

forward = partial(kernel_cases, "delta", delta_scan, takes=5, others=OTHERS, backward=False)
forward_backward = partial(kernel_cases, "delta", delta_scan, takes=5, others=OTHERS, backward=True)
one_step = partial(
    step_cases, "delta", partial(single_step, delta=True), delta_scan, takes=5, states=1, others={"fla-gdn": FLA_STEP}
)


def cases(*, device: str, quick: bool = False) -> list[Case]:
    """The recurrence against its chunked form."""
    return recurrence_cases("delta", delta_scan, rates=1, device=device, quick=quick)
