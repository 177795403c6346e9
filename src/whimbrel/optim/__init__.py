"""Optimizers: Fira, GaLore and APOLLO with low-rank state, AdamW, and the sorting of parameters into groups."""

from whimbrel._lazy import lazy_exports

KINDS: dict[str, str] = {
    "adamw": "whimbrel.optim.adamw.config:AdamWConfig",
    "apollo": "whimbrel.optim.apollo.config:ApolloConfig",
    "fira": "whimbrel.optim.fira.config:FiraConfig",
    "galore": "whimbrel.optim.galore.config:GaLoreConfig",
}

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "AdamW": "whimbrel.optim.adamw.optimizer:AdamW",
        "AdamWConfig": "whimbrel.optim.adamw.config:AdamWConfig",
        "Apollo": "whimbrel.optim.apollo.optimizer:Apollo",
        "ApolloConfig": "whimbrel.optim.apollo.config:ApolloConfig",
        "Fira": "whimbrel.optim.fira.optimizer:Fira",
        "FiraConfig": "whimbrel.optim.fira.config:FiraConfig",
        "GaLore": "whimbrel.optim.galore.optimizer:GaLore",
        "GaLoreConfig": "whimbrel.optim.galore.config:GaLoreConfig",
        "load_foreign": "whimbrel.optim.foreign:load_foreign",
        "learning_rate_factor": "whimbrel.optim.schedule:learning_rate_factor",
        "memory_report": "whimbrel.optim.memory:memory_report",
        "param_groups": "whimbrel.optim.groups:param_groups",
        "read_foreign": "whimbrel.optim.foreign:read_foreign",
    },
)
