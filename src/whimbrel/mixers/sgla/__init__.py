"""Scalar-gated linear attention: one decaying state, a baseline for RLA."""

from __future__ import annotations

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "SGLA": "whimbrel.mixers.sgla.layer:SGLA",
        "SGLAConfig": "whimbrel.mixers.sgla.config:SGLAConfig",
    },
)
