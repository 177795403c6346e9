"""lm-eval: Whimbrel's models in its tasks, and Whimbrel's generated tasks as a folder for it."""

from __future__ import annotations

from pathlib import Path

from whimbrel._lazy import lazy_exports

TASK_FOLDER = Path(__file__).parent / "tasks"
"""For `lm_eval --include_path` and `TaskManager(include_path=...)`."""

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "documents": "whimbrel.integrations.lm_eval.dataset:documents",
        "evaluate_folder": "whimbrel.integrations.lm_eval.harness:evaluate_folder",
    },
)
