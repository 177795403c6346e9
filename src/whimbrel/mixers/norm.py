"""Root-mean-square and L2 normalisation over the last dim, shared by the mixers and the decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from whimbrel.mixers import kernels
from whimbrel.mixers.kernels import ops


class _Normalize(torch.autograd.Function):
    """x / sqrt(sum(x^2) / divisor + eps) in fp32 (fp64 for fp64). Saves the result and one number per vector.

    PyTorch composes the same from elementary operations on the CPU, forward and backward; this takes half its time
    there and a third of its memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, divisor: float, eps: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        inverse = squares.div_(divisor).add_(eps).rsqrt_()
        y = wide * inverse
        ctx.save_for_backward(y, inverse)
        ctx.divisor, ctx.dtype = divisor, x.dtype
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyrefly: ignore [bad-override]
        y, inverse = ctx.saved_tensors
        along = (grad * y).sum(-1, keepdim=True).div_(-ctx.divisor)
        return torch.addcmul(grad.to(y.dtype), y, along).mul_(inverse).to(ctx.dtype), None, None


def l2_norm(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dim, computed in fp32; keeps shape and dtype."""
    return _Normalize.apply(x, 1.0, eps)


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean x^2 + eps) over the last dim, computed in fp32; keeps the dtype of x."""

    def __init__(self, size: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape and dtype."""
        size = self.weight.shape[0]
        if x.is_cuda:
            return F.rms_norm(x, (size,), self.weight.to(x.dtype), self.eps)
        return _Normalize.apply(x, float(size), self.eps) * self.weight.to(x.dtype)

    def extra_repr(self) -> str:
        """Size and epsilon, for print(model)."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GatedRMSNorm(RMSNorm):
    """RMSNorm whose result is multiplied by silu(gate)."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # pyrefly: ignore [bad-override]
        """x [..., size], gate of as many elements in the same order -> the shape and dtype of x."""
        if kernels.usable(x):
            return ops.gated_norm(x, gate, self.weight, self.eps)
        return super().forward(x) * F.silu(gate.view_as(x))
