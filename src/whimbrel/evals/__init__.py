"""Bits per byte on held-out text and recall tasks, with intervals and the chance level."""

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "BpbResult": "whimbrel.evals.bpb:BpbResult",
        "Interval": "whimbrel.evals.intervals:Interval",
        "RecallResult": "whimbrel.evals.recall:RecallResult",
        "accuracy_interval": "whimbrel.evals.intervals:accuracy_interval",
        "compare_bpb": "whimbrel.evals.bpb:compare_bpb",
        "evaluate_bpb": "whimbrel.evals.bpb:evaluate_bpb",
        "evaluate_mqar": "whimbrel.evals.recall:evaluate_mqar",
        "evaluate_needle": "whimbrel.evals.recall:evaluate_needle",
        "paired_difference": "whimbrel.evals.intervals:paired_difference",
        "ratio_interval": "whimbrel.evals.intervals:ratio_interval",
        "run_evals": "whimbrel.evals.suite:run_evals",
        "wilson": "whimbrel.evals.intervals:wilson",
    },
)
