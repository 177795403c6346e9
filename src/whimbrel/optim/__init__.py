"""Optimizers: Fira and GaLore with low-rank state, AdamW, and the sorting of parameters into groups."""

from whimbrel._lazy import lazy_exports

KINDS: dict[str, str] = {
    "adamw": "whimbrel.optim.adamw.config:AdamWConfig",
    "fira": "whimbrel.optim.fira.config:FiraConfig",
    "galore": "whimbrel.optim.galore.config:GaLoreConfig",
}

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "AdamW": "whimbrel.optim.adamw.optimizer:AdamW",
        "AdamWConfig": "whimbrel.optim.adamw.config:AdamWConfig",
        "Fira": "whimbrel.optim.fira.optimizer:Fira",
        "FiraConfig": "whimbrel.optim.fira.config:FiraConfig",
        "GaLore": "whimbrel.optim.galore.optimizer:GaLore",
        "GaLoreConfig": "whimbrel.optim.galore.config:GaLoreConfig",
        "learning_rate_factor": "whimbrel.optim.schedule:learning_rate_factor",
        "param_groups": "whimbrel.optim.groups:param_groups",
    },
)
