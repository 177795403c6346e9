"""Gated DeltaNet: one state under a gated delta rule, a baseline for RDN."""

from __future__ import annotations

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "GDN": "whimbrel.mixers.gdn.layer:GDN",
        "GDNConfig": "whimbrel.mixers.gdn.config:GDNConfig",
    },
)
