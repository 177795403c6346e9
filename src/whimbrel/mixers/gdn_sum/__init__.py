"""Two Gated DeltaNets summed: a baseline with the state of RDN and nothing residual in it."""

from __future__ import annotations

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "GDNSum": "whimbrel.mixers.gdn_sum.layer:GDNSum",
        "GDNSumConfig": "whimbrel.mixers.gdn_sum.config:GDNSumConfig",
    },
)
