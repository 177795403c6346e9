"""Cross entropy of a linear head, a few rows at a time, so that all logits never exist at once.

On CUDA the optional package liger-kernel takes over where it is installed: its kernel goes over the logits fewer times.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE = -100
"""Target of a position that does not count, as in torch.nn.functional.cross_entropy."""

CHUNK_LOGITS = 2**21
"""Logits that exist at a time: 8 MB in fp32. Larger pieces fall out of the cache of a CPU core."""

CUDA_CHUNK_LOGITS = 2**26
"""The same on CUDA: 256 MB in fp32. Matrices of fewer rows do not keep a card busy."""

_HAS_LIGER = find_spec("liger_kernel") is not None


def mean_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(hidden weight^T)[target] over the rows whose target is not IGNORE; 0 if there is none.

    hidden [N, D], weight [V, D], targets [N] int64 -> scalar fp32 (fp64 for fp64). Differentiable once, in hidden
    and weight.
    """
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if _liger_serves(hidden):
        if not differentiable:
            hidden, weight = hidden.detach(), weight.detach()
        return _liger(hidden, weight, targets)
    return _MeanCrossEntropy.apply(hidden, weight, targets, differentiable)


@torch.no_grad()
def cross_entropy_per_row(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same for every row by itself, [N], without a gradient; 0 where the target is IGNORE."""
    pieces = [
        F.cross_entropy(_logits(h, weight), t, ignore_index=IGNORE, reduction="none")
        for h, t in zip(_rows(hidden, weight), _rows(targets, weight), strict=True)
    ]
    return torch.cat(pieces)


def _liger_serves(hidden: Tensor) -> bool:
    return _HAS_LIGER and hidden.is_cuda and hidden.dtype != torch.float64


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    # Sums over the pieces in fp32, since there may be dozens.
    return liger_fused_linear_cross_entropy(
        hidden, weight, targets, ignore_index=IGNORE, reduction="mean", accum_dtype=torch.float32
    )


def _rows(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(1, (CUDA_CHUNK_LOGITS if x.is_cuda else CHUNK_LOGITS) // weight.shape[0]))


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return logits if logits.dtype == torch.float64 else logits.float()


class _MeanCrossEntropy(torch.autograd.Function):
    """Forms the gradients with the loss, while a piece's logits are at hand; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, differentiable: bool) -> Tensor:
        share = (targets != IGNORE).sum().clamp_min(1).double().reciprocal()
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        d_hidden, d_weight = [], None
        for h, t in zip(_rows(hidden, weight), _rows(targets, weight), strict=True):
            counted = (t != IGNORE)[:, None]
            t = t.clamp_min(0)[:, None]
            scores = torch.log_softmax(_logits(h, weight), -1)
            loss -= scores.gather(1, t).mul_(counted).sum()
            if differentiable:
                scores = scores.exp_().scatter_add_(1, t, torch.full_like(t, -1, dtype=scores.dtype))
                scores = scores.mul_((counted * share).to(scores.dtype)).to(h.dtype)
                d_hidden.append((scores @ weight).to(h.dtype))
                piece = scores.mT @ h
                d_weight = piece.to(weight.dtype) if d_weight is None else d_weight.add_(piece)
        if differentiable:
            ctx.save_for_backward(torch.cat(d_hidden), d_weight)
        return (loss * share).to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyrefly: ignore [bad-override]
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad.to(d_hidden.dtype), d_weight * grad.to(d_weight.dtype), None, None
