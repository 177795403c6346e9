"""Timing of operations against their reference and rivals, and the result lines every claim rests on."""

from __future__ import annotations

from whimbrel._lazy import lazy_exports

CASES: dict[str, str] = {
    "rdn": "whimbrel.mixers.rdn.bench:cases",
    "rla": "whimbrel.mixers.rla.bench:cases",
    "delta": "whimbrel.scan.delta.bench:cases",
    "decay": "whimbrel.scan.decay.bench:cases",
    "attend": "whimbrel.attend.bench:cases",
    "sparse": "whimbrel.sparse.bench:cases",
    "optim": "whimbrel.optim.bench:cases",
    "merge": "whimbrel.merge.bench:cases",
}
"""Case name -> "module:function" with the signature `cases(*, device: str, quick: bool) -> list[Case]`."""

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Case": "whimbrel.bench.case:Case",
        "record": "whimbrel.bench.results:record",
        "run_case": "whimbrel.bench.runner:run_case",
    },
)
