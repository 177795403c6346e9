"""Bits per byte on held-out text and recall tasks, with intervals and the chance level."""

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "DENSE": "whimbrel.evals.grid:DENSE",
        "Method": "whimbrel.evals.grid:Method",
        "BpbResult": "whimbrel.evals.bpb:BpbResult",
        "Interval": "whimbrel.evals.intervals:Interval",
        "RecallResult": "whimbrel.evals.recall:RecallResult",
        "accuracy_interval": "whimbrel.evals.intervals:accuracy_interval",
        "compare_bpb": "whimbrel.evals.bpb:compare_bpb",
        "evaluate_bpb": "whimbrel.evals.bpb:evaluate_bpb",
        "evaluate_grid": "whimbrel.evals.grid:evaluate_grid",
        "evaluate_mqar": "whimbrel.evals.recall:evaluate_mqar",
        "evaluate_needle": "whimbrel.evals.recall:evaluate_needle",
        "make_task": "whimbrel.evals.tasks:make_task",
        "paired_difference": "whimbrel.evals.intervals:paired_difference",
        "ratio_interval": "whimbrel.evals.intervals:ratio_interval",
        "run_evals": "whimbrel.evals.suite:run_evals",
        "wilson": "whimbrel.evals.intervals:wilson",
    },
)
