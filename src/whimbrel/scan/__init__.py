"""Recurrences S_t = A_t S_(t-1) + B_t, one folder per kind of A: a scalar decay, a gated delta rule."""

from __future__ import annotations

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Out": "whimbrel.scan.base:Out",
        "State": "whimbrel.scan.base:State",
        "decay_scan": "whimbrel.scan.decay.op:decay_scan",
        "delta_scan": "whimbrel.scan.delta.op:delta_scan",
    },
)
