"""Whimbrel's optimizers in torchtitan: for its own models, and in anybody's recipe by an override."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer
from torchtitan.config.override import derive, override

from whimbrel.config import OptimConfig, ScheduleConfig, decode, kind_class
from whimbrel.optim.schedule import learning_rate_factor


class WhimbrelOptimizers(OptimizersContainer):
    """One optimizer of the table `whimbrel.optim.KINDS` for each part of the model."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        kind: str = "fira"
        """Name in the table, or "module:ConfigClass"."""
        options: dict[str, Any] = field(default_factory=dict)
        """Its settings, as in the table [optim] of a run's config.toml; `low_rank` names parameters by patterns."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        settings: OptimConfig = decode(
            kind_class(OptimConfig.FAMILY, config.kind), dict(config.options), where="optim."
        )
        self.model_parts = model_parts
        self.optimizers = [settings.build(settings.groups(part)) for part in model_parts]
        every = [p for part in model_parts for p in part.parameters() if p.requires_grad]
        self._validate_params([p for o in self.optimizers for group in o.param_groups for p in group["params"]])
        self._post_init(every)


def _override(kind: str) -> Any:
    def factory(config: OptimizersContainer.Config, **options: Any) -> WhimbrelOptimizers.Config:
        return derive(config, WhimbrelOptimizers.Config, kind=kind, options=options)

    factory.__name__ = factory.__qualname__ = kind
    return override(target=OptimizersContainer.Config, exact=True, description=f"Whimbrel's {kind}")(factory)


# --override.imports 'whimbrel.integrations.titan.optim.fira={"lr": 0.005, "rank": 256, "low_rank": ["layers.*"]}'
adamw, apollo, fira, galore = (_override(kind) for kind in ("adamw", "apollo", "fira", "galore"))


class Schedules(LRSchedulersContainer):
    """The learning rate as `whimbrel train` sets it."""

    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):
        schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

        def build(self, *, optimizers: OptimizersContainer, training_steps: int) -> LRSchedulersContainer:
            """The schedule for each optimizer; a rate is a function of the step alone."""
            total = self.total_steps or training_steps
            return Schedules(
                optimizers, lambda step: learning_rate_factor(min(step, total - 1), self.schedule, steps=total)
            )
