"""The families of methods: the base class of each, and which class a `kind` names. Imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from whimbrel._lazy import load_object
from whimbrel.errors import ConfigError, nearest

if TYPE_CHECKING:
    from torch import nn, optim

    from whimbrel.merge.pma import Weights
    from whimbrel.sparse.apply import Selector


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise ConfigError "name = value is not allowed; ..." unless `ok`."""
    if not ok:
        raise ConfigError(f"{name} = {value!r} is not allowed; use {allowed}")


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """Options of a token mixer; `build` makes its layer."""

    FAMILY: ClassVar[str] = "whimbrel.mixers"

    def build(self, hidden_size: int, norm_eps: float) -> nn.Module:
        """The layer: x [B, T, hidden_size] -> Out(y [B, T, hidden_size], state)."""
        raise NotImplementedError

    def num_params(self, hidden_size: int) -> int:
        """Parameters of the layer."""
        raise NotImplementedError

    def state_bytes(self, hidden_size: int, tokens: int, *, bytes_per_element: int = 4) -> int:
        """Bytes of the layer's state for one sequence after `tokens` tokens."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Options of an optimizer; `groups` sorts a model's parameters, `build` makes the optimizer."""

    FAMILY: ClassVar[str] = "whimbrel.optim"

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups of `model` for `build`."""
        raise NotImplementedError

    def build(self, groups: list[dict[str, Any]]) -> optim.Optimizer:
        """The optimizer over `groups`; its learning rate is set by the schedule at every step."""
        raise NotImplementedError

    def state_bytes(self, shapes: Mapping[str, Sequence[int]], *, bytes_per_element: int = 4) -> int:
        """Bytes of optimizer state for parameters of these names and shapes."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SelectorConfig:
    """Options of a block selector for sparse prefill; `build` makes it."""

    FAMILY: ClassVar[str] = "whimbrel.sparse"

    def build(self) -> Selector:
        """The selector: a function of queries and keys that returns the plan of blocks to attend to."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Options of an averaging method; `weights(n)` gives the weights of n checkpoints, oldest first."""

    FAMILY: ClassVar[str] = "whimbrel.merge"

    def weights(self, n: int) -> Weights:
        """The weights of n checkpoints, oldest first; they sum to one."""
        raise NotImplementedError


def kinds(family: str) -> dict[str, str]:
    """The family's table: kind -> "module:ConfigClass"."""
    return importlib.import_module(family).KINDS


def kind_class(family: str, kind: str, *, where: str = "kind") -> type:
    """The config class that `kind` names; raises ConfigError with the nearest name for an unknown one."""
    table = kinds(family)
    target = table.get(kind, kind)
    if ":" not in target:
        known = ", ".join(table)
        raise ConfigError(
            f"{where} = '{kind}' is not known{nearest(kind, table)}; use one of {known}, or 'module:ConfigClass'"
        )
    try:
        return load_object(target)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{where} = '{kind}' cannot be loaded: {error}") from error


def kind_of(config: Any) -> str:
    """The kind that names the class of `config`."""
    cls = type(config)
    target = f"{cls.__module__}:{cls.__qualname__}"
    return next((kind for kind, value in kinds(cls.FAMILY).items() if value == target), target)
