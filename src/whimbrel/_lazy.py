"""Names that are loaded on first use, so that importing a package stays cheap."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(
    package: str, exports: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The module functions `__getattr__`, `__dir__` and the list `__all__` for a package.

    `exports` maps a public name to "module:attribute". A name must not equal a submodule of the package,
    since Python would then bind the submodule over it.
    """

    def load(name: str) -> Any:
        target = exports.get(name)
        if target is None:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return load_object(target)

    names = sorted(exports)
    return load, lambda: names, names


def load_object(target: str) -> Any:
    """The object named by "module:attribute"."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
