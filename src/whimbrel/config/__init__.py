"""The configuration: frozen dataclasses, strict TOML in and out, methods chosen by `kind`. Imports no torch.

A field that holds a method (a mixer, an optimizer, a selector, a merge) is annotated with its family's base class.
In TOML such a table carries `kind`, either a name from the family's table (`whimbrel.mixers.KINDS` and its
siblings) or "module:ConfigClass" of someone else's package.
"""

from whimbrel.config.families import (
    MergeConfig,
    MixerConfig,
    OptimConfig,
    SelectorConfig,
    kind_class,
    kind_of,
    kinds,
    require,
)
from whimbrel.config.plain import check_literals, decode, encode, load_config, parse_toml, to_toml, with_overrides
from whimbrel.config.run import (
    AveragingConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OnlineConfig,
    ScheduleConfig,
    SpikesConfig,
)

__all__ = [
    "AveragingConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "MergeConfig",
    "MixerConfig",
    "ModelConfig",
    "OnlineConfig",
    "OptimConfig",
    "ScheduleConfig",
    "SelectorConfig",
    "SpikesConfig",
    "check_literals",
    "decode",
    "encode",
    "kind_class",
    "kind_of",
    "kinds",
    "load_config",
    "parse_toml",
    "require",
    "to_toml",
    "with_overrides",
]
