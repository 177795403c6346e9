"""Updates in backward: a parameter is stepped as soon as its gradient is there, and the gradient is freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from whimbrel.errors import ConfigError, UnsupportedError


def refusal(what: str) -> UnsupportedError:
    """The error for what needs all gradients of a step at once."""
    return UnsupportedError(
        f"{what} does not go with updates in backward, where no two gradients exist at once; "
        "leave it out, or leave out fuse_into_backward"
    )


def check_loop(accumulation_steps: int, clip_grad_norm: float, grad_scaler: Any) -> None:
    """Raise UnsupportedError where a training loop does what needs all gradients of a step at once."""
    for asked, what in (
        (accumulation_steps != 1, f"accumulation_steps = {accumulation_steps}"),
        (bool(clip_grad_norm), f"clip_grad_norm = {clip_grad_norm}"),
        (grad_scaler is not None and grad_scaler.is_enabled(), "a gradient scaler"),
    ):
        if asked:
            raise refusal(what)


def check_model(model: nn.Module, grouped: Iterable[Tensor], optimizer: str) -> None:
    """Raise ConfigError where a trainable parameter is in no group of the optimizer of this name."""
    known = set(grouped)
    for name, param in model.named_parameters():
        if param.requires_grad and param not in known:
            raise ConfigError(f"{name} is in no group of {optimizer}; add it, or switch its gradient off")


def hook(update: Callable[[Tensor], None], params: Iterable[Tensor]) -> None:
    """Call `update`, a method of an optimizer, with each trainable parameter whose gradient backward has finished."""
    # a hook that held the optimizer would be a cycle that no collector sees, and keep all weights for ever
    this = weakref.WeakMethod(update)

    def call(param: Tensor) -> None:
        found = this()
        if found is not None:
            found(param)

    for param in params:
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(call)
