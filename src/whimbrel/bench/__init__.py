"""Timing of operations against their reference and rivals, and the result lines every claim rests on."""

from __future__ import annotations

from whimbrel._lazy import lazy_exports

CASES: dict[str, str] = {
    "rdn": "whimbrel.mixers.rdn.bench:cases",
    "rla": "whimbrel.mixers.rla.bench:cases",
    "delta": "whimbrel.scan.delta.bench:cases",
    "decay": "whimbrel.scan.decay.bench:cases",
    "rdn_fwd": "whimbrel.mixers.rdn.bench:forward",
    "rdn_fwd_bwd": "whimbrel.mixers.rdn.bench:forward_backward",
    "rdn_step": "whimbrel.mixers.rdn.bench:one_step",
    "rla_fwd": "whimbrel.mixers.rla.bench:forward",
    "rla_fwd_bwd": "whimbrel.mixers.rla.bench:forward_backward",
    "rla_step": "whimbrel.mixers.rla.bench:one_step",
    "delta_fwd": "whimbrel.scan.delta.bench:forward",
    "delta_fwd_bwd": "whimbrel.scan.delta.bench:forward_backward",
    "delta_step": "whimbrel.scan.delta.bench:one_step",
    "decay_fwd": "whimbrel.scan.decay.bench:forward",
    "decay_fwd_bwd": "whimbrel.scan.decay.bench:forward_backward",
    "decay_step": "whimbrel.scan.decay.bench:one_step",
    "attend": "whimbrel.attend.bench:cases",
    "sparse": "whimbrel.sparse.bench:cases",
    "prefill": "whimbrel.sparse.prefill.bench:cases",
    "prefill_crossover": "whimbrel.sparse.prefill.bench:crossover",
    "optim": "whimbrel.optim.bench:cases",
    "optim_step": "whimbrel.optim.kernels.bench:cases",
    "merge": "whimbrel.merge.bench:cases",
    "train_tokens": "whimbrel.bench.models:train_tokens",
    "prefill_tokens": "whimbrel.bench.models:prefill_tokens",
}
"""Case name -> "module:function" with the signature `(*, device: str, quick: bool) -> list[Case]`."""

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Case": "whimbrel.bench.case:Case",
        "record": "whimbrel.bench.results:record",
        "run_case": "whimbrel.bench.runner:run_case",
    },
)
