"""Whimbrel's optimizers in transformers' Trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn, optim

from whimbrel.config import OptimConfig, decode, kind_class
from whimbrel.optim.groups import ALIASES, fnmatch_literal, target_names

if TYPE_CHECKING:
    from whimbrel.optim.groups import Target


class OptimizerFactory:
    """Makes an optimizer for `Trainer(..., optimizer_cls_and_kwargs=(OptimizerFactory, {"kind": "fira", ...}))`.

    Trainer makes an instance and calls it with the model and the other keys.
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        kind: str = "fira",
        targets: str | Sequence[str] = "all-linear",
        optim_target_modules: Target | None = None,
        **options: Any,
    ) -> optim.Optimizer:
        """The optimizer `kind` over the parameters of `model` that need a gradient.

        targets: which matrices get state of a low rank, in optimizers that have it: "all-linear" takes the weights of
        all nn.Linear but the head, otherwise patterns over parameter names. optim_target_modules: the same by modules,
        as TrainingArguments takes it (`whimbrel.optim.groups.target_names`). `options` are settings of the optimizer,
        as under `[optim]` in a configuration, or the names that Trainer's optim_args has for them (update_proj_gap,
        scale, proj_type); `lr` is the full rate, which Trainer's schedule scales (not TrainingArguments.learning_rate).
        Raises ConfigError for an unknown kind, option or pattern.
        """
        cls = kind_class(OptimConfig.FAMILY, kind)
        options = {ALIASES.get(name, name): value for name, value in options.items()}
        if "low_rank" in {field.name for field in dataclasses.fields(cls)}:
            if optim_target_modules is not None or targets == "all-linear":
                names = target_names(model, "all-linear" if optim_target_modules is None else optim_target_modules)
                options["low_rank"] = [fnmatch_literal(name) for name in names]
            else:
                options["low_rank"] = [targets] if isinstance(targets, str) else targets
        config: OptimConfig = decode(cls, options, where="optim.")
        return config.build(config.groups(model))
