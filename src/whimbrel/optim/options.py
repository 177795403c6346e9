"""What each optimizer option may be, for configs and optimizers alike. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from whimbrel.config import require
from whimbrel.errors import ConfigError

Side = Literal["std", "reverse_std", "left", "right"]
Refresh = Literal["power", "exact"]
AnyRefresh = Literal["power", "exact", "random"]
OnRefresh = Literal["keep", "rotate", "reset"]
ResidualMode = Literal["official", "paper"]
Scaling = Literal["column", "matrix"]
StateDtype = Literal["float32", "bfloat16", "int8"]
BasisDtype = Literal["float32", "bfloat16", "int4"]
Impl = Literal["auto", "eager", "triton"]


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value in names), "one of " + ", ".join(names)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _pair(value: Any) -> bool:
    return len(value) == 2 and all(0 <= beta < 1 for beta in value)


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda value: value >= 0, "a number of at least 0"),
    "rank": (_count, "a positive whole number"),
    "alpha": (lambda value: value > 0, "a positive number"),
    "gamma": (lambda value: value == 0 or value >= 1, "0 (no limiter) or a number of at least 1"),
    "refresh_steps": (_count, "a positive number of steps"),
    "betas": (_pair, "two numbers of at least 0 and below 1"),
    "eps": (lambda value: value >= 0, "a number of at least 0"),
    "weight_decay": (lambda value: value >= 0, "a number of at least 0"),
    "min_dim": (_count, "a positive whole number"),
    "seed": (lambda value: isinstance(value, int) and value >= 0, "a whole number of at least 0"),
    "side": _one_of("std", "reverse_std", "left", "right"),
    "refresh": _one_of("power", "exact"),
    "on_refresh": _one_of("keep", "rotate", "reset"),
    "residual_mode": _one_of("official", "paper"),
    "scaling": _one_of("column", "matrix"),
    "lazy_overlap": (lambda value: 0 <= value <= 1, "a number from 0 (no lazy refreshes) to 1"),
    "state_dtype": _one_of("float32", "bfloat16", "int8"),
    "basis_dtype": _one_of("float32", "bfloat16", "int4"),
    "other_dtype": _one_of("float32", "bfloat16", "int8"),
    "impl": _one_of("auto", "eager", "triton"),
    "stagger": (_flag, "true or false"),
    "stochastic_rounding": (_flag, "true or false"),
}


def check_options(options: Mapping[str, Any], *, prefix: str = "", random: bool = False) -> None:
    """Raise ConfigError for the first option whose value is not allowed; other names are left alone.

    random: whether bases may be drawn, refresh="random", from which nothing can be carried to the next.
    """
    rules = _RULES | ({"refresh": _one_of("power", "exact", "random")} if random else {})
    if options.get("refresh") == "random" and random:
        rules |= {"on_refresh": _one_of("keep"), "lazy_overlap": (lambda value: value == 0, "0 with random bases")}
    for name, value in options.items():
        if name in rules:
            allows, allowed = rules[name]
            try:
                fits = bool(allows(value))
            except TypeError:  # of another kind, as None where a number is wanted
                fits = False
            require(fits, prefix + name, value, allowed)


def check_rank(rank: int, shape: tuple[int, ...], name: str) -> None:
    """Raise ConfigError unless `name` is a matrix [m, n], or one for each expert [E, m, n], of sides >= `rank`."""
    if len(shape) not in (2, 3):
        raise ConfigError(
            f"{name} has shape {list(shape)}, but a low-rank group takes matrices; put it into a group without a rank"
        )
    smaller = min(shape[-2:])
    if rank > smaller:
        raise ConfigError(f"rank = {rank} exceeds the smaller side {smaller} of {name}; choose at most {smaller}")
