"""The training loop, its processes and its metrics."""

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "TrainResult": "whimbrel.training.loop:TrainResult",
        "train": "whimbrel.training.loop:train",
    },
)
