"""Text as token shards, training batches, and generated recall tasks."""

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Batch": "whimbrel.data.loader:Batch",
        "Document": "whimbrel.data.corpus:Document",
        "Loader": "whimbrel.data.loader:Loader",
        "Recall": "whimbrel.data.synthetic:Recall",
        "Symbols": "whimbrel.data.tokenizer:Symbols",
        "TokenShards": "whimbrel.data.shards:TokenShards",
        "Tokenizer": "whimbrel.data.tokenizer:Tokenizer",
        "default_cache": "whimbrel.data.corpus:default_cache",
        "load_tokenizer": "whimbrel.data.shards:load_tokenizer",
        "mqar": "whimbrel.data.synthetic:mqar",
        "prepare": "whimbrel.data.pipeline:prepare",
        "read_documents": "whimbrel.data.corpus:read_documents",
        "split_documents": "whimbrel.data.corpus:split_documents",
        "write_shards": "whimbrel.data.shards:write_shards",
    },
)
