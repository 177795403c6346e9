"""Linear layers of a model by the names of their weights, to be replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from whimbrel.errors import ConfigError


def replace_linears(
    model: nn.Module, patterns: str | Sequence[str], make: Callable[[str, nn.Linear], nn.Module]
) -> list[str]:
    """Put make(name, layer) in the place of every nn.Linear without bias whose weight's name matches a pattern.

    Returns the names of the weights. Raises ConfigError where none matches, or where a match has a bias or is tied.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    found, taken = {}, set()
    for path, layer in model.named_modules():
        name = f"{path}.weight" if path else "weight"
        if type(layer) is nn.Linear and any(fnmatchcase(name, pattern) for pattern in patterns):
            if layer.bias is not None:
                raise ConfigError(
                    f"{path} has a bias, which low-memory weights do not take; leave it out of the patterns"
                )
            found[path] = layer
    if not found:
        raise ConfigError(f"patterns = {patterns} match no weight of an nn.Linear; choose other patterns")
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for path, layer in found.items():
        if owners[id(layer.weight)] > 1 or id(layer) in taken:
            raise ConfigError(f"{path}.weight is tied to another layer's; leave it out of the patterns")
        taken.add(id(layer))
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, make(f"{path}.weight", layer))
    return [f"{path}.weight" for path in found]
