"""Whimbrel's optimizers in transformers' Trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn, optim

from whimbrel.config import OptimConfig, decode, kind_class


class OptimizerFactory:
    """Makes an optimizer for `Trainer(..., optimizer_cls_and_kwargs=(OptimizerFactory, {"kind": "fira", ...}))`.

    Trainer makes an instance and calls it with the model and the other keys.
    """

    def __call__(
        self, model: nn.Module, *, kind: str = "fira", targets: str | Sequence[str] = "all-linear", **options: Any
    ) -> optim.Optimizer:
        """The optimizer `kind` over the parameters of `model` that need a gradient.

        targets: which matrices get state of a low rank, in optimizers that have it: "all-linear" takes the weights of
        all nn.Linear but the head, otherwise patterns over parameter names. `options` are settings of the optimizer,
        as under `[optim]` in a configuration; `lr` is the full rate, which Trainer's schedule scales (not
        TrainingArguments.learning_rate). Raises ConfigError for an unknown kind, option or pattern.
        """
        cls = kind_class(OptimConfig.FAMILY, kind)
        if "low_rank" in {field.name for field in dataclasses.fields(cls)}:
            patterns = [targets] if isinstance(targets, str) else targets
            options["low_rank"] = _linear_weights(model) if targets == "all-linear" else patterns
        config: OptimConfig = decode(cls, options, where="optim.")
        return config.build(config.groups(model))


def _linear_weights(model: nn.Module) -> list[str]:
    """Names of the matrices that trainable linear layers hold, without the head's."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and module.weight.requires_grad
    ]
