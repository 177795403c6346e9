"""Whimbrel: train language models on the memory you have and run them over long contexts."""

from whimbrel._lazy import lazy_exports

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Config": "whimbrel.config:Config",
        "ConfigError": "whimbrel.errors:ConfigError",
        "WhimbrelError": "whimbrel.errors:WhimbrelError",
        "load_config": "whimbrel.config:load_config",
        "load_model": "whimbrel.infer.load:load_model",
        "train": "whimbrel.training.loop:train",
    },
)
