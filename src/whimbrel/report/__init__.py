"""One self-contained HTML page from the figures of a run, and the SVG writer that docs share with it."""

from __future__ import annotations

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Report": "whimbrel.report.schema:Report",
        "write_report": "whimbrel.report.page:write_report",
    },
)
