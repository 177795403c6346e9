"""FlexPrefill (arXiv 2502.20766): per head, a vertical-slash or a query-aware pattern that covers a share of
attention."""

from __future__ import annotations

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "FlexPrefillConfig": "whimbrel.sparse.flex_prefill.config:FlexPrefillConfig",
        "flex_prefill": "whimbrel.sparse.flex_prefill.op:flex_prefill",
    },
)
