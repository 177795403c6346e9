"""Linear layers whose weights themselves are kept small: 8-bit codes, and a low-rank plus a sparse part."""

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Int8Linear": "whimbrel.optim.weights.int8:Int8Linear",
        "Restarts": "whimbrel.optim.weights.sltrain:Restarts",
        "SLTrainLinear": "whimbrel.optim.weights.sltrain:SLTrainLinear",
        "int8_weights": "whimbrel.optim.weights.int8:int8_weights",
        "refactorize": "whimbrel.optim.weights.sltrain:refactorize",
        "sltrain": "whimbrel.optim.weights.sltrain:sltrain",
    },
)
