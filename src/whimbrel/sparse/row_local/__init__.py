"""Row-local selection: each query block is chosen from its own queries and earlier keys only."""

from __future__ import annotations

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "RowLocalConfig": "whimbrel.sparse.row_local.config:RowLocalConfig",
        "row_local": "whimbrel.sparse.row_local.op:row_local",
    },
)
