"""Benchmark cases of `decay_scan`."""

from __future__ import annotations

from functools import partial

from whimbrel.bench.case import Case
from whimbrel.scan.bench import FLA_SIMPLE_GLA, kernel_cases, recurrence_cases, single_step, step_cases
from whimbrel.scan.decay.op import decay_scan

OTHERS = {"fla-simple-gla": FLA_SIMPLE_GLA}

forward = partial(kernel_cases, "decay", decay_scan, takes=5, others=OTHERS, backward=False)
forward_backward = partial(kernel_cases, "decay", decay_scan, takes=5, others=OTHERS, backward=True)
one_step = partial(step_cases, "decay", partial(single_step, delta=False), decay_scan, takes=5, states=1, others={})


def cases(*, device: str, quick: bool = False) -> list[Case]:
    """The recurrence against its chunked form."""
    return recurrence_cases("decay", decay_scan, rates=1, device=device, quick=quick)
