"""Benchmark cases of `rdn`."""

from __future__ import annotations

from functools import partial

from whimbrel.bench.case import Case
from whimbrel.mixers.bench import step
from whimbrel.mixers.rdn.op import rdn
from whimbrel.scan import rivals
from whimbrel.scan.bench import (
    FLA_EXCUSED,
    FLA_GDN,
    FLA_STEP,
    FLASH_QLA,
    SDPA_CUDNN,
    Contender,
    kernel_cases,
    outputs,
    recurrence_cases,
    step_cases,
)

OTHERS = {
    "fla-gdn": FLA_GDN,
    "flash-qla": FLASH_QLA,
    "two-pass-fla": Contender(call=rivals.rdn_by_fla, truth=outputs(rdn), takes=6, excused=FLA_EXCUSED),
    "two-pass-flash-qla": Contender(call=rivals.rdn_by_flash_qla, truth=outputs(rdn), takes=6),
    "sdpa-cudnn": SDPA_CUDNN,
}
"""What it is timed against: passes of single-state operators, whole or as the halves of RDN, and softmax."""

forward = partial(kernel_cases, "rdn", rdn, takes=6, others=OTHERS, backward=False)
forward_backward = partial(kernel_cases, "rdn", rdn, takes=6, others=OTHERS, backward=True, parts=2)
one_step = partial(step_cases, "rdn", partial(step, delta=True), rdn, takes=6, states=2, others={"fla-gdn": FLA_STEP})


def cases(*, device: str, quick: bool = False) -> list[Case]:
    """The recurrence against its chunked form."""
    return recurrence_cases("rdn", rdn, rates=2, device=device, quick=quick)
