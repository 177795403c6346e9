"""Softmax attention with grouped queries and rotary positions, for hybrids and as the baseline."""

from __future__ import annotations

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "SoftmaxAttention": "whimbrel.mixers.softmax.layer:SoftmaxAttention",
        "SoftmaxConfig": "whimbrel.mixers.softmax.config:SoftmaxConfig",
    },
)
