"""The decoder: embedding, blocks of a token mixer and a SwiGLU, final norm, head."""

from __future__ import annotations

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Cache": "whimbrel.model.decoder:Cache",
        "Decoder": "whimbrel.model.decoder:Decoder",
        "ModelOut": "whimbrel.model.decoder:ModelOut",
        "build_model": "whimbrel.model.decoder:build_model",
        "cache_bytes": "whimbrel.model.decoder:cache_bytes",
        "set_prefill": "whimbrel.model.decoder:set_prefill",
    },
)
