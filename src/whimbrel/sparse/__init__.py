"""Who may be skipped: selectors look at queries and keys and return a block plan. One folder each, one line
per kind."""

from __future__ import annotations

from whimbrel._lazy import lazy_exports

KINDS: dict[str, str] = {
    "dense": "whimbrel.sparse.dense.config:DenseConfig",
    "window": "whimbrel.sparse.window.config:WindowConfig",
    "flex_prefill": "whimbrel.sparse.flex_prefill.config:FlexPrefillConfig",
    "row_local": "whimbrel.sparse.row_local.config:RowLocalConfig",
}
"""Kind of selector -> "module:Config"."""

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Audit": "whimbrel.sparse.coverage:Audit",
        "DenseConfig": "whimbrel.sparse.dense.config:DenseConfig",
        "FlexPrefillConfig": "whimbrel.sparse.flex_prefill.config:FlexPrefillConfig",
        "KeyStatistics": "whimbrel.sparse.statistics:KeyStatistics",
        "Out": "whimbrel.sparse.apply:Out",
        "RowLocalConfig": "whimbrel.sparse.row_local.config:RowLocalConfig",
        "Target": "whimbrel.sparse.apply:Target",
        "Selector": "whimbrel.sparse.apply:Selector",
        "WindowConfig": "whimbrel.sparse.window.config:WindowConfig",
        "apply_selector": "whimbrel.sparse.apply:apply_selector",
        "key_statistics": "whimbrel.sparse.statistics:key_statistics",
    },
)
