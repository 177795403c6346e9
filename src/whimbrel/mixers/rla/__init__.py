"""Residual Linear Attention: gated linear attention whose second state corrects the first."""

from __future__ import annotations

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "rla": "whimbrel.mixers.rla.op:rla",
        "rla_step": "whimbrel.mixers.rla.op:rla_step",
        "RLA": "whimbrel.mixers.rla.layer:RLA",
        "RLAConfig": "whimbrel.mixers.rla.config:RLAConfig",
    },
)
