"""Benchmark cases of `rla`."""

from __future__ import annotations

from functools import partial

from whimbrel.bench.case import Case
from whimbrel.mixers.bench import step
from whimbrel.mixers.rla.op import rla
from whimbrel.scan import rivals
from whimbrel.scan.bench import (
    FLA_EXCUSED,
    FLA_SIMPLE_GLA,
    Contender,
    kernel_cases,
    outputs,
    recurrence_cases,
    step_cases,
)

OTHERS = {
    "fla-simple-gla": FLA_SIMPLE_GLA,
    "two-pass-fla": Contender(call=rivals.rla_by_fla, truth=outputs(rla), takes=6, excused=FLA_EXCUSED),
}
"""What it is timed against: passes of single-state operators, whole or as the halves of RLA, and softmax."""

forward = partial(kernel_cases, "rla", rla, takes=6, others=OTHERS, backward=False)
forward_backward = partial(kernel_cases, "rla", rla, takes=6, others=OTHERS, backward=True, parts=2)
one_step = partial(step_cases, "rla", partial(step, delta=False), rla, takes=6, states=2, others={})


def cases(*, device: str, quick: bool = False) -> list[Case]:
    """The recurrence against its chunked form."""
    return recurrence_cases("rla", rla, rates=2, device=device, quick=quick)
