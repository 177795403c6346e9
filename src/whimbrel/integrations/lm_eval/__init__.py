"""lm-eval: Whimbrel's models in its tasks, and Whimbrel's generated tasks as a folder for it."""

from __future__ import annotations

from pathlib import Path

from whimbrel._lazy import lazy_exports
from whimbrel.errors import MissingExtraError

try:
    import lm_eval  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise MissingExtraError(
        "whimbrel.integrations.lm_eval needs lm-eval and transformers; run pip install 'whimbrel[lm-eval]'"
    ) from error

TASK_FOLDER = Path(__file__).parent / "tasks"
"""For `lm_eval --include_path` and `TaskManager(include_path=...)`."""

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "documents": "whimbrel.integrations.lm_eval.dataset:documents",
        "evaluate_folder": "whimbrel.integrations.lm_eval.harness:evaluate_folder",
    },
)
