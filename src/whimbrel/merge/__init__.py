"""Averages of checkpoints of one run: which weights (`pma`), and the streaming sum over files (`stream`)."""

from whimbrel._lazy import lazy_exports

KINDS = {
    "sma": "whimbrel.merge.config:SMAConfig",
    "wma": "whimbrel.merge.config:WMAConfig",
    "ema": "whimbrel.merge.config:EMAConfig",
    "ema-corrected": "whimbrel.merge.config:EMACorrectedConfig",
    "decay": "whimbrel.merge.config:DecayConfig",
    "explicit": "whimbrel.merge.config:ExplicitConfig",
}

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "MergeReport": "whimbrel.merge.stream:MergeReport",
        "OnlineAverage": "whimbrel.merge.online:OnlineAverage",
        "SpikeDetector": "whimbrel.merge.spikes:SpikeDetector",
        "Weights": "whimbrel.merge.pma:Weights",
        "load_average": "whimbrel.merge.recover:load_average",
        "merge_checkpoints": "whimbrel.merge.stream:merge_checkpoints",
        "merge_weights": "whimbrel.merge.config:merge_weights",
        "select_window": "whimbrel.merge.select:select_window",
    },
)
