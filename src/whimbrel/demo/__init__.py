"""The main job: the four methods together, from text to a page, on two CPU cores."""

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, {"run_demo": "whimbrel.demo.job:run_demo"})
