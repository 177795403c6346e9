"""Residual Delta Net: a gated delta rule whose second state corrects the first."""

from __future__ import annotations

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "rdn": "whimbrel.mixers.rdn.op:rdn",
        "rdn_step": "whimbrel.mixers.rdn.op:rdn_step",
        "RDN": "whimbrel.mixers.rdn.layer:RDN",
        "RDNConfig": "whimbrel.mixers.rdn.config:RDNConfig",
    },
)
