"""What stands in a block where attention would: one folder per mixer, one line per kind."""

from __future__ import annotations

from whimbrel._lazy import lazy_exports

KINDS: dict[str, str] = {
    "rla": "whimbrel.mixers.rla.config:RLAConfig",
    "rdn": "whimbrel.mixers.rdn.config:RDNConfig",
    "gdn": "whimbrel.mixers.gdn.config:GDNConfig",
    "gdn-sum": "whimbrel.mixers.gdn_sum.config:GDNSumConfig",
    "sgla": "whimbrel.mixers.sgla.config:SGLAConfig",
    "softmax": "whimbrel.mixers.softmax.config:SoftmaxConfig",
}
"""Kind of mixer -> "module:Config"."""

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "RLA": "whimbrel.mixers.rla.layer:RLA",
        "RDN": "whimbrel.mixers.rdn.layer:RDN",
        "GDN": "whimbrel.mixers.gdn.layer:GDN",
        "GDNSum": "whimbrel.mixers.gdn_sum.layer:GDNSum",
        "SGLA": "whimbrel.mixers.sgla.layer:SGLA",
        "SoftmaxAttention": "whimbrel.mixers.softmax.layer:SoftmaxAttention",
    },
)
