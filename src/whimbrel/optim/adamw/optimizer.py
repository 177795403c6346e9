"""AdamW as torch ships it, and the foreach step for the parameters that Fira and GaLore do not project."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import AdamW

from whimbrel.optim.lowrank import bias_correction

__all__ = ["AdamW", "adamw_step", "decay"]


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    steps: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    active: Tensor | None = None,
) -> None:
    """One AdamW step in place, on lists of equal length; reads nothing back to the host.

    params: any float dtype and shape; grads, exp_avgs, exp_avg_sqs: float32, shaped like params; steps:
    float32 scalars. As in the authors' code of Fira and GaLore, `eps` is added to the uncorrected root, and
    the decay comes after the update; with eps = 0 and no decay this is torch.optim.AdamW. (arXiv 1711.05101,
    algorithm 2). Where `active`, a scalar of bool on the device, is given and false, nothing changes.
    """
    if active is None:
        torch._foreach_add_(steps, 1.0)
        torch._foreach_lerp_(exp_avgs, grads, 1 - betas[0])
        torch._foreach_mul_(exp_avg_sqs, betas[1])
    else:
        on = active.float()
        lr = lr * on
        grads = [torch.where(active, grad, 0.0) for grad in grads]
        torch._foreach_add_(steps, [on] * len(steps))
        for mean, grad in zip(exp_avgs, grads, strict=True):
            mean.lerp_(grad, on * (1 - betas[0]))
        torch._foreach_mul_(exp_avg_sqs, torch.where(active, betas[1], 1.0))
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - betas[1])
    roots = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_add_(roots, eps)
    updates = torch._foreach_div(exp_avgs, roots)
    torch._foreach_mul_(updates, list((lr * bias_correction(torch.stack(steps), betas)).unbind()))
    torch._foreach_sub_(params, updates)
    if weight_decay:
        share = lr * weight_decay
        if not isinstance(share, Tensor):  # filled there, since a copy to the device would be waited for
            share = torch.full((), share, device=params[0].device)
        decay(params, [share] * len(params))


def decay(params: list[Tensor], shares: list[Tensor]) -> None:
    """Take the share of each parameter off it, in place; shares are scalars.

    A product with 1 - share would round the share to the spacing of numbers near 1, the same way at every step.
    """
    torch._foreach_sub_(params, torch._foreach_mul(params, shares))
