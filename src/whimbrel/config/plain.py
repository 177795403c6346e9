"""Settings to plain data and back: decoding that refuses unknown names and wrong types, TOML, overrides."""

from __future__ import annotations

import dataclasses
import functools
import math
import tomllib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from whimbrel.config.families import kind_class, kind_of
from whimbrel.config.run import Config
from whimbrel.errors import ConfigError, nearest

T = TypeVar("T")
_TYPES = {int: "a whole number", float: "a number", str: "text in quotes", bool: "true or false"}


def decode(cls: type[T], data: Mapping[str, Any], *, base: T | None = None, where: str = "") -> T:
    """A `cls` from plain data; settings that `data` leaves out come from `base` or the defaults.

    Raises ConfigError for an unknown name (with the nearest one), a wrong type, or a value that the class refuses.
    """
    hints = _hints(cls)
    names = list(hints)
    start = cls() if base is None else base
    values: dict[str, Any] = {name: getattr(start, name) for name in names}
    for name, value in data.items():
        path = f"{where}{name}"
        if name not in names:
            raise ConfigError(f"unknown setting '{path}'{nearest(name, names) or '; use one of ' + ', '.join(names)}")
        values[name] = _decode_value(hints[name], value, values[name], path)
    return cls(**values)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Type of each field, in order."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def check_literals(config: Any, where: str) -> None:
    """Raise ConfigError where a setting of `config` with listed values has another; `where` is put before its name."""
    for name, hint in _hints(type(config)).items():
        if get_origin(hint) is Literal:
            _decode_plain(hint, getattr(config, name), where + name)


def _decode_value(hint: Any, value: Any, base: Any, path: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} = {value!r} is not a table; write [{path}] with its settings")
        if not hasattr(hint, "FAMILY"):
            return decode(hint, value, base=base, where=f"{path}.")
        return _decode_kind(hint, value, base, path)
    return _decode_plain(hint, value, path)


def _decode_kind(hint: Any, value: Mapping[str, Any], base: Any, path: str) -> Any:
    settings = dict(value)
    kind = settings.pop("kind", None)
    if kind is None:
        cls = type(base)
    else:
        cls = kind_class(hint.FAMILY, kind, where=f"{path}.kind")
        if not issubclass(cls, hint):
            raise ConfigError(f"{path}.kind = '{kind}' names {cls.__name__}, which is not a {hint.__name__}")
    return decode(cls, settings, base=base if type(base) is cls else None, where=f"{path}.")


def _decode_plain(hint: Any, value: Any, path: str) -> Any:
    origin = get_origin(hint)
    if origin is Literal:
        allowed = get_args(hint)
        if value not in allowed:
            names = ", ".join(map(repr, allowed))
            raise ConfigError(f"{path} = {value!r} is not allowed{nearest(str(value), allowed)}; use one of {names}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise ConfigError(f"{path} = {value!r} is not a list; write [{value!r}]")
        return tuple(_decode_plain(get_args(hint)[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin in (Union, types.UnionType):
        return _decode_plain(next(h for h in get_args(hint) if h is not type(None)), value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{path} = {value!r} is not allowed; use {_TYPES.get(hint, hint.__name__)}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{path} = {value!r} is not finite; use a finite number")
    return value


def encode(config: Any) -> dict[str, Any]:
    """Plain data of a config; `decode` of it gives an equal config. A None is left out."""
    data: dict[str, Any] = {"kind": kind_of(config)} if hasattr(config, "FAMILY") else {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            value = encode(value)
        elif isinstance(value, tuple):
            value = list(value)
        if value is not None:
            data[f.name] = value
    return data


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML; `parse_toml` gives it back."""
    import tomli_w

    return tomli_w.dumps(encode(config))


def parse_toml(text: str, *, base: Config | None = None, source: str = "configuration") -> Config:
    """A Config from TOML; settings that are left out come from `base` or the defaults."""
    return decode(Config, _parse(text, source), base=base)


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not valid TOML: {error}") from error


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """`config` with dotted settings replaced, e.g. {"optim.kind": "galore", "optim.rank": 64}."""
    tree: dict[str, Any] = {}
    for name, value in overrides.items():
        node = tree
        *parents, leaf = name.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return decode(Config, tree, base=config)


def load_config(source: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """The Config of a recipe's name or of a TOML file, with dotted overrides applied last.

    A TOML file may start from a recipe with a top-level `recipe = "name"`. Raises ConfigError for an unknown recipe,
    a missing file, invalid TOML, an unknown setting or a value that is not allowed.
    """
    from whimbrel import recipes

    name = str(source)
    if name.endswith(".toml") or "/" in name:
        config = _load_file(Path(source))
    else:
        config = recipes.get(name)
    return with_overrides(config, overrides) if overrides else config


def _load_file(path: Path) -> Config:
    from whimbrel import recipes

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"configuration file '{path}' does not exist; name a recipe or a TOML file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file '{path}' cannot be read: {error}") from error
    data = _parse(text, f"configuration file '{path}'")
    recipe = data.pop("recipe", None)
    return decode(Config, data, base=recipes.get(recipe) if recipe is not None else None)
