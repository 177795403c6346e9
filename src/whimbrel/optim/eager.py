"""A step of B matrices in PyTorch: their gradients projected, the method's rule, the weights updated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from whimbrel.optim import lowrank, storage
from whimbrel.optim.adamw.optimizer import decay
from whimbrel.optim.amp import GradScale
from whimbrel.optim.groups import resolve_side
from whimbrel.optim.matrix import Matrix, stack_grads
from whimbrel.optim.method import Method, Projected
from whimbrel.optim.moments import read_moments, store_moments
from whimbrel.optim.words import Words


def project(
    group: dict[str, Any], batch: Sequence[Matrix], basis: Tensor, amp: GradScale, square: Tensor | None
) -> Projected:
    """The gradients of a batch, with their bases [B, d, r], whole on every process.

    square: where squared norms of gradients are added up, if they are asked for.
    """
    side, spread = resolve_side(group["side"], batch[0].shape), batch[0].spread
    # stack copies, so that the mask below does not reach the gradients
    grad = amp.unscaled(stack_grads(batch))
    slice_norm = torch.linalg.vector_norm(grad, dim=lowrank.slice_dim(side))
    if spread.depth.groups:
        slice_norm = spread.own(slice_norm.square(), 1).sqrt()
    active = amp.active(spread.total(slice_norm.square()))
    if square is not None:
        square += slice_norm.square().sum()
    return Projected(
        grad.masked_fill_(~active[:, None, None], 0.0),
        torch.where(active[:, None], slice_norm, 0.0),
        active,
        spread.depth.cut(basis, -2),
        side,
        spread,
    )


def apply(method: Method, group: dict[str, Any], batch: Sequence[Matrix], projected: Projected, words: Words) -> None:
    """Update the weights of a batch by the method's rule, and store the state after it."""
    states = [matrix.state for matrix in batch]
    update, step, mean, square, *after = method.rule(
        projected,
        *read_moments(batch, projected.side),
        *(storage.stack([state[key] for state in states]) for key in method.scalars),
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        **{name: group[name] for name in method.options},
    )
    moments = lowrank.Moments(step, mean, square)
    storage.store(states, "step", step)
    keys = words.keys(group, batch)
    store_moments(batch, moments, projected.side, keys, projected.active)
    for key, value in zip(method.scalars, after, strict=True):
        storage.store(states, key, value)
    weights = [matrix.weight for matrix in batch]
    # after the update, on the updated weights, as in the authors' code
    shares = group["lr"] * group["weight_decay"] * projected.active.float()
    if weights[0].dtype == torch.bfloat16 and group["stochastic_rounding"]:
        # all at once, as each alone takes some forty calls
        value = storage.stack(weights).float() - update
        if group["weight_decay"]:
            value = value - shares[:, None, None] * value
        storage.write_weights(weights, value, keys, stochastic=True, first=batch[0].first)
        return
    torch._foreach_sub_(weights, list(update.unbind()))
    if group["weight_decay"]:
        decay(weights, list(shares.unbind()))
