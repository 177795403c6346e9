"""Options of the averaging methods. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from whimbrel.config import MergeConfig, decode, kind_class, require
from whimbrel.errors import ConfigError
from whimbrel.merge import pma
from whimbrel.merge.pma import Number, Weights


@dataclass(frozen=True, kw_only=True)
class SMAConfig(MergeConfig):
    """Simple moving average: equal weights."""

    def weights(self, n: int) -> Weights:
        """The weights of n checkpoints, oldest first."""
        return pma.sma(n)


@dataclass(frozen=True, kw_only=True)
class WMAConfig(MergeConfig):
    """Weighted moving average: weights proportional to the index, newest heaviest."""

    def weights(self, n: int) -> Weights:
        """The weights of n checkpoints, oldest first."""
        return pma.wma(n)


@dataclass(frozen=True, kw_only=True)
class EMAConfig(MergeConfig):
    """Exponential moving average as a recursion that starts at the oldest checkpoint."""

    alpha: float = 0.2
    """Weight of each newer checkpoint against the average before it; above 0, at most 1."""

    def __post_init__(self) -> None:
        pma.ema(1, self.alpha)

    def weights(self, n: int) -> Weights:
        """The weights of n checkpoints, oldest first."""
        return pma.ema(n, self.alpha)


@dataclass(frozen=True, kw_only=True)
class EMACorrectedConfig(MergeConfig):
    """Exponential moving average that starts at zero, divided by the sum of its weights."""

    alpha: float = 0.2
    """Ratio 1 - alpha between the weights of neighbours; above 0, at most 1."""

    def __post_init__(self) -> None:
        pma.ema_corrected(1, self.alpha)

    def weights(self, n: int) -> Weights:
        """The weights of n checkpoints, oldest first."""
        return pma.ema_corrected(n, self.alpha)


@dataclass(frozen=True, kw_only=True)
class DecayConfig(MergeConfig):
    """Weights that imitate a decay of the learning rate over the averaged stretch (arXiv 2507.17634)."""

    curve: Literal["linear", "cosine", "minus-sqrt"] = "minus-sqrt"
    """Shape of the decay, from the full rate to zero; not looked at when `values` is set."""
    values: tuple[str, ...] = ()
    """The decay itself, a share of the full rate per checkpoint, oldest first, beginning with 1."""

    def __post_init__(self) -> None:
        if self.values:
            pma.from_decay(self.values)

    def weights(self, n: int) -> Weights:
        """The weights of n checkpoints, oldest first."""
        if self.values:
            _check_length(self.values, n)
            return pma.from_decay(self.values)
        curves = {"linear": pma.sma, "cosine": pma.cosine_decay, "minus-sqrt": pma.minus_sqrt_decay}
        return curves[self.curve](n)


@dataclass(frozen=True, kw_only=True)
class ExplicitConfig(MergeConfig):
    """Weights as given."""

    values: tuple[str, ...] = ("1",)
    """One weight per checkpoint, oldest first, each a decimal or a fraction such as "1/3"."""
    any_sum: bool = False
    """Accept weights that do not sum to 1, for task vectors and the like."""

    def __post_init__(self) -> None:
        pma.explicit(self.values, any_sum=self.any_sum)

    def weights(self, n: int) -> Weights:
        """The weights of n checkpoints, oldest first."""
        _check_length(self.values, n)
        return pma.explicit(self.values, any_sum=self.any_sum)


def _check_length(values: Sequence[str], n: int) -> None:
    require(len(values) == n, "number of merge.values", len(values), f"one for each of the {n} checkpoints")


def merge_config(
    method: str | MergeConfig, *, alpha: float | None = None, weights: Sequence[Number] | None = None
) -> MergeConfig:
    """The options of `method`, a kind from `whimbrel.merge.KINDS` or a finished config.

    `alpha` is for kinds that have such an option, `weights` for `explicit`; any other method, and a finished
    config, refuse them with ConfigError.
    """
    finished = isinstance(method, MergeConfig)
    cls = type(method) if finished else kind_class(MergeConfig.FAMILY, method, where="merge.method")
    has_alpha = any(field.name == "alpha" for field in dataclasses.fields(cls))
    for name, value, used in (("alpha", alpha, has_alpha), ("weights", weights, cls is ExplicitConfig)):
        if value is not None and (finished or not used):
            raise ConfigError(f"merge.{name} is not used by method {cls.__name__}; leave it out")
    if finished:
        return method
    if cls is ExplicitConfig and weights is None:
        raise ConfigError("merge.method = 'explicit' needs merge.weights, one for each checkpoint")
    settings: dict[str, object] = {} if alpha is None else {"alpha": alpha}
    if weights is not None:
        settings["values"] = [str(value) for value in weights]
    return decode(cls, settings, where="merge.")


def merge_weights(
    n: int,
    *,
    method: str | MergeConfig = "sma",
    alpha: float | None = None,
    weights: Sequence[Number] | None = None,
) -> Weights:
    """The weights that `method` gives n checkpoints, oldest first; arguments as in `merge_checkpoints`."""
    return merge_config(method, alpha=alpha, weights=weights).weights(n)
