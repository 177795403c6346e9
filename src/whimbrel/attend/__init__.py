"""Softmax attention over a block plan: who attends to whom is data, made elsewhere."""

from __future__ import annotations

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Grid": "whimbrel.attend.plan:Grid",
        "Out": "whimbrel.attend.op:Out",
        "Plan": "whimbrel.attend.plan:Plan",
        "attend": "whimbrel.attend.op:attend",
        "attend_packed": "whimbrel.attend.op:attend_packed",
        "merge_parts": "whimbrel.attend.op:merge_parts",
    },
)
