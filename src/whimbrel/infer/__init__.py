"""Loading, prompting and generating with trained models."""

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "SparsePrefill": "whimbrel.infer.prefill:SparsePrefill",
        "compare_prefill": "whimbrel.infer.prefill:compare_prefill",
        "generate": "whimbrel.infer.decode:generate",
        "load_model": "whimbrel.infer.load:load_model",
        "load_tokenizer": "whimbrel.infer.load:load_tokenizer",
    },
)
