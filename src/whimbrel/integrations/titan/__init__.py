"""torchtitan: Whimbrel's models, optimizers, data and averages in an engine for many machines.

`torchrun ... -m torchtitan.train --module whimbrel.integrations.titan --config rdn_360m` trains a recipe; a recipe's
name is written with underscores. README.md of this folder has the rest.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from whimbrel._lazy import lazy_exports
from whimbrel.errors import MissingExtraError, UnsupportedError
from whimbrel.recipes import RECIPES

try:
    _VERSION = version("torchtitan")
except PackageNotFoundError as error:
    raise MissingExtraError(
        "whimbrel.integrations.titan needs torchtitan and triton; run pip install 'whimbrel[titan]'"
    ) from error
if not _VERSION.startswith("0.3."):
    raise UnsupportedError(f"torchtitan {_VERSION} is not supported; run pip install 'torchtitan>=0.3,<0.4'")

_export, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "TitanTrainer": "whimbrel.integrations.titan.trainer:TitanTrainer",
        "WhimbrelOptimizers": "whimbrel.integrations.titan.optim:WhimbrelOptimizers",
        "trainer_config": "whimbrel.integrations.titan.recipes:trainer_config",
    },
)


def __getattr__(name: str) -> Any:
    recipe = name.replace("_", "-")
    for known in (recipe, recipe.replace("-5b", ".5b")):
        if known in RECIPES:
            from whimbrel.integrations.titan.recipes import trainer_config

            return lambda: trainer_config(RECIPES[known]())
    return _export(name)
